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
    logits: Tensor
    target: Tensor
    weight: Tensor | None
    shard: Shard | None  # None: all classes are here


Whole = Callable[[Tensor, bool], Tensor]


def loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    local, whole_of = local_rows(input, target, weight)
    of_part = options.for_part()
    if local.shard is None:
        part = whole.loss(local.logits, local.target, local.weight, of_part)
    else:
        part = shards.loss(local.logits, local.target, local.weight, of_part, local.shard)
    return reduced(part, local, options.ignore_index, options.reduction, whole_of)


def rows_of(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[LocalRows, dense.Rows, Whole]:
    """The results of :func:`local_rows`, and between them the rows of this rank."""
    local, whole_of = local_rows(input, target, weight)
    logits = _checks.classes_last(local.logits)
    labels = Labels.of(local.target.long().reshape(logits.shape[:-1]), _checks.num_classes(input), ignore_index)
    return local, dense.Rows(logits, labels), whole_of


def stats(local: LocalRows, rows: dense.Rows, backend: BackendName | None) -> RowStats:
    """The statistics of the rows of this rank."""
    return dense.stats(rows, backend) if local.shard is None else shards.stats(rows, local.shard, backend)


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor, with its gradient; any other tensor as it is."""
    whole: Tensor = tensor.full_tensor() if _checks.is_dtensor(tensor) else tensor
    return whole


def summed(tensor: Tensor) -> Tensor:
    """A DTensor whose pending sums over ranks are done; any other tensor as it is.

    A choice among classes that are split over ranks leaves a sum pending, and two tensors with pending sums cannot meet in one operation.
    """
    if not _checks.is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    ready: Tensor = tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
    return ready


def local_rows(input: Any, target: Tensor, weight: Tensor | None) -> tuple[LocalRows, Whole]:
    """The part of DTensor logits on this rank, and a function that makes one DTensor of the results of all ranks.

    That function takes the losses of the rows here, or with ``True`` a part of a sum over all rows.
    """
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
        elif over is None and class_dim == placement.dim % input.dim():
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

    def whole(result: Tensor, is_sum: bool) -> Tensor:
        if is_sum:
            parts = [Partial() if type(p) is Sharded else Replicate() for p in of_rows]
            return DTensor.from_local(result, mesh, parts, run_check=False).redistribute(placements=[Replicate()] * mesh.ndim)
        shape, stride = _shape_without(input, class_dim)
        return DTensor.from_local(result, mesh, of_rows, run_check=False, shape=shape, stride=stride)

    return LocalRows(logits, target, weight, shard), whole


def reduced(loss: Tensor, rows: LocalRows, ignore_index: int, reduction: Reduction, whole: Whole) -> Tensor:
    """The loss of all rows, from the losses of the rows here (``"none"``) or their sum."""
    if reduction != "mean":
        return whole(loss, reduction == "sum")
    return whole(loss, True) / whole(row_weights(rows.target, rows.weight, ignore_index).sum().to(loss.dtype), True)


def _shape_without(input: Tensor, class_dim: int) -> tuple[torch.Size, tuple[int, ...]]:
    shape = [size for dim, size in enumerate(input.shape) if dim != class_dim]
    like = torch.empty(shape, device="meta")
    return like.shape, like.stride()


def check_no_probabilities(input: Tensor, target: Tensor) -> None:
    if _checks.is_probabilities(input, target):
        raise NotImplementedError("target holds class probabilities, but input is a DTensor; pass indices, or input.full_tensor()")
