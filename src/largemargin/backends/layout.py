"""The memory layout of rows that kernels take: two dimensions of rows for a tensor of any shape."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Rows (outer, inner) of num_classes, with the strides of the logits and of their gradient in elements."""

    outer: int
    inner: int
    num_classes: int
    outer_stride: int
    inner_stride: int
    class_stride: int
    gradient_outer_stride: int
    gradient_inner_stride: int
    gradient_class_stride: int


class Spans(NamedTuple):
    """Rows (outer, inner), and for each tensor its strides of outer, inner and class."""

    outer: int
    inner: int
    strides: list[tuple[int, int, int]]


def spans(tensors: Sequence[Tensor]) -> Spans | None:
    """The rows of tensors of one shape (..., C); None if two dimensions are not enough."""
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
    return Spans(outer, inner, list(zip(*([0] * len(tensors) for _ in range(missing)), *steps, classes, strict=True)))


def layout(logits: Tensor, gradient: Tensor | None) -> Layout | None:
    """The layout of ``logits`` (..., C) and their gradient; None if two dimensions are not enough."""
    found = spans([logits, logits if gradient is None else gradient])
    return None if found is None else Layout(found.outer, found.inner, logits.shape[-1], *found.strides[0], *found.strides[1])


class Laid(NamedTuple):
    layout: Layout
    logits: Tensor
    gradient: Tensor | None


def lay(logits: Tensor, gradient: Tensor | None) -> Laid:
    """``logits`` and ``gradient``, copied if two strides do not describe their rows, as in a crop of an image."""
    found = layout(logits, gradient)
    if found is None:
        logits = logits.contiguous()
        gradient = None if gradient is None else torch.empty_like(logits)
        found = layout(logits, gradient)
        assert found is not None
    return Laid(found, logits, gradient)


class LaidTogether(NamedTuple):
    outer: int
    inner: int
    strides: list[tuple[int, int, int]]  # of outer, inner and class, of what is read and then of what is written
    read: list[Tensor]
    written: list[Tensor | None]


def lay_together(read: list[Tensor], written: list[Tensor | None]) -> LaidTogether:
    """The same for any number of tensors (..., C) of one shape."""
    found = spans([*read, *(tensor for tensor in written if tensor is not None)])
    if found is None:
        read = [tensor.contiguous() for tensor in read]
        written = [None if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in written]
        return lay_together(read, written)
    strides = iter(found.strides)
    return LaidTogether(
        found.outer,
        found.inner,
        [*(next(strides) for _ in read), *((0, 0, 0) if tensor is None else next(strides) for tensor in written)],
        read,
        written,
    )
