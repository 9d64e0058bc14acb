"""Rows whose classes are split over ranks: their statistics, by one all-gather of six numbers per row.

Each rank has the logits of some classes, in rank order, and sums them up (a :class:`.parts.Part`). After one exchange every rank merges
all parts in the same way, so all ranks have the same statistics and the same loss, bit for bit. The gradient of a rank's logits needs only
these statistics: the backward pass is local. Probabilities take a second all-gather: see :mod:`.shares`.
"""

from __future__ import annotations  # there are builds of torch without process groups

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks
from .._backend_names import BackendName
from .._reduce import Labels, reduce
from ..backends import ladder, reference
from ..backends.protocol import Backend
from ..loss import LossOptions
from ..rowstats import ELSEWHERE, IGNORED, Cotangents, RowStats
from . import collectives
from .collectives import Shard, once
from .dense import Rows
from .parts import Part, WeightedCotangents, WeightedStats, finished, gradient_of, loss_of, merge, part_of
from .shares import Share, merge_largest, part_of_largest


def loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, shard: Shard) -> Tensor:
    """The loss of logits of some classes, (C_r,), (N, C_r) or (N, C_r, d1, ...), and indices among all classes.

    Or probabilities of these classes, shaped like ``input``.
    """
    if target.is_floating_point():
        return _loss_of_probabilities(input, target, weight, options, shard)
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    labels = Labels.of(target.long().reshape(logits.shape[:-1]), shard.num_classes, options.ignore_index)
    summed = weight if options.label_smoothing > 0 else None
    _checks.check_no_gradient("classes are split and label_smoothing > 0", weight=summed)
    summed = shard.own(summed, logits.dtype)
    if summed is not None:
        logits = logits.to(summed.dtype)  # two terms read them: the wider dtype adds their gradients before rounding
    return loss_of(_stats(logits, shard.local(labels.class_index), summed, shard, options.backend), labels, weight, options)


def _loss_of_probabilities(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, shard: Shard) -> Tensor:
    """Two all-gathers, of six and eight numbers per row."""
    _checks.check_no_gradient("classes are split and target has probabilities", target=target, weight=weight)
    logits, target = (tensor.movedim(1, -1) if tensor.dim() > 2 else tensor for tensor in (input, target))
    losses: Tensor = _LossOfShares.apply(logits, target, shard.own(weight, logits.dtype), options, shard.group)
    return reduce(losses, losses.numel(), options.reduction)


def stats(rows: Rows, shard: Shard, backend: BackendName | None) -> RowStats:
    """``rows`` has the logits of this rank's classes, and labels among all classes."""
    return rows.labels.mark_stats(_stats(rows.logits, shard.local(rows.labels.class_index), None, shard, backend).stats)


def _stats(logits: Tensor, target: Tensor, weight: Tensor | None, shard: Shard, backend: BackendName | None) -> WeightedStats:
    """The statistics of rows (..., C_r) with local targets, and the sums of ``weight`` (C_r,) if given."""
    computes = ladder.pick(logits, backend) if logits.shape[-1] else reference
    *fields, sum_weight, weighted_log_q = _StatsOfShard.apply(logits, target, weight, shard.group, computes)
    return WeightedStats(RowStats(*fields), sum_weight, weighted_log_q)


def exchange(part: Part, target: Tensor, group: dist.ProcessGroup) -> Part:
    """The parts of all ranks, along the first dimension of each field; the same on every rank."""
    fields = torch.stack([field for field in part if field is not None])
    empty = fields.new_tensor([-torch.inf, 0, 0, 0, 0, -torch.inf, 0, 0])[: len(fields)]  # a Part without classes
    fields = torch.where(target == IGNORED, empty.reshape(-1, *[1] * target.dim()), fields)
    return Part(*collectives.all_gather(fields, group).unbind(1))


def exchange_largest(part: Part, largest: Tensor, group: dist.ProcessGroup) -> tuple[Part, Tensor]:
    """The rows whose target is their arg-max, from :func:`.shares.part_of_largest`, and the arg-max: its index here, or ELSEWHERE."""
    merged, owner = merge_largest(exchange(part, largest, group))
    return merged, torch.where(owner == dist.get_rank(group), largest, ELSEWHERE)


class _LossOfShares(torch.autograd.Function):
    """The losses of rows. The forward pass makes the gradient, and the backward pass multiplies each row by its upstream gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, group: dist.ProcessGroup) -> Tensor:
        backend = ladder.pick(logits, options.backend) if logits.shape[-1] else reference
        merged, top = exchange_largest(*part_of_largest(logits, backend), group)
        share = Share.of(logits, target, weight, merged, top, options)
        totals = collectives.all_gather(share.sums, group).sum(0)
        ctx.save_for_backward(share.gradient(totals) if ctx.needs_input_grad[0] else None)
        return totals[0]

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.unsqueeze(-1), None, None, None, None


class _StatsOfShard(torch.autograd.Function):
    """The fields of RowStats, then ``sum_weight`` and ``weighted_log_q``, which are None without a weight."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, group: dist.ProcessGroup, backend: Backend
    ) -> tuple[Tensor | None, ...]:
        parts = exchange(part_of(logits, target, weight, backend), target, group)
        merged = merge(parts)
        # c* is the first largest class, so the first rank that has the maximum has it
        has_largest = (parts.max.argmax(0) == dist.get_rank(group)) & (merged.num_classes > 0)
        rows = finished(merged, target)
        ctx.backend = backend
        ctx.save_for_backward(logits, target, weight, has_largest, *merged)
        constants = rows.stats.num_nontargets, rows.sum_weight
        ctx.mark_non_differentiable(*(field for field in constants if field is not None))
        ctx.set_materialize_grads(False)
        return *rows.stats, rows.sum_weight, rows.weighted_log_q

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, weight, has_largest, *merged = ctx.saved_tensors
        *of_stats, _, _, of_weights = grads
        cotangents = WeightedCotangents(Cotangents(*of_stats), of_weights)
        gradient = gradient_of(logits, target, weight, Part(*merged), cotangents, ctx.backend, has_largest=has_largest)
        return gradient, None, None, None, None
