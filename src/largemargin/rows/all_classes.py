r"""The statistics of a row for every class as its target, in O(C), for probability targets.

The paper defines its loss for one class. For a distribution ``t`` the loss is the expectation over ``y ~ t``, which needs all C targets.
Only the arg-max ``j`` can have more than half of the probability; every other target has ``f_j`` among its non-targets. So ``j`` uses the
sums of :mod:`.rowstats`. With ``z_c = f_c - f_j``, ``x_c = e^z_c`` and ``s = sum_{c != j} x_c``, other targets subtract their own term:

    S_y = 1 + (s - x_y)      log_odds = z_y - log S_y      tau_y = E_q[z] = (sum_{c != j} x_c z_c - x_y z_y) / S_y

Nothing overflows, and ``s - x_y`` is never negative. (Subtracting ``e^{f_y}`` from ``sum e^f`` gives NaN for ``y = j`` at a lead of 18
nats.) The derivatives are explicit, because autograd through ``z = f - f_j`` would lose entry j.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _torch
from ..loss import LossOptions, loss_of_probabilities
from ..rowstats import RowStats, accumulation_dtype, near, row_stats, row_stats_by_autograd, row_stats_jvp, row_stats_vjp
from .dense import RowsFunction


def loss(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    """The expectation of the loss over y ~ target, for logits (C,), (N, C) or (N, C, d1, ...) and probabilities of the same shape."""
    logits = _checks.classes_last(input.to(accumulation_dtype(input.dtype)))
    num_rows = logits[..., 0].numel() if input.numel() else 0
    return loss_of_probabilities(stats(logits), _checks.classes_last(target), weight, options, num_rows)


def stats(logits: Tensor) -> RowStats:
    """The statistics of each row for every class as its target; ``logits`` and every field have the shape (..., C)."""
    if _torch.is_recording():
        return all_row_stats(logits, row_stats_by_autograd)
    operation = _AllRowStats if torch.compiler.is_compiling() else _AllRowStatsWithJvp
    return RowStats(*operation.apply(logits))


class _AllRowStats(RowsFunction):
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
        with _torch.forward_mode_enabled():
            logits = torch.autograd.forward_ad.unpack_dual(ctx.saved_tensors[0]).primal
            return (*all_row_stats_jvp(logits, tangent)[:-1], None)


class _Peeled(NamedTuple):
    """The row without its arg-max ``j``; shaped like the logits or broadcasting against them."""

    top: Tensor  # j, shaped like a target
    is_top: Tensor
    kept: Tensor  # the classes of the row: their logit is not -inf
    x: Tensor
    xz: Tensor  # x z
    S: Tensor
    log_S: Tensor
    tau: Tensor
    mean_u_z: Tensor  # mean of z over the non-targets of y
    num_nontargets: Tensor  # K, at least 1

    def rest(self, values: Tensor) -> Tensor:
        """For every class c, the sum of ``values`` over all targets y except j and c."""
        values = torch.where(self.is_top, 0.0, values)
        return values.sum(-1, keepdim=True) - values


def _peel(logits: Tensor) -> _Peeled:
    top = logits.argmax(-1)
    kept = logits != -torch.inf
    is_top = torch.arange(logits.shape[-1], device=logits.device) == top.unsqueeze(-1)
    z = torch.where(kept, logits - logits.gather(-1, top.unsqueeze(-1)), 0.0)
    x = torch.where(kept, z.exp(), 0.0)
    xz = x * near(z)
    others = torch.where(is_top, 0.0, x)
    rest = others.sum(-1, keepdim=True) - others  # subtracting x would make S = 0 at j of a confident row, and its derivative NaN
    S = 1 + rest
    tau = (xz.sum(-1, keepdim=True) - xz) / S  # z_j = 0
    num_nontargets = (kept.sum(-1, keepdim=True) - kept.long()).clamp(min=1).to(z.dtype)
    mean_u_z = (z.sum(-1, keepdim=True) - z) / num_nontargets
    return _Peeled(top, is_top, kept, x, xz, S, torch.log1p(rest), tau, mean_u_z, num_nontargets)


def all_row_stats(logits: Tensor, row_stats: Callable[[Tensor, Tensor], RowStats] = row_stats) -> RowStats:
    """The statistics of every class as target, each field shaped like ``logits`` (..., C). ``row_stats`` computes the arg-max's."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    row = _peel(logits)
    log_S = row.log_S
    # not z: this is -inf for a masked class (whose non-targets are the whole row), and NaN in a row with masked classes only
    log_odds = (logits - logits.gather(-1, row.top.unsqueeze(-1))) - log_S
    others = RowStats(log_odds, row.tau - log_S, row.mean_u_z - log_S, log_S, row.tau - row.mean_u_z, row.num_nontargets)
    top = row_stats(logits, row.top)
    return RowStats(*(torch.where(row.is_top, field.unsqueeze(-1), rest) for field, rest in zip(top, others, strict=True)))


def all_row_stats_vjp(logits: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    """The gradient with respect to the logits, from the gradients of the fields of RowStats, all shaped (..., C)."""
    g_l, g_e, g_a, g_rho, g_spread = grads[:5]
    g_e, g_a = g_e + g_spread, g_a - g_spread
    dtype = logits.dtype
    logits = logits.to(g_l.dtype)
    row = _peel(logits)
    at_top = row.top.unsqueeze(-1)
    grad = row_stats_vjp(logits, row.top, tuple(g.gather(-1, at_top).squeeze(-1) for g in (g_l, g_e, g_a, g_rho)))
    grad = grad + torch.where(row.is_top, 0.0, g_l)
    grad = grad + row.xz * row.rest(g_e / row.S) - row.x * row.rest((g_e * row.tau + g_l) / row.S)
    grad = grad + (row.rest(g_a / row.num_nontargets) - row.x * row.rest(g_a / row.S))
    # for targets other than the arg-max, rho is L - f_j
    grad = grad + row.x * row.rest(g_rho / row.S) - torch.where(row.is_top, row.rest(g_rho), 0.0)
    return torch.where(row.kept, grad, g_l).to(dtype)


def all_row_stats_jvp(logits: Tensor, tangent: Tensor) -> RowStats:
    dtype = accumulation_dtype(logits.dtype)
    logits = logits.to(dtype)
    row = _peel(logits)
    v = torch.where(row.kept, tangent.to(dtype), 0.0)

    def without_own(values: Tensor) -> Tensor:
        return values.sum(-1, keepdim=True) - values

    mu = without_own(row.x * v) / row.S  # E_q[v]
    d_neg_entropy = without_own(row.xz * v) / row.S - row.tau * mu
    d_mean_log_q = without_own(v) / row.num_nontargets - mu
    d_rho = mu - v.gather(-1, row.top.unsqueeze(-1))
    others = RowStats(tangent.to(dtype) - mu, d_neg_entropy, d_mean_log_q, d_rho, d_neg_entropy - d_mean_log_q, torch.zeros_like(mu))
    top = row_stats_jvp(logits, row.top, v)
    return RowStats(*(torch.where(row.is_top, field.unsqueeze(-1), rest) for field, rest in zip(top, others, strict=True)))
