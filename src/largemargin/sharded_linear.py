r"""Linear layer and loss whose classes are split over ranks: neither the logits nor the classifier are ever in one place.

A rank makes the logits of its classes a tile at a time and sums up their statistics; one all-gather makes these the rows' own; then the
tiles become gradients. What does not fit into one tile, nor into the memory of the classifier's gradient, is multiplied twice: four
products, where one device needs three. The features are the same on every rank, and so is their gradient, the sum of what every rank's
classes say: one all-reduce, in which a rank takes part whether it needs that gradient or not.
"""

from __future__ import annotations  # there are builds of torch without process groups

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import _checks, shards
from ._backends import Divergence, ladder
from ._backends.ladder import Backend
from ._reduce import Reduction
from .dtensors import check_alike, check_plain
from .functional import LossOfRows, checked_options
from .layer import Layer
from .linear import (
    Problem,
    factor_and_denominator,
    gradients_of,
    is_finite,
    linear_large_margin_cross_entropy,
    loss_and_coefficients,
    scaled,
)
from .ops import class_index
from .shards import Shard, check_all_here, check_eager, eagerly, shard_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@eagerly
def sharded_linear_large_margin_cross_entropy(
    input: Tensor,
    linear_weight_shard: Tensor,
    target: Tensor,
    *,
    group: ProcessGroup | None,
    class_start: int | None = None,
    num_classes: int | None = None,
    linear_bias_shard: Tensor | None = None,
    weight: Tensor | None = None,
    lam: float = 0.3,
    divergence: Divergence = "symmetric",
    hard_bias: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
    r"""The large-margin loss of a linear classifier whose classes are split over the ranks of a group; equal to that of the whole one.

    .. math:: \ell(X\,[W^{(0)} \dots W^{(p-1)}]^\top + b, y), \quad \ell \text{ of eqs. (8), (11), (13), (15)}

    Rank r holds the rows :math:`W^{(r)}` of some classes, in the order of the ranks; a rank may have few or none. ``input`` is the same on
    every rank, and every rank gets the whole gradient of it. That of the classifier is local. As in
    :func:`sharded_large_margin_cross_entropy` the loss is the same on every rank, bit for bit, every rank has to go back from this same
    loss (not from a share of its rows, nor from a multiple of its own), and it cannot be differentiated twice.

    Args:
        input: features, shape ``(N, D)`` or any ``(..., D)``, floating; the same on every rank.
        linear_weight_shard: the classifier's rows for this rank's classes, shape ``(C_r, D)``, floating.
        target: class indices among all classes, shape ``(...)``, the same on every rank.
        group: the ranks that share the classes; ``None`` is :func:`linear_large_margin_cross_entropy`.
        class_start: the index of this rank's first class; by default that after those of the ranks before.
        num_classes: of all ranks together.
        linear_bias_shard: shape ``(C_r,)``, floating.
        weight: a factor for each class, shape ``(num_classes,)``; it gets no gradient.
        lam: the paper's lambda, at least 0.
        divergence: ``"symmetric"`` (8), ``"kl_qu"`` or ``"kl_uq"`` (10).
        hard_bias: the constant b of eq. (15), in nats, finite.
        label_smoothing: the epsilon of eq. (13), in [0, 1].
        ignore_index: rows with this target have loss 0 and an exactly zero gradient.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``. With ``"none"`` the gradients are computed in the backward pass, with one more
            product, and either all ranks need that of ``input`` or none.
        backend: who computes the rows, as in :func:`large_margin_cross_entropy`.

    Returns:
        What :func:`linear_large_margin_cross_entropy` returns for the whole classifier, on every rank.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`linear_large_margin_cross_entropy` and
            :func:`sharded_large_margin_cross_entropy`.

    Example:
        >>> import torch, largemargin
        >>> features, classifier = torch.eye(3, requires_grad=True), torch.eye(3, requires_grad=True)
        >>> largemargin.sharded_linear_large_margin_cross_entropy(features, classifier, torch.tensor([0, 1, 2]), group=None)
        tensor(0.5514, grad_fn=<...>)

    Source: Kobayashi, BMVC 2019, eqs. (8), (11), (13) and (15); see docs/scaling.md.
    """
    options = checked_options(lam, divergence, hard_bias, label_smoothing, ignore_index, reduction)
    if group is None:
        check_all_here(len(linear_weight_shard), class_start, num_classes)
        return linear_large_margin_cross_entropy(
            input, linear_weight_shard, target, linear_bias=linear_bias_shard, weight=weight, **options._asdict(), backend=backend
        )
    _checks.check_linear(input, linear_weight_shard, target, linear_bias_shard, None, may_be_empty=True)
    for name, value in (("target", target), ("weight", weight)):
        check_plain(name, value)
    check_alike(input=input, linear_weight_shard=linear_weight_shard, linear_bias_shard=linear_bias_shard)
    check_eager("sharded_linear_large_margin_cross_entropy")
    needed = [_needs_gradient(tensor) for tensor in (input, linear_weight_shard, linear_bias_shard)]
    later = reduction == "none" or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    shard, (of_input, laters) = shard_of(len(linear_weight_shard), target, group, class_start, num_classes, (needed[0], later))
    wanted = _Wanted._make((*needed, any(of_input), all(of_input)))
    if any(laters) and wanted.input_of_any and not (wanted.input_of_all and all(laters)):
        raise ValueError(
            'with reduction="none" or hooks on saved tensors the gradient of input is summed in the backward pass: all ranks of the group '
            f"have to need it and to have such hooks, or none; got input.requires_grad {of_input}, in the backward pass {laters}"
        )
    features, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    like_logits = features[:, :1].expand(-1, shard.num_classes)  # their shape, dtype and device, for the checks of the loss
    _checks.check_indices(like_logits, labels, ignore_index)
    _checks.check_weight(weight, like_logits)
    if weight is not None and weight.requires_grad:
        raise ValueError("weight must not require a gradient where classes are split; pass weight.detach()")
    problem = Problem(features, linear_weight_shard, linear_bias_shard, labels.long(), weight, options, backend)
    loss: Tensor = _ShardedLinear.apply(*problem, shard, wanted, later)
    return loss.reshape(target.shape) if reduction == "none" else loss


def _needs_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


class _Wanted(NamedTuple):
    """Which gradients this rank needs, and which ranks need that of the features, to which all contribute."""

    input: bool
    linear_weight: bool
    linear_bias: bool
    input_of_any: bool
    input_of_all: bool

    @property
    def layer(self) -> tuple[bool, bool, bool]:
        return self.input_of_any, self.linear_weight, self.linear_bias


class _ShardedLinear(torch.autograd.Function):
    """Gradients are made in the forward pass, where every rank is, if one upstream gradient serves all rows."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, options, backend, shard, wanted, later = arguments
        loss, gradients, whole = _run(Problem._make((*tensors, options, backend)), shard, None if later else wanted)
        ctx.settings, ctx.gradients = (options, backend, shard, wanted), gradients
        ctx.save_for_backward(*tensors, *whole)
        return loss

    @staticmethod
    @shards.once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        options, backend, shard, wanted = ctx.settings
        saved = ctx.saved_tensors
        factor: Tensor | None = upstream
        with_all = wanted.input_of_all or not wanted.input_of_any  # whether every rank goes back, and can sum the gradient of input again
        if gradients is None or (with_all and not is_finite(upstream)):
            if not with_all:
                raise RuntimeError("a second backward pass sums the gradient of input again, and some ranks of the group do not need it")
            problem = Problem._make((*saved[:5], options, backend))
            gradients, factor = _run(problem, shard, wanted, shards.Part(*saved[5:]), upstream)[1], None
        return *scaled(gradients, factor, Layer(*saved[:3])), *[None] * 7


def _run(
    problem: Problem, shard: Shard, wanted: _Wanted | None, whole: shards.Part | None = None, upstream: Tensor | None = None
) -> tuple[Tensor, Any, shards.Part]:
    """The loss, the wanted gradients times ``upstream``, and the merged sums of the rows, which a later pass may give back as ``whole``."""
    layer, target, weight, options, backend = problem.layer, *problem[3:]
    of_rows = options._replace(reduction="none" if options.reduction == "none" else "sum")
    loss_of_rows = LossOfRows(*class_index(target, shard.num_classes, options.ignore_index), weight, of_rows)
    local, summed = shard.local(loss_of_rows.class_index), shard.own(loss_of_rows.summed_weight, layer.dtype)
    factor, denominator = factor_and_denominator(problem, upstream)
    gradients, factor = gradients_of(layer, (False,) * 3 if wanted is None else wanted.layer, factor)
    kernels = ladder.kernels(gradients.workspace, backend) if shard.size else None
    was_known = whole is not None
    if whole is None:
        parts = [shards.part_of(tile, local[rows], summed, kernels) for rows, tile in gradients.tiles()]
        parts = parts or [shards.part_of(gradients.workspace, local, summed, None)]
        mine = shards.Part._make(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True))
        whole = shards.merged(mine, local, shard.group)
    loss, coefficients = loss_and_coefficients(loss_of_rows, whole, factor, wanted is not None and any(wanted.layer))
    loss = loss / denominator
    if wanted is None:
        return loss, None, whole
    if any(wanted.layer):
        for rows, tile in gradients.tiles(computed=not was_known):
            of_these = [None if grad is None else grad[rows] for grad in coefficients]
            part = shards.Part._make(None if field is None else field[rows] for field in whole)
            gradients.add_from_logits(rows, tile, local[rows], part, of_these, kernels, summed)
    d_input, d_weight, d_bias = gradients.finish()
    if d_input is not None:  # because some rank needs it
        shards.all_reduce(d_input, shard.group)
    return loss, (d_input if wanted.input else None, d_weight, d_bias), whole
