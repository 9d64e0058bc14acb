r"""Linear layer and loss in one: features x classifier -> loss, without the logits N x C.

A few rows at a time have their logits in one tile. The loss turns the tile into its gradient in place, and two products turn that into
their part of the gradients of features and classifier. Where the reduction is a number this happens in the forward pass: three products
in all. With ``reduction="none"``, whose rows wait for their upstream gradients, and in a second backward pass the logits are computed
again. What a tile is made of and where its gradient goes is in :mod:`.layer`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, fused, shards
from ._backends import Divergence, LossOptions, ladder
from ._backends.ladder import Backend
from ._reduce import Reduction, row_weights
from .dtensors import check_alike, check_plain, is_dtensor
from .functional import LossOfRows, checked_options, large_margin_cross_entropy
from .layer import Gradients, HalfLayerGradients, Layer, LayerGradients
from .ops import class_index
from .products import linear
from .tracing import is_symbolic, no_script, record


@no_script
def linear_large_margin_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    num_classes: int | None = None,
    lam: float = 0.3,
    divergence: Divergence = "symmetric",
    hard_bias: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
    r"""The large-margin loss of ``linear(input, linear_weight, linear_bias)``, in the memory of its gradients: the logits are never held.

    .. math:: \ell(X W^\top + b, y), \quad \ell \text{ of eqs. (8), (11), (13), (15)}

    Equal to :func:`large_margin_cross_entropy` of these logits up to rounding. Half precision is multiplied and accumulated in float32.

    Args:
        input: features, shape ``(N, D)``, ``(B, T, D)`` or any ``(..., D)``, floating.
        linear_weight: the classifier, shape ``(C, D)``, floating; another dtype than that of ``input`` is fine.
        target: class indices, shape ``(...)`` of ``input`` without its last dimension, int64 (or uint8). No probabilities.
        linear_bias: shape ``(C,)``, floating; a class whose bias is -inf is not in the row.
        weight: a factor for each class, shape ``(num_classes,)``, floating.
        num_classes: the first ``num_classes`` rows of ``linear_weight`` are classes, the rest is padding with gradient 0; default all.
        lam: the paper's lambda, at least 0.
        divergence: ``"symmetric"`` (8), ``"kl_qu"`` or ``"kl_uq"`` (10).
        hard_bias: the constant b of eq. (15), in nats, finite.
        label_smoothing: the epsilon of eq. (13), in [0, 1].
        ignore_index: rows with this target have loss 0 and an exactly zero gradient.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``; ``"none"`` computes the logits a second time in the backward pass.
        backend: who computes the loss of a tile, as in :func:`large_margin_cross_entropy`.

    Returns:
        A scalar, or with ``reduction="none"`` the loss of each row, shaped like ``target``; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`large_margin_cross_entropy` for the logits; ValueError where shapes of
            features and classifier do not fit, and for an empty ``linear_weight`` (a parameter sharded away must be gathered first).

    Example:
        >>> import torch
        >>> from largemargin import linear_large_margin_cross_entropy
        >>> features, classifier = torch.eye(3, requires_grad=True), torch.eye(3, requires_grad=True)
        >>> loss = linear_large_margin_cross_entropy(features, classifier, torch.tensor([0, 1, 2]))
        >>> loss
        tensor(0.5514, grad_fn=<...>)
        >>> loss.backward()

    Source: Kobayashi, BMVC 2019, eqs. (8), (11), (13) and (15); the chunks over rows are folklore.
    """
    if is_symbolic(input, target):
        return record(linear_large_margin_cross_entropy, locals())  # type: ignore[no-any-return]
    options = checked_options(lam, divergence, hard_bias, label_smoothing, ignore_index, reduction)
    _checks.check_linear(input, linear_weight, target, linear_bias, num_classes)
    check_alike(input=input, linear_weight=linear_weight, linear_bias=linear_bias)
    if not is_dtensor(input):
        for name, value in (("target", target), ("weight", weight)):
            check_plain(name, value)
    if num_classes is not None and num_classes != len(linear_weight):  # the gradient of the padding is 0, as autograd makes it
        linear_weight = linear_weight[:num_classes]
        linear_bias = None if linear_bias is None else linear_bias[:num_classes]
    features, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    like_logits = features[:, :1].expand(-1, len(linear_weight))  # their shape, dtype and device, for the checks of the loss
    _checks.check_indices(like_logits, labels, ignore_index)
    _checks.check_weight(weight, like_logits)
    if _checks.can_look_at(labels):
        _checks.check_range(labels, len(linear_weight), ignore_index)
    loss = _linear_loss(Problem(features, linear_weight, linear_bias, labels.long(), weight, options, backend))
    return loss.reshape(target.shape) if reduction == "none" else loss


class Problem(NamedTuple):
    """Rows, the layer that makes logits of them, and the loss of these."""

    input: Tensor  # (N, D)
    linear_weight: Tensor  # (C, D)
    linear_bias: Tensor | None
    target: Tensor  # (N,)
    weight: Tensor | None
    options: LossOptions
    backend: Backend | None

    @property
    def layer(self) -> Layer:
        return Layer(*self[:3])


def _linear_loss(problem: Problem) -> Tensor:
    parameters = [tensor for tensor in problem[:3] if tensor is not None]
    if (
        torch.compiler.is_compiling()
        or not ladder.unwatched()
        or not all(map(ladder.is_plain, parameters))
        or (problem.weight is not None and problem.weight.requires_grad)
    ):
        return _with_logits(problem)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parameters):
        loss: Tensor = LinearLargeMarginCrossEntropy.apply(*problem)
        return loss
    return _chunked(problem, (False, False, False))[0]


def _with_logits(problem: Problem) -> Tensor:
    """The same by its definition, with all logits at once: what transforms, compiled code and higher derivatives take."""
    dtype = problem.layer.dtype
    input, weight, bias = problem.layer
    logits = linear(input.to(dtype), weight.to(dtype))
    if bias is not None:
        logits = logits + bias.to(dtype)
    return large_margin_cross_entropy(logits, problem.target, problem.weight, **problem.options._asdict(), backend=problem.backend)


class LinearLargeMarginCrossEntropy(torch.autograd.Function):
    """The loss of features and classifier, whose gradients are made in the forward pass where one upstream gradient serves all rows."""

    @staticmethod
    def forward(ctx: Any, *problem: Any) -> Tensor:
        *tensors, options, backend = problem
        ctx.save_for_backward(*tensors)
        ctx.settings = options, backend
        later = options.reduction == "none" or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        wanted = (False, False, False) if later else ctx.needs_input_grad[:3]
        loss, gradients = _chunked(Problem(*problem), wanted)
        ctx.gradients = None if later else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ladder.is_plain_gradient(upstream):
            return *_reference_gradients(ctx, upstream), None, None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        tensors = ctx.saved_tensors
        factor: Tensor | None = upstream
        if gradients is None or not is_finite(upstream):
            gradients, factor = _chunked(Problem(*tensors, *ctx.settings), ctx.needs_input_grad[:3], upstream)[1], None
        return *scaled(gradients, factor, Layer(*tensors[:3])), None, None, None, None


def is_finite(upstream: Tensor) -> bool:
    """Of an upstream gradient that is not, ignored rows are to know nothing; where looking costs a wait, they may."""
    return not upstream.is_cpu or math.isfinite(upstream.item())


def scaled(gradients: Gradients, upstream: Tensor | None, layer: Layer) -> Gradients:
    """Accumulators, which nobody else has, times ``upstream``, in the dtypes of the layer: rounded once, and last."""
    if upstream is not None and not (upstream.is_cpu and upstream.item() == 1):
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
    d_input, d_weight, d_bias = (
        None if gradient is None or of is None else gradient.to(of.dtype) for gradient, of in zip(gradients, layer, strict=True)
    )
    return d_input, d_weight, d_bias


def _reference_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The gradients by the definition, which can be differentiated and batched."""
    *layer, target, weight = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: the hooks of the tensors themselves run once, outside
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in layer]
        loss = _with_logits(Problem._make((*aliases, target, weight, *ctx.settings)))
        wanted = [alias for alias, needed in zip(aliases, ctx.needs_input_grad, strict=False) if needed and alias is not None]
        found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=create_graph))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]


