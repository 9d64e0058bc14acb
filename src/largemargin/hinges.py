"""Losses with a margin of their own, on the logits or in the softmax, that the paper compares with (Sec. 3).

    hard margin                 (Sec. 3)    softplus(margin - (l + rho)), since f_y - f_c* = l + rho
    Crammer-Singer hinge        (1)         max(0, margin - (l + rho))
    dense hinge                 (14)        mean over c != y of max(0, f_c - f_y + margin)

The dense hinge is the one loss that is not a function of the statistics of a row.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _checks
from ._reduce import REDUCTIONS, Reduction, reduce_rows
from .dtensors import LocalRows, check_plain, is_dtensor, reduced
from .functional import softplus
from .ops import Rows, checked_rows, rows_of_dtensor, stats_of_local_rows, stats_of_rows
from .rowstats import IGNORED, accumulation_dtype
from .shards import all_gather, once
from .tracing import is_symbolic, no_script, record

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # there are builds of torch without it


@no_script
def hard_margin_softplus(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margin: float = 1.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Softmax loss with a hard margin in place of the one it hides: only the target and the largest non-target get a gradient.

    .. math:: \mathrm{softplus}(f_{c^*} - f_y + \rho) \quad \text{(Sec. 3, Margin by LSE)}

    The paper reports that CNNs "are not properly trained at all" by it; it is here to be compared with.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``; no probabilities.
        weight: a factor for each class, shape ``(C,)``, floating.
        margin: the constant rho in nats, finite; the paper has 1.
        ignore_index: rows with this target have loss 0 and an exactly zero gradient.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``, which divides by the summed weights of the kept rows.

    Returns:
        A scalar, or with ``reduction="none"`` the loss of each row.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`large_margin_cross_entropy`; RuntimeError for probabilities.

    Example:
        >>> import torch, largemargin
        >>> largemargin.hard_margin_softplus(torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([0]))
        tensor(0.6931)

    Source: Kobayashi, BMVC 2019, Sec. 3.
    """
    if is_symbolic(input, target):
        return record(hard_margin_softplus, locals())  # type: ignore[no-any-return]
    _check(input, target, weight, margin, ignore_index, reduction)
    return _loss(lambda rows, local: softplus(margin - _margins(rows, local)), input, target, weight, ignore_index, reduction)


