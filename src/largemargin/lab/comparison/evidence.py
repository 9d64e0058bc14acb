"""What lies behind the difference of two losses: classes, confusions, samples and calibration. Arrays in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..predictions import Predictions

Array = NDArray[np.float64]
Runs = Sequence[Predictions]  # one loss, a run for each seed, all of the same samples


def class_errors(runs: Runs) -> Array:
    """The error of each class in percent, mean over seeds; NaN for a class without a sample."""
    labels, num_classes = runs[0].labels, runs[0].logits.shape[1]
    wrong = np.mean([run.wrong for run in runs], axis=0)
    counts = np.bincount(labels, minlength=num_classes)
    with np.errstate(invalid="ignore"):
        return np.asarray(100 * np.bincount(labels, weights=wrong, minlength=num_classes) / counts)


def majority_error(labels: NDArray[np.int64]) -> float:
    """The error in percent of always naming the most frequent class."""
    return 100 * (1 - float(np.bincount(labels).max()) / len(labels))


@dataclass(frozen=True)
class Confusion:
    """How often a class was taken for another: samples a seed, under both losses."""

    label: int
    predicted: int
    baseline: float
    method: float


def changed_confusions(baseline: Runs, method: Runs, most: int = 10) -> list[Confusion]:
    """The pairs of classes whose confusion changed most, in samples a seed."""
    num_classes = baseline[0].logits.shape[1]
    both = [_confusions(runs, num_classes) for runs in (baseline, method)]
    pairs = np.union1d(*(counts[0] for counts in both))
    numbers = [_looked_up(pairs, *counts) for counts in both]
    order = np.argsort(-abs(numbers[1] - numbers[0]), kind="stable")[:most]
    return [
        Confusion(int(pairs[i] // num_classes), int(pairs[i] % num_classes), float(numbers[0][i]), float(numbers[1][i]))
        for i in order
        if numbers[0][i] != numbers[1][i]
    ]


def _confusions(runs: Runs, num_classes: int) -> tuple[NDArray[np.int64], Array]:
    """The codes ``label * C + predicted`` of mistakes, and how many a seed there are."""
    codes = np.concatenate([(run.labels * num_classes + run.predicted)[run.wrong] for run in runs])
    found, counts = np.unique(codes, return_counts=True)
    return found, counts / len(runs)


def _looked_up(pairs: NDArray[np.int64], codes: NDArray[np.int64], counts: Array) -> Array:
    found = np.zeros(len(pairs))
    found[np.searchsorted(pairs, codes)] = counts
    return found


@dataclass(frozen=True)
class Disagreement:
    """A sample that one loss gets right more often than the other."""

    index: int  # in the held-out set
    label: int
    baseline_right: int  # seeds
    method_right: int
    taken_for: int  # what the loss that is wrong more often says most often


def disagreements(baseline: Runs, method: Runs, most: int = 12) -> tuple[list[Disagreement], list[Disagreement]]:
    """The samples that the method gets right and the baseline wrong, and the reverse: at most ``most`` each, the clearest first."""
    right = [np.sum([~run.wrong for run in runs], axis=0) for runs in (baseline, method)]
    shares = right[1] / len(method) - right[0] / len(baseline)
    found = []
    for sign, wrong_runs in ((1, baseline), (-1, method)):
        order = np.argsort(-sign * shares, kind="stable")[:most]
        found.append(
            [
                Disagreement(int(i), int(baseline[0].labels[i]), int(right[0][i]), int(right[1][i]), _taken_for(wrong_runs, i))
                for i in order
                if sign * shares[i] > 0.5
            ]
        )
    return found[0], found[1]


def _taken_for(runs: Runs, index: np.int64) -> int:
    said = [int(run.logits[index].argmax()) for run in runs]
    return max(set(said) - {int(runs[0].labels[index])}, key=lambda c: (said.count(c), -c))


@dataclass(frozen=True)
class Reliability:
    """Samples of all seeds in bins of equal width by the probability of the predicted class."""

    confidence: Array  # mean of the samples of a bin; NaN where there is none
    accuracy: Array
    share: Array  # of all samples


def reliability(runs: Runs, bins: int = 15) -> Reliability:
    confidence = np.concatenate([run.probabilities.max(1) for run in runs])
    right = np.concatenate([~run.wrong for run in runs])
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidences, accuracies = (np.bincount(place, weights=values, minlength=bins) / counts for values in (confidence, right))
    return Reliability(confidences, accuracies, counts / len(right))


def paired_outcomes(baseline: Runs, method: Runs) -> Array:
    """The differences of the errors in percent, method minus baseline: shape (seeds, samples), runs in the same order of seeds."""
    pairs = zip(method, baseline, strict=True)
    return np.array([100.0 * ours.wrong - 100.0 * theirs.wrong for ours, theirs in pairs])
