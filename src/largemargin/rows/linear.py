r"""Linear layer and loss in one, without all logits N x C in memory.

One tile holds the logits of a few rows. The loss turns the tile into its gradient in place, and two products turn that into a part of the
gradients of features and classifier. If the loss is reduced, all this happens in the forward pass, with three products. With
``reduction="none"`` rows need their upstream gradients first, so the backward pass computes the logits again. A second backward pass does
so too. :mod:`.tiles` makes the tiles and accumulates their gradients.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _torch
from .._reduce import Labels, row_weights
from ..backends import ladder
from ..loss import LossOptions
from ..products import linear
from . import dtensors, whole
from .parts import loss_and_cotangents, part_of
from .tiles import Gradients, HalfLayerGradients, Layer, LayerGradients


class Problem(NamedTuple):
    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    linear_bias: Tensor | None
    target: Tensor  # (N,)
    weight: Tensor | None
    options: LossOptions

    @property
    def layer(self) -> Layer:
        return Layer(self.input, self.linear_weight, self.linear_bias)

    @property
    def summed_weight(self) -> Tensor | None:
        return self.weight if self.options.label_smoothing > 0 else None


def loss(problem: Problem) -> Tensor:
    parameters = [tensor for tensor in problem.layer if tensor is not None]
    if (
        torch.compiler.is_compiling()
        or not _torch.is_unwatched()
        or not all(map(_torch.is_plain, parameters))
        or (problem.weight is not None and problem.weight.requires_grad)
    ):
        return _with_logits(problem)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parameters):
        result: Tensor = LinearLargeMarginCrossEntropy.apply(*problem)
        return result
    return _chunked(problem, (False, False, False))[0]


def _with_logits(problem: Problem) -> Tensor:
    """The loss with all logits at once, for transforms, compiled code and higher derivatives."""
    dtype = problem.layer.dtype
    input, weight, bias = problem.layer
    logits = linear(input.to(dtype), weight.to(dtype))
    if bias is not None:
        logits = logits + bias.to(dtype)
    if _checks.is_dtensor(logits):
        return dtensors.loss(logits, problem.target, problem.weight, problem.options)
    return whole.loss(logits, problem.target, problem.weight, problem.options)


class LinearLargeMarginCrossEntropy(torch.autograd.Function):
    """The loss of features and classifier, whose gradients are made in the forward pass where one upstream gradient serves all rows."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        problem = Problem._make(arguments)
        ctx.save_for_backward(*problem.layer, problem.target, problem.weight)
        ctx.options = problem.options
        later = problem.options.reduction == "none" or _torch.has_saved_tensor_hooks()
        wanted = (False, False, False) if later else ctx.needs_input_grad[:3]
        loss, gradients = _chunked(problem, wanted)
        ctx.gradients = None if later else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, upstream), None, None, None


def _gradients(ctx: Any, upstream: Tensor) -> Gradients:
    if not _torch.is_plain_gradient(upstream):
        return _reference_gradients(ctx, upstream)
    gradients, ctx.gradients = ctx.gradients, None
    problem = Problem._make((*ctx.saved_tensors, ctx.options))
    factor: Tensor | None = upstream
    if gradients is None or not is_finite(upstream):
        gradients, factor = _chunked(problem, ctx.needs_input_grad[:3], upstream)[1], None
    return scaled(gradients, factor, problem.layer)


def is_finite(upstream: Tensor) -> bool:
    """Whether ``upstream`` is finite; if not, it must not reach ignored rows. On an accelerator a check would synchronise: True."""
    return not upstream.is_cpu or math.isfinite(upstream.item())


def scaled(gradients: Gradients, upstream: Tensor | None, layer: Layer) -> Gradients:
    """Accumulators times ``upstream``, multiplied in place and then rounded once to the dtypes of the layer."""
    if upstream is not None and not (upstream.is_cpu and upstream.item() == 1):
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
    d_input, d_weight, d_bias = (
        None if gradient is None or of is None else gradient.to(of.dtype) for gradient, of in zip(gradients, layer, strict=True)
    )
    return d_input, d_weight, d_bias


def _reference_gradients(ctx: Any, upstream: Tensor) -> Gradients:
    """The gradients through all logits; they can be differentiated and batched."""
    *layer, target, weight = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases, because the hooks of the tensors themselves must run only once, outside
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in layer]
        loss = _with_logits(Problem._make((*aliases, target, weight, ctx.options)))
        wanted = [alias for alias, needed in zip(aliases, ctx.needs_input_grad, strict=False) if needed and alias is not None]
        found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=create_graph))
    d_input, d_weight, d_bias = (next(found) if needed else None for needed in ctx.needs_input_grad[:3])
    return d_input, d_weight, d_bias


def _chunked(problem: Problem, wanted: Sequence[bool], upstream: Tensor | None = None) -> tuple[Tensor, Gradients]:
    """The loss, and the wanted gradients of input, linear_weight and linear_bias times ``upstream``, as accumulators."""
    layer, target, weight, options = problem.layer, problem.target, problem.weight, problem.options.for_part()
    a_row = options.reduction == "none"
    factor, denominator = factor_and_denominator(problem, upstream)
    losses = factor.new_zeros(len(target) if a_row else ())
    gradients, upstream = gradients_of(layer, wanted, factor)
    for rows, tile in gradients.tiles():
        here = upstream[rows] if upstream.dim() else upstream
        kernel = whole.kernel(tile, target, weight, options)
        if kernel is not None:
            loss = kernel(tile, target[rows], weight, options, tile if any(wanted) else None, here if here.dim() else here.item())
            gradients.add(rows, tile)
        else:
            labels = Labels.of(target[rows], len(layer.weight), options.ignore_index)
            backend = ladder.pick(tile, options.backend)
            summed = None if problem.summed_weight is None else problem.summed_weight.to(tile.dtype)
            part = part_of(tile, labels.class_index, summed, backend)
            loss, cotangents = loss_and_cotangents(part, labels, weight, options, here, any(wanted))
            if any(wanted):
                gradients.add_from_logits(rows, tile, labels.class_index, part, cotangents, backend, summed)
        losses[rows if a_row else ...] += loss
    return losses / denominator, gradients.finish()


def factor_and_denominator(problem: Problem, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factor of the gradients of the rows' losses (one number, or one per row), and the denominator of ``mean``, else 1."""
    dtype, target = problem.layer.dtype, problem.target
    factor = torch.ones((), dtype=dtype, device=target.device) if upstream is None else upstream.to(dtype)
    if problem.options.reduction != "mean":
        return factor, torch.ones_like(factor)
    denominator = row_weights(target, problem.weight, problem.options.ignore_index).sum().to(dtype)
    return factor / denominator, denominator


def gradients_of(layer: Layer, wanted: Sequence[bool], factor: Tensor) -> tuple[LayerGradients, Tensor]:
    """The accumulators of a layer's gradients, and the factor of the gradients of its logits."""
    if not layer.is_half:
        return LayerGradients(layer, wanted), factor
    # scaled to a largest factor of 1, for half precision
    size = factor.abs().amax() if factor.numel() else factor.new_ones(())
    size = torch.where((size > 0) & (size < torch.inf), size, 1.0)
    return HalfLayerGradients(layer, wanted, size), factor / size
