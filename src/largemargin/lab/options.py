"""Options as fields of a dataclass: the default, the help and the check of each stand in one place.

The command line is made of them. This module needs the standard library alone.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A number within bounds."""

    name: str
    of: type
    bounds: tuple[tuple[str, float], ...]
    words: str  # what a message asks for


POSITIVE_INT = Kind("PositiveInt", int, ((">", 0),), "a whole number from 1 on")
NON_NEGATIVE_INT = Kind("NonNegativeInt", int, ((">=", 0),), "a whole number from 0 on")
MULTIPLIER = Kind("Multiplier", int, ((">=", 1), ("<=", 4)), "a whole number from 1 to 4")
PIXELS = Kind("Pixels", int, ((">=", 8), ("<=", 1024)), "a whole number of pixels from 8 to 1024")
POSITIVE_SHARE = Kind("PositiveShare", float, ((">", 0), ("<=", 1)), "a share above 0 and up to 1")
SHARE = Kind("ClosedUnitInterval", float, ((">=", 0), ("<=", 1)), "a share from 0 to 1")
OPEN_SHARE = Kind("OpenUnitInterval", float, ((">", 0), ("<", 1)), "a share above 0 and below 1")
SHARE_BELOW_1 = Kind("ShareBelow1", float, ((">=", 0), ("<", 1)), "a share from 0 to below 1")
NON_NEGATIVE = Kind("NonNegativeNumber", float, ((">=", 0), ("<", math.inf)), "a finite number from 0 on")
POSITIVE = Kind("PositiveNumber", float, ((">", 0), ("<", math.inf)), "a finite number above 0")
FINITE = Kind("FiniteNumber", float, ((">", -math.inf), ("<", math.inf)), "a finite number")
KINDS = (
    POSITIVE_INT,
    NON_NEGATIVE_INT,
    MULTIPLIER,
    PIXELS,
    POSITIVE_SHARE,
    SHARE,
    OPEN_SHARE,
    SHARE_BELOW_1,
    NON_NEGATIVE,
    POSITIVE,
    FINITE,
)

UNSET: Any = dataclasses.MISSING


@dataclass(frozen=True)
class Option:
    """What the command line knows of a field."""

    help: str
    type: Any  # a Kind of number, one of these words, a type, or None: what the field's annotation says
    metavar: str
    usual: bool  # most people may want it: `--help` shows it, and `--help-all` the others
    computed: bool  # found out by the run itself, and no option of the command line
    many: bool  # values: a list


def option(
    default: Any = UNSET,
    *,
    help: str,
    type: Any = None,
    metavar: str = "VALUE",
    usual: bool = False,
    computed: bool = False,
    many: bool = False,
    **more: Any,
) -> Any:
    """A field that is an option; ``more`` stands in its metadata as well."""
    return dataclasses.field(default=default, metadata={"option": Option(help, type, metavar, usual, computed, many), **more})


def options_of(cls: Any) -> Mapping[str, Option]:
    """The options of a dataclass by the names of their fields."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(cls) if "option" in field.metadata}
