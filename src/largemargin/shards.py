"""Rows whose classes are split over ranks: their statistics, for one all-gather of six numbers a row.

Each rank has the logits of some classes, in the order of the ranks. It sums up its own (a :class:`.rowstats.Record`), the records and the
target's logit go around once, and every rank merges all of them alike: so all have the same statistics, bit for bit, and whatever loss is
made of them. The gradient of a rank's logits needs nothing but these statistics: the backward pass is local.
"""

from __future__ import annotations  # there are builds of torch without process groups

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks
from ._backends import ladder
from ._backends.ladder import Backend
from .rowstats import (
    ELSEWHERE,
    IGNORED,
    Record,
    RowStats,
    accumulation_dtype,
    finish,
    merge_stacked,
    nontargets,
    record,
    row_stats_vjp,
    without_spread,
)


class Shard(NamedTuple):
    """The classes that this rank holds: ``size`` of ``num_classes``, from ``start`` on."""

    group: dist.ProcessGroup
    start: int
    size: int
    num_classes: int

    def local(self, class_index: Tensor) -> Tensor:
        """Indices of all classes as this rank sees them: an index of its own, ELSEWHERE, or IGNORED."""
        index = class_index - self.start
        here = (index >= 0) & (index < self.size)
        return torch.where(class_index == IGNORED, IGNORED, torch.where(here, index, ELSEWHERE))

    def own(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The weights of this rank's classes, of those of all; in the dtype that logits of ``dtype`` are computed in."""
        return None if weight is None else weight[self.start : self.start + self.size].to(accumulation_dtype(dtype))


def check_group(group: object) -> None:
    if dist.is_available() and (
        group is dist.GroupMember.NON_GROUP_MEMBER or (isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0)
    ):
        raise ValueError("group must be one that this rank belongs to")
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup, got {_checks.describe(group)}; of a mesh pass mesh.get_group(), of all "
            "ranks torch.distributed.group.WORLD"
        )


def check_all_here(size: int, class_start: int | None, num_classes: int | None) -> None:
    if class_start not in (None, 0) or num_classes not in (None, size):
        raise ValueError(f"group=None means that the {size} classes here are all; got class_start={class_start}, num_classes={num_classes}")


def check_eager(name: str) -> None:
    if not ladder.unwatched():
        raise NotImplementedError(
            f"{name} has no rule for functorch transforms, forward mode, dispatch modes and tracing; it talks to other ranks"
        )


