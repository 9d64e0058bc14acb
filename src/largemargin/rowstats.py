r"""The maths: three numbers describe a row of logits.

A row holds logits ``f`` over the classes and a target ``y``. Write ``N = {c != y}`` for the non-target classes, ``K = |N|``,
``q = softmax(f_N)``, ``u = 1/K`` and ``L = LSE(f_N)``. Every loss of the paper is a function of

    log_odds     l = f_y - L = log p_y / (1 - p_y)
    neg_entropy  e = E_q[log q]
    mean_log_q   a = mean_N(log q)

and of ``rho = L - max_N f``, the margin hidden in the softmax loss (eq. 7). All are invariant to a common offset of the logits.

A class whose logit is -inf is not in the row: it counts neither in N nor in K. A row with the target ``IGNORED`` has statistics and
gradient 0, even if it holds NaN. If the classes of a row are split, the target is ``ELSEWHERE`` in every part without it: all classes of
that part are non-targets. The functions here take the classes in the last dimension.

``row_stats_vjp`` and ``row_stats_jvp`` are the derivatives of ``row_stats``, and can be differentiated again. Autograd through
``row_stats`` would give a wrong rho, because the sums treat the maximum as a constant. The sums are over ``z = f - max_N f`` and never
use the absolute ``L``: at a common offset of 1e4 a stored float32 ``L`` is wrong by 5e-4.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED, ELSEWHERE = -1, -2  # targets that are not an index


class RowStats(NamedTuple):
    """The statistics of a row of logits about its target; every field has the target's shape."""

    log_odds: Tensor  # l = f_y - L; +inf without a non-target class
    neg_entropy: Tensor  # e = E_q[log q], in [-log K, 0]
    mean_log_q: Tensor  # a = mean_N(log q), at most -log K
    rho: Tensor  # L - max_N f, eq. (7), in [0, log K], eq. (4)
    spread: Tensor  # E_q[f] - mean_N(f) = e - a >= 0, without their common log S, which would cancel badly; half of it is eq. (8)
    num_nontargets: Tensor  # K, in the dtype of the others; carries no gradient


class Record(NamedTuple):
    """Sums over a set of non-target classes. The statistics follow from them, and the sums of two sets can be merged."""

    max: Tensor  # m = max f
    sum_exp: Tensor  # S = sum e^z, with z = f - m
    sum_exp_z: Tensor  # T = sum e^z z
    sum_z: Tensor  # A = sum z
    num_classes: Tensor  # K


class Cotangents(NamedTuple):
    """The gradients of a loss with respect to the fields of RowStats, each shaped like the target; None means 0."""

    log_odds: Tensor | None = None
    neg_entropy: Tensor | None = None
    mean_log_q: Tensor | None = None
    rho: Tensor | None = None
    spread: Tensor | None = None

    def folded(self) -> "Cotangents":
        """The same gradients, with that of spread = e - a added to those of e and a."""
        _, g_e, g_a, _, g_spread = self
        if g_spread is None:
            return self
        return self._replace(
            neg_entropy=g_spread if g_e is None else g_e + g_spread, mean_log_q=-g_spread if g_a is None else g_a - g_spread, spread=None
        )


