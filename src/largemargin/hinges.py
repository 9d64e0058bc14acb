"""Losses with a margin of their own, on the logits or in the softmax, that the paper compares with (Sec. 3).

    hard margin                 (Sec. 3)    softplus(margin - (l + rho)), since f_y - f_c* = l + rho
    Crammer-Singer hinge        (1)         max(0, margin - (l + rho))
    dense hinge                 (14)        mean over c != y of max(0, f_c - f_y + margin)

The dense hinge is the one loss that is not a function of the statistics of a row.
"""

import torch
from torch import Tensor

from . import _checks
from ._reduce import REDUCTIONS, Reduction, reduce_rows
from .functional import softplus
from .ops import Rows, checked_rows, stats_of_rows
from .rowstats import accumulation_dtype
from .tracing import is_symbolic, no_script, record


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
    margins, rows = _margins(input, target, weight, margin, ignore_index, reduction)
    return reduce_rows(softplus(margin - margins), rows.class_index, weight, reduction)


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
    margins, rows = _margins(input, target, weight, margin, ignore_index, reduction)
    return reduce_rows((margin - margins).relu(), rows.class_index, weight, reduction)


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
    rows = _checked_hinge_rows(input, target, weight, margin, ignore_index, reduction)
    logits = rows.logits.to(accumulation_dtype(rows.logits.dtype))
    target_logit = logits.gather(-1, rows.class_index.clamp(min=0).unsqueeze(-1))
    is_target = torch.arange(logits.shape[-1], device=logits.device) == rows.class_index.unsqueeze(-1)
    nontarget = ~is_target & (logits != -torch.inf) & (rows.class_index >= 0).unsqueeze(-1)
    violations = torch.where(nontarget, (logits - target_logit + margin).relu(), 0.0)
    losses = violations.sum(-1) / nontarget.sum(-1).clamp(min=1)
    largest = logits.detach().amax(-1)
    losses = losses + (largest - largest)  # NaN where the row holds NaN or +inf, or nothing but -inf; else 0
    if rows.valid is not None:
        losses = torch.where(rows.valid, losses, torch.nan)
    return reduce_rows(losses, rows.class_index, weight, reduction)


def _checked_hinge_rows(
    input: Tensor, target: Tensor, weight: Tensor | None, margin: float, ignore_index: int, reduction: Reduction
) -> Rows:
    _checks.check_number("margin", margin)
    _checks.check_word("reduction", reduction, REDUCTIONS)
    rows = checked_rows(input, target, ignore_index)
    _checks.check_weight(weight, input)
    return rows


def _margins(
    input: Tensor, target: Tensor, weight: Tensor | None, margin: float, ignore_index: int, reduction: Reduction
) -> tuple[Tensor, Rows]:
    """The classification margin ``f_y - f_c* = l + rho`` of each row (Sec. 2.1)."""
    rows = _checked_hinge_rows(input, target, weight, margin, ignore_index, reduction)
    stats = stats_of_rows(rows, None)
    return stats.log_odds + stats.rho, rows