def eagerly(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiled code breaks here, and calls the function as it is."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Tensor:
        if torch.compiler.is_compiling():
            result: Tensor = torch.compiler.disable(function)(*args, **options)
            return result
        return function(*args, **options)

    return call


def shard_of(
    size: int,
    target: Tensor,
    group: dist.ProcessGroup,
    class_start: int | None,
    num_classes: int | None,
    also: Sequence[int] = (),
) -> tuple[Shard, list[list[int]]]:
    """Where this rank's classes lie among all, and of what each rank says ``also``, all.

    The ranks tell each other, and an accelerator is waited for; unless all is given there, and nothing else is to be said.
    """
    check_group(group)
    for name, value in (("class_start", class_start), ("num_classes", num_classes)):
        if value is not None:
            _checks.check_integer(name, value)
    start, total = (-1 if value is None else value for value in (class_start, num_classes))
    if -1 in (start, total) or also or target.is_cpu:
        sizes, starts, totals, *heard = say_with_rows((size, start, total, *also), target, group)
        found = [0, *accumulate(sizes)][:-1]
        if any(said not in (-1, place) for said, place in zip(starts, found, strict=True)):
            raise ValueError(
                f"class_start is {starts} on the ranks of the group (-1: none), but shards of {sizes} classes start at {found}"
            )
        if any(said not in (-1, sum(sizes)) for said in totals):
            raise ValueError(f"num_classes is {totals} on the ranks of the group (-1: none), but their shards have {sizes} classes")
        return Shard(group, found[dist.get_rank(group)], size, sum(sizes)), heard
    if not 0 <= start <= start + size <= total:
        raise ValueError(
            f"class_start={start} and the {size} classes of this rank must lie in num_classes={total}; it is the index of its first class"
        )
    return Shard(group, start, size, total), []


def say_with_rows(said: Sequence[int], target: Tensor, group: dist.ProcessGroup) -> list[list[int]]:
    """What each rank says, number by number; every rank sees all of it, so that all raise an error or none does, and none waits.

    The rows have to be the same everywhere: their number and a checksum of their labels go with it.
    """
    labels = target.reshape(-1).long()
    checksum = ((labels + 1) * torch.arange(1, len(labels) + 1, device=labels.device)).sum()
    mine = torch.cat([torch.tensor([*said, len(labels)], device=labels.device), checksum.reshape(1)])
    *heard, num_rows, checksums = all_gather(mine, group).t().tolist()
    check_same_number_of_rows(num_rows)
    if len(set(checksums)) > 1:
        raise ValueError(
            "target must be the same on all ranks of the group; rows that are split over them are to be gathered first: gather_rows"
        )
    return heard


def check_same_number_of_rows(num_rows: Sequence[int]) -> None:
    if len(set(num_rows)) > 1:
        raise ValueError(
            f"input must have the same rows on all ranks of the group, got {list(num_rows)} of them; rows that are split over the ranks "
            "are to be gathered first: gather_rows"
        )


def all_gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``values`` of every rank, stacked along a new first dimension, on their own device."""
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return values.unsqueeze(0)
    sent = values.reshape(-1).to(_carrying_device(values.device, group))
    gathered = sent.new_empty(num_ranks * sent.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name before torch 2.13
    with _exchange(group):
        gather(gathered, sent, group=group)
    return gathered.to(values.device).reshape(num_ranks, *values.shape)


def all_reduce(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of ``values`` over the ranks, in place."""
    if dist.get_world_size(group) == 1:
        return values
    sent = values.to(_carrying_device(values.device, group))
    with _exchange(group):
        dist.all_reduce(sent, group=group)
    return values if sent is values else values.copy_(sent.to(values.device))


def _carrying_device(device: torch.device, group: dist.ProcessGroup) -> torch.device:
    """``device`` if the group has a backend for it, else a device for which it has one: NCCL carries no tensors of the CPU."""
    types = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    if device.type in (*types, "meta"):  # a meta tensor has nothing to carry
        return device
    bound = group.bound_device_id  # the device_id of init_process_group
    return bound if bound is not None and bound.type in types else torch.device(types[0])


@contextmanager
def _exchange(group: dist.ProcessGroup) -> Iterator[None]:
    """Around a collective operation: an error that means lost ranks names them; any other error stays as it is."""
    try:
        yield
    except RuntimeError as error:
        if not _lost_ranks(error):
            raise
        raise RuntimeError(
            f"rank {dist.get_rank()} lost the ranks {dist.get_process_group_ranks(group)} of its group: one of them has died, raised an "
            f"error or not answered in time; the first failure in the launcher's log names it ({error})"
        ) from error


# what gloo, NCCL and the store say when a peer is gone: gloo raises a plain RuntimeError, and a DistBackendError may mean anything
_LOST = re.compile(r"connection (closed|reset|refused|aborted)|broken pipe|tim(ed|e) ?out|remote process|communicator was aborted", re.I)


def _lost_ranks(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistNetworkError) or _LOST.search(str(error)) is not None


class Part(NamedTuple):
    """What a rank contributes to its rows: the record of its non-targets, the target's logit, and their class weights where asked for."""

    max: Tensor
    sum_exp: Tensor
    sum_exp_z: Tensor
    sum_z: Tensor
    num_classes: Tensor
    target_logit: Tensor  # -inf where the target is elsewhere
    sum_weight: Tensor | None = None  # sum w_c
    sum_weight_z: Tensor | None = None  # sum w_c z_c


def part_of(logits: Tensor, target: Tensor, weight: Tensor | None, kernels: Any) -> Part:
    """The part of logits (..., C) with local targets; ``weight`` (C,), or None."""
    dtype = accumulation_dtype(logits.dtype)
    if logits.shape[-1] == 0:
        zero = torch.zeros(target.shape, dtype=dtype, device=logits.device)
        nothing = torch.full_like(zero, -torch.inf)
        return Part(nothing, zero, zero, zero, zero, nothing, *([] if weight is None else [zero, zero]))
    target_logit = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1).to(dtype)
    target_logit = torch.where(target >= 0, target_logit, -torch.inf)
    if kernels is None:
        sums = record(nontargets(logits.to(dtype), target))
    else:
        stats, (m, sum_exp, mean_q_z) = kernels.row_stats(logits, target)
        _, _, _, _, spread, count = stats
        sums = Record(m, sum_exp, mean_q_z * sum_exp, (mean_q_z - spread) * count, count)
    if weight is None:
        return Part(*sums, target_logit)
    others = nontargets(logits.to(dtype), target)
    present = others != -torch.inf
    z = torch.where(present, others - sums.max.unsqueeze(-1), 0.0)
    return Part(*sums, target_logit, (present * weight).sum(-1), (z * weight).sum(-1))


