"""``row_stats``: the one differentiable operation.

The reference's autograd functions save only their inputs. Their backward is plain torch on those inputs, so that it can be
differentiated again, batched by ``vmap`` and traced by ``torch.compile`` like any other code. A kernel's cannot: where one of these is
under way, the ladder takes the reference, and so does a kernel's backward that is itself to be differentiated.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._backends import ladder
from ._backends.ladder import Backend
from .allclasses import all_row_stats, all_row_stats_jvp, all_row_stats_vjp
from .dtensors import LocalRows, Whole, check_indices_only, check_plain, is_dtensor, local_rows
from .rowstats import IGNORED, RowStats, row_stats_by_autograd, row_stats_jvp, row_stats_vjp
from .rowstats import row_stats as row_stats_reference
from .shards import stats_of_shard
from .tracing import is_symbolic, no_script, record


class _RowsFunction(torch.autograd.Function):
    """An operation on rows with any leading dimensions, which is all vmap needs. (The rule torch can generate fails under forward mode.)"""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *operands: Tensor) -> tuple[tuple[Tensor, ...], int]:
        moved = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(operands, in_dims, strict=True)
        )
        return cls.apply(*moved), 0


class _RowStats(_RowsFunction):
    """The statistics of one target a row: logits (..., C), target (...)."""

    @staticmethod
    def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        return tuple(row_stats_reference(logits, target))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(output[-1])
        ctx.set_materialize_grads(False)  # a loss without a regulariser should not pay for one

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        logits, target = ctx.saved_tensors
        return row_stats_vjp(logits, target, grads), None


def is_recording() -> bool:
    """Whether the operations make a program that is to be stored: torch.jit.trace, torch.export and torch.onnx.export."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()


def differentiable_jvp() -> Any:
    """Around the body of a jvp: torch calls it with forward mode off and drops the tangents of an outer jvp (pytorch/pytorch#197867)."""
    return torch.autograd.forward_ad._set_fwd_grad_enabled(True)


class _RowStatsWithJvp(_RowStats):
    # a class of its own because torch.compile traces no function that has a jvp
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor | None, ...]:
        with differentiable_jvp():
            logits, target = (torch.autograd.forward_ad.unpack_dual(saved).primal for saved in ctx.saved_tensors)
            return (*row_stats_jvp(logits, target, tangent)[:5], None)


