"""The main loss where a kernel has all of it: forward writes the gradient too, so that forward and backward cost one exp an element.

The gradient is that of the loss itself. Backward hands it over if the upstream gradient is 1, multiplies it if that costs no digits,
and otherwise, or when called again, computes it anew from the logits: it never sees a scaled buffer.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._backends import LossOptions, cpu, ladder
from ._backends.ladder import Backend
from .ops import classes_last

Reference = Callable[[Tensor, Tensor, Tensor | None, LossOptions], Tensor]


def kernels(input: Tensor, target: Tensor, weight: Tensor | None, backend: Backend | None) -> Any:
    """The module that has the whole loss of these logits, or None."""
    if not input.is_cpu or torch.compiler.is_compiling() or backend == "triton":
        return None
    module = ladder.kernels(input, backend)
    if module is None or not ladder.is_plain(target) or input.numel() == 0:
        return None
    return module if weight is None or (ladder.is_plain(weight) and not weight.requires_grad) else None


def loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, reference: Reference, donate: bool = False) -> Tensor:
    """The loss of logits ``input`` (C,), (N, C) or (N, C, d1, ...); ``reference`` is the same function, for higher derivatives."""
    if target.dtype is not torch.int64:
        target = target.long()
    if input.requires_grad and torch.is_grad_enabled():
        loss: Tensor = _apply(input, target, weight, options, reference, donate)
        return loss
    return cpu.loss(*_rows(input, target), weight, options)


def _rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if input.dim() == 2:
        return input, target
    logits = classes_last(input)
    return logits, target.reshape(logits.shape[:-1])


class LargeMarginCrossEntropy(torch.autograd.Function):
    """The loss of rows whose kernel is at hand."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, reference: Reference, donate: bool
    ) -> Tensor:
        ctx.options, ctx.reference = options, reference
        ctx.donated = donate and torch._debug_has_internal_overlap(input) == 0
        rows = _rows(input, target)
        if options.reduction == "none":  # each row has an upstream gradient of its own: there is nothing to prepare
            ctx.gradient = None
            ctx.save_for_backward(input, target, weight)
            return cpu.loss(*rows, weight, options)
        if ctx.donated:
            ctx.gradient = input.detach()
            loss = cpu.loss(*rows, weight, options, rows[0])
            torch.autograd.graph.increment_version(input)
            ctx.save_for_backward(None, target, weight)
            return loss
        ctx.gradient = torch.empty_like(input)
        ctx.save_for_backward(input, target, weight)
        return cpu.loss(*rows, weight, options, classes_last(ctx.gradient))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, ctx.gradient = ctx.gradient, None
        plain = not torch.is_grad_enabled() and ladder.unwatched() and ladder.is_plain(upstream)
        if gradient is not None and plain:
            factor = upstream.item()
            if factor == 1:
                return gradient, None, None, None, None, None
            exact = gradient.dtype == torch.float32 or abs(math.frexp(factor)[0]) == 0.5  # a power of two costs no digits
            if ctx.donated or (exact and math.isfinite(factor)):
                return gradient.mul_(factor), None, None, None, None, None
        input, target, weight = ctx.saved_tensors
        if input is None:
            raise RuntimeError(
                "the logits of a loss with donate=True are gone after its first backward pass; for a second one, or for higher "
                "derivatives, leave donate=False"
            )
        if not plain:  # to be differentiated again, or batched
            ctx.gradient = gradient
            with torch.enable_grad():
                loss = ctx.reference(input, target, weight, ctx.options)
                (gradient,) = torch.autograd.grad(loss, input, upstream, create_graph=True)
            return gradient, None, None, None, None, None
        if gradient is None:
            gradient = input.detach() if ctx.donated else torch.empty_like(input)
        each = upstream if upstream.dim() else upstream.item()
        cpu.loss(*_rows(input, target), weight, ctx.options, classes_last(gradient), each)
        if ctx.donated:
            torch.autograd.graph.increment_version(input)
        return gradient, None, None, None, None, None


# Function.apply without its branch for functorch transforms, which the ladder has ruled out: 1 of some 40 microseconds
_apply = super(torch.autograd.Function, LargeMarginCrossEntropy).apply
