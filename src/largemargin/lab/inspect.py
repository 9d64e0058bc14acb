"""``largemargin inspect``: what a file of logits and labels says about a classifier, overall, class by class and row by row."""

import csv
import json
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from .. import metrics
from .errors import LabError

CHUNK = 2**22  # logits that are in float64 at a time: 32 MiB
LARGEST = np.float64(np.finfo(np.float32).max)
# column -> key of MarginMetrics.compute(), factor, decimals
COLUMNS = {
    "n": ("rows", 1, 0),
    "error %": ("error", 100, 2),
    "margin": ("margin", 1, 3),
    "rho-hat": ("rho_hat", 1, 3),
    "divergence": ("divergence", 1, 3),
    "NLL": ("nll", 1, 4),
    "ECE %": ("ece", 100, 2),
}
NOTE = (
    "Means over rows; margin f_y - max f_c, rho-hat (eq. 7), divergence (eq. 8) and NLL in nats. "
    "Rows are counted from 0, in a CSV from the first line below the header."
)

Numbers = np.ndarray[Any, np.dtype[Any]]


class Labelled(NamedTuple):
    """A file that was found good: finite logits (N, C) and labels (N,) in [0, C), N >= 1 and C >= 2."""

    logits: Numbers
    labels: Numbers
    class_names: list[str]


# what numpy raises for a file that is no archive of arrays, or not a whole one
BROKEN = (
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
)


def read(path: Path) -> Labelled:
    """Read and check a file; LabError says what is wrong with it."""
    readers = {".npz": _read_npz, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise LabError(f"{path}: the name must end in .npz (arrays logits and labels) or .csv (a column label, the others logits)")
    try:
        if not path.exists():
            raise LabError(f"{path} is not there; give the path of an .npz or .csv file")
        if not path.is_file():
            raise LabError(f"{path} is not a file; give the path of an .npz or .csv file")
        labelled = readers[path.suffix.lower()](path)
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise LabError(f"{path} does not fit into memory; inspect fewer rows at a time") from error
    _check(path, labelled)
    return labelled._replace(labels=labelled.labels.astype(np.int64))


def _read_npz(path: Path) -> Labelled:
    if path.stat().st_size == 0:
        raise LabError(f"{path} is empty; write it with numpy.savez(path, logits=logits, labels=labels)")
    if not zipfile.is_zipfile(path):
        raise LabError(
            f"{path} is not an .npz archive, or is cut short; write it anew with numpy.savez(path, logits=logits, labels=labels)"
        )
    arrays = {}
    try:
        with zipfile.ZipFile(path):  # whose errors say more than those of numpy.load
            file = np.load(path, allow_pickle=False)
        with file:
            for name in ("logits", "labels"):
                if name not in file.files:
                    found = ", ".join(file.files) or "none"
                    raise LabError(f"{path} has no array {name} (it has: {found}); write it with numpy.savez(path, logits=..., labels=...)")
                arrays[name] = _array(path, name, file)
    except BROKEN as error:
        raise LabError(f"{path} is damaged ({error}); write it anew with numpy.savez(path, logits=logits, labels=labels)") from error
    logits, labels = arrays["logits"], arrays["labels"]
    for name, array, kinds, fix in (
        ("logits", logits, "fiu", "convert them with logits.astype('float32')"),
        ("labels", labels, "iu", "convert them with labels.astype('int64')"),
    ):
        if not isinstance(array, np.ndarray):
            raise LabError(f"{path}: {name} is not a numpy array; write the file with numpy.savez(path, logits=logits, labels=labels)")
        if array.dtype.kind not in kinds:
            wanted = "integers" if kinds == "iu" else "numbers"
            raise LabError(f"{path}: {name} must be {wanted}, got {array.dtype}; {fix}")
    return Labelled(logits, labels, [str(c) for c in range(logits.shape[1] if logits.ndim == 2 else 0)])


def _array(path: Path, name: str, file: Mapping[str, Numbers]) -> Numbers:
    try:
        return file[name]
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise LabError(f"{path}: {name} is an array of Python objects, which is not read; make it an array of numbers") from error
        raise


def _read_csv(path: Path) -> Labelled:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = [name.strip() for name in next(csv.reader([file.readline()], skipinitialspace=True), [])]
            if not header:
                raise LabError(f"{path} is empty; its first line must name the columns: label and one for each class")
            if header.count("label") != 1:
                found = ", ".join(header[:8]) + (", ..." if len(header) > 8 else "")
                raise LabError(f"{path} must have one column label, has {header.count('label')} (its first line is: {found})")
            with warnings.catch_warnings(action="ignore"):  # that there are no rows
                table = np.loadtxt(file, delimiter=",", ndmin=2, comments=None, quotechar='"')
    except csv.Error as error:
        raise LabError(f"{path} is not a CSV file: {error}") from error
    except UnicodeDecodeError as error:
        raise LabError(f"{path} is not a text file in UTF-8; write it as CSV") from error
    except ValueError as error:
        raise LabError(f"{path}: {str(error).split(';')[0].rstrip('.')}, counting from the line below the header") from error
    if not len(table):
        raise LabError(f"{path} has a header and no rows")
    if table.shape[1] != len(header):
        raise LabError(f"{path}: the header names {len(header)} columns and the rows have {table.shape[1]}")
    at = header.index("label")
    labels = table[:, at]
    whole = labels == np.floor(labels)
    if not whole.all():
        row = int(whole.argmin())
        raise LabError(f"{path}: labels must be integers, row {row} has {labels[row]:g}")
    return Labelled(np.delete(table, at, 1), labels, [name for name in header if name != "label"])


def _check(path: Path, labelled: Labelled) -> None:
    logits, labels, _ = labelled
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels):
        raise LabError(f"{path}: logits must have the shape (N, C) and labels (N,), got {logits.shape} and {labels.shape}")
    if not len(labels):
        raise LabError(f"{path} has no rows")
    if logits.shape[1] < 2:
        raise LabError(f"{path}: logits must have at least 2 classes, got {logits.shape[1]}")
    for rows in _chunks(logits.shape):
        finite = np.abs(logits[rows]) <= LARGEST
        if not finite.all():
            row, c = np.argwhere(~finite)[0]
            at = rows.start + int(row)
            raise LabError(
                f"{path}: logits must be finite and in the range of float32, row {at} has {float(logits[at, c])} for class {c}; "
                "leave such rows out"
            )
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        row = int(outside.argmax())
        raise LabError(
            f"{path}: labels must be in [0, {logits.shape[1]}), row {row} has {labels[row]:g} "
            f"({int(outside.sum())} of {len(labels)} are out of range); count the classes from 0, and leave out rows without a label"
        )


