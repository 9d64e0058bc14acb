r"""The statistics of a row for every class as its target, in O(C): what probability targets need.

The paper defines its loss for one class. For a distribution ``t`` over classes the loss is the expectation over ``y ~ t``, which
asks for the statistics of all C targets. Only the arg-max ``j`` can hold more than half of the probability; every other target
leaves ``f_j`` among its non-targets. So ``j`` gets the record of :mod:`.rowstats`, and with ``z_c = f_c - f_j``, ``x_c = e^z_c`` and
``s = sum_{c != j} x_c`` the others follow from it by taking their own term out:

    S_y = 1 + (s - x_y)      log_odds = z_y - log S_y      tau_y = E_q[z] = (sum_{c != j} x_c z_c - x_y z_y) / S_y

Nothing overflows, and ``s - x_y`` is never negative. (The plain downdate ``sum e^f - e^{f_y}`` is NaN for ``y = j`` at a lead of 18
nats.) The derivatives are written by hand: autograd through ``z = f - f_j`` would lose entry j.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .rowstats import RowStats, accumulation_dtype, near, row_stats, row_stats_jvp, row_stats_vjp


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
        """The sum of ``values`` over all targets y but j and c itself, for every class c."""
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
    rest = others.sum(-1, keepdim=True) - others  # minus x would leave S = 0 at j of a confident row, and a NaN in its derivative
    S = 1 + rest
    tau = (xz.sum(-1, keepdim=True) - xz) / S  # z_j = 0
    num_nontargets = (kept.sum(-1, keepdim=True) - kept.long()).clamp(min=1).to(z.dtype)
    mean_u_z = (z.sum(-1, keepdim=True) - z) / num_nontargets
    return _Peeled(top, is_top, kept, x, xz, S, torch.log1p(rest), tau, mean_u_z, num_nontargets)


def all_row_stats(logits: Tensor, row_stats: Callable[[Tensor, Tensor], RowStats] = row_stats) -> RowStats:
    """The statistics of every class as target, each field shaped like ``logits`` (..., C).

    A masked class has ``log_odds`` -inf, and all classes of the row as its non-targets. ``row_stats`` are those of the arg-max.
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    row = _peel(logits)
    log_S = row.log_S
    # not z: this is -inf for a masked class, and NaN in a row without any other
    log_odds = (logits - logits.gather(-1, row.top.unsqueeze(-1))) - log_S
    others = RowStats(log_odds, row.tau - log_S, row.mean_u_z - log_S, log_S, row.tau - row.mean_u_z, row.num_nontargets)
    top = row_stats(logits, row.top)
    return RowStats(*(torch.where(row.is_top, field.unsqueeze(-1), rest) for field, rest in zip(top, others, strict=True)))


def all_row_stats_vjp(logits: Tensor, grads: tuple[Tensor, ...]) -> Tensor:
    """The gradient with respect to the logits, given those with respect to the fields of RowStats, all shaped (..., C)."""
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
    # off the arg-max, rho is measured from f_j
    grad = grad + row.x * row.rest(g_rho / row.S) - torch.where(row.is_top, row.rest(g_rho), 0.0)
    return torch.where(row.kept, grad, g_l).to(dtype)


def all_row_stats_jvp(logits: Tensor, tangent: Tensor) -> RowStats:
    """The directional derivative of the statistics along ``tangent``, shaped like the logits."""
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
