r"""The maths: a row of logits is three numbers.

A row holds logits ``f`` over the classes and a target ``y``. Write ``N = {c != y}`` for the non-target classes, ``K = |N|``,
``q = softmax(f_N)``, ``u = 1/K`` and ``L = LSE(f_N)``. Every loss of the paper is a function of

    log_odds     l = f_y - L = log p_y / (1 - p_y)
    neg_entropy  e = E_q[log q]
    mean_log_q   a = mean_N(log q)

and of ``rho = L - max_N f``, the margin hidden in the softmax loss (eq. 7). All are invariant to a common offset of the logits.

A class whose logit is -inf is not in the row: it belongs neither to N nor to K. A row whose target is -1 is not asked for: its
statistics and its gradient are 0, whatever it holds. The functions here take the classes on the last dimension and know nothing of
reductions or weights. ``row_stats_vjp`` and ``row_stats_jvp`` are the derivatives of ``row_stats``, and can be differentiated again.
Autograd through ``row_stats`` itself would miss that rho depends on the maximum, which is a constant in the sums.

The numbers are accumulated on ``z = f - max_N f`` and never pass through the absolute ``L``: at a common offset of 1e4 a stored
float32 ``L`` is wrong by 5e-4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowStats(NamedTuple):
    """What a row of logits says about its target; every field has the target's shape.

    ``spread`` is ``neg_entropy - mean_log_q`` computed without their common ``log S``, which would cost it its digits when the
    logits are nearly uniform.
    """

    log_odds: Tensor  # l = f_y - L; +inf where no non-target class is left
    neg_entropy: Tensor  # e = E_q[log q], in [-log K, 0]
    mean_log_q: Tensor  # a = mean_N(log q), at most -log K
    rho: Tensor  # L - max_N f, eq. (7), in [0, log K], eq. (4)
    spread: Tensor  # E_q[f] - mean_N(f) = sum_N (q - u) f = e - a >= 0; half of it is eq. (8)
    num_nontargets: Tensor  # K, in the dtype of the others; carries no gradient


class Record(NamedTuple):
    """Sums over a set of non-target classes, from which the statistics follow; mergeable, so sets can be split at will."""

    max: Tensor  # m = max f
    sum_exp: Tensor  # S = sum e^z, with z = f - m
    sum_exp_z: Tensor  # T = sum e^z z
    sum_z: Tensor  # A = sum z
    num_classes: Tensor  # K


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is computed in float32; float32 and float64 in themselves."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shifted(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``m``, and for every class whether it is absent, ``z = f - m`` and ``e^z`` (0 where absent)."""
    m = logits.detach().amax(-1)  # a constant: l, e, a and their derivatives do not depend on m, and rho has its own term
    shift = m.masked_fill(m == -torch.inf, 0.0)  # no class at all: any finite shift will do
    z = logits - shift.unsqueeze(-1)
    absent = logits == -torch.inf
    exp_z = z.exp()
    return m, absent, z.masked_fill(absent, 0.0), exp_z


def near(z: Tensor) -> Tensor:
    """``z`` for products with ``e^z``, which is 0 from -1e4 down: a larger factor could overflow, and 0 * inf is NaN."""
    return z.clamp(min=-1e4)


def record(logits: Tensor) -> Record:
    """The sums over the classes of the last dimension; a class whose logit is -inf is absent."""
    m, absent, z, exp_z = _shifted(logits)
    num_classes = (logits.shape[-1] - absent.sum(-1)).to(z.dtype)
    return Record(m, exp_z.sum(-1), (exp_z * near(z)).sum(-1), z.sum(-1), num_classes)


def merge(left: Record, right: Record) -> Record:
    """The record of a union of disjoint sets of classes. Associative; the record of no class, (-inf, 0, 0, 0, 0), is its identity."""
    m = torch.maximum(left.max, right.max)
    sums = []
    for part in (left, right):
        d = torch.where(part.num_classes == 0, 0.0, part.max - m)
        scale = d.exp()
        sum_exp_z = scale * part.sum_exp_z + torch.where(scale == 0, 0.0, scale * d) * part.sum_exp
        sums.append((scale * part.sum_exp, sum_exp_z, part.sum_z + d * part.num_classes, part.num_classes))
    return Record(m, *(a + b for a, b in zip(*sums, strict=True)))


def finish(record: Record, target_logit: Tensor) -> RowStats:
    """The statistics of a row from the record of its non-target classes and its target's logit ``f_y``."""
    m, sum_exp, sum_exp_z, sum_z, num_nontargets = record
    alone = num_nontargets == 0
    sum_exp = torch.where(alone, 1.0, sum_exp)
    rho = sum_exp.log()  # log S, eq. (7)
    mean_q_z = sum_exp_z / sum_exp  # E_q[z]
    mean_u_z = sum_z / num_nontargets.clamp(min=1)  # mean_N(z)
    log_odds = (target_logit - m) - rho
    # alone in its row the target is certain, unless it is itself -inf, +inf or NaN: then f_y - f_y is NaN
    log_odds = torch.where(alone, (target_logit - target_logit) + torch.inf, log_odds)
    log_odds = torch.where(target_logit == torch.inf, torch.nan, log_odds)
    return RowStats(log_odds, mean_q_z - rho, mean_u_z - rho, rho, mean_q_z - mean_u_z, num_nontargets)


