"""A CSV file of finished scores: the columns method, seed, one for each metric, and optionally the data set."""

import difflib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import LabError
from ..tables import Rows, read_csv
from . import results
from .results import METHOD, SEED
from .runs import Score

DATA_SET = ("data set", "data_set", "dataset", "data")  # what the column of the data set may be called
SHOWN = 12  # names in a message


def read(path: Path, metrics: Sequence[str] = (), say: Callable[[str], object] = lambda _: None) -> list[Score]:
    """The runs of a file, a row each; of its metrics only ``metrics``, if any are named.

    Of the ``results.csv`` of a comparison the first score counts, if none are named; ``say`` hears a line on it.
    """
    table = read_csv(path, f"the columns {METHOD}, {SEED} and one for each metric")
    if results.is_of_a_comparison(table):
        table = results.as_scores(path, table)
        metrics = metrics or _first_score(path, table.names, say)
    names = table.names
    _check_header(path, table)
    at = {name.lower(): i for i, name in enumerate(names)}
    of_data = next((at[name] for name in DATA_SET if name in at), None)
    columns = _metrics(path, names, [at[METHOD], at[SEED], *([] if of_data is None else [of_data])], metrics)
    scores = []
    for line, row in zip(table.lines, table.rows, strict=True):
        where = f"{path}, line {line}, column"
        scores.append(
            Score(
                method=_word(f"{where} {names[at[METHOD]]}", row[at[METHOD]]),
                seed=_seed(f"{where} {names[at[SEED]]}", row[at[SEED]]),
                data_set="" if of_data is None else _word(f"{where} {names[of_data]}", row[of_data]),
                metrics={name: _number(f"{where} {name}", row[i], table) for name, i in columns.items()},
                where=f"line {line}",
            )
        )
    return scores


def _first_score(path: Path, names: Sequence[str], say: Callable[[str], object]) -> list[str]:
    first, *others = (name for name in names if name.startswith(results.SCORE))
    more = f"; --metrics names others ({_list(others)})" if others else ""
    say(f"{path} is of a comparison: its loss is the method, and {first} is judged{more}")
    return [first]


def _check_header(path: Path, table: Rows) -> None:
    names, where = table.names, f"{path}, line {table.first_line}"
    lowered = [name.lower() for name in names]
    for needed, what in ((METHOD, "the name of what is compared"), (SEED, "a whole number")):
        if lowered.count(needed) != 1:
            close = difflib.get_close_matches(needed, lowered, n=1)
            meant = f"; rename {names[lowered.index(close[0])]} if it is that" if close and close[0] != needed else ""
            raise LabError(
                f"{where}: expected one column {needed} ({what}), got {lowered.count(needed)} among {_list(names)}; name the column "
                f"{needed}{meant}"
            )
    found = [name for name in names if name.lower() in DATA_SET]
    if len(found) > 1:
        raise LabError(f"{where}: the columns {' and '.join(found)} both name a data set; keep one")


def _metrics(path: Path, names: Sequence[str], others: Sequence[int], wanted: Sequence[str]) -> dict[str, int]:
    """The columns of the metrics by their names."""
    found = {name: i for i, name in enumerate(names) if i not in others}
    if not found:
        raise LabError(f"{path}: there is no metric beside {_list(names)}; add a column of numbers, accuracy say")
    for name in wanted:
        if name not in found:
            raise LabError(f"--metrics {name} is not a metric of {path}, which has {_list(list(found))}; name one of these")
    return {name: found[name] for name in wanted} if wanted else found


def _word(where: str, text: str) -> str:
    if not text:
        raise LabError(f"{where}: it is empty; expected a name")
    return text


def _seed(where: str, text: str) -> int:
    try:
        number = float(text)
        if number != int(number) or "_" in text:
            raise ValueError
    except (ValueError, OverflowError):
        raise LabError(f"{where}: got {text!r}, expected a whole number; number seeds, or folds, alike for all methods") from None
    return int(number)


def _number(where: str, text: str, table: Rows) -> float:
    try:
        value = table.number(text)
    except ValueError:
        what = "an empty cell" if not text else repr(text)
        raise LabError(
            f"{where}: got {what}, expected a number; write the number alone (0.931, no % or unit), or name the columns that are metrics "
            "with --metrics"
        ) from None
    if not math.isfinite(value):
        raise LabError(
            f"{where}: got {text}, expected a finite number; a run that diverged has no score, so repeat it, write the score it deserves "
            "(chance, say), or remove its seed for all methods"
        )
    return value


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
