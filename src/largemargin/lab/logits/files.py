"""Files of logits and labels: ``.npz`` and ``.csv``, checked so that no number that follows is about something else."""

import csv
import itertools
import json
import os
import re
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from ..errors import LabError
from ..files import lost_link
from ..predictions import NAME as PREDICTIONS
from ..words import counted

LARGEST = np.float64(np.finfo(np.float32).max)
CHECKED_AT_ONCE = 2**18  # logits; for most files the first ones show what kind of numbers they hold
SEPARATORS = (",", ";", "\t")
ENOUGH_ROWS = 5  # from here on a column of whole numbers is no accident
SORTED_ROWS = 20  # differences of one sign: by chance once in half a million columns
INDICES = ("id", "index", "idx", "row", "row_id", "sample", "sample_id", "image_id")  # names that are hardly those of classes
OTHERS = (  # names of what is written beside logits
    *("confidence", "conf", "probability", "prob", "max_prob", "prediction", "predicted", "pred", "y_pred", "y_true", "target"),
    *("score", "entropy", "loss", "nll", "margin", "weight", "split", "fold", "epoch", "seed", "time", "timestamp"),
)
NAMED_LOGITS = re.compile(r"(logits?|scores?|prob(s|abilit(y|ies))?)[_.:/ (-]|p[_(]", re.IGNORECASE)  # what may stand before a class's name
NUMBERED = re.compile(r"(?P<plain>-?\d+)|(?P<before>(.*\D)?)(?P<number>\d+)(?P<after>\D*)", re.DOTALL)
ROUNDED = 0.05  # by which the sum of a row of probabilities may differ from 1, where they were rounded

Numbers = np.ndarray[Any, np.dtype[Any]]


class Labelled(NamedTuple):
    """A file that was found good.

    Logits (N, C) are finite, or -inf for a masked class; labels (N,) are in [0, C); N >= 1 and C >= 2.
    """

    logits: Numbers
    labels: Numbers
    class_names: list[str]
    warnings: tuple[str, ...] = ()  # what the user should know of the file
    files: Numbers | None = None  # names (N,) of what the rows are of


# what numpy raises for a file that is no archive of arrays, or not a whole one
BROKEN = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, SyntaxError, tokenize.TokenError)


