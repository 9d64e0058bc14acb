"""DTensor logits: each rank computes on the part that it has; where the classes are sharded, by the statistics of :mod:`.shards`.

The result is a DTensor too. Its mean is that of the whole batch, whichever ranks hold its rows.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from . import _checks
from ._reduce import Reduction, row_weights
from .shards import Shard


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Without importing what those who have no DTensor do not need."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


class LocalRows(NamedTuple):
    """The part of a rank, as plain tensors."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    shard: Shard | None  # None: all classes are here


Whole = Callable[[Tensor, bool], Tensor]


def gathered(tensor: Tensor) -> Tensor:
    """A DTensor as the plain tensor that it stands for, with its gradient; any other tensor as it is."""
    whole: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return whole


def local_rows(input: Any, target: Tensor, weight: Tensor | None) -> tuple[LocalRows, Whole]:
    """The part that this rank has of DTensor logits, and a function that makes the results of all ranks one DTensor.

    That function takes the losses of the rows here, or (True) a part of a sum over all rows.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate
    from torch.distributed.tensor import Shard as Sharded

    mesh, class_dim = input.device_mesh, min(1, input.dim() - 1)
    over: int | None = None  # the dimension of the mesh that has the classes
    placements: list[Any] = []
    for mesh_dim, placement in enumerate(input.placements):
        if type(placement) is not Sharded:
            placements.append(Replicate())
        elif placement.dim % input.dim() != class_dim:
            placements.append(Sharded(placement.dim % input.dim()))
        elif over is None and class_dim == placement.dim % input.dim():
            over = mesh_dim
            placements.append(Sharded(class_dim))
        else:  # the classes are split twice: once is enough
            placements.append(Replicate())
    if tuple(placements) != tuple(input.placements):
        input = input.redistribute(placements=placements)

    # the same rows of the target, which has no class dimension
    of_rows = [Sharded(p.dim - (p.dim > class_dim)) if type(p) is Sharded and i != over else Replicate() for i, p in enumerate(placements)]
    if not is_dtensor(target):
        target = DTensor.from_local(target, mesh, [Replicate()] * mesh.ndim, run_check=False)
    placed: Any = target
    target = placed.redistribute(placements=of_rows).to_local()
    if is_dtensor(weight):
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
                f"input has {logits.shape[class_dim]} of its {num_classes} classes on this rank, where a DTensor has {size}; for shards of "
                "other sizes use sharded_large_margin_cross_entropy"
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
    """From the losses of the rows here (``"none"``) or else their sum, that of all rows."""
    if reduction != "mean":
        return whole(loss, reduction == "sum")
    return whole(loss, True) / whole(row_weights(rows.target, rows.weight, ignore_index).sum().to(loss.dtype), True)


def _shape_without(input: Tensor, class_dim: int) -> tuple[torch.Size, tuple[int, ...]]:
    shape = [size for dim, size in enumerate(input.shape) if dim != class_dim]
    like = torch.empty(shape, device="meta")
    return like.shape, like.stride()


def check_plain(name: str, value: object) -> None:
    """For what goes with plain logits."""
    if is_dtensor(value):
        raise TypeError(f"{name} is a DTensor, and input is not; pass {name}.full_tensor(), or input as a DTensor too")


def check_alike(**tensors: Tensor | None) -> None:
    """Refuse DTensors beside plain tensors where both meet in one product."""
    given = {name: is_dtensor(tensor) for name, tensor in tensors.items() if tensor is not None}
    if len(set(given.values())) > 1:
        placed, plain = next(name for name in given if given[name]), next(name for name in given if not given[name])
        raise TypeError(f"{placed} is a DTensor, and {plain} is not; pass {placed}.full_tensor(), or {plain} as a DTensor too")


def check_indices_only(input: Tensor, target: Tensor) -> None:
    if _checks.is_probabilities(input, target):
        raise NotImplementedError(
            f"target holds class probabilities, {_checks.describe(target)}, and input is a DTensor; pass class indices, or "
            "input.full_tensor()"
        )