def _chunks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of rows, each of about CHUNK logits."""
    step = max(1, CHUNK // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def _tensors(labelled: Labelled, rows: "slice | Numbers") -> tuple[Tensor, Tensor]:
    return torch.from_numpy(labelled.logits[rows].astype(np.float64)), torch.from_numpy(labelled.labels[rows])


def summarise(path: Path, top: int) -> dict[str, Any]:
    """All that is printed, as plain numbers: shares in [0, 1] and nats."""
    labelled = read(path)
    num_rows, num_classes = labelled.logits.shape
    margin, confidence = np.empty(num_rows), np.empty(num_rows)  # the latter in log-odds, which tell more apart
    prediction = np.empty(num_rows, dtype=np.int64)
    for rows in _chunks(labelled.logits.shape):
        logits, labels = _tensors(labelled, rows)
        predicted = logits.argmax(-1)
        prediction[rows] = predicted
        margin[rows] = metrics.margin(logits, labels, reduction="none")
        confidence[rows] = metrics.log_odds(logits, predicted, reduction="none")

    overall = metrics.MarginMetrics()
    per_class = []
    by_class = np.argsort(labelled.labels, kind="stable")
    ends = np.cumsum(np.bincount(labelled.labels, minlength=num_classes))
    for c, name in enumerate(labelled.class_names):
        of_class = metrics.MarginMetrics()
        rows_of_class = by_class[(ends[c - 1] if c else 0) : ends[c]]
        for rows in _chunks((len(rows_of_class), num_classes)):
            of_class.update(*_tensors(labelled, rows_of_class[rows]))
        overall.merge(of_class)
        per_class.append({"class": c, "name": name, **_figures(of_class)})

    def row(i: int) -> dict[str, Any]:
        sigmoid = 1 / (1 + math.exp(-confidence[i]))
        names = {"row": i, "label": int(labelled.labels[i]), "prediction": int(prediction[i])}
        return names | {"confidence": sigmoid, "margin": float(margin[i])}

    mistakes = np.flatnonzero(prediction != labelled.labels)
    return {
        "file": str(path),
        "classes": num_classes,
        "overall": _figures(overall),
        "per_class": per_class,
        "confident_mistakes": [row(int(i)) for i in mistakes[_smallest(-confidence[mistakes], top)]],
        "smallest_margins": [row(int(i)) for i in _smallest(margin, top)],
    }


def _smallest(values: Numbers, count: int) -> Numbers:
    """The indices of the smallest, of equal ones the first."""
    return np.argsort(values, kind="stable")[:count]


def _figures(counted: metrics.MarginMetrics) -> dict[str, float | None]:
    """``None`` where there are no rows."""
    figures = counted.compute()
    figures = {"error": 1 - figures["accuracy"]} | figures
    return {name: value if math.isfinite(value) else None for name, value in figures.items()} | {"rows": int(figures["rows"])}


def inspect(path: Path, top: int, as_json: bool, console: Console) -> None:
    """Print what a file says."""
    summary = summarise(path, top)
    if as_json:
        console.print(json.dumps(summary, allow_nan=False), soft_wrap=True, markup=False, highlight=False)
        return
    overall = summary["overall"]
    console.print(f"{path}: {overall['rows']} rows, {summary['classes']} classes", style="bold", markup=False, highlight=False)
    _print_table(console, list(COLUMNS), [_cells(overall)])
    console.print(
        f"adaptive ECE {100 * overall['adaptive_ece']:.2f} %, top-5 error {100 * overall['top5_error']:.2f} %, "
        f"non-target entropy {overall['nontarget_entropy']:.3f}",
        highlight=False,
    )
    console.print("\nby class", style="bold")
    _print_table(console, ["class", *COLUMNS], [[of_class["name"], *_cells(of_class)] for of_class in summary["per_class"]])
    names = [of_class["name"] for of_class in summary["per_class"]]
    for title, key in (("the most confident mistakes", "confident_mistakes"), ("the smallest margins", "smallest_margins")):
        console.print(f"\n{title}", style="bold")
        rows = [
            [str(row["row"]), names[row["label"]], names[row["prediction"]], f"{row['confidence']:.4f}", f"{row['margin']:.3f}"]
            for row in summary[key]
        ]
        if rows:
            _print_table(console, ["row", "label", "prediction", "confidence", "margin"], rows)
        else:
            console.print("none")
    console.print(NOTE, style="dim", highlight=False)


def _cells(figures: dict[str, Any]) -> list[str]:
    values = ((figures[key], factor, decimals) for key, factor, decimals in COLUMNS.values())
    return ["n/a" if value is None else f"{factor * value:.{decimals}f}" for value, factor, decimals in values]


def _print_table(console: Console, columns: list[str], rows: list[list[str]]) -> None:
    """No number is ever cut: where the terminal is narrow, lines wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
