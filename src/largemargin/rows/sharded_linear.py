r"""Linear layer and loss whose classes are split over ranks: no rank has all logits or the whole classifier.

A rank makes the logits of its classes one tile at a time and sums up their statistics. One all-gather completes these, and then the tiles
become gradients. If there are several tiles, the logits are computed twice: four products instead of three. The gradient of the features
is a sum over the classes of all ranks: one all-reduce, in which every rank takes part, even if it does not need that gradient.

With probabilities the tiles are passed three times, with an all-gather after the first and the second: see :mod:`.shares`.
"""

from __future__ import annotations  # there are builds of torch without process groups

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks, _torch
from .._reduce import Labels
from ..backends import ladder, reference
from . import collectives
from .collectives import Shard, once
from .linear import TILES_OF_PROBABILITIES, Problem, factor_and_denominator, gradients_of, is_finite, scaled
from .parts import Part, loss_and_cotangents, merge, part_of
from .shards import exchange, exchange_largest
from .shares import NUM_SUMS, Share, part_of_largest
from .tiles import Gradients, LayerGradients


def loss(problem: Problem, group: dist.ProcessGroup, class_start: int | None, num_classes: int | None) -> Tensor:
    """``problem`` has the layer of this rank's classes, and labels among all classes."""
    needed = [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in problem.layer]
    later = problem.options.reduction == "none" or _torch.has_saved_tensor_hooks()
    size, soft = len(problem.linear_weight), problem.has_probabilities
    labels = problem.indices.new_zeros(len(problem.input), dtype=torch.int64) if soft else problem.indices  # to be compared
    shard, (of_input, laters) = collectives.shard_of(size, labels, group, class_start, num_classes, (needed[0], later))
    wanted = _Wanted(needed[0], needed[1], needed[2], any(of_input), all(of_input))
    if any(laters) and wanted.input_of_any and not (wanted.input_of_all and all(laters)):
        raise ValueError(
            'with reduction="none" or hooks on saved tensors the backward pass sums the gradient of input over the ranks. Then either all '
            f"ranks of the group must need it, in that pass, or none; got input.requires_grad {of_input}, in that pass {laters}"
        )
    like_logits = problem.input[:, :1].expand(-1, shard.num_classes)  # has their shape, dtype and device, for the checks of the loss
    if soft:
        _checks.check_probabilities(like_logits[:, :1].expand(-1, size), problem.indices, problem.options.ignore_index)
    else:
        _checks.check_indices(like_logits, problem.indices, problem.options.ignore_index)
    _checks.check_weight(problem.weight, like_logits)
    _checks.check_no_gradient("classes are split", weight=problem.weight, target=problem.indices)
    target = problem.indices if soft else problem.indices.long()
    result: Tensor = _ShardedLinear.apply(*problem._replace(target=target), shard, wanted, later)
    return result


class _Wanted(NamedTuple):
    """The gradients that this rank needs, and whether any or all ranks need the gradient of the features."""

    input: bool
    linear_weight: bool
    linear_bias: bool
    input_of_any: bool
    input_of_all: bool

    @property
    def layer(self) -> tuple[bool, bool, bool]:
        return self.input_of_any, self.linear_weight, self.linear_bias


