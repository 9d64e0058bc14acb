"""Combinations of options: every three values of three options meet in some case, which finds what the whole product finds, with fewer."""

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


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
