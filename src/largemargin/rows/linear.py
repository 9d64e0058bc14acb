r"""Linear layer and loss in one, without all logits N x C in memory.

One tile holds the logits of a few rows. The loss turns the tile into its gradient in place, and two products turn that into a part of the
gradients of features and classifier. If the loss is reduced, all this happens in the forward pass, with three products. With
``reduction="none"`` rows need their upstream gradients first, so the backward pass computes the logits again, as every second backward
pass does. :mod:`.tiles` makes the tiles and accumulates their gradients.

A classifier (C, d1, ..., D) has d1 x ... rows of logits for each row of features. A tile has them side by side, class by class.

The target may be a :class:`.teacher.Teacher`, which computes the probabilities of a tile when the tile needs them.
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
from . import dtensors, whole
from .parts import gradient_of, loss_and_cotangents, part_of
from .teacher import Teacher
from .tiles import Gradients, HalfLayerGradients, Layer, LayerGradients

TILES_OF_PROBABILITIES = 16  # without a kernel, the statistics of every class as the target take about 16 times the memory of their logits


class Problem(NamedTuple):
    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D), or (C d1 ..., D) of a classifier (C, d1, ..., D)
    linear_bias: Tensor | None
    target: Tensor | Teacher  # int64 indices (N, d1, ...), or probabilities (N, C, d1, ...)
    weight: Tensor | None
    options: LossOptions

    @property
    def layer(self) -> Layer:
        return Layer(self.input, self.linear_weight, self.linear_bias)

    @property
    def summed_weight(self) -> Tensor | None:
        return self.weight if self.options.label_smoothing > 0 else None

    @property
    def has_probabilities(self) -> bool:
        return isinstance(self.target, Teacher) or self.target.is_floating_point()

    @property
    def indices(self) -> Tensor:
        """The target without a teacher."""
        assert isinstance(self.target, Tensor)
        return self.target

    def probabilities(self, rows: slice) -> Tensor:
        return self.target.probabilities(rows) if isinstance(self.target, Teacher) else self.target[rows]

    @property
    def targets(self) -> list[Tensor | None]:
        """The tensors of the target."""
        return self.target.tensors if isinstance(self.target, Teacher) else [self.target]

    @property
    def positions(self) -> tuple[int, ...]:
        """``(d1, ...)``; empty for a classifier (C, D)."""
        if isinstance(self.target, Teacher):
            return tuple(self.target.linear_weight.shape[1:-1])
        return tuple(self.target.shape[2 if self.has_probabilities else 1 :])

    @property
    def num_classes(self) -> int:
        return len(self.linear_weight) // math.prod(self.positions)

    def logits_of(self, products: Tensor) -> Tensor:
        """A view (n, C, d1, ...) of ``products`` (n, C d1 ...)."""
        return products.unflatten(1, (self.num_classes, *self.positions)) if self.positions else products


def loss(problem: Problem) -> Tensor:
    parameters = [tensor for tensor in problem.layer if tensor is not None]
    probabilities = [tensor for tensor in problem.targets if tensor is not None and problem.has_probabilities]
    if (
        torch.compiler.is_compiling()
        or not _torch.is_unwatched()
        or not all(map(_torch.is_plain, [*parameters, *probabilities]))
        or any(tensor is not None and tensor.requires_grad for tensor in (problem.weight, *problem.targets))
    ):
        return _with_logits(problem)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parameters):
        result: Tensor = LinearLargeMarginCrossEntropy.apply(*problem)
        return result
    return _chunked(problem, (False, False, False))[0]


def _with_logits(problem: Problem) -> Tensor:
    """The loss with all logits at once, for transforms, compiled code and higher derivatives."""
    logits = problem.logits_of(problem.layer.logits())
    target = problem.target.all_probabilities() if isinstance(problem.target, Teacher) else problem.target
    if _checks.is_dtensor(logits) and not problem.has_probabilities:
        return dtensors.loss(logits, target, problem.weight, problem.options)
    return whole.loss(logits, target, problem.weight, problem.options)


class LinearLargeMarginCrossEntropy(torch.autograd.Function):
    """The loss of features and classifier. If it is reduced, the forward pass makes the gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        problem = Problem._make(arguments)
        ctx.save_for_backward(*problem.layer, problem.weight, *problem.targets)
        ctx.options = problem.options
        ctx.temperature = problem.target.temperature if isinstance(problem.target, Teacher) else None
        later = problem.options.reduction == "none" or _torch.has_saved_tensor_hooks()
        wanted = (False, False, False) if later else ctx.needs_input_grad[:3]
        loss, gradients = _chunked(problem, wanted)
        ctx.gradients = None if later else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, upstream), None, None, None


def _saved(ctx: Any) -> Problem:
    input, linear_weight, linear_bias, weight, *targets = ctx.saved_tensors
    if ctx.temperature is None:
        return Problem(input, linear_weight, linear_bias, targets[0], weight, ctx.options)
    return Problem(input, linear_weight, linear_bias, Teacher._make((*targets, ctx.temperature)), weight, ctx.options)


