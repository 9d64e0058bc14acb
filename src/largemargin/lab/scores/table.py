"""A CSV file of finished scores: the columns method, seed, one for each metric, and optionally the data set."""

import csv
import difflib
import io
import math
from collections.abc import Sequence
from pathlib import Path

from ..errors import LabError
from ..files import lost_link
from ..words import counted
from .runs import Score

SEPARATORS = (",", ";", "\t")
METHOD, SEED = "method", "seed"
DATA_SET = ("data set", "data_set", "dataset", "data")  # what the column of the data set may be called
SHOWN = 12  # names in a message


def read(path: Path, metrics: Sequence[str] = ()) -> list[Score]:
    """The runs of a file, a row each; of its metrics only ``metrics``, if any are named."""
    separator, lines = _lines(path)
    number, header = lines[0]
    _check_header(path, number, header)
    at = {name.lower(): i for i, name in enumerate(header)}
    of_data = next((at[name] for name in DATA_SET if name in at), None)
    columns = _metrics(path, header, [at[METHOD], at[SEED], *([] if of_data is None else [of_data])], metrics)
    scores = []
    for number, row in lines[1:]:
        where = f"line {number}"
        if len(row) != len(header):
            raise LabError(
                f"{path}, {where}: it has {counted(len(row), 'value')}, and the header names {counted(len(header), 'column')}; write a "
                "value for each"
            )
        scores.append(
            Score(
                method=_word(path, where, header[at[METHOD]], row[at[METHOD]]),
                seed=_seed(path, where, header[at[SEED]], row[at[SEED]]),
                data_set="" if of_data is None else _word(path, where, header[of_data], row[of_data]),
                metrics={name: _number(path, where, name, row[i], separator) for name, i in columns.items()},
                where=where,
            )
        )
    if not scores:
        raise LabError(f"{path} has a header and no rows; it needs a row for each run")
    return scores


def _lines(path: Path) -> tuple[str, list[tuple[int, list[str]]]]:
    """The separator, and the rows that are not empty with the numbers of their lines."""
    if link := lost_link(path):
        raise LabError(f"{path} is {link}; restore it, or give another file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = next((line for line in text.splitlines() if line.strip()), "")
        separator = max(SEPARATORS, key=first.count)  # of none, the first
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise LabError(f"{path} is not a text file in UTF-8; export the scores as CSV") from error
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror or error}; give the path of a CSV file") from error
    except csv.Error as error:
        raise LabError(f"{path} is not a CSV file: {error}") from error
    if not rows:
        raise LabError(f"{path} is empty; its first line must name the columns {METHOD}, {SEED} and one for each metric")
    return separator, rows


def _check_header(path: Path, number: int, header: Sequence[str]) -> None:
    for i, name in enumerate(header, 1):
        if not name:
            raise LabError(
                f"{path}, line {number}: column {i} has no name, as the index that pandas writes; write the file with "
                "to_csv(path, index=False), or name the column"
            )
        if header.count(name) > 1:
            raise LabError(f"{path}, line {number}: two columns are called {name}; rename one")
    lowered = [name.lower() for name in header]
    for needed, what in ((METHOD, "the name of what is compared"), (SEED, "a whole number")):
        if lowered.count(needed) != 1:
            close = difflib.get_close_matches(needed, lowered, n=1)
            meant = f"; rename {header[lowered.index(close[0])]} if it is that" if close and close[0] != needed else ""
            raise LabError(
                f"{path}, line {number}: expected one column {needed} ({what}), got {lowered.count(needed)} among {_list(header)}; name "
                f"the column {needed}{meant}"
            )
    found = [name for name in header if name.lower() in DATA_SET]
    if len(found) > 1:
        raise LabError(f"{path}, line {number}: the columns {' and '.join(found)} both name a data set; keep one")


def _metrics(path: Path, header: Sequence[str], others: Sequence[int], wanted: Sequence[str]) -> dict[str, int]:
    """The columns of the metrics by their names."""
    found = {name: i for i, name in enumerate(header) if i not in others}
    if not found:
        raise LabError(f"{path}: there is no metric beside {_list(header)}; add a column of numbers, accuracy say")
    for name in wanted:
        if name not in found:
            raise LabError(f"--metrics {name} is not a metric of {path}, which has {_list(list(found))}; name one of these")
    return {name: found[name] for name in wanted} if wanted else found


def _word(path: Path, where: str, column: str, text: str) -> str:
    if not text:
        raise LabError(f"{path}, {where}, column {column}: it is empty; expected a name")
    return text


def _seed(path: Path, where: str, column: str, text: str) -> int:
    try:
        number = float(text)
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise LabError(
            f"{path}, {where}, column {column}: got {text!r}, expected a whole number; number seeds, or folds, alike for all methods"
        ) from None
    return int(number)


def _number(path: Path, where: str, column: str, text: str, separator: str) -> float:
    """The value of a metric; where a semicolon separates, a comma may be the decimal point."""
    plain = text.replace(",", ".") if separator == ";" else text
    try:
        value = float(plain)
    except ValueError:
        what = "an empty cell" if not text else repr(text)
        raise LabError(
            f"{path}, {where}, column {column}: got {what}, expected a number; write the number alone (0.931, no % or unit), or name the "
            "columns that are metrics with --metrics"
        ) from None
    if not math.isfinite(value):
        raise LabError(
            f"{path}, {where}, column {column}: got {text}, expected a finite number; a run that diverged has no score, so repeat it, "
            "write the score it deserves (chance, say), or remove its seed for all methods"
        )
    return value


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
