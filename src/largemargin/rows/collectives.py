"""The exchanges between the ranks of a group: where their classes lie, sums, and errors about lost ranks."""

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

from .. import _checks, _torch
from ..rowstats import ELSEWHERE, IGNORED, accumulation_dtype


class Shard(NamedTuple):
    """The classes that this rank holds: ``size`` of ``num_classes``, from ``start`` on."""

    group: dist.ProcessGroup
    start: int
    size: int
    num_classes: int

    def local(self, class_index: Tensor) -> Tensor:
        """Convert global class indices to local ones: an index among the classes here, ELSEWHERE, or IGNORED."""
        index = class_index - self.start
        here = (index >= 0) & (index < self.size)
        return torch.where(class_index == IGNORED, IGNORED, torch.where(here, index, ELSEWHERE))

    def part(self, per_class: Tensor) -> Tensor:
        """The entries of this rank's classes among those of all classes (C,)."""
        return per_class[self.start : self.start + self.size]

    def own(self, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The part of the class weights for this rank, in the accumulation dtype of ``dtype``."""
        return None if weight is None else self.part(weight).to(accumulation_dtype(dtype))


def check_group(group: object) -> None:
    if dist.is_available() and (
        group is dist.GroupMember.NON_GROUP_MEMBER or (isinstance(group, dist.ProcessGroup) and dist.get_rank(group) < 0)
    ):
        raise ValueError("group must be one that this rank belongs to")
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup, got {_checks.describe(group)}; pass mesh.get_group(), or "
            "torch.distributed.group.WORLD for all ranks"
        )


def check_all_here(size: int, class_start: int | None, num_classes: int | None) -> None:
    if class_start not in (None, 0) or num_classes not in (None, size):
        raise ValueError(
            f"group=None means that this process has all {size} classes; got class_start={class_start}, num_classes={num_classes}"
        )


def check_eager(name: str) -> None:
    if not _torch.is_unwatched():
        raise NotImplementedError(f"{name} has no rule for functorch transforms, forward mode, dispatch modes and tracing")


def eagerly(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make compiled code break its graph and call the function eagerly."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Tensor:
        if torch.compiler.is_compiling():
            result: Tensor = torch.compiler.disable(function)(*args, **options)
            return result
        return function(*args, **options)

    return call


def shard_of(
    size: int, target: Tensor, group: dist.ProcessGroup, class_start: int | None, num_classes: int | None, also: Sequence[int] = ()
) -> tuple[Shard, list[list[int]]]:
    """The classes of this rank among all, and the numbers ``also`` of all ranks.

    Ranks exchange sizes, which synchronises the accelerator. On an accelerator they exchange nothing if ``class_start`` and ``num_classes``
    are given and ``also`` is empty.
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
            raise ValueError(f"class_start is {starts} on the ranks (-1: not given), but shards of {sizes} classes start at {found}")
        if any(said not in (-1, sum(sizes)) for said in totals):
            raise ValueError(f"num_classes is {totals} on the ranks of the group (-1: none), but their shards have {sizes} classes")
        return Shard(group, found[dist.get_rank(group)], size, sum(sizes)), heard
    if not 0 <= start <= start + size <= total:
        raise ValueError(f"class_start={start} is this rank's first class, and its {size} classes must lie in num_classes={total}")
    return Shard(group, start, size, total), []


def say_with_rows(said: Sequence[int], target: Tensor, group: dist.ProcessGroup) -> list[list[int]]:
    """The numbers ``said`` of all ranks. The ranks also compare their number of rows and a checksum of their labels.

    Every rank sees the numbers of all, so either all ranks raise an error, or none does, and no rank waits forever.
    """
    labels = target.reshape(-1).long()
    checksum = ((labels + 1) * torch.arange(1, len(labels) + 1, device=labels.device)).sum()
    mine = torch.cat([torch.tensor([*said, len(labels)], device=labels.device), checksum.reshape(1)])
    *heard, num_rows, checksums = all_gather(mine, group).t().tolist()
    check_same_number_of_rows(num_rows)
    if len(set(checksums)) > 1:
        raise ValueError(
            "target must be the same on all ranks of the group; if its rows are split over ranks, gather them with gather_rows"
        )
    return heard


def check_same_number_of_rows(num_rows: Sequence[int]) -> None:
    if len(set(num_rows)) > 1:
        raise ValueError(
            f"input must have the same rows on all ranks of the group, got {list(num_rows)} rows; gather them with gather_rows"
        )


def all_gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``values`` of every rank, stacked along a new first dimension, on the device of ``values``."""
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return values.unsqueeze(0)
    sent = values.reshape(-1).to(_carrying_device(values.device, group))
    gathered = sent.new_empty(num_ranks * sent.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the old name, before torch 2.13
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
    """``device`` if the group has a backend for it, else a device of its backend: NCCL cannot send tensors of the CPU."""
    types = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    if device.type in (*types, "meta"):  # a meta tensor has no data to send
        return device
    bound = group.bound_device_id  # the device_id of init_process_group
    return bound if bound is not None and bound.type in types else torch.device(types[0])


@contextmanager
def _exchange(group: dist.ProcessGroup) -> Iterator[None]:
    """Around a collective operation: explain an error that means lost ranks, and pass on any other."""
    try:
        yield
    except RuntimeError as error:
        if not _lost_ranks(error):
            raise
        raise RuntimeError(
            f"rank {dist.get_rank()} lost the ranks {dist.get_process_group_ranks(group)} of its group: one of them died, failed or did "
            f"not answer in time; the first failure in the launcher's log names it ({error})"
        ) from error


# messages of gloo, NCCL and the store for a lost peer; the type says too little: gloo raises a plain RuntimeError
_LOST = re.compile(r"connection (closed|reset|refused|aborted)|broken pipe|tim(ed|e) ?out|remote process|communicator was aborted", re.I)


def _lost_ranks(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistNetworkError) or _LOST.search(str(error)) is not None


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For a backward pass that cannot be differentiated, because that would need the other ranks."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("a loss of classes split over ranks cannot be differentiated twice: create_graph=True is not supported")
        return backward(ctx, *grads)

    return checked