def merged(part: Part, target: Tensor, group: dist.ProcessGroup) -> Part:
    """The parts of all ranks as one, the same on every rank."""
    return _whole(_gathered(part, target, group))


def _gathered(part: Part, target: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """The fields of every rank's part, each with the ranks in its first dimension."""
    fields = torch.stack([field for field in part if field is not None])
    empty = fields.new_tensor([-torch.inf, 0, 0, 0, 0, -torch.inf, 0, 0])[: len(fields)]
    fields = torch.where(target == IGNORED, empty.reshape(-1, *[1] * target.dim()), fields)
    return all_gather(fields, group).unbind(1)


def _whole(gathered: Sequence[Tensor]) -> Part:
    whole = merge_stacked(Record(*gathered[:5]))
    target_logit = gathered[5].amax(0)
    if len(gathered) == 6:
        return Part(*whole, target_logit)
    d = torch.where(gathered[4] == 0, 0.0, gathered[0] - whole.max)
    return Part(*whole, target_logit, gathered[6].sum(0), (gathered[7] + d * gathered[6]).sum(0))


Grads = list[Tensor | None]  # with respect to the fields that `finished` returns


def of_three(grads: Grads, like: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Those of log_odds, neg_entropy and mean_log_q, with that of spread in the last two; zeros where there is none."""
    g_l, g_e, g_a = (torch.zeros_like(like.max) if grad is None else grad for grad in without_spread(grads)[:3])
    return g_l, g_e, g_a


class SplitStats(NamedTuple):
    """The statistics of rows that may be split."""

    stats: RowStats
    # of the non-targets, for label smoothing with class weights: sum w_c and sum w_c log q_c
    sum_weight: Tensor | None
    weighted_log_q: Tensor | None

    @staticmethod
    def of(fields: Sequence[Tensor], sum_weight: Tensor | None) -> SplitStats:
        """From the fields that :func:`finished` returns."""
        return SplitStats(RowStats(*fields[:6]), sum_weight, fields[6] if len(fields) > 6 else None)


def finished(whole: Part, target: Tensor) -> list[Tensor]:
    """The fields of RowStats and, where weights were asked for, ``sum w_c log q_c``; 0 in ignored rows."""
    stats = finish(Record(*whole[:5]), whole.target_logit)
    fields = list(stats)
    if whole.sum_weight is not None and whole.sum_weight_z is not None:
        fields.append(whole.sum_weight_z - whole.sum_weight * stats.rho)
    return [torch.where(target == IGNORED, 0.0, field) for field in fields]


def gradient_of(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    whole: Part,
    grads: Grads,
    kernels: Any,
    out: Tensor | None = None,
    has_largest: Tensor | None = None,
) -> Tensor:
    """The gradient of a rank's logits (..., C), from those of the fields that :func:`finished` returns; in ``out`` if that is given.

    ``has_largest`` (...) says in which rows the largest non-target c* is one of these classes; without it rho has no gradient.
    """
    if logits.shape[-1] == 0:
        return torch.zeros_like(logits) if out is None else out
    extra = _of_weights_and_rho(logits, target, weight, whole, grads, has_largest)
    plain = all(grad is None or ladder.is_plain_gradient(grad) for grad in grads) and ladder.is_plain(logits)
    single = all(field is None or field.dtype == torch.float32 for field in whole)  # hooks on saved tensors may return what they like
    gradient: Tensor
    if kernels is None or not plain or not single or logits.dtype not in kernels.DTYPES:
        gradient = row_stats_vjp(logits, target, [*grads[:3], None, grads[4]], Record(*whole[:5]))
        if extra is not None:
            gradient = (gradient + extra).to(logits.dtype)
        return gradient if out is None else out.copy_(gradient)
    mean_q_z = whole.sum_exp_z / torch.where(whole.num_classes == 0, 1.0, whole.sum_exp)
    state = torch.stack([whole.max, whole.sum_exp, mean_q_z])
    gradient = kernels.row_stats_backward(logits, target, whole.num_classes, state, [*grads[:3], None, grads[4]], out)
    if extra is not None:
        gradient += extra
    return gradient


def _of_weights_and_rho(
    logits: Tensor, target: Tensor, weight: Tensor | None, whole: Part, grads: Grads, has_largest: Tensor | None
) -> Tensor | None:
    """The part of the gradient that comes from the sums with class weights and from rho, if any."""
    of_rho, of_weights = grads[3], grads[6] if len(grads) > 6 else None
    if (of_weights is None or weight is None) and (of_rho is None or has_largest is None):
        return None
    others = nontargets(logits.to(whole.max.dtype), target)
    present = others != -torch.inf
    q = torch.where(present, (others - whole.max.unsqueeze(-1)).exp() / whole.sum_exp.unsqueeze(-1), 0.0)
    extra = torch.zeros_like(q)
    if of_weights is not None and weight is not None and whole.sum_weight is not None:
        extra = extra + of_weights.unsqueeze(-1) * (present * weight - whole.sum_weight.unsqueeze(-1) * q)
    if of_rho is not None and has_largest is not None:
        at_largest = torch.zeros_like(q).scatter(-1, others.argmax(-1, keepdim=True), has_largest.unsqueeze(-1).to(q.dtype))
        extra = extra + of_rho.unsqueeze(-1) * (q - at_largest)
    return extra


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward pass of a function that has no second one, which would need the other ranks."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a loss of classes split over ranks cannot be differentiated twice: create_graph=True is not supported")
        return backward(ctx, *grads)

    return checked


class _StatsOfShard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, group: dist.ProcessGroup, kernels: Any
    ) -> tuple[Tensor, ...]:
        gathered = _gathered(part_of(logits, target, weight, kernels), target, group)
        whole = _whole(gathered)
        # c* is the first of the largest, so it is on the first rank that has one
        has_largest = (gathered[0].argmax(0) == dist.get_rank(group)) & (whole.num_classes > 0)
        fields = finished(whole, target)
        ctx.kernels = kernels
        ctx.save_for_backward(logits, target, weight, has_largest, *whole)
        constants = [fields[5]] if whole.sum_weight is None else [fields[5], whole.sum_weight]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return *fields, *constants[1:]

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, weight, has_largest, *whole = ctx.saved_tensors
        gradient = gradient_of(logits, target, weight, Part(*whole), list(grads[:7]), ctx.kernels, has_largest=has_largest)
        return gradient, None, None, None, None


def stats_of_shard(logits: Tensor, target: Tensor, weight: Tensor | None, group: dist.ProcessGroup, backend: Backend | None) -> SplitStats:
    """The statistics of rows (..., C) of this rank's logits with local targets; ``weight`` (C,) where it is to be summed up."""
    kernels = ladder.kernels(logits, backend) if logits.shape[-1] else None
    fields = _StatsOfShard.apply(logits, target, weight, group, kernels)
    return SplitStats.of(fields[:7] if weight is not None else fields, fields[7] if weight is not None else None)
