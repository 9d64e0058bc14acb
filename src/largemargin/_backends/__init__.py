"""Those who compute rows faster than the reference; the ladder that picks one is in :mod:`.ladder`.

Each module works on rows (..., C) without autograd and has ``why_not()``, which says in words why it cannot be used here, or None;
``DTYPES``; and ``row_stats`` and ``row_stats_backward``, the two halves of :func:`largemargin.row_stats`. The CPU has a whole loss besides.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from .._reduce import Reduction
from ..rowstats import without_spread

Divergence = Literal["symmetric", "kl_qu", "kl_uq"]


class LossOptions(NamedTuple):
    """What the loss of a row depends on beside its logits, target and weights: arguments of large_margin_cross_entropy."""

    lam: float
    divergence: Divergence
    hard_bias: float
    label_smoothing: float
    ignore_index: int
    reduction: Reduction


def folded(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The upstream gradients that a kernel takes: those of :func:`.without_spread`, contiguous."""
    return [None if g is None else g.contiguous() for g in without_spread(grads)]
