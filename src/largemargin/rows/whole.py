"""The loss of rows by a kernel that computes all of it. The forward pass writes the gradient too, so both cost one exp per element.

The backward pass returns this gradient if the upstream gradient is 1, and scales it if that is exact. Otherwise, and in a second
backward pass, it computes the gradient again from the logits. Donated logits do not exist any more after the forward pass: their gradient
replaces them, is always scaled, and allows one backward pass.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor

from .. import _checks, _torch
from ..backends import ladder, reference
from ..backends.protocol import LossOfProbabilities, WholeLoss
from ..loss import LossOptions
from . import all_classes, dense


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
    if target.dtype is not torch.int64:
        target = target.long()
    if not (input.requires_grad and torch.is_grad_enabled()):
        return whole(*_rows(input, target), weight, options)
    apply = _apply_donated if donate and _may_be_donated(input, options) else _apply
    result: Tensor = apply(input, target, weight, options, whole)
    return result


def kernel_of_probabilities(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> LossOfProbabilities | None:
    """The kernel of the whole loss of these logits and class probabilities, if there is one."""
    if torch.compiler.is_compiling():
        ladder.refuse_probabilities(options.backend)
        return None
    backend = ladder.pick(input, options.backend)
    if backend is reference or input.numel() == 0:
        return None
    plain = _torch.is_plain(target) and not _torch.is_zero_tensor(target)
    fixed_weight = weight is None or (_torch.is_plain(weight) and not weight.requires_grad)
    if backend.loss_of_probabilities is None or not plain or not fixed_weight:
        ladder.refuse_probabilities(options.backend)
        return None
    return backend.loss_of_probabilities


def loss_of_probabilities(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, donate: bool = False) -> Tensor:
    """The loss of logits (C,), (N, C) or (N, C, d1, ...) and probabilities of the same shape, by a kernel or by the statistics."""
    whole = kernel_of_probabilities(input, target, weight, options)
    if whole is None:
        return all_classes.loss(input, target, weight, options)
    if not (torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)):
        return whole(_checks.classes_last(input), _checks.classes_last(target), weight, options)
    donated = donate and input.requires_grad and _may_be_donated(input, options)
    operation = DonatedLogitsOfProbabilities if donated else LargeMarginOfProbabilities
    result: Tensor = operation.apply(input, target, weight, options, whole)
    return result


def _may_be_donated(input: Tensor, options: LossOptions) -> bool:
    """A donated gradient is made before its scale is known, which float16 does not bear."""
    return options.reduction != "none" and input.dtype is not torch.float16 and not _torch.overlaps_itself(input)


def _rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if input.dim() == 2:
        return input, target
    logits = _checks.classes_last(input)
    return logits, target.reshape(logits.shape[:-1])


class LargeMarginCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, kernel: WholeLoss) -> Tensor:
        ctx.options, ctx.kernel, ctx.gradient = options, kernel, None
        ctx.save_for_backward(input, target, weight)
        # with "none" each row needs its own upstream gradient first
        if options.reduction == "none" or _torch.has_saved_tensor_hooks():
            return kernel(*_rows(input, target), weight, options)
        ctx.gradient = torch.empty_like(input)
        return kernel(*_rows(input, target), weight, options, _checks.classes_last(ctx.gradient))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, upstream), None, None, None, None


def _gradient(ctx: Any, upstream: Tensor) -> Tensor:
    if not _torch.is_plain_gradient(upstream):
        return _reference_gradient(ctx, upstream)
    factor = upstream if upstream.dim() else upstream.item()
    gradient: Tensor | None
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is not None and _scales(gradient, factor):
        return gradient if factor == 1 else gradient.mul_(factor)
    input, target, weight = ctx.saved_tensors
    kernel: WholeLoss = ctx.kernel
    if ladder.pick(input, None).loss is not kernel:  # hooks on saved tensors may return other tensors
        return _reference_gradient(ctx, upstream)
    if gradient is None:
        gradient = torch.empty_like(input)
    kernel(*_rows(input, target), weight, ctx.options, _checks.classes_last(gradient), factor)
    return gradient


def _scales(gradient: Tensor, factor: float | Tensor) -> bool:
    """Whether the gradient of the forward pass may be scaled: the factor is one number, and the product exact or in float32."""
    if not isinstance(factor, float) or not math.isfinite(factor):
        return False
    if gradient.dtype == torch.float16:  # its small entries are lost, and a scaled loss is there to keep them
        return factor == 1
    return gradient.dtype == torch.float32 or abs(math.frexp(factor)[0]) == 0.5  # a power of two


def _reference_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    input, target, weight = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        alias = _alias(input)
        loss = dense.loss(alias, target, weight, ctx.options._replace(backend="reference"))
        gradient: Tensor = torch.autograd.grad(loss, alias, upstream, create_graph=create_graph)[0]
    return gradient


class LargeMarginOfProbabilities(torch.autograd.Function):
    """The same for class probabilities, which may require a gradient too."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, kernel: LossOfProbabilities
    ) -> Tensor:
        ctx.options, ctx.kernel, ctx.gradients = options, kernel, None
        ctx.save_for_backward(input, target, weight)
        if options.reduction == "none" or _torch.has_saved_tensor_hooks():
            return kernel(_checks.classes_last(input), _checks.classes_last(target), weight, options)
        loss, *ctx.gradients = _with_gradients(ctx, input, target, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, upstream), None, None, None


