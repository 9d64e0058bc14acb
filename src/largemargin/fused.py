"""The main loss where a kernel has all of it: forward writes the gradient too, so that forward and backward cost one exp an element.

The gradient is that of the loss itself. Backward hands it over if the upstream gradient is 1, multiplies it if that costs no digits,
and otherwise, or when called again, computes it anew from the logits: it never sees a scaled buffer. Donated logits are gone after the
forward pass: their gradient, in their place, is multiplied whatever it costs, and there is one backward pass.
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


def applies(input: Tensor, target: Tensor, weight: Tensor | None, backend: Backend | None) -> bool:
    """Whether a kernel has the whole loss of these logits."""
    if not input.is_cpu or torch.compiler.is_compiling() or backend == "triton":
        return False
    if ladder.kernels(input, backend) is None or not ladder.is_plain(target) or input.numel() == 0:
        return False
    return weight is None or (ladder.is_plain(weight) and not weight.requires_grad)


def loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, reference: Reference, donate: bool = False) -> Tensor:
    """The loss of logits ``input`` (C,), (N, C) or (N, C, d1, ...); ``reference`` is the same function, for higher derivatives."""
    if target.dtype is not torch.int64:
        target = target.long()
    if not (input.requires_grad and torch.is_grad_enabled()):
        return cpu.loss(*_rows(input, target), weight, options)
    if donate and options.reduction != "none" and torch._debug_has_internal_overlap(input) == 0:
        loss: Tensor = DonatedLogits.apply(input, target, weight, options)
    else:
        loss = _apply(input, target, weight, options, reference)
    return loss


def loss_and_gradient(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, gradient: Tensor | None, upstream: Tensor
) -> Tensor:
    """The loss of rows ``logits`` (N, C) and, where it is to be written, their gradient times ``upstream``: without autograd."""
    return cpu.loss(logits, target, weight, options, gradient, upstream if upstream.dim() else upstream.item())


def _rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if input.dim() == 2:
        return input, target
    logits = classes_last(input)
    return logits, target.reshape(logits.shape[:-1])


def _reference_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    """The gradient by the reference, which can be differentiated and batched."""
    input, target, weight = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        alias = input.view_as(input) if input.requires_grad else input.requires_grad_()  # the hooks of input itself run once, outside
        loss = ctx.reference(alias, target, weight, ctx.options)
        gradient: Tensor = torch.autograd.grad(loss, alias, upstream, create_graph=create_graph)[0]
    return gradient


class LargeMarginCrossEntropy(torch.autograd.Function):
    """The loss of rows whose kernel is at hand."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, reference: Reference) -> Tensor:
        ctx.options, ctx.reference, ctx.gradient = options, reference, None
        ctx.save_for_backward(input, target, weight)
        # a gradient for each row waits for the upstream gradient of the row; checkpointing and offloading want nothing to be kept
        if options.reduction == "none" or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return cpu.loss(*_rows(input, target), weight, options)
        ctx.gradient = torch.empty_like(input)
        return cpu.loss(*_rows(input, target), weight, options, classes_last(ctx.gradient))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ladder.is_plain_gradient(upstream):
            return _reference_gradient(ctx, upstream), None, None, None, None
        factor = upstream if upstream.dim() else upstream.item()
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is not None:
            if factor == 1:
                return gradient, None, None, None, None
            exact = gradient.dtype == torch.float32 or abs(math.frexp(factor)[0]) == 0.5  # a power of two costs no digits
            if exact and math.isfinite(factor):
                return gradient.mul_(factor), None, None, None, None
        input, target, weight = ctx.saved_tensors
        if not (ladder.is_plain(input) and input.dtype in cpu.DTYPES):  # hooks on saved tensors may return what they like
            return _reference_gradient(ctx, upstream), None, None, None, None
        if gradient is None:
            gradient = torch.empty_like(input)
        cpu.loss(*_rows(input, target), weight, ctx.options, classes_last(gradient), factor)
        return gradient, None, None, None, None


class DonatedLogits(torch.autograd.Function):
    """The same with the gradient in the place of the logits."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
        if getattr(input, "_donated_version", None) == input._version:
            raise ValueError("input was donated to another loss already, and holds its gradient; donate to the last loss that needs it")
        rows, labels = _rows(input, target)
        loss = cpu.loss(rows, labels, weight, options, rows)
        torch.autograd.graph.increment_version(input)
        input._donated_version = input._version  # type: ignore[attr-defined]
        ctx.gradient, ctx.version = input.detach(), input._version
        ctx.save_for_backward(labels == options.ignore_index)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradient is None or not ladder.is_plain_gradient(upstream):
            raise RuntimeError(
                "the logits of a loss with donate=True are gone after its first backward pass; for a second one, or for higher "
                "derivatives, leave donate=False"
            )
        gradient, ctx.gradient = ctx.gradient, None
        if gradient._version != ctx.version:
            raise RuntimeError(
                "the logits of a loss with donate=True, which hold their gradient, have been modified by an inplace operation before its "
                "backward pass; leave donate=False, or do not touch them"
            )
        factor = upstream.item()
        if factor != 1:
            gradient.mul_(factor)
        if not math.isfinite(factor):
            (ignored,) = ctx.saved_tensors
            classes_last(gradient).masked_fill_(ignored.unsqueeze(-1), 0.0)
        return gradient, None, None, None


# Function.apply without its branch for functorch transforms, which the ladder has ruled out: 1 of some 40 microseconds
_apply = super(torch.autograd.Function, LargeMarginCrossEntropy).apply