def _gradients(ctx: Any, upstream: Tensor) -> Gradients:
    if not _torch.is_plain_gradient(upstream):
        return _reference_gradients(ctx, upstream)
    gradients, ctx.gradients = ctx.gradients, None
    problem = _saved(ctx)
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
    """The gradients through all logits."""
    problem = _saved(ctx)

    def loss(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
        return _with_logits(problem._replace(input=input, linear_weight=linear_weight, linear_bias=linear_bias))

    d_input, d_weight, d_bias = whole.gradients_by_autograd(loss, problem.layer, ctx.needs_input_grad, upstream)
    return d_input, d_weight, d_bias


def _chunked(problem: Problem, wanted: Sequence[bool], upstream: Tensor | None = None) -> tuple[Tensor, Gradients]:
    """The loss, and the wanted gradients of input, linear_weight and linear_bias times ``upstream``, as accumulators."""
    if problem.has_probabilities or problem.layer.is_half:
        return _in_tiles(problem, wanted, upstream)
    gradients = LayerGradients(problem.layer, wanted)
    kernel = ladder.pick_for_loss(gradients.workspace, problem.indices, problem.weight, problem.options.backend).loss
    if kernel is None or not gradients.one_tile:
        return _in_tiles(problem, wanted, upstream, gradients)
    # a kernel that has all rows also reduces their losses; by operations of torch that takes a quarter of a small call
    ((rows, tile),) = gradients.tiles()
    logits = _checks.classes_last(problem.logits_of(tile))
    factor = 1.0 if upstream is None else upstream if upstream.dim() else upstream.item()
    loss = kernel(logits, problem.indices, problem.weight, problem.options, logits if any(wanted) else None, None, factor)
    gradients.add(rows, tile)
    return loss, gradients.finish()


def _in_tiles(
    problem: Problem, wanted: Sequence[bool], upstream: Tensor | None, gradients: LayerGradients | None = None
) -> tuple[Tensor, Gradients]:
    factor, denominator = factor_and_denominator(problem, upstream)
    problem = problem._replace(options=problem.options.for_part())
    a_row, dtype = problem.options.reduction == "none", factor.dtype
    if problem.has_probabilities:
        dtype = torch.promote_types(dtype, problem.target.dtype)
    losses = factor.new_zeros((len(problem.input), *problem.positions) if a_row else (), dtype=dtype)
    if gradients is None:
        gradients, factor = gradients_of(problem.layer, wanted, factor, TILES_OF_PROBABILITIES if problem.has_probabilities else 1)
    loss_of_tile = _loss_of_probabilities if problem.has_probabilities else _loss_of_indices
    for rows, tile in gradients.tiles():
        here = factor[rows] if factor.dim() else factor
        losses[rows if a_row else ...] += loss_of_tile(problem, rows, tile, gradients, here, any(wanted))
    return losses / denominator, gradients.finish()


def _loss_of_indices(problem: Problem, rows: slice, tile: Tensor, gradients: LayerGradients, upstream: Tensor, wanted: bool) -> Tensor:
    """The loss of a tile. If ``wanted``, its gradient times ``upstream`` replaces the logits and is added to ``gradients``."""
    target, weight, options = problem.indices[rows], problem.weight, problem.options
    logits = _checks.classes_last(problem.logits_of(tile))
    kernel = ladder.pick_for_loss(logits, target, weight, options.backend).loss
    if kernel is not None:
        loss = kernel(logits, target, weight, options, logits if wanted else None, None, upstream if upstream.dim() else upstream.item())
        gradients.add(rows, tile)
        return loss
    labels = Labels.of(target, problem.num_classes, options.ignore_index)
    backend = ladder.pick(logits, options.backend)
    summed = None if problem.summed_weight is None else problem.summed_weight.to(tile.dtype)
    part = part_of(logits, labels.class_index, summed, backend)
    loss, cotangents = loss_and_cotangents(part, labels, weight, options, upstream, wanted)
    if wanted and problem.positions:
        gradient_of(logits, labels.class_index, summed, part, cotangents, backend, logits)
        gradients.add(rows, tile)
    elif wanted:
        gradients.add_from_logits(rows, tile, labels.class_index, part, cotangents, backend, summed)
    return loss


def _loss_of_probabilities(
    problem: Problem, rows: slice, tile: Tensor, gradients: LayerGradients, upstream: Tensor, wanted: bool
) -> Tensor:
    """The same for probabilities."""
    logits, target = problem.logits_of(tile), problem.probabilities(rows)
    if not wanted:
        return whole.loss(logits, target, problem.weight, problem.options)
    leaf = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = whole.loss(leaf, target, problem.weight, problem.options)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype).expand_as(loss))
    logits.copy_(gradient)
    gradients.add(rows, tile)
    return loss.detach()


def factor_and_denominator(problem: Problem, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factor of the gradients of the rows' losses (one number, or one per row), and the denominator of ``mean``, else 1."""
    dtype = problem.layer.dtype
    factor = torch.ones((), dtype=dtype, device=problem.input.device) if upstream is None else upstream.to(dtype)
    if problem.options.reduction != "mean":
        return factor, torch.ones_like(factor)
    if problem.has_probabilities:
        num_rows = len(problem.input) * math.prod(problem.positions)
        return factor / num_rows if num_rows else factor, torch.full_like(factor, num_rows)
    denominator = row_weights(problem.indices, problem.weight, problem.options.ignore_index).sum().to(dtype)
    return factor / denominator, denominator


def gradients_of(layer: Layer, wanted: Sequence[bool], factor: Tensor, tiles: int = 1) -> tuple[LayerGradients, Tensor]:
    """The accumulators of a layer's gradients, and the factor of the gradients of its logits; ``tiles`` as in :class:`LayerGradients`."""
    if not layer.is_half:
        return LayerGradients(layer, wanted, tiles), factor
    # scaled to a largest factor of 1, for half precision
    size = factor.abs().amax() if factor.numel() else factor.new_ones(())
    size = torch.where((size > 0) & (size < torch.inf), size, 1.0)
    return HalfLayerGradients(layer, wanted, size, tiles), factor / size