class Softmax(NamedTuple):
    """The softmax over the non-targets of a row, ``q_c = e^(f_c - m) / S``, as the numbers that its gradient needs."""

    state: Tensor  # (3, ...): m, S and E_q[z], of all non-targets
    num_nontargets: Tensor  # K
    exp_z: Tensor | None = None  # (..., C): e^z of each class, where a kernel has kept it

    @classmethod
    def of(cls, record: Record) -> "Softmax":
        m, sum_exp, sum_exp_z, _, num_classes = record
        mean_q_z = sum_exp_z / torch.where(num_classes == 0, 1.0, sum_exp)
        return cls(torch.stack([m, sum_exp, mean_q_z]), num_classes)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the computation: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shifted(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``m``, and for every class: whether it is absent, ``z = f - m`` (0 if absent) and ``e^z``."""
    m = logits.detach().amax(-1)  # a constant: l, e, a and their derivatives do not depend on m, and rho has its own term
    shift = m.masked_fill(m == -torch.inf, 0.0)  # a row without classes: any finite shift works
    z = logits - shift.unsqueeze(-1)
    absent = logits == -torch.inf
    exp_z = z.exp()
    return m, absent, z.masked_fill(absent, 0.0), exp_z


def near(z: Tensor) -> Tensor:
    """``z`` clamped for products with ``e^z``, which is 0 below -1e4: the factor could overflow otherwise, and 0 * inf is NaN."""
    return z.clamp(min=-1e4)


def record(logits: Tensor) -> Record:
    """The sums over the classes of the last dimension; a class whose logit is -inf is absent."""
    m, absent, z, exp_z = _shifted(logits)
    num_classes = (logits.shape[-1] - absent.sum(-1)).to(z.dtype)
    return Record(m, exp_z.sum(-1), (exp_z * near(z)).sum(-1), z.sum(-1), num_classes)


def merge(parts: Record) -> Record:
    """The record of a union of disjoint sets of classes, which lie along the first dimension of every field.

    Merging is associative, with the identity (-inf, 0, 0, 0, 0).
    """
    m = parts.max.amax(0)
    d = torch.where(parts.num_classes == 0, 0.0, parts.max - m)
    scale = d.exp()
    sum_exp_z = scale * parts.sum_exp_z + torch.where(scale == 0, 0.0, scale * d) * parts.sum_exp
    sum_z = parts.sum_z + d * parts.num_classes
    return Record(m, *(sums.sum(0) for sums in (scale * parts.sum_exp, sum_exp_z, sum_z, parts.num_classes)))


def finish(record: Record, target_logit: Tensor) -> RowStats:
    """The statistics of a row from the record of its non-target classes and its target's logit ``f_y``."""
    m, sum_exp, sum_exp_z, sum_z, num_nontargets = record
    alone = num_nontargets == 0
    sum_exp = torch.where(alone, 1.0, sum_exp)
    rho = sum_exp.log()  # log S, eq. (7)
    mean_q_z = sum_exp_z / sum_exp  # E_q[z]
    mean_u_z = sum_z / num_nontargets.clamp(min=1)  # mean_N(z)
    log_odds = (target_logit - m) - rho
    # a target alone in its row is certain (+inf), unless f_y is -inf, +inf or NaN: then f_y - f_y is NaN
    log_odds = torch.where(alone, (target_logit - target_logit) + torch.inf, log_odds)
    log_odds = torch.where(target_logit == torch.inf, torch.nan, log_odds)
    return RowStats(log_odds, mean_q_z - rho, mean_u_z - rho, rho, mean_q_z - mean_u_z, num_nontargets)


def nontargets(logits: Tensor, target: Tensor) -> Tensor:
    """The row with the target's logit set to -inf; an ignored row is all -inf."""
    others = _on_target(logits, target, -torch.inf)
    return others.masked_fill((target == IGNORED).unsqueeze(-1), -torch.inf)


def _on_target(values: Tensor, target: Tensor, value: Tensor | float) -> Tensor:
    """``values`` (..., C) with ``value`` at the target, if the target is an index."""
    at_first = torch.where(target.unsqueeze(-1) >= 0, value, values[..., :1])
    return values.scatter(-1, target.clamp(min=0).unsqueeze(-1), at_first)


def row_stats(logits: Tensor, target: Tensor) -> RowStats:
    """The statistics of every row; ``logits`` (..., C) with C >= 1, ``target`` (...) with indices in [0, C), or IGNORED."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    target_logit = logits.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    stats = finish(record(nontargets(logits, target)), target_logit)
    return RowStats(*(torch.where(target >= 0, field, 0.0) for field in stats))


def row_stats_by_autograd(logits: Tensor, target: Tensor) -> RowStats:
    """The same for stored programs: autograd through these operations is right for rho too."""
    stats = row_stats(logits, target)
    others = nontargets(logits.to(stats.rho.dtype), target)
    largest = others.gather(-1, others.detach().argmax(-1, keepdim=True)).squeeze(-1)
    # the value is 0, and the derivative belongs to -max_N f, which the sums treat as a constant
    minus_largest = torch.where(stats.num_nontargets == 0, 0.0, largest.detach() - largest)
    return stats._replace(rho=stats.rho + minus_largest)


class _Row(NamedTuple):
    others: Tensor  # the logits of the non-targets, -inf at other classes
    absent: Tensor  # whether they are -inf
    q: Tensor
    log_q_minus_e: Tensor  # log q_c - E_q[log q] = z_c - E_q[z]: no logarithm
    num_nontargets: Tensor  # K, at least 1
    alone: Tensor  # K = 0

    def first_max(self) -> Tensor:
        return self.others.detach().argmax(-1, keepdim=True)  # the index of c*


def _row(logits: Tensor, target: Tensor, softmax: Softmax | None = None) -> _Row:
    """``softmax`` is over all non-targets, if ``logits`` has only some classes of the row."""
    others = nontargets(logits, target)
    if softmax is None:
        _, absent, z, exp_z = _shifted(others)
        num_nontargets = (logits.shape[-1] - absent.sum(-1, keepdim=True)).to(z.dtype)
        sum_exp, z = exp_z.sum(-1, keepdim=True), near(z)
        mean_q_z = (exp_z * z).sum(-1, keepdim=True) / torch.where(num_nontargets == 0, 1.0, sum_exp)
    else:
        m, sum_exp, mean_q_z = softmax.state.unsqueeze(-1)
        num_nontargets = softmax.num_nontargets.unsqueeze(-1)
        absent = others == -torch.inf
        z = near(torch.where(absent, 0.0, others - m))
        exp_z = torch.where(absent, 0.0, z.exp())
    alone = num_nontargets == 0
    sum_exp = torch.where(alone, 1.0, sum_exp)
    return _Row(others, absent, exp_z / sum_exp, z - mean_q_z, num_nontargets.clamp(min=1), alone)


def row_stats_vjp(logits: Tensor, target: Tensor, grads: Sequence[Tensor | None], softmax: Softmax | None = None) -> Tensor:
    """The gradient with respect to the logits, from :class:`Cotangents`.

    ``q_c (g_e (log q_c - e) - g_l) + g_a (1/K - q_c) + g_rho (q_c - [c = c*])`` for non-targets, ``g_l`` for the target. ``softmax`` is
    over all non-targets of a row that is split; then rho must have no gradient.
    """
    g_l, g_e, g_a, g_rho, _ = (None if g is None else g.unsqueeze(-1) for g in Cotangents(*grads[:5]).folded())
    row = _row(logits.to(accumulation_dtype(logits.dtype)), target, softmax)

    grad = torch.zeros_like(row.q) if g_e is None else g_e * row.log_q_minus_e
    grad = row.q * (grad if g_l is None else grad - g_l)
    if g_a is not None:
        # not added to g_l first: with one non-target class this term is exactly 0, and adding g_a to a small g_l would round g_l away
        grad = grad + (g_a * (1 / row.num_nontargets - row.q)).masked_fill(row.absent, 0.0)
    if g_rho is not None:
        at_max = torch.zeros_like(row.q).scatter(-1, row.first_max(), (~row.alone).to(row.q.dtype))
        grad = grad + g_rho * (row.q - at_max)
    on_target = torch.zeros_like(row.alone, dtype=grad.dtype) if g_l is None else g_l * (~row.alone).to(grad.dtype)
    grad = _on_target(grad, target, on_target).to(logits.dtype)
    return grad.masked_fill((target == IGNORED).unsqueeze(-1), 0.0)  # its upstream gradient may be infinite


def row_stats_jvp(logits: Tensor, target: Tensor, tangent: Tensor) -> RowStats:
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