def _chunked(problem: Problem, wanted: Sequence[bool], upstream: Tensor | None = None) -> tuple[Tensor, Gradients]:
    """The loss, and of the gradients of input, linear_weight and linear_bias those that are wanted, times ``upstream``; accumulators."""
    layer, target, weight, options, backend = problem.layer, *problem[3:]
    a_row = options.reduction == "none"
    factor, denominator = factor_and_denominator(problem, upstream)
    of_rows = options._replace(reduction="none" if a_row else "sum")
    losses = factor.new_zeros(len(target) if a_row else ())
    gradients, upstream = gradients_of(layer, wanted, factor)
    for rows, tile in gradients.tiles():
        here = upstream[rows] if upstream.dim() else upstream
        if fused.applies(tile, target, weight, backend):
            loss = fused.loss_and_gradient(tile, target[rows], weight, of_rows, tile if any(wanted) else None, here)
            gradients.add(rows, tile)
        else:
            loss_of_rows = LossOfRows(*class_index(target[rows], len(layer.weight), options.ignore_index), weight, of_rows)
            index, kernels = loss_of_rows.class_index, ladder.kernels(tile, backend)
            summed = None if loss_of_rows.summed_weight is None else loss_of_rows.summed_weight.to(tile.dtype)
            whole = shards.part_of(tile, index, summed, kernels)
            loss, coefficients = loss_and_coefficients(loss_of_rows, whole, here, any(wanted))
            if any(wanted):
                gradients.add_from_logits(rows, tile, index, whole, coefficients, kernels, summed)
        losses[rows if a_row else ...] += loss
    return losses / denominator, gradients.finish()


