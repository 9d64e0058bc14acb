"""The formulas of the paper: from the statistics of rows to their loss.

In the symbols of :mod:`.rowstats` (``l`` the log-odds of the target, ``e`` and ``a`` the two averages of ``log q``, K non-targets):

    softmax loss                (2, 3, 6)   softplus(-l)
    with a hard bias b          (15)        softplus(b - l)
    D(q||u), D(u||q), half sum  (10, 8)     log K + e,  -log K - a,  (e - a) / 2
    the large-margin loss       (11)        softplus(b - l) + lam * divergence
    label smoothing             (13)        (1 - eps) softplus(-l) + eps * mean over all classes of -log p_c
    a hard margin, the hinge    (Sec. 3, 1) softplus(margin - (l + rho)),  max(0, margin - (l + rho))

:mod:`.rows` computes the statistics that :func:`loss_of_indices` and :func:`loss_of_probabilities` take.
"""

from typing import Literal, NamedTuple, TypedDict, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._backend_names import BackendName
from ._reduce import REDUCTIONS, Labels, Reduction, reduce, reduce_rows
from .rowstats import RowStats
from .tracing import no_script

Divergence = Literal["symmetric", "kl_qu", "kl_uq"]
DIVERGENCES = get_args(Divergence)


class LinearOptions(TypedDict, total=False):
    """The options of the loss by name, except ``ignore_index``, which may be None in a loss that is fused with a classifier."""

    lam: float
    divergence: Divergence
    hard_bias: float
    label_smoothing: float
    reduction: Reduction
    backend: BackendName | None


class Options(LinearOptions, total=False):
    """The options of the loss by name; :func:`.large_margin_cross_entropy` describes them."""

    ignore_index: int


class LossOptions(NamedTuple):
    lam: float = 0.3
    divergence: Divergence = "symmetric"
    hard_bias: float = 0.0
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: Reduction = "mean"
    backend: BackendName | None = None

    @classmethod
    def of(cls, function: str, options: Options) -> "LossOptions":
        _checks.check_known(function, options, cls._fields)
        return cls(**options).checked()

    def checked(self) -> "LossOptions":
        _checks.check_number("lam", self.lam, low=0)
        _checks.check_word("divergence", self.divergence, DIVERGENCES)
        _checks.check_number("hard_bias", self.hard_bias)
        _checks.check_label_smoothing(self.label_smoothing)
        _checks.check_word("reduction", self.reduction, REDUCTIONS)
        return self

    def for_part(self) -> "LossOptions":
        # for a part of a batch, whose sum the caller divides
        return self if self.reduction == "none" else self._replace(reduction="sum")


class HingeOptions(NamedTuple):
    """The options of a loss of the lead of the target over the largest other logit, ``l + rho``."""

    margin: float
    soft: bool  # softplus(margin - lead) instead of max(0, margin - lead)
    ignore_index: int = -100
    reduction: Reduction = "mean"
    backend: BackendName | None = None
    label_smoothing: float = 0.0


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), the paper's L of eq. (3)."""
    # torch's default threshold of 20 has an error of 2e-9 in float64; log1p(exp(-|x|)) + max(x, 0) has the wrong derivative at 0
    return F.softplus(x, threshold=40)


def error_probability(log_odds: Tensor) -> Tensor:
    """1 - p of a row, with all digits."""
    return torch.exp(-softplus(log_odds))  # not sigmoid(-l), which is 0 in float32 from 89 nats on: its e^l overflows


@no_script
def divergence(stats: RowStats, kind: Divergence = "symmetric") -> Tensor:
    r"""How far the non-target logits are from uniform: the paper's regulariser, differentiable.

    .. math:: \tilde D = \tfrac12 \{D(q \| u) + D(u \| q)\} \; (8), \quad D(q \| u) = \log K + E_q[\log q], \quad
              D(u \| q) = -\log K - \tfrac1K \textstyle\sum_{c \neq y} \log q_c \; (10)

    It does not depend on the target's logit. With two classes q = u, so it is 0, and the large-margin loss is the softmax loss.

    Args:
        stats: the result of :func:`row_stats`.
        kind: ``"symmetric"`` for (8), ``"kl_qu"`` for D(q||u), ``"kl_uq"`` for D(u||q).

    Returns:
        One value per row, shaped like the fields of ``stats``; at least 0 up to rounding. Clamping would stop its gradient.

    Raises:
        ValueError: unknown ``kind``.

    Example:
        >>> import torch, largemargin
        >>> stats = largemargin.row_stats(torch.tensor([[5.0, 1.0, 1.0], [5.0, 3.0, 1.0]]), torch.tensor([0, 0]))
        >>> largemargin.divergence(stats)
        tensor([0.0000, 0.3808])

    Source: Kobayashi, BMVC 2019, eqs. (8) and (10).
    """
    _checks.check_word("kind", kind, DIVERGENCES)
    if kind == "symmetric":
        return stats.spread / 2  # eq. (8); log K cancels
    log_num_nontargets = stats.num_nontargets.clamp(min=1).log()
    return log_num_nontargets + stats.neg_entropy if kind == "kl_qu" else -log_num_nontargets - stats.mean_log_q  # eq. (10)


