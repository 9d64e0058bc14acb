"""The memory layout of rows that kernels take: two dimensions of rows for a tensor of any shape."""

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


def layout(logits: Tensor, gradient: Tensor | None) -> Layout | None:
    """The layout of ``logits`` (..., C) and their gradient; None if two dimensions are not enough."""
    *shape, num_classes = logits.shape
    strides = logits.stride()
    gradient_strides = strides if gradient is None else gradient.stride()
    dims: list[tuple[int, int, int]] = []  # size and both strides; neighbours are merged if one stride spans them
    for size, f, g in zip(shape, strides[:-1], gradient_strides[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * f and dims[-1][2] == size * g:
            dims[-1] = (dims[-1][0] * size, f, g)
        else:
            dims.append((size, f, g))
    if len(dims) > 2:
        return None
    (outer, f0, g0), (inner, f1, g1) = [(1, 0, 0)] * (2 - len(dims)) + dims
    f2, g2 = (1, 1) if num_classes == 1 else (strides[-1], gradient_strides[-1])  # the stride of a single class is arbitrary
    return Layout(outer, inner, num_classes, f0, f1, f2, g0, g1, g2)


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
