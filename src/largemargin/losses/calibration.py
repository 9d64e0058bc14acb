"""The softmax loss with a penalty on confidence.

With CE = softplus(-l), p = sigmoid(l), h its binary entropy, K non-targets, and C classes in the row:

    confidence penalty          CE - beta H,  H = h(p) - (1 - p) e, the entropy of the whole softmax
    MaxSup                      CE + alpha (max f - mean f)
    margin label smoothing      CE + alpha mean_c max(0, max f - f_c - margin)

In the statistics, with logits measured from the largest non-target, the target is at l + rho, and the non-targets sum to K (a + rho).
Margin label smoothing is no function of the statistics. It needs one more sum over the classes.
"""

from typing import TYPE_CHECKING, Any, Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks
from ..loss import error_probability, softplus
from ..rows import collectives
from ..rows.collectives import once
from ..rowstats import RowStats
from .rows import LossRows, RegularizedOptions, RowLoss, row_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # there are builds of torch without it


@row_loss
def confidence_penalty(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, beta: float = 0.1, **options: Unpack[RegularizedOptions]
) -> Tensor:
    r"""The softmax loss minus a multiple of the entropy of the prediction.

    .. math:: -\log p_y - \beta H(p), \qquad H(p) = -\sum_c p_c \log p_c

    Args:
        beta: at least 0; the paper uses 0.1 for CIFAR-10.

    Example:
        >>> import torch, largemargin
        >>> largemargin.confidence_penalty(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.6238)

    Source: Pereyra et al., *Regularizing Neural Networks by Penalizing Confident Output Distributions*, 2017.
    """
    _checks.check_number("beta", beta, low=0)
    rows = LossRows.of(input, target, weight, **options)
    stats = rows.stats()
    return rows.reduce(softplus(-stats.log_odds) - beta * _entropy(stats), stats)


class ConfidencePenaltyLoss(RowLoss, function=confidence_penalty):
    """:func:`.confidence_penalty` as a module."""

    beta: float
    lam: float


@row_loss
def max_suppression(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, alpha: float = 0.1, **options: Unpack[RegularizedOptions]
) -> Tensor:
    r"""MaxSup: label smoothing that lowers the largest logit instead of the target's, so that a wrong row's target is not pushed down.

    .. math:: -\log p_y + \alpha (\max_c f_c - \tfrac1C \textstyle\sum_c f_c)

    Where the target has the largest logit, this is label smoothing with epsilon = ``alpha`` (eq. 13).

    Args:
        alpha: at least 0; the paper raises it from 0.1 to 0.2 over the run, which you may do by the module's attribute.

    Example:
        >>> import torch, largemargin
        >>> largemargin.max_suppression(torch.tensor([[1.0, -1.0]]), torch.tensor([0]))
        tensor(0.2269)

    Source: Zhou et al., *MaxSup: Overcoming Representation Collapse in Label Smoothing*, 2025.
    """
    _checks.check_number("alpha", alpha, low=0)
    rows = LossRows.of(input, target, weight, **options)
    stats = rows.stats()
    return rows.reduce(softplus(-stats.log_odds) + alpha * _largest_above_mean(stats), stats)


class MaxSuppressionLoss(RowLoss, function=max_suppression):
    """:func:`.max_suppression` as a module."""

    alpha: float
    lam: float


@row_loss
def margin_label_smoothing(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margin: float = 10.0,
    alpha: float = 0.1,
    **options: Unpack[RegularizedOptions],
) -> Tensor:
    r"""MbLS: a penalty on logits that are more than a margin below the largest one.

    .. math:: -\log p_y + \frac{\alpha}{C} \sum_c \max(0, \max_j f_j - f_c - m)

    The paper writes a sum over the classes; its code takes the mean, as here. The penalty is not a function of the statistics of a row: it
    reads the logits once more in plain torch, and stores arrays of their size.

    Args:
        margin: m in nats, at least 0.
        alpha: at least 0. The defaults of both are those of the authors' code.

    Example:
        >>> import torch, largemargin
        >>> largemargin.margin_label_smoothing(torch.tensor([[3.0, 0.0]]), torch.tensor([0]), margin=1.0)
        tensor(0.1486)

    Source: Liu et al., *The Devil is in the Margin: Margin-based Label Smoothing for Network Calibration*, CVPR 2022.
    """
    _checks.check_number("margin", margin, low=0)
    _checks.check_number("alpha", alpha, low=0)
    rows = LossRows.of(input, target, weight, **options)
    rows = rows.with_logits(rows.logits)  # two terms read them: the wider dtype adds their gradients before rounding
    stats = rows.stats()
    return rows.reduce(softplus(-stats.log_odds) + alpha * _excess(rows, margin) / _num_classes(stats), stats)


class MarginLabelSmoothingLoss(RowLoss, function=margin_label_smoothing):
    """:func:`.margin_label_smoothing` as a module."""

    margin: float
    alpha: float
    lam: float


def _entropy(stats: RowStats) -> Tensor:
    l = stats.log_odds.clamp(-1e4, 1e4)  # h(p) is 0 long before; 0 * inf is NaN
    return torch.sigmoid(l) * softplus(-l) + error_probability(l) * (softplus(l) - stats.neg_entropy)


def _num_classes(stats: RowStats) -> Tensor:
    """The classes of the row, of which a masked target is none; 1 in a row without a class."""
    return (stats.num_nontargets + (stats.log_odds != -torch.inf).to(stats.num_nontargets.dtype)).clamp(min=1)


def _largest_above_mean(stats: RowStats) -> Tensor:
    """``max f - mean f`` over the classes of the row."""
    above_others = (stats.log_odds + stats.rho).masked_fill(stats.log_odds.isinf(), 0.0)  # f_y - max_N f; a target alone, or masked, is 0
    total = above_others + stats.num_nontargets * (stats.mean_log_q + stats.rho)
    return above_others.relu() - total / _num_classes(stats)


def _excess(rows: LossRows, margin: float) -> Tensor:
    """The sum over the classes of the row of ``max(0, max f - f_c - margin)``."""
    if rows.shard is not None:
        excess: Tensor = _ExcessOfShard.apply(rows.logits, margin, rows.shard.group)
        return excess
    logits = rows.logits
    largest = logits.gather(-1, logits.detach().argmax(-1, keepdim=True))  # not amax, whose gradient is NaN in an ignored row with NaN
    return (largest - logits - margin).relu().masked_fill(logits == -torch.inf, 0.0).sum(-1)


class _ExcessOfShard(torch.autograd.Function):
    """The same for logits (..., C) of some classes, at least one."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, margin: float, group: "ProcessGroup") -> Tensor:
        at, found = logits.argmax(-1, keepdim=True), collectives.all_gather(logits.amax(-1), group)
        excess = (found.amax(0).unsqueeze(-1) - logits - margin).relu().masked_fill(logits == -torch.inf, 0.0)
        exceeds = excess > 0
        sums: Tensor = collectives.all_gather(torch.stack([excess.sum(-1), exceeds.sum(-1).to(logits.dtype)]), group).sum(0)
        is_here = found.argmax(0) == dist.get_rank(group)  # the first rank that has the maximum
        ctx.save_for_backward(exceeds, at, torch.where(is_here, sums[1], 0.0))
        return sums[0]

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        exceeds, at, pulls_on_largest = ctx.saved_tensors
        gradient = -upstream.unsqueeze(-1) * exceeds
        return gradient.scatter_add(-1, at, (upstream * pulls_on_largest).unsqueeze(-1)), None, None
