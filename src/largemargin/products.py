"""Matrix products with values and derivatives that autocast does not change.

Turning autocast off around a product does not protect its backward pass, which may run with autocast on, as compiled backward passes do.
So the product is an operation, and its derivatives are such products too. One case remains: a backward graph that
``torch.compile(backend="aot_eager")`` made with autocast off uses torch's product, which rounds if it runs under autocast.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _torch


def linear(input: Tensor, weight: Tensor) -> Tensor:
    """``input W^T`` of rows (..., D) and ``weight`` (C, D), in their own dtype."""
    if _torch.is_recording():
        # a program should not turn autocast off if it never was on
        with _without_autocast(input) if torch.is_autocast_enabled(input.device.type) else nullcontext():
            return F.linear(input, weight)
    return _product(input.reshape(-1, input.shape[-1]), weight).reshape(*input.shape[:-1], len(weight))


def _product(a: Tensor, b: Tensor) -> Tensor:
    operation = _Product if torch.compiler.is_compiling() else _ProductWithJvp
    product: Tensor = operation.apply(a, b)
    return product


def _without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    device = tensor.device.type
    # some devices, such as meta, have no autocast
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class _Product(torch.autograd.Function):
    """``a b^T`` of matrices (..., N, D) and (..., M, D) with equal leading dimensions."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with _without_autocast(a):
            # F.linear if possible, because subclasses of a weight implement it
            return F.linear(a, b) if b.dim() == 2 else a @ b.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        for_a, for_b = ctx.needs_input_grad
        return _product(gradient, b.mT) if for_a else None, _product(gradient.mT, a.mT) if for_b else None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        if in_dims[0] is not None and in_dims[1] is None and b.dim() == 2:  # one classifier for the whole batch: more rows
            a = a.movedim(in_dims[0], 0)
            return _product(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], len(b)), 0
        a, b = (
            factor.expand(info.batch_size, *factor.shape) if dim is None else factor.movedim(dim, 0)
            for factor, dim in zip((a, b), in_dims, strict=True)
        )
        return _product(a, b), 0


class _ProductWithJvp(_Product):
    # a separate class, because torch.compile cannot trace a function with a jvp
    @staticmethod
    def jvp(ctx: Any, of_a: Tensor | None, of_b: Tensor | None) -> Tensor:
        with _torch.forward_mode_enabled():
            a, b = (torch.autograd.forward_ad.unpack_dual(saved).primal for saved in ctx.saved_tensors)
            terms = [_product(*factors) for factors in ((of_a, b), (a, of_b)) if None not in factors]
            return sum(terms[1:], terms[0])
