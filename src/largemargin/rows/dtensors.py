"""DTensor logits: each rank computes on its part, by :mod:`.shards` if classes are sharded.

The result is a DTensor too. A mean is over the whole batch, however its rows are placed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._backend_names import BackendName
from .._reduce import Labels, Reduction, row_weights
from ..loss import LossOptions
from ..rowstats import RowStats
from . import dense, shards, whole
from .collectives import Shard


class LocalRows(NamedTuple):
    """The part of DTensor logits on this rank."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    shard: Shard | None  # None: all classes are here
    to_dtensor: Callable[[Tensor, bool], Tensor]  # makes one DTensor of the rows' results here, or with True of the parts of a sum

    def rows(self, ignore_index: int) -> dense.Rows:
        logits = _checks.classes_last(self.logits)
        num_classes = _checks.num_classes(self.logits) if self.shard is None else self.shard.num_classes
        return dense.Rows(logits, Labels.of(self.target.long().reshape(logits.shape[:-1]), num_classes, ignore_index))

    def stats(self, rows: dense.Rows, backend: BackendName | None) -> RowStats:
        return dense.stats(rows, backend) if self.shard is None else shards.stats(rows, self.shard, backend)

    def reduced(self, loss: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
        """The loss of all rows, from the losses of the rows here (``"none"``) or their sum."""
        if reduction != "mean":
            return self.to_dtensor(loss, reduction == "sum")
        denominator = row_weights(self.target, self.weight, ignore_index).sum().to(loss.dtype)
        return self.to_dtensor(loss, True) / self.to_dtensor(denominator, True)


def loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    local = local_rows(input, target, weight)
    of_part = options.for_part()
    if local.shard is None:
        part = whole.loss(local.logits, local.target, local.weight, of_part)
    else:
        part = shards.loss(local.logits, local.target, local.weight, of_part, local.shard)
    return local.reduced(part, options.ignore_index, options.reduction)


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, with its gradient; any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if _checks.is_dtensor(tensor) else tensor
    return full


def summed(tensor: Tensor) -> Tensor:
    """A DTensor whose pending sums over ranks are done; any other tensor as it is.

    A choice among classes that are split over ranks leaves a sum pending, and two tensors with pending sums cannot meet in one operation.
    """
    if not _checks.is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    ready: Tensor = tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
    return ready


def local_rows(input: Any, target: Tensor, weight: Tensor | None) -> LocalRows:
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor import Shard as Sharded

    mesh, class_dim = input.device_mesh, min(1, input.dim() - 1)
    over: int | None = None  # the mesh dimension over which the classes are split
    placements: list[Any] = []
    for mesh_dim, placement in enumerate(input.placements):
        if type(placement) is not Sharded:
            placements.append(Replicate())
        elif placement.dim % input.dim() != class_dim:
            placements.append(Sharded(placement.dim % input.dim()))
        elif over is None:
            over = mesh_dim
            placements.append(Sharded(class_dim))
        else:  # the classes are split twice: undo the second split
            placements.append(Replicate())
    if tuple(placements) != tuple(input.placements):
        input = input.redistribute(placements=placements)

    # the placements of the target, which has no class dimension
    of_rows = [Sharded(p.dim - (p.dim > class_dim)) if type(p) is Sharded and i != over else Replicate() for i, p in enumerate(placements)]
    if not _checks.is_dtensor(target):
        target = DTensor.from_local(target, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placed: Any = target
    target = placed.redistribute(placements=of_rows).to_local()
    if _checks.is_dtensor(weight):
        weight = weight.full_tensor()
    logits = input.to_local(grad_placements=placements)
    shard = None
    if over is not None:
        num_classes, ranks = input.shape[class_dim], mesh.size(over)
        chunk = -(-num_classes // ranks)  # as torch.chunk cuts
        start = min(mesh.get_local_rank(over) * chunk, num_classes)
        size = min(chunk, num_classes - start)
        if logits.shape[class_dim] != size:
            raise ValueError(
                f"input has {logits.shape[class_dim]} of {num_classes} classes on this rank, but torch gives this rank {size}; for other "
                "sizes of shards use sharded_large_margin_cross_entropy"
            )
        shard = Shard(mesh.get_group(over), start, size, num_classes)

    def to_dtensor(result: Tensor, is_sum: bool) -> Tensor:
        if is_sum:
            parts = [Partial() if type(p) is Sharded else Replicate() for p in of_rows]
            return DTensor.from_local(result, mesh, parts, run_check=False).redistribute(placements=[Replicate()] * mesh.ndim)
        like = torch.empty([size for dim, size in enumerate(input.shape) if dim != class_dim], device="meta")
        return DTensor.from_local(result, mesh, of_rows, run_check=False, shape=like.shape, stride=like.stride())

    return LocalRows(logits, target, weight, shard, to_dtensor)


def check_no_probabilities(input: Tensor, target: Tensor) -> None:
    if _checks.is_probabilities(input, target):
        raise NotImplementedError("target holds class probabilities, but input is a DTensor; pass indices, or input.full_tensor()")
