"""Rows whose classes are all here: their statistics as one differentiable operation, and their loss.

The autograd functions of the reference save only their inputs, and their backward pass is plain torch: torch can differentiate it again,
batch it by ``vmap`` and trace it. Kernels do not allow that; in these cases the ladder, or a kernel's backward pass, uses the reference.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _torch, rowstats
from .._backend_names import BackendName
from .._reduce import Labels
from ..backends import ladder, reference
from ..backends.protocol import Backend, Predictions, mark_ignored
from ..loss import HingeOptions, LossOptions, loss_of_indices
from ..rowstats import IGNORED, Cotangents, RowStats, Softmax


class Rows(NamedTuple):
    logits: Tensor  # (..., C), C >= 1
    labels: Labels  # (...)

    @classmethod
    def of(cls, input: Tensor, target: Tensor, ignore_index: int) -> "Rows":
        """``input`` (C,), (N, C) or (N, C, d1, ..., dk) and the class indices have been checked."""
        logits, target = _classes_last(input, target)
        return cls(logits, Labels.of(target, _checks.num_classes(input), ignore_index))


def _classes_last(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (..., C), and the target (...) in int64."""
    logits = _checks.classes_last(input)
    return logits, target.long() if input.dim() == 2 else target.long().reshape(logits.shape[:-1])


def loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions | HingeOptions) -> Tensor:
    """The loss of logits (C,), (N, C) or (N, C, d1, ...) and class indices, by the statistics of the rows."""
    if options.label_smoothing == 0 or weight is None or not weight.numel():
        rows = Rows.of(input, target, options.ignore_index)
        return loss_of_indices(_stats(rows, options.backend), rows.labels, weight, options)
    # two terms read the logits: the wider dtype adds their gradients before rounding
    rows = Rows.of(input.to(rowstats.accumulation_dtype(input.dtype)), target, options.ignore_index)
    return loss_of_indices(_stats(rows, options.backend), rows.labels, weight, options, _weighted_cross_entropy(rows, weight))


def _weighted_cross_entropy(rows: Rows, weight: Tensor) -> Tensor:
    """The sum of ``-w_c log p_c`` over the classes of each row."""
    # log_softmax would pass the NaN of an ignored row on to its gradient
    logits = rows.logits.masked_fill(rows.labels.class_index.unsqueeze(-1) < 0, 0.0)
    log_p = torch.where(logits != -torch.inf, logits.log_softmax(-1), 0.0)
    return -(log_p * weight.to(log_p.dtype)).sum(-1)


def stats_of(input: Tensor, target: Tensor, ignore_index: int, backend: BackendName | None) -> RowStats:
    """As :func:`stats`. ``input`` and ``target`` are as for :meth:`Rows.of`; a kernel that checks labels spares a pass over them."""
    if _checks.can_look_at(target) and _torch.is_plain(target) and input.numel():  # without classes the kernel would see a masked one
        kernels = ladder.pick(input, backend)
        if kernels.CHECKS_LABELS:
            return RowStats(*_apply_kernels(*_classes_last(input, target), ignore_index, kernels))
    return stats(Rows.of(input, target, ignore_index), backend)


def stats(rows: Rows, backend: BackendName | None) -> RowStats:
    """The statistics of each row about its target; 0 if it is ignored, NaN if its label is out of range."""
    return rows.labels.mark_stats(_stats(rows, backend))


def predictions(input: Tensor, target: Tensor, ignore_index: int) -> Predictions:
    """What the rows predict, without a gradient. ``input`` and ``target`` are as for :meth:`Rows.of`."""
    kernels = reference if torch.compiler.is_compiling() else ladder.pick(input, None)
    if kernels.predictions is not None and input.numel() and _torch.is_plain(target):
        return kernels.predictions(*_classes_last(input, target), ignore_index)
    rows = Rows.of(input, target, ignore_index)
    index = rows.labels.class_index
    prediction = torch.where(index >= 0, rows.logits.argmax(-1), IGNORED)
    log_odds = _stats(Rows(rows.logits, Labels(prediction, None)), None).log_odds
    return Predictions(stats(rows, None), log_odds, _ahead(rows.logits, index))