class _RowStatsByKernels(torch.autograd.Function):
    """The same by the kernels of a backend, in eager mode."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, kernels: ModuleType) -> tuple[Tensor, ...]:
        stats, state = kernels.row_stats(logits, target)
        ctx.kernels = kernels
        ctx.save_for_backward(logits, target, stats[-1], state)
        ctx.mark_non_differentiable(stats[-1])
        ctx.set_materialize_grads(False)
        return tuple(stats)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        logits, target, num_nontargets, state = ctx.saved_tensors
        plain = all(g is None or ladder.is_plain_gradient(g) for g in grads)
        # hooks on saved tensors may return what they like
        kept = ladder.is_plain(logits) and logits.dtype in ctx.kernels.DTYPES and num_nontargets.dtype == state.dtype == torch.float32
        if not (plain and kept):  # to be differentiated again, or batched
            return row_stats_vjp(logits, target, grads), None, None
        return ctx.kernels.row_stats_backward(logits, target, num_nontargets, state, grads[:5]), None, None


class _AllRowStats(_RowsFunction):
    """The statistics of every class as target: logits (..., C)."""

    @staticmethod
    def forward(logits: Tensor) -> tuple[Tensor, ...]:
        return tuple(all_row_stats(logits))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(output[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return all_row_stats_vjp(logits, grads)


class _AllRowStatsWithJvp(_AllRowStats):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        with differentiable_jvp():
            logits = torch.autograd.forward_ad.unpack_dual(ctx.saved_tensors[0]).primal
            return (*all_row_stats_jvp(logits, tangent)[:5], None)


class Rows(NamedTuple):
    """Checked rows in the layout the backends take."""

    logits: Tensor  # (..., C), C >= 1
    class_index: Tensor  # (...), int64 in [0, C), or IGNORED
    valid: Tensor | None  # (...), False where the label was out of range; None where that has been checked


def classes_last(input: Tensor) -> Tensor:
    """A view (..., C) of ``input`` (C,), (N, C) or (N, C, d1, ..., dk), with C >= 1."""
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    # torch accepts rows without classes where no label asks for one; a masked class says the same
    return logits if logits.shape[-1] else torch.nn.functional.pad(logits, (0, 1), value=-torch.inf)


def checked_rows(input: Tensor, target: Tensor, ignore_index: int) -> Rows:
    """The rows of logits ``input`` (C,), (N, C) or (N, C, d1, ..., dk) with class indices ``target``; bad input raises."""
    _checks.check_input(input, target)
    _checks.check_indices(input, target, ignore_index)
    check_plain("target", target)
    num_classes = _checks.num_classes(input)
    logits = classes_last(input)
    return Rows(logits, *class_index(target.long().reshape(logits.shape[:-1]), num_classes, ignore_index))


def class_index(target: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """The last two fields of :class:`Rows` for labels."""
    ignored = target == ignore_index
    if _checks.can_look_at(target):
        _checks.check_range(target, num_classes, ignore_index)
        return torch.where(ignored, IGNORED, target), None
    in_range = (target >= 0) & (target < num_classes)
    return torch.where(ignored, IGNORED, torch.where(in_range, target, 0)), ignored | in_range


def stats_of_rows(rows: Rows, backend: Backend | None) -> RowStats:
    """The statistics of each row about its target; NaN where the label was out of range."""
    fields: tuple[Tensor, ...]
    if is_recording():
        fields = row_stats_by_autograd(rows.logits, rows.class_index)
    elif torch.compiler.is_compiling():
        if ladder.compiled_kernels(rows.logits, backend):
            fields = torch.ops.largemargin.row_stats(rows.logits, rows.class_index)[:6]
        else:
            fields = _RowStats.apply(rows.logits, rows.class_index)
    elif (kernels := ladder.kernels(rows.logits, backend)) is not None and ladder.is_plain(rows.class_index):
        fields = _RowStatsByKernels.apply(rows.logits, rows.class_index, kernels)
    else:
        fields = _RowStatsWithJvp.apply(rows.logits, rows.class_index)
    if rows.valid is not None:
        fields = tuple(torch.where(rows.valid, field, torch.nan) for field in fields)
    return RowStats(*fields)


def rows_of_dtensor(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> tuple[LocalRows, Rows, Whole]:
    """The part that this rank has of DTensor logits, the same as rows, and what makes the results of all ranks one DTensor."""
    _checks.check_input(input, target)
    check_indices_only(input, target)
    _checks.check_indices(input, target, ignore_index)
    _checks.check_weight(weight, input)
    local, whole = local_rows(input, target, weight)
    logits = classes_last(local.logits)
    num_classes = _checks.num_classes(input)
    rows = Rows(logits, *class_index(local.target.long().reshape(logits.shape[:-1]), num_classes, ignore_index))
    return local, rows, whole


def stats_of_local_rows(local: LocalRows, rows: Rows, backend: Backend | None) -> RowStats:
    """The statistics of the rows of this rank, whichever ranks have their classes."""
    if local.shard is None:
        return stats_of_rows(rows, backend)
    stats = stats_of_shard(rows.logits, local.shard.local(rows.class_index), None, local.shard.group, backend).stats
    return stats if rows.valid is None else RowStats(*(torch.where(rows.valid, field, torch.nan) for field in stats))


def stats_of_all_classes(logits: Tensor, backend: Backend | None) -> RowStats:
    """The statistics of each row for every class as its target; ``logits`` and every field (..., C)."""
    ladder.refuse_all_classes(backend)
    if is_recording():
        return all_row_stats(logits, row_stats_by_autograd)
    op = _AllRowStats if torch.compiler.is_compiling() else _AllRowStatsWithJvp
    return RowStats(*op.apply(logits))


@no_script
def row_stats(input: Tensor, target: Tensor, *, ignore_index: int = -100, backend: Backend | None = None) -> RowStats:
    r"""The statistics of each row of logits about its target; differentiable, and all a loss needs.

    .. math:: l = f_y - L, \quad e = E_q[\log q], \quad a = \tfrac1K \textstyle\sum_{c \neq y} \log q_c, \quad
              \hat\rho = L - f_{c^*} \; (7), \qquad L = \mathrm{LSE}(\{f_c\}_{c \neq y})

    with :math:`q` the softmax over the K non-target classes (eq. 9). Classes whose logit is -inf are not in the row.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; any floating dtype, half precision is computed in float32.
        target: class indices in ``[0, C)`` or ``ignore_index``, int64 (or uint8), shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        ignore_index: rows with this target get statistics 0 and an exactly zero gradient, whatever they hold.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; ``None`` takes the fastest that can (see docs/backends.md).

    Returns:
        :class:`RowStats`, a named tuple of ``log_odds``, ``neg_entropy``, ``mean_log_q``, ``rho``, ``spread`` and ``num_nontargets``,
        each shaped like ``target``, in float32 or (for float64 input) float64; DTensors for a DTensor, on the ranks that have the rows.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`torch.nn.functional.cross_entropy` does for the same mistake; also
            ValueError for an unknown backend. Off the CPU and in compiled code a label out of range is not an error: its row is NaN.

    Example:
        >>> import torch, largemargin
        >>> logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        >>> stats = largemargin.row_stats(logits, torch.tensor([0]))
        >>> stats.rho  # two equal non-targets: log 2
        tensor([0.6931], grad_fn=<...>)
        >>> focal = ((1 - stats.log_odds.sigmoid()) ** 2 * torch.nn.functional.softplus(-stats.log_odds)).mean()
        >>> focal.backward()  # one's own loss, in one line

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, Sec. 2.
    """
    if is_symbolic(input, target):
        return record(row_stats, locals())  # type: ignore[no-any-return]
    if is_dtensor(input):
        local, rows, whole = rows_of_dtensor(input, target, None, ignore_index)
        return RowStats(*(whole(field, False) for field in stats_of_local_rows(local, rows, backend)))
    return stats_of_rows(checked_rows(input, target, ignore_index), backend)
