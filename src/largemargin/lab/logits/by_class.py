"""The figures of :class:`~largemargin.metrics.MarginMetrics` for many groups of rows at once, from one pass over the logits."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ... import RowStats, divergence, row_stats
from .files import Labelled, chunks

Array = NDArray[np.float64]
Indices = NDArray[np.int64]

TOP_K, NUM_BINS = 5, 15
# the adaptive calibration error sorts rows by the log-odds of their confidence, in cells of 1/256 nat from -16 to 48
LOWEST, CELLS_PER_NAT, NUM_CELLS = -16, 256, 64 * 256
MEANS: dict[str, Callable[[RowStats], torch.Tensor]] = {
    "margin": lambda stats: stats.log_odds + stats.rho,
    "rho_hat": lambda stats: stats.rho,
    "divergence": divergence,
    "kl_qu": lambda stats: divergence(stats, "kl_qu"),
    "kl_uq": lambda stats: divergence(stats, "kl_uq"),
    "log_odds": lambda stats: stats.log_odds,
    "nontarget_entropy": lambda stats: -stats.neg_entropy,
    "nll": lambda stats: torch.logaddexp(torch.zeros_like(stats.log_odds), -stats.log_odds),
}


class Rows(NamedTuple):
    """What is counted of each row."""

    labels: Indices
    predictions: Indices
    confidence: Array  # the log-odds of the prediction, which tell more apart than its probability
    ahead: Indices  # classes before the label's; of equal logits the first comes first
    values: dict[str, Array]  # those of MEANS

    @property
    def right(self) -> NDArray[np.bool_]:
        return np.asarray(self.predictions == self.labels)


def rows_of(labelled: Labelled, chunk: int) -> Rows:
    """One pass over the logits, of which ``chunk`` are in float64 at a time."""
    with one_thread():
        parts = list(_parts(labelled, chunk))
    values = {name: np.concatenate([part.values[name] for part in parts]) for name in MEANS}
    predictions, ahead = (np.concatenate([getattr(part, name) for part in parts]) for name in ("predictions", "ahead"))
    return Rows(labelled.labels, predictions, np.concatenate([part.confidence for part in parts]), ahead, values)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in this thread alone: chunks that stay in a cache take less time than threads need to meet on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parts(labelled: Labelled, chunk: int) -> Iterator[Rows]:
    for rows in chunks(labelled.logits.shape, chunk):
        logits, labels = labelled.logits[rows].astype(np.float64), labelled.labels[rows]
        predictions = logits.argmax(1)
        stats = row_stats(torch.from_numpy(logits), torch.from_numpy(labels))
        confidence = stats.log_odds.numpy().copy()
        wrong = np.flatnonzero(predictions != labels)
        if len(wrong):
            confidence[wrong] = row_stats(torch.from_numpy(logits[wrong]), torch.from_numpy(predictions[wrong])).log_odds
        values = {name: of_stats(stats).numpy() for name, of_stats in MEANS.items()}
        yield Rows(labels, predictions, confidence, _ahead(logits, labels), values)


def _ahead(logits: Array, labels: Indices) -> Indices:
    of_label = logits[np.arange(len(labels)), labels]
    ahead: Indices = np.count_nonzero(logits > of_label[:, None], axis=1)
    equal = logits == of_label[:, None]
    for row in np.flatnonzero(np.count_nonzero(equal, axis=1) > 1):
        ahead[row] += np.count_nonzero(equal[row, : labels[row]])
    return ahead


def figures(rows: Rows, groups: Indices, num_groups: int) -> list[dict[str, float]]:
    """The figures of the rows of each group, in the order of the groups; NaN where a group has no rows."""
    counts = np.bincount(groups, minlength=num_groups)

    def mean(values: Array) -> Array:
        return np.asarray(np.bincount(groups, weights=values, minlength=num_groups) / counts)

    gaps = 1 / (1 + np.exp(-rows.confidence)) - rows.right
    with np.errstate(invalid="ignore"):
        accuracy = mean(rows.right.astype(np.float64))
        columns = {
            "error": 1 - accuracy,
            "rows": counts,
            "invalid_rows": np.zeros(num_groups),
            "accuracy": accuracy,
            f"top{TOP_K}_error": mean((rows.ahead >= TOP_K).astype(np.float64)),
            **{name: mean(values) for name, values in rows.values.items()},
            "ece": _equal_width(rows.confidence, gaps, groups, counts),
            "adaptive_ece": _equal_mass(rows.confidence, gaps, groups, counts),
        }
    return [{name: float(column[group]) for name, column in columns.items()} for group in range(num_groups)]


def _equal_width(confidence: Array, gaps: Array, groups: Indices, counts: Indices) -> Array:
    # bins are closed on the right; the rounding of a confidence on an edge, such as 1/3, must not decide its bin
    bins = np.ceil(NUM_BINS / (1 + np.exp(-confidence)) - 1e-6).astype(np.int64).clip(1, NUM_BINS) - 1
    of_bins = np.bincount(groups * NUM_BINS + bins, weights=gaps, minlength=len(counts) * NUM_BINS)
    return np.asarray(abs(of_bins.reshape(-1, NUM_BINS)).sum(1) / counts)


def _equal_mass(confidence: Array, gaps: Array, groups: Indices, counts: Indices) -> Array:
    """Cut the rows of each group into equal shares; a cell on a cut is divided in proportion."""
    cells = np.floor((confidence - LOWEST) * CELLS_PER_NAT + 1e-3).clip(0, NUM_CELLS - 1).astype(np.int64)
    _, places, rows_of_cells = np.unique(groups * NUM_CELLS + cells, return_inverse=True, return_counts=True)
    of_cells = np.bincount(places, weights=gaps)
    sum_rows, sum_gaps = rows_of_cells.cumsum(), of_cells.cumsum()
    first = counts.cumsum() - counts  # rows of the groups before
    cuts = first[:, None] + np.arange(NUM_BINS + 1) * counts[:, None] / NUM_BINS
    cell = np.searchsorted(sum_rows, cuts)
    beyond = (sum_rows[cell] - cuts) / rows_of_cells[cell]  # the share of the cell above the cut
    gaps_below = sum_gaps[cell] - beyond * of_cells[cell]
    return np.asarray(abs(np.diff(gaps_below, axis=1)).sum(1) / counts)
