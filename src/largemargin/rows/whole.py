"""The loss of rows by a kernel that computes all of it. The forward pass writes the gradient too, so both cost one exp per element.

The backward pass returns this gradient if the upstream gradient is 1, and scales it if that is exact. Otherwise, and in a second
backward pass, it computes the gradient again from the logits. Donated logits do not exist any more after the forward pass: their gradient
replaces them, is always scaled, and allows one backward pass.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _torch
from ..backends import ladder
from ..backends.protocol import WholeLoss
from ..loss import LossOptions
from . import dense


def kernel(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> WholeLoss | None:
    """The kernel of the whole loss of these logits, if there is one."""
    if torch.compiler.is_compiling() or input.numel() == 0:
        return None
    whole = ladder.pick(input, options.backend).loss
    if whole is None or not _torch.is_plain(target):
        return None
    return whole if weight is None or (_torch.is_plain(weight) and not weight.requires_grad) else None


def loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, donate: bool = False) -> Tensor:
    """The loss of logits (C,), (N, C) or (N, C, d1, ...) and class indices, by a kernel or by the statistics."""
    whole = kernel(input, target, weight, options)
    if whole is None:
        return dense.loss(input, target, weight, options)
    call = _Call(whole, target if target.dtype is torch.int64 else target.long(), weight, options)
    if not (input.requires_grad and torch.is_grad_enabled()):
        return call(input)
    apply = _donated if donate and options.reduction != "none" and not _torch.overlaps_itself(input) else _apply
    result: Tensor = apply(input, call)
    return result


class _Call(NamedTuple):
    """A kernel and its arguments beside the logits."""

    kernel: WholeLoss
    target: Tensor
    weight: Tensor | None
    options: LossOptions

    def __call__(self, input: Tensor, gradient: Tensor | None = None, upstream: float | Tensor = 1.0) -> Tensor:
        """The loss of logits in the layout of torch; their gradient, times ``upstream``, goes to ``gradient`` if it is given."""
        if input.dim() == 2:
            return self.kernel(input, self.target, self.weight, self.options, gradient, upstream)
        logits = _checks.classes_last(input)
        target = self.target.reshape(logits.shape[:-1])
        return self.kernel(
            logits, target, self.weight, self.options, None if gradient is None else _checks.classes_last(gradient), upstream
        )


class LargeMarginCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, call: _Call) -> Tensor:
        ctx.kernel, ctx.options, ctx.gradient = call.kernel, call.options, None
        ctx.save_for_backward(input, call.target, call.weight)
        # with "none" each row needs its own upstream gradient first
        if call.options.reduction != "none" and not _torch.has_saved_tensor_hooks():
            ctx.gradient = torch.empty_like(input)
        return call(input, ctx.gradient)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return _gradient(ctx, upstream), None


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    if not _torch.is_plain_gradient(upstream):
        return _reference_gradient(ctx, upstream)
    factor = upstream if upstream.dim() else upstream.item()
    gradient: Tensor | None
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is not None and isinstance(factor, float):
        if factor == 1:
            return gradient
        exact = gradient.dtype == torch.float32 or abs(math.frexp(factor)[0]) == 0.5  # a power of two is exact
        if exact and math.isfinite(factor):
            return gradient.mul_(factor)
    input, target, weight = ctx.saved_tensors
    kernel: WholeLoss = ctx.kernel
    if ladder.pick(input, None).loss is not kernel:  # hooks on saved tensors may return other tensors
        return _reference_gradient(ctx, upstream)
    gradient = torch.empty_like(input) if gradient is None else gradient
    _Call(kernel, target, weight, ctx.options)(input, gradient, factor)
    return gradient


def _reference_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    input, target, weight = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        alias = input.view_as(input) if input.requires_grad else input.requires_grad_()  # an alias, as hooks of input must run only once
        loss = dense.loss(alias, target, weight, ctx.options._replace(backend="reference"))
        gradient: Tensor = torch.autograd.grad(loss, alias, upstream, create_graph=create_graph)[0]
    return gradient


class DonatedLogits(torch.autograd.Function):
    """The same with the gradient in the place of the logits."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, call: _Call) -> Tensor:
        if getattr(input, "_donated_version", None) == _torch.version(input):
            raise ValueError("input was donated to another loss already, and holds its gradient; donate to the last loss that needs it")
        loss = call(input, input)
        torch.autograd.graph.increment_version(input)
        input._donated_version = _torch.version(input)  # type: ignore[attr-defined]
        ctx.gradient, ctx.version = input.detach(), _torch.version(input)
        ctx.save_for_backward(call.target == call.options.ignore_index)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        if ctx.gradient is None or not _torch.is_plain_gradient(upstream):
            raise RuntimeError("a loss with donate=True has one backward pass and no higher derivatives; leave donate=False")
        gradient, ctx.gradient = ctx.gradient, None
        if _torch.version(gradient) != ctx.version:
            raise RuntimeError(
                "the logits of a loss with donate=True were modified by an inplace operation before its backward pass; leave donate=False"
            )
        factor = upstream.item()
        if factor != 1:
            gradient.mul_(factor)
        if not math.isfinite(factor):
            (ignored,) = ctx.saved_tensors
            rows = _checks.classes_last(gradient)
            rows.masked_fill_(ignored.reshape(rows.shape[:-1]).unsqueeze(-1), 0.0)
        return gradient, None


_apply, _donated = _torch.direct_apply(LargeMarginCrossEntropy), _torch.direct_apply(DonatedLogits)
