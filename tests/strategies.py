"""Hypothesis strategies: rows of logits as they come in practice and as they should not, their targets, and a loss's options.

Logits are Python floats that float32 holds exactly, so that every dtype under test and the oracle see the same numbers.
"""

from typing import NamedTuple

import torch

from properties import st
from registry import DIVERGENCES

SCALES = (1e-4, 1e-2, 1.0, 5.0, 30.0, 1e3, 1e4)
OFFSETS = (0.0, 0.0, 10.0, -1e2, 1e4, -1e5, 1e5)
LEADS = (12.0, 16.0, 20.0, 50.0, 87.0, 103.0, 110.0)


class Row(NamedTuple):
    logits: list[float]
    target: int


class Batch(NamedTuple):
    logits: list[list[float]]
    targets: list[int]  # class indices or ignore_index
    num_classes: int
    ignore_index: int


def as_float32(values: list[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float64).to(torch.float32).tolist()


@st.composite
def logits(draw, num_classes: int, *, scales=SCALES, offsets=OFFSETS, masked: bool = True) -> list[float]:
    """A row: any scale and offset, sometimes with ties, sometimes with classes masked by -inf."""
    unit = draw(st.lists(st.floats(-1, 1, width=16), min_size=num_classes, max_size=num_classes))
    if draw(st.booleans()):  # ties: a few distinct values
        unit = [round(2 * value) / 2 for value in unit]
    scale, offset = draw(st.sampled_from(scales)), draw(st.sampled_from(offsets))
    row = as_float32([offset + scale * value for value in unit])
    if masked and draw(st.booleans()):
        keep = draw(st.lists(st.booleans(), min_size=num_classes, max_size=num_classes))
        row = [value if kept else -float("inf") for value, kept in zip(row, keep, strict=True)]
    return row


@st.composite
def rows(draw, *, min_classes: int = 1, max_classes: int = 40, scales=SCALES, offsets=OFFSETS, masked: bool = True) -> Row:
    """A row and its target, which is in the row and sometimes leads it by tens of nats."""
    num_classes = draw(st.integers(min_classes, max_classes))
    row = draw(logits(num_classes, scales=scales, offsets=offsets, masked=masked))
    target = draw(st.integers(0, num_classes - 1))
    others = [value for c, value in enumerate(row) if c != target and value != -float("inf")]
    if row[target] == -float("inf"):
        row[target] = max(others, default=0.0)
    if others and draw(st.integers(0, 3)) == 0:
        row[target] = as_float32([max(others) + draw(st.sampled_from(LEADS))])[0]
    return Row(row, target)


@st.composite
def batches(draw, *, max_classes: int = 12, max_rows: int = 5, **options) -> Batch:
    """Rows of one width, possibly none, some of them ignored; ``ignore_index`` may itself be a class."""
    num_classes = draw(st.integers(1, max_classes))
    drawn = [draw(rows(min_classes=num_classes, max_classes=num_classes, **options)) for _ in range(draw(st.integers(0, max_rows)))]
    ignore_index = draw(st.sampled_from([-100, -1, 0, num_classes - 1, 255]))
    targets = [ignore_index if draw(st.integers(0, 3)) == 0 else row.target for row in drawn]
    return Batch([row.logits for row in drawn], targets, num_classes, ignore_index)


@st.composite
def probabilities(draw, row: list[float]) -> list[float]:
    """Shares of the classes in the row: one class, a few or all, summing to 1 or not."""
    num_classes = len(row)
    shares = draw(st.lists(st.sampled_from([0.0, 0.0, 0.25, 1.0]) | st.floats(0, 1, width=16), min_size=num_classes, max_size=num_classes))
    if draw(st.booleans()) and sum(shares) > 0:
        shares = as_float32([share / sum(shares) for share in shares])
    return [share if value > -float("inf") else 0.0 for share, value in zip(shares, row, strict=True)]


def weights(num_classes: int) -> st.SearchStrategy[list[float] | None]:
    return st.none() | st.lists(st.sampled_from([0.0, 1.0]) | st.floats(0.0625, 4, width=16), min_size=num_classes, max_size=num_classes)


lams = st.sampled_from([0.0, 0.3, 1.0, 9.0])
divergences = st.sampled_from(DIVERGENCES)
hard_biases = st.sampled_from([0.0, 1.0, -3.0])
smoothings = st.sampled_from([0.0, 0.1, 1.0])
reductions = st.sampled_from(["none", "sum", "mean"])
dtypes = st.sampled_from([torch.float32, torch.float64])
