"""The large-margin loss of logits with all classes, by a kernel of the whole loss, or else by the statistics of the rows.

On the CPU the forward pass writes the gradients too, so both passes cost one exp per element. The backward pass returns these gradients if
the upstream gradient is 1, and scales them if that is exact. Otherwise, and in a second backward pass, it computes the gradients again from
the logits. The gradient of donated logits replaces them in the forward pass; it is always scaled, and allows one backward pass. Only class
probabilities can have a gradient of the target.

A loss in float16 is scaled so that small gradients do not become 0. They must be scaled before they are rounded, so logits in float16 are
not donated, and their gradient is never scaled afterwards.

On a GPU the host does not know the upstream gradient, and must not wait for it. There the backward pass computes the gradients, from the
logits and a few numbers a row.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _torch
from ..backends import ladder
from ..backends.protocol import TwoPasses, WholeLoss
from ..loss import HingeOptions, LossOptions
from . import all_classes, dense

Gradients = tuple[Tensor | None, Tensor | None]  # of the logits and the target


def loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions | HingeOptions, donate: bool = False) -> Tensor:
    """The loss of logits (C,), (N, C) or (N, C, d1, ...) and class indices or probabilities, by a kernel or by the statistics."""
    found = ladder.pick_for_loss(input, target, weight, options.backend)
    differentiated = torch.is_grad_enabled() and (input.requires_grad or target.requires_grad)
    if found.two_passes is not None and isinstance(options, LossOptions):
        if not differentiated:
            return found.two_passes.forward(*_rows(input, target), weight, options, False)[0]
        result: Tensor = LargeMarginInTwoPasses.apply(input, target, weight, options, found.two_passes, donate)
        return result
    if found.loss is None:
        return _by_statistics(input, target, weight, options)
    if target.dtype is torch.uint8:
        target = target.long()
    if not differentiated:
        return found.loss(*_rows(input, target), weight, options)
    donated = donate and input.requires_grad and not _waits(input, target, options) and not _torch.overlaps_itself(input)
    result = (_apply_donated if donated else _apply)(input, target, weight, options, found.loss)
    return result


def _by_statistics(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions | HingeOptions) -> Tensor:
    if isinstance(options, LossOptions) and target.is_floating_point():
        return all_classes.loss(input, target, weight, options)
    return dense.loss(input, target, weight, options)


def _waits(input: Tensor, target: Tensor, options: LossOptions | HingeOptions) -> bool:
    """Whether gradients wait for the upstream gradient: one for each row, or the scale that keeps small entries of float16."""
    return options.reduction == "none" or input.dtype is torch.float16 or target.dtype is torch.float16


def _rows(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if input.dim() == 2:
        return input, target
    logits = _checks.classes_last(input)
    return logits, _checks.classes_last(target) if target.is_floating_point() else target.reshape(logits.shape[:-1])


class LargeMarginCrossEntropy(torch.autograd.Function):
    """The loss whose gradients a kernel writes in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions | HingeOptions, kernel: WholeLoss
    ) -> Tensor:
        ctx.options, ctx.kernel, ctx.gradients = options, kernel, None
        ctx.save_for_backward(input, target, weight)
        if _waits(input, target, options) or _torch.has_saved_tensor_hooks():
            return kernel(*_rows(input, target), weight, options)
        loss, ctx.gradients = _with_gradients(ctx, input, target, weight)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, upstream), None, None, None


def _with_gradients(
    ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, factor: float | Tensor = 1.0
) -> tuple[Tensor, Gradients]:
    """The loss, and the gradients that autograd asks for, times ``factor``."""
    of_input = torch.empty_like(input) if ctx.needs_input_grad[0] else None
    of_target = torch.empty_like(target) if ctx.needs_input_grad[1] else None
    rows, written = _rows(input, target), (_classes_last(of_input), _classes_last(of_target))
    return ctx.kernel(*rows, weight, ctx.options, *written, factor), (of_input, of_target)


