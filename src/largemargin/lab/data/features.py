"""Data that are no images: a vector of numbers for each sample, from an npz file or a table.

Words become one feature for each category, as scikit-learn's ``OneHotEncoder(handle_unknown="ignore")`` has it: categories are those of
the training samples. Missing numbers stay NaN here; a run fills them from its own training samples.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import LabError
from ..words import counted
from .images import spread
from .raw_table import RawTable, read_table
from .splits import labels_of, split_of

Array = np.ndarray[Any, np.dtype[Any]]
TARGETS = ("label", "target", "class", "y")  # what the column of the classes is usually called
SPLIT = "split"
MOST_WORDS = 100  # categories of a column


class Column(NamedTuple):
    """A column of a table."""

    name: str
    words: tuple[str, ...] | None = None  # its categories; None for numbers

    @property
    def size(self) -> int:
        """The features that it becomes."""
        return 1 if self.words is None else len(self.words)


@dataclass(frozen=True)
class FeatureSet:
    """Features (N, D), with NaN for a missing number, and labels (N,) int64, for training and for testing."""

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    columns: tuple[Column, ...] = ()  # of a table
    notes: tuple[str, ...] = ()  # what the user should know of the file
    test_files: tuple[str, ...] = ()  # names of the test samples: where they stand in the file

    @property
    def num_features(self) -> int:
        return self.train_features.shape[1]

    def digest(self) -> str:
        """Twelve characters that change with any feature, label or class name."""
        whole = hashlib.sha256(repr(("features", self.classes)).encode())
        for part in (self.train_features, self.train_labels, self.test_features, self.test_labels):
            whole.update(repr((part.dtype, tuple(part.shape))).encode())
            whole.update(part.contiguous().reshape(-1).numpy().data)
        return whole.hexdigest()[:12]

    def few(self, count: int) -> "FeatureSet":
        """At most ``count`` samples of each split, spread over it."""
        training, testing = spread(len(self.train_labels), count), spread(len(self.test_labels), count)
        return FeatureSet(
            *(self.train_features[training], self.train_labels[training], self.test_features[testing], self.test_labels[testing]),
            *(self.classes, self.columns),
        )


def of_arrays(path: Path, train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> FeatureSet:
    """Features from the arrays of an npz file."""
    features = [_checked(path, name, part) for name, part in (("train_x", train_x), ("test_x", test_x))]
    if features[0].shape[1] != features[1].shape[1]:
        raise LabError(
            f"data {path}: training samples have {counted(features[0].shape[1], 'feature')}, test samples {features[1].shape[1]}"
        )
    classes, labels = labels_of(path, train_y, test_y)
    notes = _notes_on(features[0], [str(i) for i in range(features[0].shape[1])])
    return FeatureSet(features[0], labels[0], features[1], labels[1], classes, notes=notes)


def _checked(path: Path, name: str, array: Array) -> Tensor:
    if array.dtype.kind not in "iufb":
        raise LabError(f"data {path}: {name} is {array.dtype} {array.shape}; features are numbers with 2 dimensions, (N, D)")
    if not array.shape[1]:
        raise LabError(f"data {path}: {name} has the shape {array.shape}, which is no feature; expected (N, D)")
    if np.isinf(array).any():
        row, column = (int(i) for i in np.argwhere(np.isinf(array))[0])
        raise LabError(f"data {path}: {name}[{row}, {column}] is {array[row, column]}; expected finite numbers, or NaN for missing ones")
    # half precision holds less than float32, and whole numbers may need more
    return torch.from_numpy(np.ascontiguousarray(array, np.float32 if array.dtype in (np.float16, np.float32, np.bool_) else np.float64))


def feature_table(path: Path, target: str = "") -> FeatureSet:
    """Features and classes from a table; ``target`` names the column of the classes.

    A column ``split`` says train or test for each row. Without it, a stratified fifth is held out.
    """
    table = read_table(path)
    name, why = target_of(table, target)
    values = values_of(table, [one for one in table.names if one not in (name, SPLIT)])
    if not values:
        raise LabError(f"data {path}: there is no column beside the class {name}; add columns of numbers or words")
    labels = _labels(table, name)
    split = table.words(SPLIT) if SPLIT in table.cells and name != SPLIT else None
    training, testing = split_of(path, labels, split, f"column {name} if it is not the class (--target)")
    for part, rows in (("train", training), ("test", testing)):
        if not len(rows):
            raise LabError(f"data {path}: column {SPLIT} says {part} in no row; it needs train and test")
    classes, (train_labels, test_labels) = labels_of(path, labels[training], labels[testing])
    columns = columns_of(path, values, training)
    features = torch.from_numpy(encoded(values, columns))
    names = [column.name for column in columns for _ in range(column.size)]
    notes = (f"classes: column {name} of {path.name} ({why})", *_counting(values), *_notes_on(features[training], names))
    return FeatureSet(
        *(features[training], train_labels, features[testing], test_labels, classes, columns),
        notes=notes,
        test_files=tuple(table.place(int(row)) for row in testing),
    )


def target_of(table: RawTable, target: str) -> tuple[str, str]:
    """The name of the column of the classes, and why it is that."""
    if target:
        if target not in table.cells:
            raise LabError(f"--target {target} is no column of {table.path}, which has {', '.join(table.names[:12])}; name one of these")
        return target, "--target"
    usual = [name for name in table.names if name.lower() in TARGETS]
    if len(usual) > 1:
        raise LabError(f"data {table.path}: the columns {' and '.join(usual)} may both be the class; name one with --target")
    if usual:
        return usual[0], "by its name; --target names another"
    last = next(name for name in reversed(table.names) if name != SPLIT or len(table.names) == 1)
    return last, "the last; --target names another"


def values_of(table: RawTable, names: Sequence[str]) -> dict[str, Array]:
    """Each column as numbers, or as words if it holds words."""
    return {name: table.numbers(name) if table.holds_numbers(name) else table.words(name) for name in names}


def columns_of(path: Path, values: Mapping[str, Array], training: Array) -> tuple[Column, ...]:
    """The columns, with the categories of the training samples."""
    columns = []
    for name, column in values.items():
        if column.dtype.kind == "f":
            columns.append(Column(name))
            continue
        words = tuple(str(word) for word in np.unique(column[training]))
        if len(words) > MOST_WORDS:
            raise LabError(
                f"data {path}: column {name} has {len(words)} different words, {words[-1]!r} say, and at most {MOST_WORDS} are categories; "
                "leave out names and free text, or turn them into numbers"
            )
        columns.append(Column(name, words))
    return tuple(columns)


def encoded(values: Mapping[str, Array], columns: Sequence[Column]) -> Array:
    """The features (N, D) of the columns, float64; a word that is no category is 0 in all of them."""
    parts = [
        values[column.name][:, None] if column.words is None else values[column.name][:, None] == np.array(column.words)
        for column in columns
    ]
    return np.concatenate(parts, axis=1, dtype=np.float64)


def _labels(table: RawTable, name: str) -> Array:
    """The classes as whole numbers or as words."""
    words = table.words(name)
    if not words.astype(bool).all():
        row = int((words == "").argmax())
        raise LabError(
            f"data {table.path}, {table.place(row)}, column {name}: the class is missing; every row needs one, so remove the row or name "
            "another column with --target"
        )
    cells = table.cells[name]
    found = [table.number(str(word)) for word in words] if isinstance(cells, list) else cells.tolist()
    numbers = [number for number in found if number is not None]
    if len(numbers) < len(found):
        return words
    odd = next((row for row, number in enumerate(numbers) if not number.is_integer()), None)
    if odd is not None:
        raise LabError(
            f"data {table.path}, {table.place(odd)}, column {name}: got {words[odd]}, and a class is a name or a whole number; name the "
            "column of the classes with --target"
        )
    return np.array([int(number) for number in numbers])


def _notes_on(training: Tensor, names: Sequence[str]) -> tuple[str, ...]:
    """What is done about constant columns and missing numbers."""
    features, notes = training.numpy(), []
    missing = np.isnan(features)
    if missing.any():
        constant = np.where(missing, -np.inf, features).max(0) <= np.where(missing, np.inf, features).min(0)
    else:
        constant = features.max(0) == features.min(0)
    if constant.any():
        found = [names[i] for i in np.flatnonzero(constant).tolist()]
        more = ", ..." if len(found) > 5 else ""
        notes.append(f"{counted(len(found), 'feature')} of one value in the training set, of no effect: {', '.join(found[:5])}{more}")
    if missing.any():
        columns = counted(int(missing.any(0).sum()), "feature")
        notes.append(f"{counted(int(missing.sum()), 'missing number')} in the training set, in {columns}, filled with the median")
    return tuple(notes)


def _counting(values: Mapping[str, Array]) -> list[str]:
    """A warning of a column that counts the rows: where they are sorted, it tells the class."""
    counting = [name for name, column in values.items() if column.dtype.kind == "f" and len(column) > 2 and (np.diff(column) == 1).all()]
    return [f"warning: column {name} counts the rows, as an index does; leave it out if it is one" for name in counting]
