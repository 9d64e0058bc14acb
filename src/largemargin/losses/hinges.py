"""The losses that the paper compares with (Sec. 3): hinges on the logits, and a hard margin in the softmax.

    hard margin                 (Sec. 3)    softplus(margin - (l + rho)), since f_y - f_c* = l + rho
    Crammer-Singer hinge        (1)         max(0, margin - (l + rho))
    dense hinge                 (14)        mean over c != y of max(0, f_c - f_y + margin)

The dense hinge is the one loss that is not a function of the statistics of a row.
"""

from typing import Any, Unpack

import torch
from torch import Tensor

from .. import _checks
from ..loss import HingeOptions, hinge
from ..rows import collectives, whole
from ..rows.collectives import Shard, once
from ..rows.dense import Rows
from ..rowstats import IGNORED, accumulation_dtype
from .rows import LossRows, RowLoss, RowOptions, check_rows, row_loss


@row_loss
def hard_margin_softplus(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, margin: float = 1.0, **options: Unpack[RowOptions]
) -> Tensor:
    r"""Softmax loss with a hard margin instead of its hidden one: only the target and the largest non-target get a gradient.

    .. math:: \mathrm{softplus}(f_{c^*} - f_y + \rho) \quad \text{(Sec. 3, Margin by LSE)}

    The paper reports that CNNs "are not properly trained at all" by this loss and :func:`crammer_singer_hinge`. Both are for comparison.

    Args:
        margin: the constant rho in nats, finite; the paper uses 1.

    Example:
        >>> import torch, largemargin
        >>> largemargin.hard_margin_softplus(torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([0]))
        tensor(0.6931)

    Source: Kobayashi, BMVC 2019, Sec. 3.
    """
    _checks.check_number("margin", margin)
    return _of_lead(input, target, weight, HingeOptions(margin, True, **options))


class HardMarginSoftplusLoss(RowLoss, function=hard_margin_softplus):
    """:func:`.hard_margin_softplus` as a module."""

    margin: float


@row_loss
def crammer_singer_hinge(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, margin: float = 1.0, **options: Unpack[RowOptions]
) -> Tensor:
    r"""The multi-class hinge of Crammer and Singer: only the target and the largest non-target get a gradient.

    .. math:: \max(0, f_{c^*} - f_y + \rho) \quad (1)

    Args:
        margin: the constant rho in nats, finite; the paper uses 1.

    Example:
        >>> import torch, largemargin
        >>> largemargin.crammer_singer_hinge(torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([0]))
        tensor(0.5000)

    Source: Crammer and Singer, JMLR 2, 2001; eq. (1) with the hinge in Kobayashi, BMVC 2019.
    """
    _checks.check_number("margin", margin)
    return _of_lead(input, target, weight, HingeOptions(margin, False, **options))


class CrammerSingerHingeLoss(RowLoss, function=crammer_singer_hinge):
    """:func:`.crammer_singer_hinge` as a module."""

    margin: float


@row_loss
def multiclass_hinge(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, margin: float = 1.0, **options: Unpack[RowOptions]
) -> Tensor:
    r"""The hinge averaged over all non-target classes: the paper's remedy for the sparse gradients of the Crammer-Singer hinge.

    .. math:: \frac{1}{C-1} \sum_{c \neq y} \max(0, f_c - f_y + \rho) \quad (14)

    ``torch.nn.functional.multi_margin_loss`` divides by C instead; with weights its ``mean`` divides by the number of rows.

    Args:
        margin: the constant rho in nats, finite; the paper uses 1.

    Example:
        >>> import torch, largemargin
        >>> largemargin.multiclass_hinge(torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([0]))
        tensor(0.2500)

    Source: Kobayashi, BMVC 2019, eq. (14).
    """
    _checks.check_number("margin", margin)
    rows = LossRows.of(input, target, weight, **options)
    return rows.reduce(_dense_hinge(rows.rows, None if rows.local is None else rows.local.shard, margin))


class MulticlassHingeLoss(RowLoss, function=multiclass_hinge):
    """:func:`.multiclass_hinge` as a module."""

    margin: float


def _of_lead(input: Tensor, target: Tensor, weight: Tensor | None, options: HingeOptions) -> Tensor:
    shared: RowOptions = {"ignore_index": options.ignore_index, "reduction": options.reduction}
    if _checks.is_dtensor(input):
        rows = LossRows.of(input, target, weight, **shared)
        return rows.reduce(hinge(rows.stats(), options))
    check_rows(input, target, weight, **shared)
    return whole.loss(input, target, weight, options)


def _dense_hinge(rows: Rows, shard: Shard | None, margin: float) -> Tensor:
    """The hinge of each row, averaged over its non-target classes. ``shard`` says which classes are here, if not all."""
    logits = rows.logits.to(accumulation_dtype(rows.logits.dtype))
    losses: Tensor
    if shard is not None:
        losses = _DenseHingeOfShard.apply(logits, shard.local(rows.labels.class_index), margin, shard)
    else:
        target_logit = logits.gather(-1, rows.labels.class_index.clamp(min=0).unsqueeze(-1))
        nontarget = _is_nontarget(logits, rows.labels.class_index)
        violations = torch.where(nontarget, (logits - target_logit + margin).relu(), 0.0)
        losses = violations.sum(-1) / nontarget.sum(-1).clamp(min=1)
        largest = logits.detach().amax(-1)
        losses = losses + (largest - largest)  # NaN if the row holds NaN or +inf, or only -inf; else 0
    return rows.labels.mark(losses)


def _is_nontarget(logits: Tensor, target: Tensor) -> Tensor:
    is_target = torch.arange(logits.shape[-1], device=logits.device) == target.unsqueeze(-1)
    return ~is_target & (logits != -torch.inf) & (target != IGNORED).unsqueeze(-1)


class _DenseHingeOfShard(torch.autograd.Function):
    """The dense hinge for logits (..., C) of some classes, at least one, with local targets (...)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, margin: float, shard: Shard) -> Tensor:
        target_logit = torch.where(target >= 0, logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1), -torch.inf)
        target_logit, largest = collectives.all_gather(torch.stack([target_logit, logits.amax(-1)]), shard.group).amax(0)
        nontarget = _is_nontarget(logits, target)
        violations = torch.where(nontarget, (logits - target_logit.unsqueeze(-1) + margin).relu(), 0.0)
        violated = violations > 0
        sums = torch.stack([values.sum(-1).to(logits.dtype) for values in (violations, violated, nontarget)])
        total, num_violated, count = collectives.all_gather(sums, shard.group).sum(0)
        count = count.clamp(min=1)
        ctx.save_for_backward(target, violated, num_violated, count)
        losses: Tensor = total / count + (largest - largest)
        return losses

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        target, violated, num_violated, count = ctx.saved_tensors
        share = upstream / count
        gradient = violated * share.unsqueeze(-1)
        at = target.clamp(min=0).unsqueeze(-1)
        on_target = torch.where((target >= 0).unsqueeze(-1), (-share * num_violated).unsqueeze(-1), gradient.gather(-1, at))
        return gradient.scatter(-1, at, on_target), None, None, None
