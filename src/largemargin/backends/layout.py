"""The memory layout of rows that kernels take: two dimensions of rows for tensors of any shape."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LaidTogether(NamedTuple):
    """Rows (outer, inner) of tensors (..., C)."""

    outer: int
    inner: int
    strides: list[tuple[int, int, int]]  # of outer, inner and class, of what is read and then of what is written; 0 for None
    read: list[Tensor]
    written: list[Tensor | None]


def lay_together(read: list[Tensor], written: list[Tensor | None]) -> LaidTogether:
    """Tensors (..., C) of one shape, copied if two strides do not describe their rows, as in a crop of an image."""
    found = _spans([*read, *(tensor for tensor in written if tensor is not None)])
    if found is None:
        read = [tensor.contiguous() for tensor in read]
        written = [None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in written]
        return lay_together(read, written)
    outer, inner, given = found
    of_written = iter(given[len(read) :])
    strides = [*given[: len(read)], *((0, 0, 0) if tensor is None else next(of_written) for tensor in written)]
    return LaidTogether(outer, inner, strides, read, written)


def _spans(tensors: Sequence[Tensor]) -> tuple[int, int, list[tuple[int, int, int]]] | None:
    """Two dimensions of rows, and the strides of each tensor; None if two dimensions are not enough."""
    *shape, num_classes = tensors[0].shape
    if 0 in shape:  # contiguous() returns an empty tensor as it is, whatever its strides
        shape = [0]
    sizes: list[int] = []
    steps: list[list[int]] = []  # of every tensor; neighbours are merged if one stride spans them
    for dim, size in enumerate(shape):
        step = [tensor.stride(dim) for tensor in tensors]
        if size == 1:
            continue
        if sizes and steps[-1] == [size * s for s in step]:
            sizes[-1], steps[-1] = sizes[-1] * size, step
        else:
            sizes.append(size)
            steps.append(step)
    if len(sizes) > 2:
        return None
    missing = 2 - len(sizes)
    outer, inner = [1] * missing + sizes
    # the stride of a single class is arbitrary
    classes = [1 if num_classes == 1 else tensor.stride(-1) for tensor in tensors]
    return outer, inner, list(zip(*([0] * len(tensors) for _ in range(missing)), *steps, classes, strict=True))