def factor_and_denominator(problem: Problem, upstream: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the gradients of the rows' losses are multiplied by, a number or one for each row, and what ``mean`` divides by, else 1."""
    dtype, target = problem.layer.dtype, problem.target
    factor = torch.ones((), dtype=dtype, device=target.device) if upstream is None else upstream.to(dtype)
    if problem.options.reduction != "mean":
        return factor, torch.ones_like(factor)
    denominator = row_weights(target, problem.weight, problem.options.ignore_index).sum().to(dtype)
    return factor / denominator, denominator


def gradients_of(layer: Layer, wanted: Sequence[bool], factor: Tensor) -> tuple[LayerGradients, Tensor]:
    """Where the gradients of a layer are added up, and the factor that those of its logits are to have."""
    if not layer.is_half:
        return LayerGradients(layer, wanted), factor
    # the gradients of the logits are to be of size 1
    size = factor.abs().amax() if factor.numel() else factor.new_ones(())
    size = torch.where((size > 0) & (size < torch.inf), size, 1.0)
    return HalfLayerGradients(layer, wanted, size), factor / size


def loss_and_coefficients(loss_of_rows: LossOfRows, whole: shards.Part, upstream: Tensor, wanted: bool) -> tuple[Tensor, shards.Grads]:
    """The loss of rows and, times ``upstream``, its gradients with respect to the fields of their statistics."""
    fields = shards.finished(whole, loss_of_rows.class_index)
    smooth = (0, 1, 2, 4, 6)
    leaves = [field.requires_grad_(wanted and i in smooth) for i, field in enumerate(fields)]
    with torch.set_grad_enabled(wanted):
        loss = loss_of_rows(shards.SplitStats.of(leaves, whole.sum_weight))
    grads: shards.Grads = [None] * 7
    if wanted:
        found = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad], upstream.expand_as(loss), allow_unused=True)
        for i, grad in zip([i for i, leaf in enumerate(leaves) if leaf.requires_grad], found, strict=True):
            grads[i] = grad
    return loss.detach(), grads
