"""Scores from predictions: the test error of each file, and which samples it gets wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LabError
from ..words import counted
from .runs import Score

ERROR = "error %"
OTHER_SAMPLES = "the test samples of the seeds differ."


@dataclass(frozen=True)
class Outcome:
    """What a file of predictions says."""

    file: str
    labels: NDArray[np.int64]
    wrong: NDArray[np.bool_]
    ids: NDArray[Any] | None = None  # names of the samples, if the file has them
    seed: int | None = None  # of the run, if the file lies in its folder


def scores_of(files: Mapping[str, Sequence[Outcome]]) -> tuple[list[Score], str]:
    """The test errors in percent of each method's files, one file a seed; and why nothing is said of test samples, or ``""``."""
    first, *others = files
    for method in others:
        if len(files[method]) != len(files[first]):
            raise LabError(
                f"--predictions: {first} has {counted(len(files[first]), 'file')}, and {method} has {len(files[method])}; give one file a "
                "seed, in the same order for each method"
            )
        for theirs, ours in zip(files[first], files[method], strict=True):
            if None not in (theirs.seed, ours.seed) and theirs.seed != ours.seed:
                raise LabError(
                    f"--predictions: {theirs.file} has seed {theirs.seed}, and its pair {ours.file} has seed {ours.seed}; give the "
                    "files of each method in the same order of seeds"
                )
            if not _same(theirs, ours):
                raise LabError(
                    f"--predictions: {theirs.file} and {ours.file} are a pair, and their test samples differ ({len(theirs.labels)} and "
                    f"{len(ours.labels)} labels); a pair needs the same samples in the same order"
                )
    crossed = all(_same(files[first][0], other) for other in files[first][1:])
    scores = [
        Score(method, seed, "", {ERROR: 100 * float(found.wrong.mean())}, found.file, found.wrong)
        for method, outcomes in files.items()
        for seed, found in enumerate(outcomes)
    ]
    return scores, "" if crossed else OTHER_SAMPLES


def _same(one: Outcome, other: Outcome) -> bool:
    """Whether both are of the same samples in one order; by their labels alone if a file does not name its samples."""
    if not np.array_equal(one.labels, other.labels):
        return False
    return one.ids is None or other.ids is None or np.array_equal(one.ids, other.ids)