def _ahead(logits: Tensor, index: Tensor) -> Tensor:
    at = index.clamp(min=0).unsqueeze(-1)
    of_target = logits.gather(-1, at)
    before = torch.arange(logits.shape[-1], device=index.device) < at
    ahead = ((logits > of_target) | ((logits == of_target) & before)).sum(-1)
    ahead = ahead.masked_fill(of_target.squeeze(-1) == -torch.inf, torch.iinfo(torch.int64).max)
    return ahead.masked_fill(index < 0, -1)


def _stats(rows: Rows, backend: BackendName | None) -> RowStats:
    logits, index = rows.logits, rows.labels.class_index
    fields: tuple[Tensor, ...]
    if _torch.is_recording():
        fields = rowstats.row_stats_by_autograd(logits, index)
    elif torch.compiler.is_compiling():
        from ..backends import compiled  # it imports torch._dynamo and sympy, which eager mode does not need

        if compiled.has_kernels(logits, backend):
            fields = torch.ops.largemargin.row_stats(logits, index)[:6]
        else:
            fields = _RowStats.apply(logits, index)
    elif (kernels := ladder.pick(logits, backend)) is not reference and _torch.is_plain(index):
        fields = _apply_kernels(logits, index, IGNORED, kernels)
    else:
        fields = _RowStatsWithJvp.apply(logits, index)
    return RowStats(*fields)


class RowsFunction(torch.autograd.Function):
    """From rows to the fields of RowStats, with any leading dimensions."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)  # saves the gradient of the regulariser if the loss has none

    @classmethod  # the rule that torch generates fails under forward mode
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *operands: Tensor) -> tuple[tuple[Tensor, ...], int]:
        moved = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(operands, in_dims, strict=True)
        )
        return cls.apply(*moved), 0


class _RowStats(RowsFunction):
    @staticmethod
    def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return tuple(rowstats.row_stats(logits, target))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        logits, target = ctx.saved_tensors
        return rowstats.row_stats_vjp(logits, target, grads), None


class _RowStatsWithJvp(_RowStats):
    # a separate class, because torch.compile cannot trace a function with a jvp
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor | None, ...]:
        with _torch.forward_mode_enabled():
            logits, target = (torch.autograd.forward_ad.unpack_dual(saved).primal for saved in ctx.saved_tensors)
            return (*rowstats.row_stats_jvp(logits, target, tangent)[:-1], None)


class _RowStatsByKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int, backend: Backend) -> tuple[Tensor, ...]:
        keep_exp = ctx.needs_input_grad[0] and not _torch.has_saved_tensor_hooks()
        stats, softmax = backend.row_stats(logits, target, ignore_index, keep_exp)
        ctx.backend, ctx.ignore_index, ctx.exp_z = backend, ignore_index, softmax.exp_z
        ctx.save_for_backward(logits, target, softmax.state, softmax.num_nontargets)
        ctx.mark_non_differentiable(stats.num_nontargets)
        ctx.set_materialize_grads(False)
        return tuple(stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, target, state, num_nontargets = ctx.saved_tensors
        cotangents = Cotangents(*grads[:-1])
        plain = all(g is None or _torch.is_plain_gradient(g) for g in cotangents)
        # hooks on saved tensors may return other tensors
        kept = (
            _torch.is_plain(logits)
            and logits.dtype in ctx.backend.DTYPES
            and state.dtype == num_nontargets.dtype == rowstats.accumulation_dtype(logits.dtype)
        )
        exp_z, ctx.exp_z = ctx.exp_z, None  # the gradient overwrites it; a second pass computes it again
        if not (plain and kept):
            return rowstats.row_stats_vjp(logits, mark_ignored(target, ctx.ignore_index), cotangents), None, None, None
        softmax = Softmax(state, num_nontargets, exp_z)
        return ctx.backend.row_stats_backward(logits, target, softmax, cotangents, None, ctx.ignore_index), None, None, None


_apply_kernels = _torch.direct_apply(_RowStatsByKernels)
