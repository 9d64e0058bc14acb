r"""The statistics of a row for every class as its target, in O(C), for probability targets.

The paper defines its loss for one class. For a distribution ``t`` the loss is the expectation over ``y ~ t``, which needs all C targets.
Only the arg-max ``j`` can have more than half of the probability; every other target has ``f_j`` among its non-targets. So ``j`` uses the
sums of :mod:`.rowstats`. With ``z_c = f_c - f_j``, ``x_c = e^z_c`` and ``s = sum_{c != j} x_c``, other targets subtract their own term:

    S_y = 1 + (s - x_y)      log_odds = z_y - log S_y      tau_y = E_q[z] = (sum_{c != j} x_c z_c - x_y z_y) / S_y

Nothing overflows, and ``s - x_y`` is never negative. (Subtracting ``e^{f_y}`` from ``sum e^f`` gives NaN for ``y = j`` at a lead of 18
nats.) The derivatives are explicit, because autograd through ``z = f - f_j`` would lose entry j.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _torch
from ..loss import LossOptions, loss_of_probabilities
from ..rowstats import Cotangents, RowStats, accumulation_dtype, near, row_stats, row_stats_by_autograd, row_stats_jvp, row_stats_vjp
from .dense import RowsFunction
from .parts import Part


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
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor:
        (logits,) = ctx.saved_tensors
        return all_row_stats_vjp(logits, grads)


class _AllRowStatsWithJvp(_AllRowStats):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor | None, ...]:
        with _torch.forward_mode_enabled():
            logits = torch.autograd.forward_ad.unpack_dual(ctx.saved_tensors[0]).primal
            return (*all_row_stats_jvp(logits, tangent)[:-1], None)


class Peeled(NamedTuple):
    """The row without its arg-max ``j``; shaped like the logits or broadcasting against them."""

    top: Tensor  # j, shaped like a target
    top_logit: Tensor
    is_top: Tensor
    kept: Tensor  # the classes of the row: their logit is not -inf
    x: Tensor
    xz: Tensor  # x z
    S: Tensor
    log_S: Tensor
    tau: Tensor
    mean_u_z: Tensor  # mean of z over the non-targets of y
    num_nontargets: Tensor  # K, at least 1

    def but_top(self, values: Tensor) -> Tensor:
        return torch.where(self.is_top, 0.0, values)

    def rest(self, values: Tensor, total: Tensor | None = None) -> Tensor:
        """For every class c, the sum of ``values`` over all targets y except j and c; ``total`` if some targets are elsewhere."""
        values = self.but_top(values)
        return (values.sum(-1, keepdim=True) if total is None else total.unsqueeze(-1)) - values

    def pulls(self, g_l: Tensor, g_e: Tensor, g_a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The terms of each target in the sums that make up the gradient of another class."""
        return g_e / self.S, (g_e * self.tau + g_l) / self.S, g_a / self.num_nontargets, g_a / self.S

    def pulled(self, g_l: Tensor, rests: Sequence[Tensor]) -> Tensor:
        """The gradient of the loss of all targets but j, from the sums of their pulls."""
        of_xz, of_x, all_alike, of_x_again = rests
        return self.but_top(g_l) + self.xz * of_xz - self.x * of_x + (all_alike - self.x * of_x_again)


def peel(logits: Tensor, top: Tensor | None = None, merged: Part | None = None) -> Peeled:
    """If ``logits`` has only some classes, ``top`` is j or ELSEWHERE, and ``merged`` is the row whose target is j."""
    if top is None:
        top = logits.argmax(-1)
    kept = logits != -torch.inf
    is_top = torch.arange(logits.shape[-1], device=logits.device) == top.unsqueeze(-1)
    top_logit = (logits.gather(-1, top.unsqueeze(-1)).squeeze(-1) if merged is None else merged.target_logit).unsqueeze(-1)
    z = torch.where(kept, logits - top_logit, 0.0)
    x = torch.where(kept, z.exp(), 0.0)
    xz = x * near(z)
    others = torch.where(is_top, 0.0, x)
    sums = [terms.sum(-1) for terms in (others, xz, z, kept)] if merged is None else _sums_below(merged)  # z_j = 0
    sum_x, sum_xz, sum_z, num_classes = (total.unsqueeze(-1) for total in sums)
    rest = sum_x - others  # subtracting x would make S = 0 at j of a confident row, and its derivative NaN
    S = 1 + rest
    num_nontargets = (num_classes - kept.long()).clamp(min=1).to(z.dtype)
    mean_u_z = (sum_z - z) / num_nontargets
    return Peeled(top, top_logit, is_top, kept, x, xz, S, torch.log1p(rest), (sum_xz - xz) / S, mean_u_z, num_nontargets)


def _sums_below(merged: Part) -> list[Tensor]:
    """The sums of x, x z and z over all classes but j, and the number of classes with j. x and z are relative to f_j."""
    m, sum_exp, sum_exp_z, sum_z, count = merged.record
    d = torch.where(count == 0, 0.0, m - merged.target_logit)
    scale = d.exp()
    return [scale * sum_exp, scale * (sum_exp_z + near(d) * sum_exp), sum_z + d * count, count + (merged.target_logit != -torch.inf)]


def all_row_stats(logits: Tensor, row_stats: Callable[[Tensor, Tensor], RowStats] = row_stats) -> RowStats:
    """The statistics of every class as target, each field shaped like ``logits`` (..., C). ``row_stats`` computes the arg-max's."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    row = peel(logits)
    return stats_of(logits, row, row_stats(logits, row.top))


def stats_of(logits: Tensor, row: Peeled, top: RowStats) -> RowStats:
    """The same from the peeled row and the statistics of its arg-max."""
    log_S = row.log_S
    # not z: this is -inf for a masked class (whose non-targets are the whole row), and NaN in a row with masked classes only
    log_odds = (logits - row.top_logit) - log_S
    others = RowStats(log_odds, row.tau - log_S, row.mean_u_z - log_S, log_S, row.tau - row.mean_u_z, row.num_nontargets)
    return RowStats(*(torch.where(row.is_top, field.unsqueeze(-1), rest) for field, rest in zip(top, others, strict=True)))


def all_row_stats_vjp(logits: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    """The gradient with respect to the logits, from the gradients of the fields of RowStats, all shaped (..., C)."""
    dtype = logits.dtype
    logits = logits.to(accumulation_dtype(dtype))
    g_l, g_e, g_a, g_rho, _ = (torch.zeros_like(logits) if g is None else g for g in Cotangents(*grads[:5]).folded())
    row = peel(logits)
    at_top = row.top.unsqueeze(-1)
    grad = row_stats_vjp(logits, row.top, tuple(g.gather(-1, at_top).squeeze(-1) for g in (g_l, g_e, g_a, g_rho)))
    grad = grad + row.pulled(g_l, [row.rest(pull) for pull in row.pulls(g_l, g_e, g_a)])
    # for targets other than the arg-max, rho is L - f_j
    grad = grad + row.x * row.rest(g_rho / row.S) - torch.where(row.is_top, row.rest(g_rho), 0.0)
    return torch.where(row.kept, grad, g_l).to(dtype)


def all_row_stats_jvp(logits: Tensor, tangent: Tensor) -> RowStats:
    dtype = accumulation_dtype(logits.dtype)
    logits = logits.to(dtype)
    row = peel(logits)
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
