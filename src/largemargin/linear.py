r"""Linear layer and loss in one: features x classifier -> loss, without the logits N x C.

A few rows at a time have their logits in one tile. The loss turns the tile into its gradient in place, and two products turn that into
their part of the gradients of features and classifier. Where the reduction is a number this happens in the forward pass: three products
in all. With ``reduction="none"``, whose rows wait for their upstream gradients, and in a second backward pass the logits are computed
again. Where the features are fewer than their width and the classifier needs a gradient, the logits of all rows stand in the memory of that
gradient, class by class, until it overwrites them.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, fused
from ._backends import Divergence, LossOptions, ladder
from ._backends.ladder import Backend
from ._reduce import REDUCTIONS, Reduction
from .functional import DIVERGENCES, large_margin_cross_entropy

TILE = 15 * 2**20  # numbers in a tile: 60 MiB of float32

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of input, linear_weight, linear_bias


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
    _checks.check_number("lam", lam, low=0)
    _checks.check_word("divergence", divergence, DIVERGENCES)
    _checks.check_number("hard_bias", hard_bias)
    _checks.check_label_smoothing(label_smoothing)
    _checks.check_word("reduction", reduction, REDUCTIONS)
    _checks.check_linear(input, linear_weight, target, linear_bias, num_classes)
    if num_classes is not None and num_classes != len(linear_weight):  # the gradient of the padding is 0, as autograd makes it
        linear_weight = linear_weight[:num_classes]
        linear_bias = None if linear_bias is None else linear_bias[:num_classes]
    features, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    like_logits = features[:, :1].expand(-1, len(linear_weight))  # their shape, dtype and device, for the checks of the loss
    _checks.check_indices(like_logits, labels, ignore_index)
    _checks.check_weight(weight, like_logits)
    if _checks.can_look_at(labels):
        _checks.check_range(labels, len(linear_weight), ignore_index)
    options = LossOptions(lam, divergence, hard_bias, label_smoothing, ignore_index, reduction)
    loss = _linear_loss(features, linear_weight, linear_bias, labels.long(), weight, options, backend)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _linear_loss(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    backend: Backend | None,
) -> Tensor:
    parameters = [tensor for tensor in (input, linear_weight, linear_bias) if tensor is not None]
    if (
        torch.compiler.is_compiling()
        or not ladder.unwatched()
        or not all(map(ladder.is_plain, parameters))
        or (weight is not None and weight.requires_grad)
    ):
        return _with_logits(input, linear_weight, linear_bias, target, weight, options, backend)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parameters):
        loss: Tensor = LinearLargeMarginCrossEntropy.apply(input, linear_weight, linear_bias, target, weight, options, backend)
        return loss
    return _chunked(input, linear_weight, linear_bias, target, weight, options, backend, (False, False, False))[0]


def _with_logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    backend: Backend | None,
) -> Tensor:
    """The same by its definition, with all logits at once: what transforms, compiled code and higher derivatives take."""
    dtype = _dtype(input, linear_weight)
    logits = F.linear(input.to(dtype), linear_weight.to(dtype), None if linear_bias is None else linear_bias.to(dtype))
    return large_margin_cross_entropy(logits, target, weight, **options._asdict(), backend=backend)


def _dtype(*tensors: Tensor) -> torch.dtype:
    """Of tiles and accumulators: float32, or float64 where any of the tensors has it."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class LinearLargeMarginCrossEntropy(torch.autograd.Function):
    """The loss of features and classifier, whose gradients are made in the forward pass where one upstream gradient serves all rows."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        linear_weight: Tensor,
        linear_bias: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        backend: Backend | None,
    ) -> Tensor:
        ctx.save_for_backward(input, linear_weight, linear_bias, target, weight)
        ctx.options, ctx.backend = options, backend
        later = options.reduction == "none" or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        wanted = (False, False, False) if later else ctx.needs_input_grad[:3]
        loss, gradients = _chunked(input, linear_weight, linear_bias, target, weight, options, backend, wanted)
        ctx.gradients = None if later else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if not ladder.is_plain_gradient(upstream):
            return *_reference_gradients(ctx, upstream), None, None, None, None
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or (upstream.is_cpu and not math.isfinite(upstream.item())):  # of which ignored rows are to know nothing
            input, linear_weight, linear_bias, target, weight = ctx.saved_tensors
            gradients = _chunked(
                input, linear_weight, linear_bias, target, weight, ctx.options, ctx.backend, ctx.needs_input_grad[:3], upstream
            )[1]
        elif not (upstream.is_cpu and upstream.item() == 1):
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(upstream)
        return *gradients, None, None, None, None


def _reference_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """The gradients by the definition, which can be differentiated and batched."""
    input, linear_weight, linear_bias, target, weight = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # aliases: the hooks of the tensors themselves run once, outside
        x, w, b = (
            input.view_as(input),
            linear_weight.view_as(linear_weight),
            None if linear_bias is None else linear_bias.view_as(linear_bias),
        )
        loss = _with_logits(x, w, b, target, weight, ctx.options, ctx.backend)
        wanted = [alias for alias, needed in zip((x, w, b), ctx.needs_input_grad, strict=False) if needed and alias is not None]
        found = iter(torch.autograd.grad(loss, wanted, upstream, create_graph=create_graph))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]


def _chunked(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    backend: Backend | None,
    wanted: Sequence[bool],
    upstream: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """The loss, and of the gradients of input, linear_weight and linear_bias those that are wanted, times ``upstream``."""
    dtype = _dtype(input, linear_weight)
    (num_rows, width), num_classes = input.shape, len(linear_weight)
    a_row = options.reduction == "none"
    of_rows = options._replace(reduction="none" if a_row else "sum")
    factor = input.new_ones((), dtype=dtype) if upstream is None else upstream.to(dtype)
    denominator = _denominator(target, weight, options).to(dtype)
    if not a_row:
        factor = factor / denominator
    losses = input.new_zeros(num_rows if a_row else (), dtype=dtype)
    d_input = torch.empty_like(input) if wanted[0] else None
    d_weight = input.new_empty(linear_weight.shape, dtype=dtype) if wanted[1] else None
    if d_weight is not None and num_rows == 0:
        d_weight.zero_()
    d_bias = input.new_zeros(num_classes, dtype=dtype) if wanted[2] else None

    in_place = d_weight is not None and num_rows <= width and num_rows * num_classes > TILE and input.dtype == linear_weight.dtype == dtype
    most = num_rows if in_place else max(1, TILE // num_classes)
    num_chunks = max(1, -(-num_rows // most))
    rows_a_chunk = max(1, -(-num_rows // num_chunks))  # of equal size: the products are the faster for it
    if in_place and d_weight is not None:
        workspace = d_weight[:, :num_rows].t()  # (N, C), class by class: row c of the gradient is made of row c of this alone
    else:
        workspace = input.new_empty((min(rows_a_chunk, num_rows), num_classes), dtype=dtype)
    for start in range(0, num_rows, rows_a_chunk):
        rows = slice(start, min(start + rows_a_chunk, num_rows))
        x, tile = input[rows].to(dtype), workspace[: rows.stop - rows.start]
        _logits_into(tile, x, linear_weight, linear_bias)
        part = _turn_into_gradient(
            tile, target[rows], weight, of_rows, backend, factor[rows] if a_row and upstream is not None else factor, any(wanted)
        )
        losses[rows if a_row else ...] += part
        if d_input is not None:
            d_input[rows] = _times(tile, linear_weight, dtype)
        if d_bias is not None:
            d_bias += tile.sum(0)
        if d_weight is not None and not in_place:
            torch.addmm(d_weight, tile.t(), x, beta=0 if start == 0 else 1, out=d_weight)  # with beta 0 what it held is not read
    if in_place and d_weight is not None:
        x, block = input.to(dtype), max(1, TILE // num_rows)
        for start in range(0, num_classes, block):
            classes = slice(start, start + block)
            torch.mm(d_weight[classes, :num_rows].clone(), x, out=d_weight[classes])
    loss = losses / denominator if options.reduction == "mean" else losses
    d_weight = None if d_weight is None else d_weight.to(linear_weight.dtype)
    if d_bias is not None and linear_bias is not None:
        d_bias = d_bias.to(linear_bias.dtype)
    return loss, (d_input, d_weight, d_bias)


def _denominator(target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """What ``mean`` divides by: the summed weights of the kept rows; else 1."""
    if options.reduction != "mean":
        return torch.ones((), dtype=torch.float64, device=target.device)
    kept = target != options.ignore_index
    if weight is None or not weight.numel():
        return kept.sum(dtype=torch.float64)
    return torch.where(kept, weight.double()[target.clamp(0, len(weight) - 1)], 0.0).sum()


def _class_blocks(linear_weight: Tensor, dtype: torch.dtype) -> list[tuple[slice, Tensor]]:
    """The classifier in a dtype: itself, or some classes at a time."""
    if linear_weight.dtype == dtype:
        return [(slice(None), linear_weight)]
    block = max(1, TILE // (4 * linear_weight.shape[1]))
    return [(slice(start, start + block), linear_weight[start : start + block]) for start in range(0, len(linear_weight), block)]


def _logits_into(tile: Tensor, x: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """``tile = x W^T + b``, in the dtype of the tile."""
    for classes, part in _class_blocks(linear_weight, tile.dtype):
        if tile.stride(0) == 1 and len(tile) > 1:
            torch.mm(part.to(tile.dtype), x.t(), out=tile.t()[classes])
        else:
            torch.mm(x, part.to(tile.dtype).t(), out=tile[:, classes])
    if linear_bias is not None:
        tile += linear_bias.to(tile.dtype)


def _times(tile: Tensor, linear_weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``tile W``."""
    blocks = _class_blocks(linear_weight, dtype)
    first, *rest = blocks
    product = torch.mm(tile[:, first[0]], first[1].to(dtype))
    for classes, part in rest:
        product.addmm_(tile[:, classes], part.to(dtype))
    return product


def _turn_into_gradient(
    tile: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, backend: Backend | None, upstream: Tensor, wanted: bool
) -> Tensor:
    """The losses of rows of logits, and in place of the logits their gradient times ``upstream``."""
    if fused.applies(tile, target, weight, backend):
        # a number, unless each row has its own
        return fused.loss_and_gradient(tile, target, weight, options, tile if wanted else None, upstream)
    leaf = tile.detach().requires_grad_(wanted)
    with torch.set_grad_enabled(wanted):
        loss = large_margin_cross_entropy(leaf, target, weight, **options._asdict(), backend=backend)
    if wanted:
        (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype).expand_as(loss))
        tile.copy_(gradient)
    return loss.detach()