@no_script
def crammer_singer_hinge(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margin: float = 1.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The multi-class hinge of Crammer and Singer; only the target and the largest non-target get a gradient.

    .. math:: \max(0, f_{c^*} - f_y + \rho) \quad (1)

    The paper reports that CNNs "are not properly trained at all" by it; it is here to be compared with.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``; no probabilities.
        weight: a factor for each class, shape ``(C,)``, floating.
        margin: the constant rho in nats, finite; the paper has 1.
        ignore_index: rows with this target have loss 0 and an exactly zero gradient.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``, which divides by the summed weights of the kept rows.

    Returns:
        A scalar, or with ``reduction="none"`` the loss of each row.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`hard_margin_softplus`.

    Example:
        >>> import torch, largemargin
        >>> largemargin.crammer_singer_hinge(torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([0]))
        tensor(0.5000)

    Source: Crammer and Singer, JMLR 2, 2001; eq. (1) with the hinge in Kobayashi, BMVC 2019.
    """
    if is_symbolic(input, target):
        return record(crammer_singer_hinge, locals())  # type: ignore[no-any-return]
    _check(input, target, weight, margin, ignore_index, reduction)
    return _loss(lambda rows, local: (margin - _margins(rows, local)).relu(), input, target, weight, ignore_index, reduction)


@no_script
def multiclass_hinge(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    margin: float = 1.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The hinge averaged over all non-target classes: the paper's remedy for the sparse gradients of the Crammer-Singer hinge.

    .. math:: \frac{1}{C-1} \sum_{c \neq y} \max(0, f_c - f_y + \rho) \quad (14)

    ``torch.nn.functional.multi_margin_loss`` divides by C instead, and with weights its ``mean`` divides by the number of rows, not by
    their summed weights.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``; no probabilities.
        weight: a factor for each class, shape ``(C,)``, floating.
        margin: the constant rho in nats, finite; the paper has 1.
        ignore_index: rows with this target have loss 0 and an exactly zero gradient.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``, which divides by the summed weights of the kept rows.

    Returns:
        A scalar, or with ``reduction="none"`` the loss of each row.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`hard_margin_softplus`.

    Example:
        >>> import torch, largemargin
        >>> largemargin.multiclass_hinge(torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([0]))
        tensor(0.2500)

    Source: Kobayashi, BMVC 2019, eq. (14).
    """
    if is_symbolic(input, target):
        return record(multiclass_hinge, locals())  # type: ignore[no-any-return]
    _check(input, target, weight, margin, ignore_index, reduction)
    return _loss(lambda rows, local: _dense_hinge(rows, local, margin), input, target, weight, ignore_index, reduction)


def _check(input: Tensor, target: Tensor, weight: Tensor | None, margin: float, ignore_index: int, reduction: Reduction) -> None:
    _checks.check_number("margin", margin)
    _checks.check_word("reduction", reduction, REDUCTIONS)
    _checks.check_input(input, target)
    _checks.check_indices(input, target, ignore_index)
    _checks.check_weight(weight, input)


def _loss(
    losses: Callable[[Rows, LocalRows | None], Tensor],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: Reduction,
) -> Tensor:
    """The reduced ``losses`` of rows, which take those of a DTensor as a rank has them."""
    if not is_dtensor(input):
        check_plain("weight", weight)
        rows = checked_rows(input, target, ignore_index)
        return reduce_rows(losses(rows, None), rows.class_index, weight, reduction)
    local, rows, whole = rows_of_dtensor(input, target, weight, ignore_index)
    of_rows = reduce_rows(losses(rows, local), rows.class_index, local.weight, "none" if reduction == "none" else "sum")
    return reduced(of_rows, local, ignore_index, reduction, whole)


def _margins(rows: Rows, local: LocalRows | None) -> Tensor:
    """The classification margin ``f_y - f_c* = l + rho`` of each row (Sec. 2.1)."""
    stats = stats_of_rows(rows, None) if local is None else stats_of_local_rows(local, rows, None)
    return stats.log_odds + stats.rho


def _dense_hinge(rows: Rows, local: LocalRows | None, margin: float) -> Tensor:
    """The hinge of each row, averaged over its non-target classes."""
    logits = rows.logits.to(accumulation_dtype(rows.logits.dtype))
    losses: Tensor
    if local is not None and local.shard is not None:
        losses = _DenseHingeOfShard.apply(logits, local.shard.local(rows.class_index), margin, local.shard.group)
    else:
        target_logit = logits.gather(-1, rows.class_index.clamp(min=0).unsqueeze(-1))
        nontarget = _is_nontarget(logits, rows.class_index)
        violations = torch.where(nontarget, (logits - target_logit + margin).relu(), 0.0)
        losses = violations.sum(-1) / nontarget.sum(-1).clamp(min=1)
        largest = logits.detach().amax(-1)
        losses = losses + (largest - largest)  # NaN where the row holds NaN or +inf, or nothing but -inf; else 0
    return losses if rows.valid is None else torch.where(rows.valid, losses, torch.nan)


def _is_nontarget(logits: Tensor, target: Tensor) -> Tensor:
    is_target = torch.arange(logits.shape[-1], device=logits.device) == target.unsqueeze(-1)
    return ~is_target & (logits != -torch.inf) & (target != IGNORED).unsqueeze(-1)


class _DenseHingeOfShard(torch.autograd.Function):
    """The same for logits (..., C) of some classes, at least one, with local targets (...)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, margin: float, group: "ProcessGroup") -> Tensor:
        target_logit = torch.where(target >= 0, logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1), -torch.inf)
        target_logit, largest = all_gather(torch.stack([target_logit, logits.amax(-1)]), group).amax(0)
        nontarget = _is_nontarget(logits, target)
        violations = torch.where(nontarget, (logits - target_logit.unsqueeze(-1) + margin).relu(), 0.0)
        violated = violations > 0
        sums = torch.stack([values.sum(-1).to(logits.dtype) for values in (violations, violated, nontarget)])
        total, num_violated, count = all_gather(sums, group).sum(0)
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
