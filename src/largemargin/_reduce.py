"""Weight, ignored rows and reduction: once, for every loss."""

from typing import Literal, get_args

import torch
from torch import Tensor

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS = get_args(Reduction)


def reduce(losses: Tensor, denominator: Tensor | int, reduction: Reduction) -> Tensor:
    """``mean`` is the sum over the denominator, NaN where that is 0."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / denominator


def reduce_rows(losses: Tensor, index: Tensor, weight: Tensor | None, reduction: Reduction, unscaled: Tensor | None = None) -> Tensor:
    """Reduce the losses (...) of rows with class indices ``index`` (...), -1 for an ignored row.

    A row counts ``w_y`` times, an ignored row not at all. ``unscaled`` is added to each row as it is: torch's smoothing term is
    weighted class by class instead. ``mean`` divides by the summed weights of the kept rows.
    """
    kept = index >= 0
    row_weight = kept.to(losses.dtype)
    if weight is not None and weight.numel():  # without classes every row is ignored
        of_targets = weight.to(losses.dtype).index_select(0, index.clamp(min=0).reshape(-1)).reshape(index.shape)
        row_weight = row_weight * of_targets
        losses = losses * row_weight
    if unscaled is not None:
        losses = losses + unscaled
    losses = torch.where(kept, losses, 0.0)  # not a product: an ignored row may hold NaN
    return reduce(losses, row_weight.sum(), reduction)


def row_weights(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """How often each row counts, in float64: ``w_y``, and 0 where it is ignored; their sum is what ``mean`` divides by."""
    target = target.long()  # uint8 would be a mask as an index, and has 156 for -100
    dtype = torch.float32 if target.device.type == "mps" else torch.float64  # no float64 there
    kept = target != ignore_index
    if weight is None or not weight.numel():
        return kept.to(dtype)
    return torch.where(kept, weight.to(dtype)[target.clamp(0, len(weight) - 1)], 0.0)
