"""What a comparison advises, in words for a reader who decides, and what the advice rests on."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..run.methods import BASELINE
from ..run.noise import Noise, phrase_of
from ..verdicts import number
from ..words import counted
from .evidence import majority_error
from .table import Row


def recommended(rows: Sequence[Row]) -> Row | None:
    """Of the lines of one share of label noise: the loss with the smallest error among those that are better than the baseline."""
    return min((row for row in rows if row.verdict == "better"), key=lambda row: row.error, default=None)


def shown(rows: Sequence[Row]) -> Row | None:
    """The loss that the report shows beside the baseline: the recommended one, else that with the smallest error."""
    candidates = [row for row in rows if row.judged is not None]
    return recommended(rows) or min(candidates, key=lambda row: row.error, default=None)


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
    where = f"With {phrase_of(noise)}"
    baseline = next(row for row in rows if row.loss == BASELINE)
    best = recommended(rows)
    if best is not None and best.judged is not None:
        found = best.judged
        again = f" after the correction for {counted(found.num_verdicts, 'verdict')}" if found.num_verdicts > 1 else ""
        return (
            f"{where}, use {best.label}: its test error is {abs(found.paired.mean):.2f} points below that of {BASELINE} "
            f"({best.error:.2f}% against {baseline.error:.2f}%, {counted(found.paired.n, 'seed')}), and chance alone rarely gives such a "
            f"difference (p = {number(found.adjusted_p)}{again})."
        )
    worse = [row.label for row in rows if row.verdict == "worse"]
    compared = [row for row in rows if row.judged is not None]
    no_better = f"{where}, stay with {BASELINE}: " + (
        "the other losses are worse." if len(worse) == len(compared) else "these seeds do not show that another loss is better."
    )
    detectable = [row.judged.paired.detectable for row in compared if row.judged and row.judged.paired.detectable is not None]
    if len(worse) < len(compared) and detectable:
        no_better += f" A true difference of {max(detectable):.2g} points would have been found 8 times in 10."
    named = f" {', '.join(worse)} {'is' if len(worse) == 1 else 'are'} worse." if worse and len(worse) < len(compared) else ""
    return no_better + named


def basis(num_seeds: int, classes: Sequence[str], labels: NDArray[np.int64] | None, num_test: int, noun: str = "image") -> str:
    """Seeds, test samples and class sizes; the sizes are known if the runs kept their predictions."""
    sentence = f"This rests on {counted(num_seeds, 'seed')} and {counted(num_test, f'test {noun}')}"
    if labels is None:
        return f"{sentence} of {counted(len(classes), 'class')}."
    sizes = np.bincount(labels, minlength=len(classes))
    spread = f"{sizes.min()}" if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
    return (
        f"{sentence}: {spread} of each of {counted(len(classes), 'class')}. "
        f"A classifier that always names the largest class would have an error of {majority_error(labels):.2f}%."
    )
