"""Rows with only some of their classes here: the sums that these contribute, and their gradient.

A part is a :class:`.rowstats.Record` and the target's logit. Merging the parts of all classes gives the statistics of the row, and the
gradient of the logits here needs only these. A tile of a linear layer is a part with all classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _torch, rowstats
from .._reduce import Labels, weights_of
from ..backends import reference
from ..backends.protocol import Backend
from ..loss import LossOptions, cross_entropy_of, loss_of_indices
from ..rowstats import IGNORED, Cotangents, Record, RowStats, Softmax, accumulation_dtype, finish, nontargets


class Part(NamedTuple):
    """The sums over the non-targets among some classes of each row; each field has the shape of the targets."""

    max: Tensor
    sum_exp: Tensor
    sum_exp_z: Tensor
    sum_z: Tensor
    num_classes: Tensor
    target_logit: Tensor  # -inf where the target is elsewhere
    sum_weight: Tensor | None = None  # sum w_c over the non-targets, if requested
    sum_weight_z: Tensor | None = None  # sum w_c z_c

    @property
    def record(self) -> Record:
        return Record(self.max, self.sum_exp, self.sum_exp_z, self.sum_z, self.num_classes)

    @property
    def unweighted(self) -> tuple[Tensor, ...]:
        """The fields that every part has, in their order."""
        return (*self.record, self.target_logit)

    def of_rows(self, rows: slice) -> "Part":
        return Part(*(None if field is None else field[rows] for field in self))  # type: ignore[arg-type]


class WeightedStats(NamedTuple):
    """The statistics of rows, and sums over their non-targets if requested."""

    stats: RowStats
    sum_weight: Tensor | None = None  # sum w_c
    weighted_log_q: Tensor | None = None  # sum w_c log q_c


class WeightedCotangents(NamedTuple):
    stats: Cotangents
    weighted_log_q: Tensor | None = None

    def of_rows(self, rows: slice) -> "WeightedCotangents":
        stats = Cotangents(*(None if grad is None else grad[rows] for grad in self.stats))
        return WeightedCotangents(stats, None if self.weighted_log_q is None else self.weighted_log_q[rows])


def part_of(logits: Tensor, target: Tensor, weight: Tensor | None, backend: Backend) -> Part:
    """The part of logits (..., C) with local targets; with ``weight`` (C,) its sums too."""
    dtype = accumulation_dtype(logits.dtype)
    if logits.shape[-1] == 0:
        zero = torch.zeros(target.shape, dtype=dtype, device=logits.device)
        nothing = torch.full_like(zero, -torch.inf)
        return Part(nothing, zero, zero, zero, zero, nothing, *([] if weight is None else [zero, zero]))
    target_logit = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1).to(dtype)
    target_logit = torch.where(target >= 0, target_logit, -torch.inf)
    sums = backend.record(logits, target)
    if weight is None:
        return Part(*sums, target_logit)
    others = nontargets(logits.to(dtype), target)
    present = others != -torch.inf
    z = torch.where(present, others - sums.max.unsqueeze(-1), 0.0)
    return Part(*sums, target_logit, (present * weight).sum(-1), (z * weight).sum(-1))


def merge(parts: Part) -> Part:
    """Merge parts that lie along the first dimension of every field."""
    merged = rowstats.merge(parts.record)
    target_logit = parts.target_logit.amax(0)
    if parts.sum_weight is None or parts.sum_weight_z is None:
        return Part(*merged, target_logit)
    d = torch.where(parts.num_classes == 0, 0.0, parts.max - merged.max)
    return Part(*merged, target_logit, parts.sum_weight.sum(0), (parts.sum_weight_z + d * parts.sum_weight).sum(0))


def finished(merged: Part, target: Tensor) -> WeightedStats:
    """The statistics of rows whose parts are merged; 0 for ignored rows."""

    def kept(field: Tensor) -> Tensor:
        return torch.where(target == IGNORED, 0.0, field)

    stats = finish(merged.record, merged.target_logit)
    if merged.sum_weight is None or merged.sum_weight_z is None:
        return WeightedStats(RowStats(*map(kept, stats)))
    weighted_log_q = kept(merged.sum_weight_z - merged.sum_weight * stats.rho)
    return WeightedStats(RowStats(*map(kept, stats)), merged.sum_weight, weighted_log_q)


def loss_of(rows: WeightedStats, labels: Labels, weight: Tensor | None, options: LossOptions) -> Tensor:
    stats, sum_weight, weighted_log_q = rows
    cross_entropy = None
    if weight is not None and sum_weight is not None and weighted_log_q is not None:
        cross_entropy = cross_entropy_of(stats, weights_of(labels.class_index, weight.to(sum_weight.dtype)), sum_weight, weighted_log_q)
    return loss_of_indices(stats, labels, weight, options, cross_entropy)


def loss_and_cotangents(
    merged: Part, labels: Labels, weight: Tensor | None, options: LossOptions, upstream: Tensor, wanted: bool
) -> tuple[Tensor, WeightedCotangents]:
    """The loss of rows and, if ``wanted``, its gradients with respect to the statistics (without rho) times ``upstream``."""
    rows = finished(merged, labels.class_index)
    if not wanted:
        return loss_of(rows, labels, weight, options), WeightedCotangents(Cotangents())
    leaves = {name: getattr(rows.stats, name).requires_grad_() for name in ("log_odds", "neg_entropy", "mean_log_q", "spread")}
    if rows.weighted_log_q is not None:
        leaves["weighted_log_q"] = rows.weighted_log_q.requires_grad_()
    with torch.enable_grad():
        loss = loss_of(rows, labels, weight, options)
        grads = torch.autograd.grad(loss, list(leaves.values()), upstream.expand_as(loss), allow_unused=True)
    found = dict(zip(leaves, grads, strict=True))
    weighted_log_q = found.pop("weighted_log_q", None)
    return loss.detach(), WeightedCotangents(Cotangents(**found), weighted_log_q)


def gradient_of(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    merged: Part,
    grads: WeightedCotangents,
    backend: Backend,
    out: Tensor | None = None,
    has_largest: Tensor | None = None,
) -> Tensor:
    """The gradient of the logits (..., C) of a part, from the cotangents of its rows; written to ``out`` if given.

    ``has_largest`` (...) says whether the row's c* is one of these classes; without it rho has no gradient.
    """
    if logits.shape[-1] == 0:
        return torch.zeros_like(logits) if out is None else out
    extra = _of_weights_and_rho(logits, target, weight, merged, grads, has_largest)
    plain = all(grad is None or _torch.is_plain_gradient(grad) for grad in grads.stats) and _torch.is_plain(logits)
    wide = accumulation_dtype(logits.dtype)
    same = all(field is None or field.dtype == wide for field in merged)  # hooks on saved tensors may return other dtypes
    if not plain or not same or logits.dtype not in backend.DTYPES:
        backend = reference
    cotangents, softmax = grads.stats._replace(rho=None), Softmax.of(merged.record)
    if extra is None:
        return backend.row_stats_backward(logits, target, softmax, cotangents, out)
    if backend is reference:  # the sum is rounded once
        gradient = (backend.row_stats_backward(logits.to(extra.dtype), target, softmax, cotangents) + extra).to(logits.dtype)
        return gradient if out is None else out.copy_(gradient)
    gradient = backend.row_stats_backward(logits, target, softmax, cotangents, out)
    gradient += extra
    return gradient


def _of_weights_and_rho(
    logits: Tensor, target: Tensor, weight: Tensor | None, merged: Part, grads: WeightedCotangents, has_largest: Tensor | None
) -> Tensor | None:
    """The terms of the gradient from class weights and rho, if any."""
    of_rho, of_weights = grads.stats.rho, grads.weighted_log_q
    if (of_weights is None or weight is None) and (of_rho is None or has_largest is None):
        return None
    others = nontargets(logits.to(merged.max.dtype), target)
    present = others != -torch.inf
    q = torch.where(present, (others - merged.max.unsqueeze(-1)).exp() / merged.sum_exp.unsqueeze(-1), 0.0)
    extra = torch.zeros_like(q)
    if of_weights is not None and weight is not None and merged.sum_weight is not None:
        extra = extra + of_weights.unsqueeze(-1) * (present * weight - merged.sum_weight.unsqueeze(-1) * q)
    if of_rho is not None and has_largest is not None:
        at_largest = torch.zeros_like(q).scatter(-1, others.argmax(-1, keepdim=True), has_largest.unsqueeze(-1).to(q.dtype))
        extra = extra + of_rho.unsqueeze(-1) * (q - at_largest)
    return extra
