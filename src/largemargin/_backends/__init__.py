"""Those who compute rows faster than the reference; the ladder that picks one is in :mod:`largemargin.ops`.

Each module works on rows (..., C) without autograd and has ``why_not()``, which says in words why it cannot be used here, or None;
``DTYPES``; and ``row_stats`` and ``row_stats_backward``, the two halves of :func:`largemargin.row_stats`. The CPU has a whole loss besides.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

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


def folded(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The upstream gradients of log_odds, neg_entropy, mean_log_q and rho, contiguous, with that of spread = e - a in the middle two."""
    g_l, g_e, g_a, g_rho, g_spread = grads
    if g_spread is not None:
        g_e = g_spread if g_e is None else g_e + g_spread
        g_a = -g_spread if g_a is None else g_a - g_spread
    return [None if g is None else g.contiguous() for g in (g_l, g_e, g_a, g_rho)]