def read(path: Path, probabilities: bool = False) -> Labelled:
    """Read and check a file; with ``probabilities`` its numbers are those, and their logarithms are the logits."""
    readers = {".npz": _read_npz, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise LabError(f"{path}: the name must end in .npz (arrays logits and labels) or .csv (a column label, the others logits)")
    try:
        if not path.exists():
            raise LabError(f"{path} is {lost_link(path) or 'not there'}; give the path of an .npz or .csv file")
        if not path.is_file():
            raise LabError(f"{path} is not a file; give the path of an .npz or .csv file")
        labelled = readers[path.suffix.lower()](path)
        _check(path, labelled, "probabilities" if probabilities else "logits")
        if probabilities:
            labelled = labelled._replace(logits=_logarithms(path, labelled.logits))
        else:
            _check_sign(path, labelled.logits)
            labelled = labelled._replace(warnings=(*labelled.warnings, *_warnings(labelled.logits)))
        labelled = labelled._replace(labels=labelled.labels.astype(np.int64))
        _check_masks(path, labelled, "a probability of 0" if probabilities else "-inf")
    except OSError as error:
        raise LabError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise LabError(f"{path} does not fit into memory; inspect fewer rows at a time") from error
    return labelled


def chunks(shape: tuple[int, ...], size: int) -> Iterator[slice]:
    """Slices of rows, each of about ``size`` numbers."""
    step = max(1, size // shape[1])
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


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
            classes = _array(path, "classes", file) if "classes" in file.files else None
            files = _array(path, "ids", file) if "ids" in file.files else None
    except BROKEN as error:
        raise LabError(f"{path} is damaged ({error}); write it anew with numpy.savez(path, logits=logits, labels=labels)") from error
    logits, labels = arrays["logits"], arrays["labels"]
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise LabError(f"{path}: {name} is not a numpy array; write the file with numpy.savez(path, logits=logits, labels=labels)")
    if logits.dtype.kind not in "fiu":
        raise LabError(f"{path}: logits must be numbers, got {logits.dtype}; convert them with logits.astype('float32')")
    num_classes = logits.shape[1] if logits.ndim == 2 else 0
    files = files if isinstance(files, np.ndarray) and files.dtype.kind == "U" and files.shape == logits.shape[:1] else None
    names = _classes_of_run(path, num_classes) or [str(c) for c in range(num_classes)]
    if isinstance(classes, np.ndarray):
        if classes.shape != (num_classes,):
            raise LabError(
                f"{path}: classes must have a name for each of the {num_classes} columns of logits, got the shape {classes.shape}"
            )
        names = [str(name) for name in classes.astype(str)]
        _check_names(path, names)
    if labels.dtype.kind == "U" and labels.ndim == 1:
        if classes is None:
            raise LabError(f"{path}: labels are text; add their order, numpy.savez(..., classes=names), or convert them to integers")
        texts, codes = np.unique(labels, return_inverse=True)
        return Labelled(logits, _by_name(path, names, [str(text) for text in texts], codes), names)
    if labels.dtype.kind not in "iu":
        raise LabError(f"{path}: labels must be integers, got {labels.dtype}; convert them with labels.astype('int64')")
    in_order = _in_order(logits) if logits.ndim == 2 else None
    if in_order is not None:
        raise LabError(
            f"{path}: column {in_order} of logits rises or falls from every row to the next, as an index or a time does, so it is not the "
            "logit of a class; leave it out of the array"
        )
    if isinstance(classes, np.ndarray) and classes.dtype.kind in "iu":  # the values of labels, as classes_ of scikit-learn
        numbers, codes = np.unique(labels, return_inverse=True)
        return _matched(path, names, logits, [str(number) for number in numbers], codes)
    return Labelled(logits, labels, names, files=files)


def _classes_of_run(path: Path, num_classes: int) -> list[str]:
    """The names of a run's classes, where the file lies in the run's folder."""
    try:
        classes = json.loads((path.parent / "result.json").read_text())["classes"] if path.name == PREDICTIONS else []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []
    fits = isinstance(classes, list) and len(classes) == num_classes and all(isinstance(name, str) for name in classes)
    return list(classes) if fits else []


def _in_order(logits: Numbers) -> int | None:
    """The first column that rises or falls from every row to the next, if there is one; only few do so in their first rows."""
    with np.errstate(invalid="ignore"):  # of infinite ones
        steps = np.diff(logits[: SORTED_ROWS + 1].astype(np.float64), axis=0)
        candidates = np.flatnonzero((steps > 0).all(0) | (steps < 0).all(0))
    whole = (int(place) for place in candidates if np.isfinite(logits[:, place]).all())
    return next((place for place in whole if _is_sorted(np.diff(logits[:, place]))), None)


def _array(path: Path, name: str, file: Mapping[str, Numbers]) -> Numbers:
    try:
        return file[name]
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise LabError(
                f"{path}: {name} is an array of Python objects, which is not read; make it an array of numbers, or, for names of classes, "
                "of text: numpy.array(classes, dtype=str)"
            ) from error
        raise


def _read_csv(path: Path) -> Labelled:
    texts: dict[str, int] = {}  # labels as they are written, in the order in which they first come

    def code(text: str) -> int:
        return texts.setdefault(text.strip(), len(texts))

    header: list[str] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            separator, header, num_lines = _header(path, file)
            at = header.index("label")
            converters: dict[int | str, Any] = {at: code}
            if separator == ";":  # a comma may be the decimal point
                converters.update((i, _decimal) for i in range(len(header)))
                converters[at] = lambda text: code(_whole(text, header))
            lines = itertools.islice(file, num_lines, None)
            with warnings.catch_warnings(action="ignore"):  # that there are no rows
                table = np.loadtxt(lines, delimiter=separator, ndmin=2, comments=None, quotechar='"', converters=converters, encoding=None)
    except csv.Error as error:
        raise LabError(f"{path} is not a CSV file: {error}") from error
    except UnicodeDecodeError as error:
        raise LabError(f"{path} is not a text file in UTF-8; write it as CSV") from error
    except ValueError as error:
        raise _no_table(path, header, str(error)) from error
    if not len(table):
        raise LabError(f"{path} has a header and no rows")
    if table.shape[1] != len(header):
        raise _other_length(path, header, 0, table.shape[1])
    names, logits = [name for name in header if name != "label"], np.delete(table, at, 1)
    odd = _check_columns(path, names, logits)
    labelled = _matched(path, names, logits, list(texts), table[:, at].astype(np.int64))
    return labelled._replace(warnings=(*odd, *labelled.warnings))


def _decimal(text: str) -> float:
    return float(text.replace(",", "."))


def _whole(text: str, names: Sequence[str]) -> str:
    """A label, with ``1,0`` for a number with a decimal comma, unless a class is called that."""
    return text if text.strip() in names else re.sub(r"^\s*(-?\d+),0+\s*$", r"\1", text)


def _no_table(path: Path, header: Sequence[str], what: str) -> LabError:
    """The reason why numpy reads no numbers, with the row counted from 0 and the column by its name."""
    if ragged := re.match(r"the number of columns changed from (\d+) to (\d+) at row (\d+)", what):
        before, length, row = (int(number) for number in ragged.groups())
        return _other_length(path, header, *((0, before) if before != len(header) else (row - 1, length)))
    if short := re.match(r"converter specified for column \d+, which is invalid for the number of fields (\d+)", what):
        return _other_length(path, header, 0, int(short[1]))
    if cell := re.match(r"could not convert string (.*) to float64 at row (\d+), column (\d+)", what, re.DOTALL):
        text, row, column = cell[1], int(cell[2]), int(cell[3])
        name = header[column - 1] if column <= len(header) else f"number {column}"
        return LabError(
            f"{path}: column {name} has {text} in row {row}; every column but label must hold numbers, so delete the column if it is no "
            "class, or give the number"
        )
    return LabError(f"{path}: {what}; every column but label must hold numbers, so delete the others")


def _other_length(path: Path, header: Sequence[str], row: int, length: int) -> LabError:
    return LabError(
        f"{path}: row {row} has {counted(length, 'column')}, and the header names {len(header)}; write every row with a value for each name"
    )


def _header(path: Path, file: TextIO) -> tuple[str, list[str], int]:
    """The separator of a CSV file, the names of its columns (one is label), and how many lines they take; ``file`` is left at its start."""
    split = {}
    for mark in SEPARATORS:
        file.seek(0)
        lines = csv.reader(file, delimiter=mark, skipinitialspace=True)  # a quoted name may go on in the next line
        split[mark] = [name.strip() for name in next(lines, [])], lines.line_num
    file.seek(0)
    separator = next((mark for mark, (names, _) in split.items() if "label" in names), ",")
    header, num_lines = split[separator]
    if not header:
        raise LabError(f"{path} is empty; its first line must name the columns: label and one for each class")
    if header.count("label") != 1:
        found = ", ".join(header[:8]) + (", ..." if len(header) > 8 else "")
        raise LabError(f"{path} must have one column label, has {header.count('label')} (its first line is: {found})")
    for i, name in enumerate(header, 1):
        if not name or re.fullmatch(r"Unnamed: \d+", name):
            raise LabError(
                f"{path}: column {i} has no name, as the index that pandas writes; write the file with to_csv(path, index=False), or "
                "delete that column"
            )
    _check_names(path, header)
    return separator, header, num_lines


def _check_names(path: Path, names: Sequence[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LabError(f"{path}: two columns are called {twice}; give each class a name of its own")


def _check_columns(path: Path, names: Sequence[str], logits: Numbers) -> list[str]:
    """Refuse columns that count rows or hold predictions, each of which would be taken for one class more; warn of names that say so."""
    whole = [bool((column == np.floor(column)).all()) for column in logits.T]
    for name, column, is_whole in zip(names, logits.T, whole, strict=True):
        what = _no_logit(name, column, is_whole, all(whole))
        if what:
            raise LabError(
                f"{path}: column {name} {what}, so it is not the logit of a class; delete every column that is not label or a class"
            )
    known_by_name = [bool(NAMED_LOGITS.match(name)) for name in names]
    if sum(known_by_name) > 1 and not all(known_by_name):
        _raise_outsider(path, names, known_by_name)
    place, what = _summary(logits)
    if what:
        raise LabError(f"{path}: column {names[place]} {what}, so it is not the logit of a class; delete it from the file")
    odd = [name for name in names if name.lower() in INDICES + OTHERS]
    return [f"column {', '.join(odd)} was taken for the logit of a class; if it is not, delete it from the file"] if odd else []


def _no_logit(name: str, column: Numbers, is_whole: bool, all_whole: bool) -> str:
    """What shows that the column is no class, or an empty string."""
    known = column[np.isfinite(column)]
    different = np.unique(known)
    if len(different) < 2:  # a masked or a constant class
        return ""
    enough = len(column) >= ENOUGH_ROWS
    steps = np.diff(column) if len(known) == len(column) else np.zeros(0)
    if is_whole and len(different) == len(column) and different[-1] - different[0] == len(column) - 1:
        return "numbers the rows" if enough or name.lower() in INDICES else ""
    if enough and len(steps) and np.allclose(steps, steps[0], rtol=1e-9, atol=0):
        return "changes by the same amount from row to row"
    if _is_sorted(steps):
        return "rises or falls from every row to the next"
    if is_whole and name.lower() in INDICES and len(different) == len(column):
        return "has another whole number in each row"
    return "holds whole numbers, and the others do not" if enough and is_whole and not all_whole else ""


def _summary(logits: Numbers) -> tuple[int, str]:
    """A column that holds what could be computed of the others, and what; the text is empty where there is none."""
    num_rows, num_columns = logits.shape
    if num_rows >= ENOUGH_ROWS and num_columns > 2:
        few = logits[:: -(-num_rows // SORTED_ROWS)]
        for i in np.flatnonzero((logits != logits[0]).any(0)):  # a constant class is one
            for part in (few[:1], few, logits):  # most are none in the first row
                what = _follows(part[:, i], np.delete(part, i, 1), many=num_rows >= SORTED_ROWS)
                if not what:
                    break
            else:
                return int(i), what
    return 0, ""


def _follows(column: Numbers, others: Numbers, many: bool) -> str:
    """What the column is of the others in every row, or an empty string."""
    if not np.isfinite(column).all() or not np.isfinite(others).all():
        return ""
    if _are_probabilities(others).all() and (len(column) == 1 or (np.abs(column) > 2 * ROUNDED).any()):
        return "stands beside probabilities: without it every row is in [0, 1] and sums to 1"
    largest = others.max(1)
    spread = largest - others.min(1)
    if (spread > 0).all() and (np.abs(column - largest) <= 1e-3 * spread).all():
        return "is the largest of the others in every row"
    if np.allclose(column, 1 / np.exp(others - largest[:, None]).sum(1), rtol=0.02, atol=0):
        return "is the probability of the largest of the others in every row"
    if many and any((column == others.argmax(1) + first).all() for first in (0, 1)):
        return "is the number of the largest of the others in every row"
    return ""


def _raise_outsider(path: Path, names: Sequence[str], known: Sequence[bool]) -> None:
    """Refuse a column whose name is unlike those of the classes."""
    name, like = names[known.index(False)], names[known.index(True)]
    raise LabError(
        f"{path}: column {name} is not named as the classes are, {like} say; delete it if it is no class, or name it as they are"
    )


def _is_sorted(steps: Numbers) -> bool:
    """Whether a column of which these are the differences is in strict order, as times and counts are; logits are not by chance."""
    return len(steps) >= SORTED_ROWS and bool((steps > 0).all() or (steps < 0).all())


def _matched(path: Path, names: list[str], logits: Numbers, texts: Sequence[str], codes: Numbers) -> Labelled:
    """Labels by the columns that they name: by number where the columns are numbers, by name where the labels are words, else by place."""
    values = [_number(text) for text in texts]
    if any(value is None for value in values):
        return Labelled(logits, _by_name(path, names, texts, codes), names)
    labels = np.array(values, dtype=np.float64)[codes]
    is_whole = labels == np.floor(labels)
    if not is_whole.all():
        row = int(is_whole.argmin())
        raise LabError(f"{path}: labels must be integers, row {row} has {labels[row]:g}")
    numbers, must_match = _numbers_of(path, names)
    inside = np.isin(labels, numbers)
    if not numbers or not (must_match or inside.all()):
        return Labelled(logits, labels, names, _of_several(names))
    order = np.argsort(numbers)
    if not inside.all():
        row = int(inside.argmin())
        raise LabError(
            f"{path}: labels must be numbers of columns ({names[order[0]]} to {names[order[-1]]}), row {row} has {labels[row]:g} "
            f"({int((~inside).sum())} of {len(labels)} are none); count labels and columns from the same number"
        )
    places = np.searchsorted(np.array(numbers)[order], labels)
    if (order == np.arange(len(order))).all():
        return Labelled(logits, places, names)
    said = f"the columns were put into the order of their numbers, {names[order[0]]} to {names[order[-1]]}; in the file they are in another"
    return Labelled(logits[:, order], places, [names[i] for i in order], (said,))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _numbers_of(path: Path, names: Sequence[str]) -> tuple[list[int], bool]:
    """The numbers in the names of the columns, none where there are others, and whether labels must be among them.

    All names have the same text around the number: ``7``, ``logit_7``, ``logits[7]``, ``resnet50_7``. Labels need not be among the numbers
    where there is such a text and the numbers have gaps: ``t3``, ``t5`` may be names of another kind.
    """
    found = [NUMBERED.fullmatch(re.sub(r"(?<=\d)\.0+$", "", name)) for name in names]
    matches = [((match["before"] or "", match["after"] or ""), int(match["plain"] or match["number"])) for match in found if match]
    plain = [number for around, number in matches if around == ("", "")]
    if plain and len(plain) < len(names):
        rest = next(name for name, match in zip(names, found, strict=True) if match is None or match["plain"] is None)
        raise LabError(f"{path}: some columns are numbers and {rest} is not; name all classes by their numbers, or none")
    texts = {around for around, _ in matches}
    if len(matches) == len(names) - 1 and len(texts) == 1 and _count([number for _, number in matches]):
        _raise_outsider(path, names, [match is not None for match in found])
    if not names or len(matches) < len(names) or len(texts) > 1:
        return [], False
    numbers = [number for _, number in matches]
    if len(set(numbers)) < len(numbers):
        raise LabError(f"{path}: two columns have the same number; give each class a number of its own")
    return numbers, bool(plain) or _count(numbers)


def _of_several(names: Sequence[str]) -> tuple[str, ...]:
    """A line where the columns are numbered several times over, ``a_0``, ``a_1``, ``b_0``, ``b_1``: those may be several classifiers."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        if (match := NUMBERED.fullmatch(name)) is None or match["plain"]:
            return ()
        numbers.setdefault((match["before"], match["after"]), []).append(int(match["number"]))
    alike = {tuple(sorted(of_one)) for of_one in numbers.values()}
    if len(numbers) < 2 or len(alike) > 1 or not _count(alike.pop()):
        return ()
    return (f"the columns look like those of {len(numbers)} classifiers and were taken for one; if so, inspect each by itself",)


def _count(numbers: Sequence[int]) -> bool:
    """Whether they are 0, 1, 2 ... or 1, 2, 3 ... in any order, and more than one."""
    return len(numbers) > 1 and sorted(numbers) in ([*range(len(numbers))], [*range(1, len(numbers) + 1)])


def _by_name(path: Path, names: Sequence[str], texts: Sequence[str], codes: Numbers) -> Numbers:
    """The places of the columns that the labels name, with or without what all names begin with (``logit_cat``)."""
    prefix = re.match(r"(?:.*[_.:/ -])?", os.path.commonprefix(list(names)))  # noqa: RUF071 - names, not paths
    places = {name[prefix.end() if prefix else 0 :]: i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    unknown = [text for text in texts if text not in places]
    if unknown:
        row = int(np.isin(codes, [texts.index(text) for text in unknown]).argmax())
        shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
        raise LabError(f"{path}: label {texts[codes[row]]!r} of row {row} names no class; the classes are: {shown}")
    return np.array([places[text] for text in texts], dtype=np.int64)[codes]


def _check(path: Path, labelled: Labelled, what: str) -> None:
    logits, labels = labelled.logits, labelled.labels
    if logits.ndim != 2 or labels.ndim != 1 or len(logits) != len(labels):
        raise LabError(f"{path}: logits must have the shape (N, C) and labels (N,), got {logits.shape} and {labels.shape}")
    if not len(labels):
        raise LabError(f"{path} has no rows")
    if logits.shape[1] < 2:
        raise LabError(f"{path}: logits must have at least 2 classes, got {logits.shape[1]}")
    for rows in chunks(logits.shape, CHECKED_AT_ONCE):
        if logits.dtype in (np.float16, np.float32) and np.isfinite(logits[rows]).all():
            continue
        finite = (np.abs(logits[rows]) <= LARGEST) | (np.isneginf(logits[rows]) & (what == "logits"))
        if not finite.all():
            row, c = np.argwhere(~finite)[0]
            at = rows.start + int(row)
            raise LabError(
                f"{path}: {what} must be finite and in the range of float32, row {at} has {float(logits[at, c])} for class {c}; "
                "leave such rows out"
            )
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        row = int(outside.argmax())
        raise LabError(
            f"{path}: labels must be in [0, {logits.shape[1]}), row {row} has {labels[row]:g} "
            f"({int(outside.sum())} of {len(labels)} are out of range); count the classes from 0, and leave out rows without a label"
        )


def _are_probabilities(rows: Numbers) -> Numbers:
    """Which rows are in [0, 1] and sum to 1."""
    rows = rows.astype(np.float64)
    result: Numbers = (rows >= 0).all(1) & (rows <= 1).all(1) & (np.abs(rows.sum(1) - 1) <= ROUNDED)
    return result


def _check_sign(path: Path, logits: Numbers) -> None:
    """Refuse negative log-probabilities, of which the smallest belongs to the likeliest class."""
    if len(logits) >= ENOUGH_ROWS:
        parts = (logits[rows] for rows in chunks(logits.shape, CHECKED_AT_ONCE))
        if all((part >= 0).all() and _are_probabilities(np.exp(-part.astype(np.float64))).all() for part in parts):
            raise LabError(
                f"{path}: these are negative log-probabilities: every number is at least 0, and exp(-x) sums to 1 in every row; the "
                "logits are -x, so change their sign"
            )


def _warnings(logits: Numbers) -> list[str]:
    """A line where the numbers may be no logits, of which no row would be in [0, 1] or [0, 100] but by chance."""
    parts = [logits[rows] for rows in chunks(logits.shape, CHECKED_AT_ONCE)]
    if all(_are_probabilities(part).all() for part in parts):
        what, fix = "probabilities: every row is in [0, 1] and sums to 1", "give --probabilities"
    elif all(_are_probabilities(part / np.float64(100)).all() for part in parts):
        what, fix = "percentages: every row is in [0, 100] and sums to 100", "divide them by 100 and give --probabilities"
    elif all(((part >= 0) & (part <= 1)).all() for part in parts):
        what, fix = "outputs of sigmoids: every number is in [0, 1]", "write what goes into the sigmoids"
    else:
        return []
    return [f"these look like {what}. They were taken for logits; if they are not, {fix}"]


def _logarithms(path: Path, probabilities: Numbers) -> Numbers:
    logits = np.empty(probabilities.shape)
    for rows in chunks(probabilities.shape, CHECKED_AT_ONCE):
        good = _are_probabilities(probabilities[rows])
        if not good.all():
            row = rows.start + int(good.argmin())
            raise LabError(
                f"{path}: --probabilities needs rows in [0, 1] that sum to 1, and row {row} is none, its sum "
                f"{probabilities[row].sum(dtype=np.float64):g}; leave the option out for logits"
            )
        with np.errstate(divide="ignore"):  # a probability of 0 masks its class
            logits[rows] = np.log(probabilities[rows].astype(np.float64))
    return logits


def _check_masks(path: Path, labelled: Labelled, masked: str) -> None:
    """Refuse rows whose statistics are infinite."""
    logits, labels = labelled.logits, labelled.labels
    for rows in chunks(logits.shape, CHECKED_AT_ONCE):
        if logits[rows].min() > -np.inf:
            continue
        known = ~np.isneginf(logits[rows])
        of_label = known[np.arange(len(known)), labels[rows]]
        for bad, what in ((~of_label, f"has {masked} for its own label"), (known.sum(1) < 2, f"has {masked} for all classes but one")):
            if bad.any():
                row = rows.start + int(bad.argmax())
                raise LabError(f"{path}: row {row} {what}, which makes its margin or its loss infinite; mend or leave out such rows")
