"""Many cases in few tests: a loop that is one test, and covering arrays, which find what the whole product finds, with fewer cases."""

import functools
import inspect
from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import Any

import pytest
import torch


def covering(strength: int = 3, **factors: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Cases, each a value of every factor in their order, in which all values of any ``strength`` factors meet.

    Found greedily: there are a few more than needed.
    """
    values = [list(factor) for factor in factors.values()]
    columns = list(combinations(range(len(values)), min(strength, len(values))))
    open_ = {(chosen, found) for chosen in columns for found in product(*(range(len(values[i])) for i in chosen))}
    cases = []
    while open_:
        case = dict(zip(*min(open_), strict=True))  # one that is still open, and what closes most beside it
        for column in (i for i in range(len(values)) if i not in case):
            case[column] = max(range(len(values[column])), key=lambda value: _closed(case | {column: value}, columns, open_))
        open_ -= {(chosen, tuple(case[i] for i in chosen)) for chosen in columns}
        cases.append(tuple(values[i][case[i]] for i in range(len(values))))
    return cases


def _closed(case: dict[int, int], columns: list[tuple[int, ...]], open_: set[Any]) -> int:
    return sum((chosen, tuple(case[i] for i in chosen)) in open_ for chosen in columns if all(i in case for i in chosen))


Values = Iterable[Any] | Callable[[dict[str, Any]], Iterable[Any]]


def every(names: str, values: Values) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As ``pytest.mark.parametrize``, but all values are one test, which names the value that failed: for cheap cases.

    The values may be a function of the fixtures. The ``rng`` of the test begins anew for each value. A value that is skipped
    leaves the others.
    """
    arguments = [name.strip() for name in names.split(",")]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def over_all(**fixtures: Any) -> None:
            cases, skipped = list(values(fixtures) if inspect.isfunction(values) else values), []
            assert cases, f"no values of {names}"
            for value in cases:
                given = dict(zip(arguments, value if len(arguments) > 1 else (value,), strict=True))
                if isinstance(rng := fixtures.get("rng"), torch.Generator):
                    rng.manual_seed(0)
                try:
                    test(**fixtures, **given)
                except pytest.skip.Exception as skip:
                    skipped.append(skip)
                except BaseException as error:
                    error.add_note(f"with {', '.join(f'{name}={_shown(value)}' for name, value in given.items())}")
                    raise
            if len(skipped) == len(cases):
                raise skipped[0]

        signature = inspect.signature(test)
        left = [parameter for name, parameter in signature.parameters.items() if name not in arguments]
        over_all.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined] # pytest asks it for the fixtures
        return over_all

    return decorate


def _shown(value: object) -> str:
    return getattr(value, "__name__", None) or repr(value)
