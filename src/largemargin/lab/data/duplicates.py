"""The same picture in two parts of a data set: a test on it says little of pictures that the network has not seen."""

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from ..words import counted

ENDS = 4096  # bytes at the beginning and at the end of a file that are compared first


def in_both(training: Iterable[Hashable], testing: Iterable[Hashable]) -> int:
    """How many of the test items are training items too."""
    known = set(training)
    return sum(item in known for item in testing)


def files_in_both(folder: Path, training: Sequence[str], testing: Sequence[str]) -> int:
    """How many test files have the bytes of a training file. Only files that agree in their size and their ends are read whole."""
    keys: tuple[Callable[[Path], Hashable], ...] = (_size, _ends, _whole)
    for key in keys:
        of_training, of_testing = ({name: key(folder / name) for name in names} for names in (training, testing))
        common = set(of_training.values()) & set(of_testing.values())
        training, testing = ([name for name, value in of.items() if value in common] for of in (of_training, of_testing))
    return len(testing)


def warning(count: int, total: int) -> list[str]:
    """A line for the user where there are any."""
    if not count:
        return []
    found = f"{count} of {counted(total, 'test image')} {'is' if count == 1 else 'are'} in the training set too"
    return [f"warning: {found}: the test error is lower than on new images; remove them from one of the two"]


def _size(path: Path) -> int:
    return os.stat(path).st_size


def _ends(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        first = file.read(ENDS)
        file.seek(max(0, size - ENDS))
        return size, hashlib.sha256(first + file.read(ENDS)).digest()


def _whole(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
