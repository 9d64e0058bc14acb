"""Those who compute rows faster than the reference; the ladder that picks one is in :mod:`largemargin.ops`.

Each module works on rows (..., C) without autograd and has ``why_not()``, which says in words why it cannot be used here, or None;
``DTYPES``; and ``row_stats`` and ``row_stats_backward``, the two halves of :func:`largemargin.row_stats`. The CPU has a whole loss besides.
"""

from typing import Literal, NamedTuple

from .._reduce import Reduction

Divergence = Literal["symmetric", "kl_qu", "kl_uq"]


class LossOptions(NamedTuple):
    """What the loss of a row depends on beside its logits, target and weights: arguments of large_margin_cross_entropy."""

    lam: float
    divergence: Divergence
    hard_bias: float
    label_smoothing: float
    ignore_index: int
    reduction: Reduction