def _nontargets(logits: Tensor, target: Tensor) -> Tensor:
    """The row without its target; without any class where the target is -1."""
    others = logits.scatter(-1, target.clamp(min=0).unsqueeze(-1), -torch.inf)
    return others.masked_fill((target < 0).unsqueeze(-1), -torch.inf)


def row_stats(logits: Tensor, target: Tensor) -> RowStats:
    """The statistics of every row; ``logits`` (..., C) with C >= 1, ``target`` (...) with indices in [0, C), or -1."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    target_logit = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    stats = finish(record(_nontargets(logits, target)), target_logit)
    return RowStats(*(torch.where(target >= 0, field, 0.0) for field in stats))


class _Row(NamedTuple):
    """What both derivatives share; shaped like the logits or broadcasting against them."""

    others: Tensor  # the logits of the non-targets, -inf elsewhere
    absent: Tensor  # where they are -inf
    q: Tensor
    log_q_minus_e: Tensor  # log q_c - E_q[log q] = z_c - E_q[z]: no logarithm
    num_nontargets: Tensor  # K, at least 1
    alone: Tensor  # K = 0

    def first_max(self) -> Tensor:
        """The index of c*, the first of the largest non-targets."""
        return self.others.detach().argmax(-1, keepdim=True)


def _row(logits: Tensor, target: Tensor) -> _Row:
    others = _nontargets(logits, target)
    _, absent, z, exp_z = _shifted(others)
    num_nontargets = (logits.shape[-1] - absent.sum(-1, keepdim=True)).to(z.dtype)
    alone = num_nontargets == 0
    sum_exp = torch.where(alone, 1.0, exp_z.sum(-1, keepdim=True))
    z = near(z)
    mean_q_z = (exp_z * z).sum(-1, keepdim=True) / sum_exp
    return _Row(others, absent, exp_z / sum_exp, z - mean_q_z, num_nontargets.clamp(min=1), alone)


def row_stats_vjp(logits: Tensor, target: Tensor, grads: Sequence[Tensor | None]) -> Tensor:
    """The gradient with respect to the logits, given those with respect to the first fields of RowStats (None and absent ones are 0).

    One line per element: ``q_c (g_e (log q_c - e) - g_l) + g_a (1/K - q_c) + g_rho (q_c - [c = c*])`` off the target, ``g_l`` on it.
    """
    g_l, g_e, g_a, g_rho, g_spread = (None if g is None else g.unsqueeze(-1) for g in (*grads, *[None] * 5)[:5])
    if g_spread is not None:  # spread = e - a
        g_e = g_spread if g_e is None else g_e + g_spread
        g_a = -g_spread if g_a is None else g_a - g_spread
    row = _row(logits.to(accumulation_dtype(logits.dtype)), target)

    grad = torch.zeros_like(row.q) if g_e is None else g_e * row.log_q_minus_e
    grad = row.q * (grad if g_l is None else grad - g_l)
    if g_a is not None:
        # never added to g_l first: with one non-target class this term is exactly 0, and a small g_l must not drown in it
        grad = grad + (g_a * (1 / row.num_nontargets - row.q)).masked_fill(row.absent, 0.0)
    if g_rho is not None:
        at_max = torch.zeros_like(row.q).scatter(-1, row.first_max(), (~row.alone).to(row.q.dtype))
        grad = grad + g_rho * (row.q - at_max)
    on_target = torch.zeros_like(row.alone, dtype=grad.dtype) if g_l is None else g_l * (~row.alone).to(grad.dtype)
    return grad.scatter(-1, target.clamp(min=0).unsqueeze(-1), on_target).to(logits.dtype)


def row_stats_jvp(logits: Tensor, target: Tensor, tangent: Tensor) -> RowStats:
    """The directional derivative of the statistics along ``tangent``, shaped like the logits."""
    dtype = accumulation_dtype(logits.dtype)
    row = _row(logits.to(dtype), target)
    v_target = tangent.to(dtype).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    v = tangent.to(dtype).masked_fill(row.absent, 0.0)
    alone = row.alone.squeeze(-1)
    mu = (row.q * v).sum(-1)  # E_q[v]
    d_neg_entropy = (row.q * row.log_q_minus_e * v).sum(-1)
    d_mean_log_q = v.sum(-1) / row.num_nontargets.squeeze(-1) - mu
    d_rho = mu - v.gather(-1, row.first_max()).squeeze(-1)
    d_log_odds = torch.where(alone, 0.0, v_target - mu)
    return RowStats(d_log_odds, d_neg_entropy, d_mean_log_q, d_rho, d_neg_entropy - d_mean_log_q, torch.zeros_like(mu))
