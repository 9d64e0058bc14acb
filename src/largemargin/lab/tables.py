"""CSV files as rows of words. Errors name the file and the line."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .errors import LabError
from .files import lost_link
from .words import counted

SEPARATORS = (",", ";", "\t")


class Rows(NamedTuple):
    """The cells of a CSV file, stripped; rows without any word are left out."""

    names: list[str]  # of the columns, in the first row
    rows: list[list[str]]  # the others, each as long as ``names``
    lines: list[int]  # where each of them ends in the file, counted from 1
    first_line: int  # where the names end
    comma_is_point: bool  # a semicolon separates, so that a comma may be the decimal point

    def number(self, text: str) -> float:
        """The number that a cell holds; raises ValueError for one that holds none."""
        if "_" in text:  # a digit separator of Python alone
            raise ValueError(text)
        return float(text.replace(",", ".") if self.comma_is_point else text)


def read_csv(path: Path, wanted: str) -> Rows:
    """The rows of a file with a header; ``wanted`` says what its first line must name."""
    if link := lost_link(path):
        raise LabError(f"{path} is {link}; restore it, or give another file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = next((line for line in text.splitlines() if line.strip()), "")
        separator = max(SEPARATORS, key=first.count)  # of none, the first
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        found = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise LabError(f"{path} is not a text file in UTF-8; export it as CSV in UTF-8") from error
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror or error}; give the path of a CSV file") from error
    except csv.Error as error:
        raise LabError(f"{path} is not a CSV file: {error}") from error
    if not found:
        raise LabError(f"{path} is empty; its first line must name {wanted}")
    (first_line, names), *others = found
    check_names(path, names, f", line {first_line}")
    for line, row in others:
        if len(row) != len(names):
            raise LabError(
                f"{path}, line {line}: it has {counted(len(row), 'value')}, and the header names {counted(len(names), 'column')}; write a "
                "value for each"
            )
    if not others:
        raise LabError(f"{path} has a header and no rows; write a row for each sample or run")
    return Rows(names, [row for _, row in others], [line for line, _ in others], first_line, separator == ";")


def check_names(path: Path, names: Sequence[str], where: str = "") -> None:
    """Refuse columns without a name, and two of one name."""
    for i, name in enumerate(names, 1):
        if not name:
            raise LabError(
                f"{path}{where}: column {i} has no name, as the index that pandas writes; write it with to_csv(path, index=False), or "
                "name the column"
            )
        if names.count(name) > 1:
            raise LabError(f"{path}{where}: two columns are called {name}; rename one")