def _classes_last(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _checks.classes_last(tensor)


def _gradients(ctx: Any, upstream: Tensor) -> Gradients:
    if not _torch.is_plain_gradient(upstream):
        return _reference_gradients(ctx, upstream)
    gradients: Gradients | None
    gradients, ctx.gradients = ctx.gradients, None
    factor = upstream if upstream.dim() else upstream.item()
    if gradients is not None:
        if factor == 1:
            return gradients
        if all(gradient is None or _scales(gradient, factor) for gradient in gradients):
            of_input, of_target = (None if gradient is None else gradient.mul_(factor) for gradient in gradients)
            return of_input, of_target
    input, target, weight = ctx.saved_tensors
    if ladder.pick(input, None).loss is not ctx.kernel:  # hooks on saved tensors may return other tensors
        return _reference_gradients(ctx, upstream)
    return _with_gradients(ctx, input, target, weight, factor)[1]


def _scales(gradient: Tensor, factor: float | Tensor) -> bool:
    """Whether the gradient of the forward pass may be scaled: by one finite number, with a product that is exact or in at least float32."""
    if not isinstance(factor, float) or not math.isfinite(factor):
        return False
    if gradient.dtype == torch.float16:  # its small numbers have lost their digits
        return False
    return gradient.dtype in (torch.float32, torch.float64) or abs(math.frexp(factor)[0]) == 0.5  # a power of two


def _reference_gradients(ctx: Any, upstream: Tensor) -> Gradients:
    input, target, weight = ctx.saved_tensors[:3]
    options = ctx.options._replace(backend="reference")
    of_input, of_target = gradients_by_autograd(
        lambda input, target: _by_statistics(input, target, weight, options), (input, target), ctx.needs_input_grad, upstream
    )
    return of_input, of_target


def gradients_by_autograd(
    loss: Callable[..., Tensor], tensors: Sequence[Tensor | None], needed: Sequence[bool], upstream: Tensor
) -> list[Tensor | None]:
    """The gradients of ``loss(*tensors)``, which can be differentiated and batched."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [_alias(tensor) if need and tensor is not None else tensor for tensor, need in zip(tensors, needed, strict=False)]
        wanted = [alias for alias, need in zip(aliases, needed, strict=False) if need and alias is not None]
        found = iter(torch.autograd.grad(loss(*aliases), wanted, upstream, create_graph=create_graph))
    return [next(found) if need else None for _, need in zip(tensors, needed, strict=False)]


def _alias(tensor: Tensor) -> Tensor:
    """A tensor to differentiate by instead of ``tensor``, whose hooks must run only once."""
    return tensor.view_as(tensor) if tensor.requires_grad else tensor.requires_grad_()


class LargeMarginInTwoPasses(torch.autograd.Function):
    """The loss whose gradient is computed in the backward pass, and written into the memory of donated logits."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, passes: TwoPasses, donate: bool
    ) -> Tensor:
        loss, saved = passes.forward(*_rows(input, target), weight, options, True)
        ctx.options, ctx.passes, ctx.dtype, ctx.donated = options, passes, input.dtype, donate and options.reduction != "none"
        ctx.save_for_backward(input, target, weight, *saved)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, target, weight, *saved = ctx.saved_tensors
        # hooks on saved tensors may return other tensors
        plain = all(tensor is None or _torch.is_plain(tensor) for tensor in (input, target, weight, *saved))
        kept = plain and input.dtype is ctx.dtype and saved[0].dtype is torch.float32
        if not (kept and _torch.is_plain_gradient(upstream)):
            return *_reference_gradients(ctx, upstream), None, None, None, None
        donated = ctx.donated and ctx.needs_input_grad[0] and not _torch.overlaps_itself(input)
        of_input = input.detach() if donated else torch.empty_like(input) if ctx.needs_input_grad[0] else None
        of_target = torch.empty_like(target) if ctx.needs_input_grad[1] else None
        written = _classes_last(of_input), _classes_last(of_target)
        ctx.passes.backward(*_rows(input, target), weight, ctx.options, saved, upstream, *written)
        if donated:
            torch.autograd.graph.increment_version(input)
        return of_input, of_target, None, None, None, None


class DonatedLogits(torch.autograd.Function):
    """The loss of donated logits: in the forward pass the gradient takes the place of the logits."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, kernel: WholeLoss) -> Tensor:
        if getattr(input, "_donated_version", None) == _torch.version(input):
            raise ValueError("input was donated to another loss already, and holds its gradient; donate it to the last loss that reads it")
        logits, rows = _rows(input, target)
        of_target = torch.empty_like(target) if ctx.needs_input_grad[1] else None
        loss = kernel(logits, rows, weight, options, logits, _classes_last(of_target))
        torch.autograd.graph.increment_version(input)
        input._donated_version = _torch.version(input)  # type: ignore[attr-defined]
        ctx.gradients, ctx.version = (input.detach(), of_target), _torch.version(input)
        ctx.save_for_backward(None if target.is_floating_point() else rows == options.ignore_index)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None or not _torch.is_plain_gradient(upstream):
            raise RuntimeError("a loss with donate=True has one backward pass and no higher derivatives; use donate=False")
        (gradient, of_target), ctx.gradients = ctx.gradients, None
        if _torch.version(gradient) != ctx.version:
            raise RuntimeError(
                "input of a loss with donate=True holds its gradient, but was modified by an inplace operation before the backward pass"
            )
        factor = upstream.item()
        if factor != 1:
            gradient.mul_(factor)
            of_target = None if of_target is None else of_target.mul_(factor)
        (ignored,) = ctx.saved_tensors
        if ignored is not None and not math.isfinite(factor):
            _checks.classes_last(gradient).masked_fill_(ignored.unsqueeze(-1), 0.0)
        return gradient, of_target, None, None, None


_apply, _apply_donated = _torch.direct_apply(LargeMarginCrossEntropy), _torch.direct_apply(DonatedLogits)