class _ShardedLinear(torch.autograd.Function):
    """The forward pass computes the gradients, because there all ranks are in step, unless rows have separate upstream gradients."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, shard, wanted, later = arguments
        problem = Problem._make(fields)
        loss, gradients, known = _run(problem)(problem, shard, None if later else wanted)
        *tensors, options = problem
        ctx.settings, ctx.gradients = (options, shard, wanted), gradients
        ctx.save_for_backward(*tensors, *known)
        return loss

    @staticmethod
    @once
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        options, shard, wanted = ctx.settings
        input, linear_weight, linear_bias, target, weight, *known = ctx.saved_tensors
        problem = Problem(input, linear_weight, linear_bias, target, weight, options)
        factor: Tensor | None = upstream
        with_all = wanted.input_of_all or not wanted.input_of_any  # whether all ranks run this backward pass, and can sum again
        if gradients is None or (with_all and not is_finite(upstream)):
            if not with_all:
                raise RuntimeError(
                    "a second backward pass sums the gradient of input again, but some ranks of the group do not need it; "
                    "let input require a gradient on all ranks"
                )
            gradients, factor = _run(problem)(problem, shard, wanted, known, upstream)[1], None
        return *scaled(gradients, factor, problem.layer), *[None] * 6


# the loss, the wanted gradients times ``upstream``, and the merged sums of the rows, which a later pass gives as ``known``
Run = tuple[Tensor, Any, Sequence[Tensor | None]]


def _run_of_indices(
    problem: Problem, shard: Shard, wanted: _Wanted | None, known: Sequence[Tensor | None] = (), upstream: Tensor | None = None
) -> Run:
    options = problem.options.for_part()
    labels = Labels.of(problem.indices, shard.num_classes, options.ignore_index)
    local, summed = shard.local(labels.class_index), shard.own(problem.summed_weight, problem.layer.dtype)
    factor, denominator = factor_and_denominator(problem, upstream)
    gradients, factor = gradients_of(problem.layer, (False,) * 3 if wanted is None else wanted.layer, factor)
    backend = ladder.pick(gradients.workspace, options.backend) if shard.size else reference
    if known:
        merged = Part(*known)  # type: ignore[arg-type]  # the first six are given
    else:
        parts = [part_of(tile, local[rows], summed, backend) for rows, tile in gradients.tiles()]
        parts = parts or [part_of(gradients.workspace, local, summed, reference)]
        mine = Part._make(None if fields[0] is None else torch.cat(fields) for fields in zip(*parts, strict=True))
        merged = merge(exchange(mine, local, shard.group))
    wants_any = wanted is not None and any(wanted.layer)
    loss, cotangents = loss_and_cotangents(merged, labels, problem.weight, options, factor, wants_any)
    loss = loss / denominator
    if wanted is None:
        return loss, None, merged
    if wants_any:
        for rows, tile in gradients.tiles(computed=not known):
            gradients.add_from_logits(rows, tile, local[rows], merged.of_rows(rows), cotangents.of_rows(rows), backend, summed)
    return loss, _reduced(gradients, shard, wanted), merged


def _run_of_probabilities(
    problem: Problem, shard: Shard, wanted: _Wanted | None, known: Sequence[Tensor | None] = (), upstream: Tensor | None = None
) -> Run:
    weight, num_rows = shard.own(problem.weight, problem.layer.dtype), len(problem.input)
    factor, denominator = factor_and_denominator(problem, upstream)
    layer = (False,) * 3 if wanted is None else wanted.layer
    gradients, factor = gradients_of(problem.layer, layer, factor, TILES_OF_PROBABILITIES)

    def share(rows: slice, tile: Tensor) -> Share:
        return Share.of(tile, problem.indices[rows], weight, merged.of_rows(rows), top[rows], problem.options)

    if known:
        *fields, top, totals = cast(Sequence[Tensor], known)
        merged = Part(*fields)
    else:
        backend = ladder.pick(gradients.workspace, problem.options.backend) if shard.size else reference
        mine, largest = gradients.workspace.new_empty((6, num_rows)), problem.indices.new_empty(num_rows, dtype=torch.int64)
        for rows, tile in gradients.tiles():
            part, largest[rows] = part_of_largest(tile, backend)
            mine[:, rows] = torch.stack(part.unweighted)
        merged, top = exchange_largest(Part(*mine), largest, shard.group)
        sums = mine.new_empty((NUM_SUMS, num_rows), dtype=torch.promote_types(mine.dtype, problem.indices.dtype))
        for rows, tile in gradients.tiles(computed=True):
            sums[:, rows] = share(rows, tile).sums
        totals = collectives.all_gather(sums, shard.group).sum(0)
    loss = (totals[0] if problem.options.reduction == "none" else totals[0].sum()) / denominator
    known = (*merged.unweighted, top, totals)
    if wanted is None:
        return loss, None, known
    if any(wanted.layer):
        for rows, tile in gradients.tiles(computed=upstream is None):
            gradient = share(rows, tile).gradient(totals[:, rows])
            gradients.add(rows, tile.copy_(gradient * (factor[rows].unsqueeze(-1) if factor.dim() else factor)))
    return loss, _reduced(gradients, shard, wanted), known


def _run(problem: Problem) -> Callable[..., Run]:
    return _run_of_probabilities if problem.has_probabilities else _run_of_indices


def _reduced(gradients: LayerGradients, shard: Shard, wanted: _Wanted) -> Gradients:
    d_input, d_weight, d_bias = gradients.finish()
    if d_input is not None:  # because some rank needs it
        collectives.all_reduce(d_input, shard.group)
    return d_input if wanted.input else None, d_weight, d_bias
