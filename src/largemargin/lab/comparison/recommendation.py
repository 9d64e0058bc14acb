"""What a comparison advises, in words for a reader who decides, and what the advice rests on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..run.methods import BASELINE
from ..run.noise import UNTOLD, Noise, phrase_of
from ..verdicts import number
from ..words import counted, listed
from .evidence import majority_error
from .table import Row


def recommended(rows: Sequence[Row]) -> Row | None:
    """Of the lines of one share of label noise: the best loss among those that are better than the baseline."""
    return min((row for row in rows if row.verdict == "better"), key=rank, default=None)


def rank(row: Row) -> float:
    """The smallest is the best."""
    return row.mean if row.metric.lower_is_better else -row.mean


def shown(rows: Sequence[Row]) -> Row | None:
    """The loss that the report shows beside the baseline: the recommended one, else the best."""
    candidates = [row for row in rows if row.judged is not None]
    return recommended(rows) or min(candidates, key=rank, default=None)


def is_clear(rows: Sequence[Row]) -> bool:
    """Whether every loss is better or worse than the baseline, so that more seeds would change no verdict's word."""
    return all(row.verdict != "inconclusive" for row in rows if row.judged is not None)


def advice(rows: Sequence[Row]) -> list[str]:
    """A sentence or two for each share of label noise."""
    return [
        _advice_at(noise, [row for row in rows if row.label_noise == noise])
        for noise in dict.fromkeys(row.label_noise for row in rows)
        if any(row.judged is not None for row in rows if row.label_noise == noise)
    ]


def _advice_at(noise: Noise, rows: Sequence[Row]) -> str:
    where = f"With {phrase_of(noise)}, " if noise != UNTOLD else ""
    baseline = next(row for row in rows if row.loss == BASELINE)
    best = recommended(rows)
    if best is not None and best.judged is not None:
        found = best.judged
        again = f" after the correction for {counted(found.num_verdicts, 'verdict')}" if found.num_verdicts > 1 else ""
        metric, side = best.metric, "below" if best.metric.lower_is_better else "above"
        by = f"{metric.number(abs(found.paired.mean))} {metric.unit}" if metric.percent else metric.number(abs(found.paired.mean))
        return _capital(
            f"{where}use {best.label}: its {metric.text} is {by} {side} that of {BASELINE} "
            f"({metric.value(best.mean)} against {metric.value(baseline.mean)}, {counted(found.paired.n, 'seed')}), and chance alone "
            f"rarely gives such a difference (p = {number(found.adjusted_p)}{again})."
        )
    worse = [row.label for row in rows if row.verdict == "worse"]
    compared = [row for row in rows if row.judged is not None]
    no_better = f"{where}stay with {BASELINE}: " + (
        "the other losses are worse." if len(worse) == len(compared) else "these seeds do not show that another loss is better."
    )
    if len(worse) < len(compared):
        no_better += _power(compared, baseline.metric.unit)
    named = f" {', '.join(worse)} {'is' if len(worse) == 1 else 'are'} worse." if worse and len(worse) < len(compared) else ""
    return _capital(no_better + named)


def _power(rows: Sequence[Row], unit: str) -> str:
    """Which true differences these seeds would have found; nothing where no pair has spread."""
    judged = [(row.label, row.judged) for row in rows if row.judged is not None and row.judged.detectable is not None]
    if not judged:
        return ""
    found = sorted({f"{one.detectable:.2g}" for _, one in judged if one.can_detect_a_gain}, key=float)
    if not found:
        return " No possible gain would have been found 8 times in 10: add seeds."
    size = found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"
    depending = ", depending on the loss," if len(found) > 1 else ""
    corrected = ", before the correction for several verdicts" if judged[0][1].is_corrected else ""
    impossible = [label for label, one in judged if not one.can_detect_a_gain]
    none = f" For {listed(impossible)} no possible gain would have been." if impossible else ""
    return f" A true difference of {size} {unit}{depending} would have been found 8 times in 10{corrected}.{none}"


def _capital(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


def basis(num_seeds: int, classes: Sequence[str], labels: NDArray[np.int64] | None, num_test: int, noun: str = "image") -> str:
    """Seeds, test samples and class sizes; the sizes are known if the runs kept their predictions."""
    if not num_test:
        return f"This rests on {counted(num_seeds, 'seed')}."
    sentence = f"This rests on {counted(num_seeds, 'seed')} and {counted(num_test, f'test {noun}')}"
    if labels is None:
        return f"{sentence} of {counted(len(classes), 'class')}."
    sizes = np.bincount(labels, minlength=len(classes))
    spread = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
    return (
        f"{sentence}: {spread} of each of {counted(len(classes), 'class')}. "
        f"A classifier that always names the largest class would have an error of {majority_error(labels):.2f}%."
    )
