"""Labels, weights, ignored rows and reduction, for every loss."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import _checks
from .rowstats import IGNORED, RowStats

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)


class Labels(NamedTuple):
    class_index: Tensor  # (...), int64 in [0, C), or IGNORED
    valid: Tensor | None  # (...), False for a label out of range; None if the labels have been checked

    @classmethod
    def of(cls, target: Tensor, num_classes: int, ignore_index: int) -> "Labels":
        """``target`` is int64. A label out of range raises if reading the labels is free."""
        looked_at = _checks.can_look_at(target)
        if looked_at and target.numel():  # these two numbers are enough for most batches
            low, high = map(int, target.aminmax())
            if 0 <= low and high < num_classes and not low <= ignore_index <= high:
                return cls(target, None)
        ignored = target == ignore_index
        if looked_at:
            _checks.check_range(target, num_classes, ignore_index)
            return cls(torch.where(ignored, IGNORED, target), None)
        in_range = (target >= 0) & (target < num_classes)
        return cls(torch.where(ignored, IGNORED, torch.where(in_range, target, 0)), ignored | in_range)

    def mark(self, values: Tensor) -> Tensor:
        """``values`` (...), NaN for a label out of range."""
        return values if self.valid is None else torch.where(self.valid, values, torch.nan)

    def mark_stats(self, stats: RowStats) -> RowStats:
        return stats if self.valid is None else RowStats(*map(self.mark, stats))


def weights_of(class_index: Tensor, weight: Tensor) -> Tensor:
    """The weight of each row's class (...); an arbitrary one for an ignored row."""
    # not weight[...], which has no vmap rule for one row
    return weight.index_select(0, class_index.clamp(min=0).reshape(-1)).reshape(class_index.shape)


def reduce(losses: Tensor, denominator: Tensor | int, reduction: Reduction) -> Tensor:
    """``mean`` divides the sum by the denominator; it is NaN if that is 0."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / denominator


def reduce_rows(losses: Tensor, index: Tensor, weight: Tensor | None, reduction: Reduction, unscaled: Tensor | None = None) -> Tensor:
    """Reduce the losses (...) of rows with class indices ``index`` (...), or IGNORED.

    A row counts ``w_y`` times, an ignored row 0 times, and ``mean`` divides by the sum of these. ``unscaled`` is added without ``w_y``: it
    is torch's smoothing term, which is weighted class by class.
    """
    kept = index >= 0
    row_weight = kept.to(losses.dtype)
    if weight is not None and weight.numel():  # if C = 0, every row is ignored
        row_weight = row_weight * weights_of(index, weight.to(losses.dtype))
        losses = losses * row_weight
    if unscaled is not None:
        losses = losses + unscaled
    losses = torch.where(kept, losses, 0.0)  # not a product: an ignored row may hold NaN
    return reduce(losses, row_weight.sum(), reduction)


def row_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """How often each row counts, in float64: ``w_y``, or 0 if ignored. ``mean`` divides by their sum."""
    target = target.long()  # torch would take uint8 as a mask, and -100 is 156 in it
    dtype = torch.float32 if target.device.type == "mps" else torch.float64  # no float64 there
    kept = target != ignore_index
    if weight is None or not weight.numel():
        return kept.to(dtype)
    return torch.where(kept, weight.to(dtype)[target.clamp(0, len(weight) - 1)], 0.0)
