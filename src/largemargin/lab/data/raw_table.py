"""Tables in CSV and parquet files, as they are written: a column holds numbers or words, and cells may be missing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import LabError, how_to_install
from ..files import lost_link
from ..tables import check_names, read_csv

Array = np.ndarray[Any, np.dtype[Any]]
MISSING = frozenset(("", "na", "n/a", "nan", "null", "none", "?"))  # in lower case
INDEX = "__index_level_"  # how pandas names the column of an index in a parquet file


@dataclass(frozen=True)
class RawTable:
    """The columns of a file: words, or numbers with NaN for a missing one."""

    path: Path
    cells: Mapping[str, list[str] | Array]
    lines: Sequence[int] = ()  # of a CSV file
    comma_is_point: bool = False

    @property
    def names(self) -> list[str]:
        return list(self.cells)

    def __len__(self) -> int:
        return len(next(iter(self.cells.values())))

    def place(self, row: int) -> str:
        """How a message calls a row."""
        return f"line {self.lines[row]}" if self.lines else f"row {row}"

    def number(self, cell: str) -> float | None:
        """The number in a cell, NaN for a missing one; None for a word."""
        if cell.lower() in MISSING:
            return math.nan
        try:
            return None if "_" in cell else float(cell.replace(",", ".") if self.comma_is_point else cell)
        except ValueError:
            return None

    def holds_numbers(self, name: str) -> bool:
        """Whether a column is one of numbers; raises LabError where a few words stand among many numbers."""
        cells = self.cells[name]
        if not isinstance(cells, list):
            return True
        found = [self.number(cell) for cell in cells]
        words = [row for row, value in enumerate(found) if value is None]
        numbers = sum(value is not None and not math.isnan(value) for value in found)
        if words and numbers > len(words):
            self._refuse_word(name, words[0])
        return not words

    def numbers(self, name: str) -> Array:
        """The column as finite float64, with NaN for a missing number."""
        cells = self.cells[name]
        if isinstance(cells, list):
            found = [self.number(cell) for cell in cells]
            if None in found:
                self._refuse_word(name, found.index(None))
            cells = np.array(found, dtype=np.float64)
        if np.isinf(cells).any():
            row = int(np.isinf(cells).argmax())
            raise LabError(
                f"data {self.path}, {self.place(row)}, column {name}: got {cells[row]:g}, expected a finite number or an empty cell"
            )
        return cells

    def words(self, name: str) -> Array:
        """The column as words, with an empty one for a missing word."""
        cells = self.cells[name]
        if not isinstance(cells, list):
            return np.array(
                ["" if math.isnan(value) else str(int(value)) if value.is_integer() else repr(value) for value in cells.tolist()]
            )
        return np.array(["" if cell.lower() in MISSING else cell for cell in cells])

    def _refuse_word(self, name: str, row: int) -> None:
        cells = self.cells[name]
        raise LabError(
            f"data {self.path}, {self.place(row)}, column {name}: got {cells[row]!r}, expected a number as in other rows; leave the cell "
            "empty if the number is missing"
        )


def read_table(path: Path) -> RawTable:
    """The table in a ``.csv`` or ``.parquet`` file."""
    if path.suffix.lower() == ".parquet":
        return _parquet(path)
    rows = read_csv(path, "the columns, one of which is the class")
    columns = zip(*rows.rows, strict=True)
    return RawTable(path, {name: list(cells) for name, cells in zip(rows.names, columns, strict=True)}, rows.lines, rows.comma_is_point)


def _parquet(path: Path) -> RawTable:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise LabError(f"data {path}: parquet files need pyarrow; {how_to_install('parquet')}, or write the table as CSV") from error
    if link := lost_link(path):
        raise LabError(f"data {path} is {link}; restore it, or give another file")
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise LabError(f"data {path} cannot be read as a parquet file: {error}") from error
    check_names(path, table.column_names)
    if not table.num_rows:
        raise LabError(f"data {path} has no rows; write a row for each sample")
    return RawTable(path, {name: _cells(path, name, column) for name, column in zip(table.column_names, table.columns, strict=True)})


def _cells(path: Path, name: str, column: Any) -> list[str] | Array:
    import pyarrow

    if name.startswith(INDEX):
        raise LabError(f"data {path}: column {name} is an index that pandas writes; write the file with to_parquet(path, index=False)")
    kind, of = column.type, pyarrow.types
    if of.is_dictionary(kind):
        kind = kind.value_type
        column = column.cast(kind)
    if of.is_string(kind) or of.is_large_string(kind):
        return ["" if cell is None else cell.strip() for cell in column.to_pylist()]
    if of.is_boolean(kind):
        column, kind = column.cast(pyarrow.int8()), pyarrow.int8()
    if of.is_integer(kind) or of.is_floating(kind) or of.is_decimal(kind) or of.is_null(kind):
        return np.array([math.nan if cell is None else float(cell) for cell in column.to_pylist()], dtype=np.float64)
    raise LabError(f"data {path}: column {name} is of type {kind}; expected numbers or words, so convert it or leave it out")