def _with_gradients(
    ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, factor: float | Tensor = 1.0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the gradients that are asked for, times ``factor``."""
    wanted = [torch.empty_like(tensor) if needed else None for tensor, needed in zip((input, target), ctx.needs_input_grad, strict=False)]
    of_input, of_target = (None if tensor is None else _checks.classes_last(tensor) for tensor in wanted)
    kernel = cast(LossOfProbabilities, ctx.kernel)
    loss = kernel(_checks.classes_last(input), _checks.classes_last(target), weight, ctx.options, of_input, of_target, factor)
    return loss, wanted[0], wanted[1]


def _gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if not _torch.is_plain_gradient(upstream):
        return _reference_gradients(ctx, upstream)
    factor = upstream if upstream.dim() else upstream.item()
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is not None and all(gradient is None or _scales(gradient, factor) for gradient in gradients):
        of_input, of_target = (gradient if gradient is None or factor == 1 else gradient.mul_(factor) for gradient in gradients)
        return of_input, of_target
    input, target, weight = ctx.saved_tensors
    if ladder.pick(input, None).loss_of_probabilities is not ctx.kernel:  # hooks on saved tensors may return other tensors
        return _reference_gradients(ctx, upstream)
    _, of_input, of_target = _with_gradients(ctx, input, target, weight, factor)
    return of_input, of_target


def _reference_gradients(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    *saved, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad[:2]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        input, target = (_alias(tensor) if need else tensor for tensor, need in zip(saved, needed, strict=True))
        loss = all_classes.loss(input, target, weight, ctx.options)
        wanted = [tensor for tensor, need in zip((input, target), needed, strict=True) if need]
        found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=create_graph))
    of_input, of_target = (next(found) if need else None for need in needed)
    return of_input, of_target


def _alias(tensor: Tensor) -> Tensor:
    """A tensor to differentiate by in its place, as its hooks must run only once."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.requires_grad_()


class DonatedLogits(torch.autograd.Function):
    """The same with the gradient in the place of the logits."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, kernel: WholeLoss) -> Tensor:
        _check_first_donation(input)
        rows, labels = _rows(input, target)
        loss = kernel(rows, labels, weight, options, rows)
        _keep_donated(ctx, input)
        ctx.save_for_backward(labels == options.ignore_index)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, factor = _donated_gradient(ctx, upstream)
        if not math.isfinite(factor):
            (ignored,) = ctx.saved_tensors
            _checks.classes_last(gradient).masked_fill_(ignored.unsqueeze(-1), 0.0)
        return gradient, None, None, None, None


class DonatedLogitsOfProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, kernel: LossOfProbabilities
    ) -> Tensor:
        _check_first_donation(input)
        rows = _checks.classes_last(input)
        ctx.of_target = torch.empty_like(target) if ctx.needs_input_grad[1] else None
        of_target = None if ctx.of_target is None else _checks.classes_last(ctx.of_target)
        loss = kernel(rows, _checks.classes_last(target), weight, options, rows, of_target)
        _keep_donated(ctx, input)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, factor = _donated_gradient(ctx, upstream)
        of_target, ctx.of_target = ctx.of_target, None
        return gradient, None if of_target is None else of_target.mul_(factor), None, None, None


def _check_first_donation(input: Tensor) -> None:
    if getattr(input, "_donated_version", None) == _torch.version(input):
        raise ValueError("input was donated to another loss already, and holds its gradient; donate to the last loss that needs it")


def _keep_donated(ctx: Any, input: Tensor) -> None:
    """Remember ``input``, which holds its gradient by now."""
    torch.autograd.graph.increment_version(input)
    input._donated_version = _torch.version(input)  # type: ignore[attr-defined]
    ctx.gradient, ctx.version = input.detach(), _torch.version(input)


def _donated_gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor, float]:
    """The gradient times the upstream factor, and this factor."""
    if ctx.gradient is None or not _torch.is_plain_gradient(upstream):
        raise RuntimeError("a loss with donate=True has one backward pass and no higher derivatives; leave donate=False")
    gradient: Tensor
    gradient, ctx.gradient = ctx.gradient, None
    if _torch.version(gradient) != ctx.version:
        raise RuntimeError(
            "the logits of a loss with donate=True, now their gradient, were modified by an inplace operation before its backward pass"
        )
    factor = upstream.item()
    return gradient if factor == 1 else gradient.mul_(factor), factor


_apply, _apply_donated = _torch.direct_apply(LargeMarginCrossEntropy), _torch.direct_apply(DonatedLogits)