def loss_of_indices(
    stats: RowStats,
    labels: Labels,
    weight: Tensor | None,
    options: LossOptions | HingeOptions,
    weighted_cross_entropy: Tensor | None = None,
) -> Tensor:
    """Eqs. (1), (3), (11), (13) and (15), weighted and reduced, for rows with one class each.

    Smoothing with ``weight`` needs ``weighted_cross_entropy``, the sum of ``-w_c log p_c`` over the classes of each row.
    """
    smoothing = None
    if options.label_smoothing > 0:
        count, in_row = stats.num_nontargets, stats.log_odds != -torch.inf  # whether y is a class of the row
        if weighted_cross_entropy is None:
            weighted_cross_entropy = cross_entropy_of(stats, torch.ones_like(count), count, count * stats.mean_log_q)
        smoothing = options.label_smoothing * (weighted_cross_entropy / (count + in_row))
    losses = labels.mark(hinge(stats, options) if isinstance(options, HingeOptions) else _margin_term(stats, options))
    return reduce_rows(losses, labels.class_index, weight, options.reduction, smoothing)


def cross_entropy_of(stats: RowStats, target_weight: Tensor, sum_weight: Tensor, weighted_log_q: Tensor) -> Tensor:
    """The sum of ``-w_c log p_c`` over the classes of the row, from the sums of ``w_c`` and of ``w_c log q_c`` over its non-targets."""
    l, alone = stats.log_odds, stats.num_nontargets == 0
    masked = l == -torch.inf  # y is not a class of the row
    # -log p_c = softplus(l) - log q_c; an infinite softplus leaves before the product, whose factor may need a gradient
    off_target = sum_weight * softplus(l.masked_fill(alone, 0.0)) - weighted_log_q
    on_target = target_weight * softplus(-l.masked_fill(masked, 0.0))
    return off_target.masked_fill(alone, 0.0) + on_target.masked_fill(masked, 0.0)


def loss_of_probabilities(
    stats: RowStats, probabilities: Tensor, weight: Tensor | None, options: LossOptions, num_rows: int, num_classes: Tensor | None = None
) -> Tensor:
    """The expectation of the loss over y ~ ``probabilities`` (..., C), from the statistics (..., C) of each class as the target.

    ``num_classes`` is the number of classes of each row, if only some of them are here.
    """
    losses = _margin_term(stats, options)
    losses = torch.where((probabilities == 0) & (losses == torch.inf), 0.0, losses)  # a masked class of probability 0 adds nothing
    losses = losses * probabilities if weight is None else losses * probabilities * weight.to(losses.dtype)
    losses = losses.sum(-1)
    if options.label_smoothing > 0:  # the mean of -w_c log p_c; -log p_c is softplus(-l) with class c as the target
        kept = stats.log_odds != -torch.inf
        cross_entropy = torch.where(kept, softplus(-stats.log_odds), 0.0)
        cross_entropy = cross_entropy if weight is None else cross_entropy * weight.to(losses.dtype)
        losses = losses + options.label_smoothing * (cross_entropy.sum(-1) / (kept.sum(-1) if num_classes is None else num_classes))
    return reduce(losses, num_rows, options.reduction)


def hinge(stats: RowStats, options: HingeOptions) -> Tensor:
    """The hard margin of Sec. 3, or the hinge (1)."""
    missing = options.margin - (stats.log_odds + stats.rho)
    return softplus(missing) if options.soft else missing.relu()


def _margin_term(stats: RowStats, options: LossOptions) -> Tensor:
    """``(1 - eps) softplus(b - l) + lam D``: eqs. (3), (11) and (15), and the first term of (13)."""
    loss = softplus(options.hard_bias - stats.log_odds)
    if options.label_smoothing == 1:
        loss = torch.where(loss.isfinite(), 0.0, loss)  # 0 * inf is NaN; a masked target stays infinite
    elif options.label_smoothing > 0:
        loss = (1 - options.label_smoothing) * loss
    return loss + options.lam * divergence(stats, options.divergence) if options.lam > 0 else loss
