"""The arguments of ``lab.compare``, looked at before anything is written."""

import math
import os
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from ..errors import LabError
from ..queue import EXECUTORS


class Wanted(NamedTuple):
    """What an argument must be."""

    words: str
    holds: Callable[[Any], bool]
    may_be_none: bool = False


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_above_0(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and bool(os.fspath(value).strip())


WANTED = {
    "out": Wanted("the path of a folder", _is_path),
    "metric": Wanted("the name of a number that train returns", lambda value: isinstance(value, str) and bool(value), True),
    "lower_is_better": Wanted("True, False or None", lambda value: isinstance(value, bool), True),
    "validation_fraction": Wanted("a number between 0 and 1", lambda value: _is_above_0(value) and value < 1),
    "device": Wanted('a text, "cpu" or "cuda:1" say', lambda value: isinstance(value, str) and bool(value), True),
    "threads": Wanted("a whole number from 1 on", _is_count),
    "jobs": Wanted("a whole number from 1 on", _is_count, True),
    "executor": Wanted(f"one of {', '.join(EXECUTORS)}", lambda value: value in EXECUTORS),
    "minutes": Wanted("a number above 0", _is_above_0, True),
    "timeout": Wanted("a number of seconds above 0", _is_above_0, True),
}


def check_arguments(given: Mapping[str, Any]) -> None:
    """Raises LabError for the first argument that cannot be."""
    for name, wanted in WANTED.items():
        value = given[name]
        if not (value is None and wanted.may_be_none) and not wanted.holds(value):
            raise LabError(f"{name} must be {wanted.words}, got {value!r}")
