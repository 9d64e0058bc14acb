"""The Triton kernels for CUDA, ROCm and XPU, in the symbols of rowstats.py: statistics of rows, the whole loss, and the gradients of both.

Each program has a tile of rows by classes. If classes are neighbours in memory, the tile is one row with as many classes as fit; for
(N, C, d1, ...) it is many rows with fewer classes. A row that fits into a tile is read once, and a longer one tile by tile. Offsets have
64 bits, sums and gradients are float32 up to the final store, and nothing synchronises the device.

A loss is one launch in each pass. The forward pass saves a few numbers a row, from which the backward pass makes the gradient times its
upstream factor. Probabilities make every class a target: rows/all_classes.py has the maths, and cpu.cpp takes the same steps.
"""

import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks
from ..loss import LossOptions
from ..rowstats import IGNORED, Cotangents, Record, RowStats, Softmax
from .layout import lay_together
from .protocol import Predict, TwoPasses, WholeLoss, for_kernel, mark_ignored, record_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CHECKS_LABELS = False
MAX_TILE = 16384  # elements of a tile held on chip
SUMMED = tl.constexpr(2048)  # numbers that the last program of a launch adds up at a time
# what the forward pass of a loss saves of a row: these for class indices, and for probabilities as many again
FIELDS = tl.constexpr(8)
predictions: Predict | None = None
loss: WholeLoss | None = None


# ---- a tile


@triton.jit
def _offsets(rows, inner, outer_stride, inner_stride):
    return (rows // inner) * outer_stride + (rows % inner) * inner_stride


@triton.jit
def _classes(start, CLASSES: tl.constexpr):
    return start + tl.arange(0, CLASSES).to(tl.int64)


@triton.jit
def _tile(starts, class_stride, wanted, num_classes, start, other, CLASSES: tl.constexpr):
    """A tile (rows, classes) of the rows that begin at ``starts``, ``other`` where a row is not wanted and beyond the last class."""
    classes = _classes(start, CLASSES)
    inside = wanted[:, None] & (classes < num_classes)[None, :]
    return tl.load(starts[:, None] + classes[None, :] * class_stride, mask=inside, other=other).to(tl.float32)


@triton.jit
def _but(f, y, start, CLASSES: tl.constexpr):
    """The tile without the targets."""
    return tl.where(_classes(start, CLASSES)[None, :] == y[:, None], -float("inf"), f)


@triton.jit
def _weights(weight_ptr, num_classes, start, CLASSES: tl.constexpr):
    classes = _classes(start, CLASSES)
    return tl.load(weight_ptr + classes, mask=classes < num_classes, other=0.0).to(tl.float32)


@triton.jit
def _clamp(z):
    # for products with e^z, which is 0 below -1e4: the factor could overflow otherwise, and 0 * inf is NaN
    return tl.where(z < -1e4, -1e4, z)


@triton.jit
def _log1p(t):
    """log(1 + t) for t >= 0."""
    u = 1.0 + t
    return tl.log(u) + (t - (u - 1.0)) / u


@triton.jit
def _softplus(x):
    """softplus(x) and its derivative."""
    t = tl.exp(-tl.abs(x))
    return tl.maximum(x, 0.0) + _log1p(t), tl.where(x > 0, 1.0, t) / (1.0 + t)


@triton.jit
def _softplus_behind(d, S):
    """softplus(b - l) and its derivative at d = z - b, where l = z - log S and S >= 1: one logarithm for both of them."""
    t = tl.exp(-tl.abs(d))
    pull = tl.where(d > 0, S * t, S)
    u = pull + tl.where(d > 0, 1.0, t)
    rounded = tl.where(d > 0, pull - (u - 1.0), 0.0)
    return tl.where(d > 0, 0.0, -d) + (tl.log(u) + rounded / u), pull / u


# ---- a row about its target


@triton.jit
def _gather(
    f, starts, class_stride, weight_ptr, y, wanted, num_classes,
    WEIGHTED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """The records of rows, and the sums of w and w z. ``f`` is the first tile, and the only one if it is ``WHOLE``."""
    m = tl.full([ROWS], -float("inf"), tl.float32)  # the record of the classes so far
    sum_exp = tl.zeros([ROWS], tl.float32)
    sum_exp_z = tl.zeros([ROWS], tl.float32)
    sum_z = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    sum_weight = tl.zeros([ROWS], tl.float32)
    sum_weight_z = tl.zeros([ROWS], tl.float32)
    for start in range(0, CLASSES if WHOLE else num_classes, CLASSES):
        if not WHOLE:
            f = _tile(starts, class_stride, wanted, num_classes, start, -float("inf"), CLASSES)
        others = _but(f, y, start, CLASSES)
        largest = tl.maximum(m, tl.max(others, 1))  # may skip NaN, which makes every sum below NaN
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        d = tl.where(count == 0, 0.0, m - shift)
        scale = tl.exp(d)
        z = others - shift[:, None]
        exp_z = tl.exp(z)
        present = others != -float("inf")
        sum_exp_z = scale * sum_exp_z + tl.where(scale == 0, 0.0, scale * d) * sum_exp + tl.sum(exp_z * _clamp(z), 1)
        sum_exp = scale * sum_exp + tl.sum(exp_z, 1)
        sum_z = sum_z + d * count + tl.sum(tl.where(present, z, 0.0), 1)
        count += tl.sum(present.to(tl.float32), 1)
        if WEIGHTED:
            w = tl.where(present, _weights(weight_ptr, num_classes, start, CLASSES)[None, :], 0.0)
            sum_weight_z = sum_weight_z + d * sum_weight + tl.sum(tl.where(present, w * z, 0.0), 1)
            sum_weight += tl.sum(w, 1)
        m = largest
    if not WEIGHTED:
        sum_weight, sum_weight_z = count, sum_z
    return m, sum_exp, sum_exp_z, sum_z, count, sum_weight, sum_weight_z


@triton.jit
def _finish(f_y, m, sum_exp, sum_exp_z, sum_z, count):
    """l, log S, E_q[z], the mean of z, and S, from a record and the target's logit."""
    alone = count == 0
    sum_exp = tl.where(alone, 1.0, sum_exp)
    rho = tl.log(sum_exp)
    l = tl.where(alone, (f_y - f_y) + float("inf"), (f_y - m) - rho)
    l = tl.where(f_y == float("inf"), float("nan"), l)
    return l, rho, sum_exp_z / sum_exp, sum_z / tl.maximum(count, 1.0), sum_exp


@triton.jit
def _element(z, q, mean_q_z, count, g_e, g_q, g_a):
    """An element of the gradient, off the target, with the coefficients of its row."""
    # g_a is not added to g_q first: see row_stats_vjp in rowstats.py
    return q * (g_e * (_clamp(z) - mean_q_z) + g_q) + g_a * (1.0 / tl.maximum(count, 1.0) - q)


@triton.jit
def _write(ptr, value, rows, classes, inner, outer_stride, inner_stride, class_stride, num_rows, num_classes):
    starts = ptr + _offsets(rows, inner, outer_stride, inner_stride)
    inside = (rows < num_rows)[:, None] & (classes < num_classes)[None, :]
    tl.store(starts[:, None] + classes[None, :] * class_stride, value.to(ptr.dtype.element_ty), mask=inside)


# ---- statistics


# the last batch of an epoch has another number of rows, which must not compile the kernel again
@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    logits_ptr, target_ptr, log_odds_ptr, neg_entropy_ptr, mean_log_q_ptr, rho_ptr, spread_ptr, num_nontargets_ptr, state_ptr,
    num_rows, num_classes, inner, outer_stride, inner_stride, class_stride,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    y = tl.load(target_ptr + rows, mask=exists, other=-1)  # -1 is ignored, -2 is elsewhere
    kept = y != -1
    starts = logits_ptr + _offsets(rows, inner, outer_stride, inner_stride)
    f = _tile(starts, class_stride, kept, num_classes, 0, -float("inf"), CLASSES)
    f_y = tl.load(starts + tl.where(y >= 0, y, 0) * class_stride, mask=y >= 0, other=0.0).to(tl.float32)
    m, sum_exp, sum_exp_z, sum_z, count, _, _ = _gather(
        f, starts, class_stride, logits_ptr, y, kept, num_classes, False, WHOLE, ROWS, CLASSES
    )
    l, rho, mean_q_z, mean_u_z, sum_exp = _finish(f_y, m, sum_exp, sum_exp_z, sum_z, count)
    tl.store(log_odds_ptr + rows, tl.where(kept, l, 0.0), mask=exists)
    tl.store(neg_entropy_ptr + rows, tl.where(kept, mean_q_z - rho, 0.0), mask=exists)
    tl.store(mean_log_q_ptr + rows, tl.where(kept, mean_u_z - rho, 0.0), mask=exists)
    tl.store(rho_ptr + rows, tl.where(kept, rho, 0.0), mask=exists)
    tl.store(spread_ptr + rows, tl.where(kept, mean_q_z - mean_u_z, 0.0), mask=exists)
    tl.store(num_nontargets_ptr + rows, tl.where(kept, count, 0.0), mask=exists)
    tl.store(state_ptr + rows, m, mask=exists)
    tl.store(state_ptr + rows + num_rows, sum_exp, mask=exists)
    tl.store(state_ptr + rows + num_rows + num_rows, mean_q_z, mask=exists)


@triton.jit(do_not_specialize=["num_rows"])
def _backward(
    logits_ptr, target_ptr, gradient_ptr, num_nontargets_ptr, state_ptr,
    log_odds_grad_ptr, neg_entropy_grad_ptr, mean_log_q_grad_ptr, rho_grad_ptr,
    num_rows, num_classes, inner, outer_stride, inner_stride, class_stride, grad_outer_stride, grad_inner_stride, grad_class_stride,
    programs_a_row, HAS_L: tl.constexpr, HAS_E: tl.constexpr, HAS_A: tl.constexpr, HAS_RHO: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    rows = program // programs_a_row * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    y = tl.load(target_ptr + rows, mask=exists, other=-1)
    starts = logits_ptr + _offsets(rows, inner, outer_stride, inner_stride)
    zero = tl.zeros([ROWS], tl.float32)
    g_l = tl.load(log_odds_grad_ptr + rows, mask=exists, other=0.0) if HAS_L else zero
    g_e = tl.load(neg_entropy_grad_ptr + rows, mask=exists, other=0.0) if HAS_E else zero
    g_a = tl.load(mean_log_q_grad_ptr + rows, mask=exists, other=0.0) if HAS_A else zero
    g_rho = tl.load(rho_grad_ptr + rows, mask=exists, other=0.0) if HAS_RHO else zero
    count = tl.load(num_nontargets_ptr + rows, mask=exists, other=0.0)
    m = tl.load(state_ptr + rows, mask=exists, other=0.0)
    inv_sum_exp = 1.0 / tl.load(state_ptr + rows + num_rows, mask=exists, other=1.0)
    mean_q_z = tl.load(state_ptr + rows + num_rows + num_rows, mask=exists, other=0.0)
    found = tl.zeros([ROWS], tl.int32) > 0  # whether c*, the first class with the maximum, is in a tile so far

    # a program has one tile; with a gradient of rho it has all tiles of its rows in turn, to find c*
    for start in range(program % programs_a_row * CLASSES, num_classes, programs_a_row * CLASSES):
        classes = _classes(start, CLASSES)
        f = _but(_tile(starts, class_stride, y != -1, num_classes, start, -float("inf"), CLASSES), y, start, CLASSES)
        live = (y != -1) & (count > 0)
        z = f - m[:, None]
        q = tl.exp(z) * inv_sum_exp[:, None]
        value = _element(z, q, mean_q_z[:, None], count[:, None], g_e[:, None], -g_l[:, None], g_a[:, None])
        if HAS_RHO:
            at = tl.where(f == m[:, None], classes[None, :], 9223372036854775807)
            first = tl.min(at, 1)
            at_max = (classes[None, :] == first[:, None]) & ~found[:, None]
            value += g_rho[:, None] * (q - at_max.to(tl.float32))
            found = found | (first < num_classes)
        value = tl.where((f != -float("inf")) & live[:, None], value, 0.0)
        on_target = g_l * (count > 0).to(tl.float32)  # NaN stays NaN
        value = tl.where((classes[None, :] == y[:, None]) & (y >= 0)[:, None], on_target[:, None], value)
        _write(gradient_ptr, value, rows, classes, inner, grad_outer_stride, grad_inner_stride, grad_class_stride, num_rows, num_classes)


# ---- the whole loss


@triton.jit
def _margin_term(l, rho, mean_q_z, mean_u_z, count, hard_bias, keep, lam_e, lam_a, lam_log_count):
    """The loss of targets before their weight and smoothing, and its derivative in -l without smoothing."""
    value, slope = _softplus(hard_bias - l)
    # a smoothing of 1 drops the first term, but a masked target stays infinite
    share = tl.where(keep > 0, keep, tl.where(value < float("inf"), 0.0, 1.0))
    term = tl.where(share > 0, share * value, 0.0)
    # lam_e e + lam_a a + lam_log_count log K; if e and a both count, their common log S is left out
    both = lam_e * (mean_q_z - mean_u_z)
    either = tl.where(lam_e != 0, lam_e * (mean_q_z - rho), 0.0) + tl.where(lam_a != 0, lam_a * (mean_u_z - rho), 0.0)
    regulariser = tl.where(lam_a == -lam_e, both, either) + lam_log_count * tl.log(tl.maximum(count, 1.0))
    return term + tl.where((lam_e != 0) | (lam_a != 0), regulariser, 0.0), share * slope


@triton.jit
def _smoothing_term(l, rho, count, sum_weight, sum_weight_z, class_weight, smoothing):
    """The smoothing term, its factor a class, and its derivatives in the other logits (times q) and in the target's."""
    alone = count == 0
    masked = l == -float("inf")  # then y is not a class of the row
    off_value, off_slope = _softplus(l)
    on_value, on_slope = _softplus(-l)
    w_y = tl.where(masked, 0.0, class_weight)
    each = smoothing / (count + tl.where(masked, 0.0, 1.0))
    off_target = tl.where(alone, 0.0, sum_weight * (off_value + rho) - sum_weight_z)
    on_target = tl.where(masked, 0.0, w_y * on_value)
    return each * (off_target + on_target), each, each * (sum_weight + w_y) * on_slope, each * (sum_weight * off_slope - w_y * on_slope)


@triton.jit
def _largest(f, starts, class_stride, wanted, num_classes, WHOLE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr):
    """The first class with the largest logit; any class of a row with NaN."""
    top = tl.full([ROWS], -float("inf"), tl.float32)
    j = tl.zeros([ROWS], tl.int64)
    for start in range(0, CLASSES if WHOLE else num_classes, CLASSES):
        if not WHOLE:
            f = _tile(starts, class_stride, wanted, num_classes, start, -float("inf"), CLASSES)
        largest = tl.max(f, 1)
        first = tl.min(tl.where(f == largest[:, None], _classes(start, CLASSES)[None, :], num_classes - 1), 1)
        wins = largest > top
        j = tl.where(wins, first, j)
        top = tl.where(wins, largest, top)
    return j


@triton.jit
def _peel(f_j, m, sum_exp, sum_exp_z, sum_z, count):
    """e^(m - f_j), and the sums of x, x z and z over the classes but j, with z = f - f_j and x = e^z."""
    lead = tl.where(count == 0, 0.0, m - f_j)
    scale = tl.exp(lead)
    return scale, scale * sum_exp, scale * (sum_exp_z + _clamp(lead) * sum_exp), sum_z + count * lead


@triton.jit
def _of_targets(
    f, t, m, count, top, scale, sum_x, sum_xz, sum_z, hard_bias, keep, lam_e, lam_a, lam_log_count,
    HAS_DIVERGENCE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Of the targets of a tile but j: the term of each, x, S, tau, and the derivative of its softmax loss over S.

    In the symbols of rows/all_classes.py. A masked target has x = 0, and an infinite loss if it has a share t.
    """
    masked = f == -float("inf")
    z = f - top
    x = tl.where(masked, 0.0, tl.exp(f - m) * scale)
    S = 1.0 + (sum_x - x)
    tau = (sum_xz - x * _clamp(z)) / S
    if HAS_BIAS:
        value, slope = _softplus_behind(z - hard_bias, S)
        pull = slope / S
    else:  # log sum e^f - f_y
        value = _log1p(sum_x) - z
        pull = 1.0 / (1.0 + sum_x)
    term = keep * value
    if HAS_DIVERGENCE:
        count = tl.maximum(count, 1.0)
        lam_log_S = lam_e + lam_a  # exactly 0 for the symmetric divergence
        logarithms = lam_log_count * tl.log(count) - lam_log_S * tl.log(S)
        term += lam_e * tau + tl.where(lam_a != 0, lam_a / count * (sum_z - z), 0.0)
        term += tl.where(lam_log_S != 0, logarithms, 0.0)
    term = tl.where(masked, float("inf"), term)
    term = tl.where((t == 0) & (term == float("inf")), 0.0, term)
    return term, x, S, tau, tl.where(keep > 0, keep * pull, tl.where(masked, pull, 0.0))


@triton.jit
def _reduce(losses, weights, partial_ptr, counter_ptr, reduced_ptr, denominator_ptr, MEAN: tl.constexpr):
    """Add up the losses of all programs. The last program to finish adds the sums of all programs, always in the same order."""
    num_programs = tl.num_programs(0)
    own_ptr = partial_ptr + tl.program_id(0)
    tl.store(own_ptr, tl.sum(losses, 0))
    tl.store(own_ptr + num_programs, tl.sum(weights, 0))
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == num_programs - 1:
        total = tl.zeros([SUMMED], tl.float32)
        total_weight = tl.zeros([SUMMED], tl.float32)
        for start in range(0, num_programs, SUMMED):
            at = start + tl.arange(0, SUMMED)
            total += tl.load(partial_ptr + at, mask=at < num_programs, other=0.0, cache_modifier=".cg")
            total_weight += tl.load(partial_ptr + num_programs + at, mask=at < num_programs, other=0.0, cache_modifier=".cg")
        loss = tl.sum(total, 0)
        denominator = tl.sum(total_weight, 0)
        tl.store(reduced_ptr, loss / denominator if MEAN else loss)
        tl.store(denominator_ptr, denominator)
        tl.store(counter_ptr, 0)  # for the next launch


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def _loss(
    logits_ptr, target_ptr, weight_ptr, losses_ptr, state_ptr, largest_ptr, partial_ptr, counter_ptr, denominator_ptr,
    lam_e, lam_a, lam_log_count, hard_bias, keep, smoothing, ignore_index, num_rows, num_classes, inner,
    outer_stride, inner_stride, class_stride, target_outer_stride, target_inner_stride, target_class_stride,
    SOFT: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHED: tl.constexpr, HAS_DIVERGENCE: tl.constexpr, HAS_BIAS: tl.constexpr,
    REDUCED: tl.constexpr, MEAN: tl.constexpr, SAVES: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = rows < num_rows
    starts = logits_ptr + _offsets(rows, inner, outer_stride, inner_stride)
    targets = target_ptr + _offsets(rows, inner, target_outer_stride, target_inner_stride)
    if SOFT:
        kept, wanted = exists, exists
        f = _tile(starts, class_stride, wanted, num_classes, 0, -float("inf"), CLASSES)
        y = _largest(f, starts, class_stride, wanted, num_classes, WHOLE, ROWS, CLASSES)
    else:
        y = tl.load(targets, mask=exists, other=0).to(tl.int64)
        kept = exists & (y != ignore_index)
        wanted = kept & (y >= 0) & (y < num_classes)
        y = tl.where(wanted, y, -1)
        f = _tile(starts, class_stride, wanted, num_classes, 0, -float("inf"), CLASSES)
    at_y = tl.where(wanted, y, 0)
    f_y = tl.load(starts + at_y * class_stride, mask=wanted, other=0.0).to(tl.float32)
    class_weight = tl.full([ROWS], 1.0, tl.float32)
    if HAS_WEIGHT:
        class_weight = tl.load(weight_ptr + at_y).to(tl.float32)
    share = class_weight
    if SOFT:
        share = class_weight * tl.load(targets + at_y * target_class_stride, mask=wanted, other=0.0).to(tl.float32)

    m, sum_exp, sum_exp_z, sum_z, count, sum_weight, sum_weight_z = _gather(
        f, starts, class_stride, weight_ptr, y, wanted, num_classes, HAS_WEIGHT and SMOOTHED, WHOLE, ROWS, CLASSES
    )
    l, rho, mean_q_z, mean_u_z, divisor = _finish(f_y, m, sum_exp, sum_exp_z, sum_z, count)
    margin, pull = _margin_term(l, rho, mean_q_z, mean_u_z, count, hard_bias, keep, lam_e, lam_a, lam_log_count)
    loss = share * margin
    g_q = share * pull
    on_target = -g_q
    each = tl.zeros([ROWS], tl.float32)
    if SMOOTHED:
        smoothed, each, of_others, of_target = _smoothing_term(l, rho, count, sum_weight, sum_weight_z, class_weight, smoothing)
        loss += smoothed
        g_q += of_others
        on_target += of_target
    on_target = tl.where(count == 0, tl.where(l == l, 0.0, l), on_target)

    if SOFT:
        scale, sum_x, sum_xz, sum_z = _peel(f_y, m, sum_exp, sum_exp_z, sum_z, count)
        pull = tl.zeros([ROWS], tl.float32)
        over_S = tl.zeros([ROWS], tl.float32)
        tau_over_S = tl.zeros([ROWS], tl.float32)
        over_count = tl.zeros([ROWS], tl.float32)
        for start in range(0, CLASSES if WHOLE else num_classes, CLASSES):
            if not WHOLE:
                f = _tile(starts, class_stride, wanted, num_classes, start, -float("inf"), CLASSES)
            others = _but(f, y, start, CLASSES)
            t = _tile(targets, target_class_stride, wanted, num_classes, start, 0.0, CLASSES)
            t = tl.where(_classes(start, CLASSES)[None, :] == y[:, None], 0.0, t)
            u = t
            if HAS_WEIGHT:
                u = t * _weights(weight_ptr, num_classes, start, CLASSES)[None, :]
            term, _, S, tau, pulled = _of_targets(
                others, t, m[:, None], count[:, None], f_y[:, None], scale[:, None], sum_x[:, None], sum_xz[:, None], sum_z[:, None],
                hard_bias, keep, lam_e, lam_a, lam_log_count, HAS_DIVERGENCE, HAS_BIAS,
            )  # fmt: skip
            loss += tl.sum(u * term, 1)
            pull += tl.sum(u * pulled, 1)
            if HAS_DIVERGENCE:
                over_S += tl.sum(u / S, 1)
                tau_over_S += tl.sum(u / S * tau, 1)
                # a masked target has one non-target more
                over_count += tl.sum(u / tl.maximum(count[:, None] + tl.where(others == -float("inf"), 1.0, 0.0), 1.0), 1)
        g_q += pull * sum_x
        on_target += pull
        if HAS_DIVERGENCE:
            on_target += lam_a * over_count - (lam_e * tau_over_S + lam_a * over_S)

    loss = tl.where(kept, tl.where(wanted, loss, float("nan")), 0.0)
    if REDUCED:
        _reduce(loss, tl.where(kept, 1.0 if SOFT else class_weight, 0.0), partial_ptr, counter_ptr, losses_ptr, denominator_ptr, MEAN)
    else:
        tl.store(losses_ptr + rows, loss, mask=exists)
    if SAVES:
        at = state_ptr + rows * (2 * FIELDS if SOFT else FIELDS)
        tl.store(at, m, mask=exists)
        tl.store(at + 1, divisor, mask=exists)
        tl.store(at + 2, mean_q_z, mask=exists)
        tl.store(at + 3, count, mask=exists)
        tl.store(at + 4, share, mask=exists)
        tl.store(at + 5, g_q, mask=exists)
        tl.store(at + 6, on_target, mask=exists)
        tl.store(at + 7, each, mask=exists)
        if SOFT:
            tl.store(largest_ptr + rows, y, mask=exists)
            tl.store(at + 8, f_y, mask=exists)
            tl.store(at + 9, sum_x, mask=exists)
            tl.store(at + 10, sum_xz, mask=exists)
            tl.store(at + 11, sum_z, mask=exists)
            tl.store(at + 12, over_S, mask=exists)
            tl.store(at + 13, tau_over_S, mask=exists)
            tl.store(at + 14, over_count, mask=exists)
            tl.store(at + 15, margin, mask=exists)


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def _loss_gradient(
    logits_ptr, target_ptr, weight_ptr, gradient_ptr, target_gradient_ptr, state_ptr, largest_ptr, upstream_ptr, denominator_ptr,
    lam_e, lam_a, lam_log_count, hard_bias, keep, ignore_index, num_rows, num_classes, inner,
    outer_stride, inner_stride, class_stride, target_outer_stride, target_inner_stride, target_class_stride,
    grad_outer_stride, grad_inner_stride, grad_class_stride, target_grad_outer_stride, target_grad_inner_stride, target_grad_class_stride,
    programs_a_row, SOFT: tl.constexpr, HAS_WEIGHT: tl.constexpr, SMOOTHED: tl.constexpr, HAS_DIVERGENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, REDUCED: tl.constexpr, MEAN: tl.constexpr, HAS_GRADIENT: tl.constexpr, HAS_TARGET_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    rows = program // programs_a_row * ROWS + tl.arange(0, ROWS)
    start = program % programs_a_row * CLASSES
    classes = _classes(start, CLASSES)
    exists = rows < num_rows
    starts = logits_ptr + _offsets(rows, inner, outer_stride, inner_stride)
    targets = target_ptr + _offsets(rows, inner, target_outer_stride, target_inner_stride)
    upstream = tl.load(upstream_ptr) if REDUCED else tl.load(upstream_ptr + rows, mask=exists, other=0.0)[:, None]
    if MEAN:
        upstream = upstream / tl.load(denominator_ptr)
    if SOFT:
        y = tl.load(largest_ptr + rows, mask=exists, other=0)
        wanted = exists
    else:
        y = tl.load(targets, mask=exists, other=0).to(tl.int64)
        wanted = exists & (y != ignore_index) & (y >= 0) & (y < num_classes)
        y = tl.where(wanted, y, -1)
    f = _but(_tile(starts, class_stride, wanted, num_classes, start, -float("inf"), CLASSES), y, start, CLASSES)
    on_y = classes[None, :] == y[:, None]
    if HAS_WEIGHT:
        w = _weights(weight_ptr, num_classes, start, CLASSES)[None, :]

    at = (state_ptr + rows * (2 * FIELDS if SOFT else FIELDS))[:, None]
    exists = exists[:, None]
    m = tl.load(at, mask=exists, other=0.0)
    divisor = tl.load(at + 1, mask=exists, other=1.0)
    mean_q_z = tl.load(at + 2, mask=exists, other=0.0)
    count = tl.load(at + 3, mask=exists, other=0.0)
    share = tl.load(at + 4, mask=exists, other=0.0)
    g_q = tl.load(at + 5, mask=exists, other=0.0)
    on_target = tl.load(at + 6, mask=exists, other=0.0)
    z = f - m
    value = _element(z, tl.exp(z) / divisor, mean_q_z, count, lam_e * share, g_q, lam_a * share)
    if SMOOTHED:
        each = tl.load(at + 7, mask=exists, other=0.0)
        value -= each * w if HAS_WEIGHT else each
    masked_value = 0.0
    if SOFT:
        top = tl.load(at + 8, mask=exists, other=0.0)
        sum_x = tl.load(at + 9, mask=exists, other=0.0)
        sum_xz = tl.load(at + 10, mask=exists, other=0.0)
        sum_z = tl.load(at + 11, mask=exists, other=0.0)
        margin = tl.load(at + 15, mask=exists, other=0.0)
        unknown = tl.where(margin == margin, 0.0, float("nan"))  # a row with NaN or without a class has no finite gradient
        t = _tile(targets, target_class_stride, wanted, num_classes, start, 0.0, CLASSES)
        u = t * w if HAS_WEIGHT else t
        term, x, S, tau, pulled = _of_targets(
            f, t, m, count, top, tl.exp(m - top), sum_x, sum_xz, sum_z,
            hard_bias, keep, lam_e, lam_a, lam_log_count, HAS_DIVERGENCE, HAS_BIAS,
        )  # fmt: skip
        # every class takes the term of its own target out of the sums over all
        value -= u * pulled * (S + x)
        if HAS_DIVERGENCE:
            over_S = tl.load(at + 12, mask=exists, other=0.0)
            tau_over_S = tl.load(at + 13, mask=exists, other=0.0)
            over_count = tl.load(at + 14, mask=exists, other=0.0)
            near_z = _clamp(f - top)
            sums = near_z * (lam_e * over_S) - (lam_e * tau_over_S + lam_a * over_S)
            value += x * (sums - u / S * (lam_e * (near_z - tau) - lam_a)) + lam_a * (over_count - u / tl.maximum(count, 1.0))
        masked_value = -u * (tl.where(keep > 0, keep, 1.0) + unknown) * upstream
        if HAS_TARGET_GRADIENT:
            term += unknown if HAS_DIVERGENCE else tl.where(f == -float("inf"), unknown, 0.0)
            term = tl.where(on_y, margin, term) * upstream
            _write(
                target_gradient_ptr, term * w if HAS_WEIGHT else term, rows, classes, inner,
                target_grad_outer_stride, target_grad_inner_stride, target_grad_class_stride, num_rows, num_classes,
            )  # fmt: skip
    if HAS_GRADIENT:
        value = tl.where(f == -float("inf"), masked_value, value * upstream)
        value = tl.where(on_y, on_target * upstream, value)
        _write(gradient_ptr, value, rows, classes, inner, grad_outer_stride, grad_inner_stride, grad_class_stride, num_rows, num_classes)


# ---- launches


@triton.jit
def _nothing(x_ptr):
    tl.store(x_ptr, 0.0)


INTERPRETED = not isinstance(_forward, triton.runtime.JITFunction)  # TRITON_INTERPRET=1: on the CPU, for tests


def why_not() -> str | None:
    if INTERPRETED:
        return None
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or accelerator.type not in ("cuda", "xpu"):
        return "there is no GPU"
    try:
        _nothing[(1,)](torch.empty(1, device=accelerator))  # triton needs a C compiler at the first launch
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        return f"triton cannot launch a kernel here ({error})"
    return None


def describe() -> str:
    return f"triton {triton.__version__}{', interpreted on the CPU' if INTERPRETED else ''}"


class _Launch(NamedTuple):
    """Rows as a kernel takes them."""

    read: list[Tensor]
    written: list[Tensor | None]
    num_rows: int
    num_classes: int
    inner: int
    strides: list[int]  # of outer, inner and class, of each tensor
    tile: dict[str, int]

    @property
    def rows(self) -> tuple[int, ...]:
        return self.num_rows, self.num_classes, self.inner, *self.strides

    @property
    def tiles_a_row(self) -> int:
        return -(-self.num_classes // self.tile["CLASSES"])

    @property
    def tiles_of_rows(self) -> int:
        return -(-self.num_rows // self.tile["ROWS"])


def _lay(read: list[Tensor], written: list[Tensor | None]) -> _Launch:
    """Tensors (..., C) of one shape; probabilities come after the logits."""
    found, num_classes = lay_together(read, written), read[0].shape[-1]
    _, inner_stride, class_stride = found.strides[0]
    tile = _tile_shape(num_classes, class_stride == 1 or inner_stride != 1, soft=len(read) > 1, gradient=bool(written))
    inner, strides = found.inner, found.strides
    if found.outer == 1:  # rows of one stride as outer rows, because division by an inner size of 1 costs nothing
        inner, strides = 1, [(row, 0, of_class) for _, row, of_class in strides]
    flat = [stride for of_tensor in strides for stride in of_tensor]
    return _Launch(found.read, found.written, found.outer * found.inner, num_classes, inner, flat, tile)


def _tile_shape(num_classes: int, in_line: bool, soft: bool, gradient: bool) -> dict[str, int]:
    """The largest tile that spills no registers. Probabilities and a gradient need more registers an element."""
    in_row = triton.next_power_of_2(max(num_classes, 1))
    if in_line:  # the classes of a row are neighbours
        classes = min(in_row, MAX_TILE // (1 + soft) // (1 + gradient))
        rows = max(1, 1024 // classes)
    else:  # at least 16 rows, which are neighbours
        classes = min(in_row, 512 if soft and not gradient else 32)  # the kernel of probabilities would read a row several times
        rows = max(16, min(64, 2048 // classes))
    a_warp = 256 if soft else 512
    return {"ROWS": rows, "CLASSES": classes, "num_warps": min(max(rows * classes // a_warp, 1), 16)}


def _copy_back(asked: Sequence[Tensor | None], computed: Sequence[Tensor | None]) -> None:
    for to, of in zip(asked, computed, strict=True):
        if to is not None and of is not None and to is not of:
            to.copy_(of)


def _on_device(tensor: Tensor) -> Any:
    """Makes the tensor's device current, because kernels start on the current device."""
    return torch.get_device_module(tensor.device).device(tensor.device) if tensor.device.type != "cpu" else nullcontext()


def row_stats(logits: Tensor, target: Tensor, ignore_index: int = IGNORED, keep_exp: bool = False) -> tuple[RowStats, Softmax]:
    shape = logits.shape[:-1]
    stats = RowStats(*(torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in RowStats._fields))
    softmax = Softmax(torch.empty((3, *shape), dtype=torch.float32, device=logits.device), stats.num_nontargets)
    labels = mark_ignored(target, ignore_index).contiguous()
    launch = _lay([logits], [])
    if launch.num_rows:
        with _on_device(logits):
            _forward[(launch.tiles_of_rows,)](
                *launch.read, labels, *stats, softmax.state, *launch.rows, launch.tiles_a_row == 1, **launch.tile
            )
    return stats, softmax


def record(logits: Tensor, target: Tensor) -> Record:
    return record_of(*row_stats(logits, target))


def row_stats_backward(
    logits: Tensor,
    target: Tensor,
    softmax: Softmax,
    cotangents: Cotangents,
    gradient: Tensor | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    labels, upstream, state = mark_ignored(target, ignore_index).contiguous(), for_kernel(cotangents), softmax.state
    if gradient is None:
        gradient = torch.empty_like(logits)
    launch = _lay([logits], [gradient])
    if launch.num_rows:
        programs_a_row = 1 if upstream[-1] is not None else launch.tiles_a_row
        with _on_device(logits):
            _backward[(launch.tiles_of_rows * programs_a_row,)](
                *launch.read, labels, *launch.written, softmax.num_nontargets, state,
                *(state if g is None else g for g in upstream), *launch.rows, programs_a_row,
                *(g is not None for g in upstream), **launch.tile,
            )  # fmt: skip
        _copy_back([gradient], launch.written)
    return gradient


class _Numbers(NamedTuple):
    """The options of a loss as its kernels take them: lam * divergence = lam_e e + lam_a a + lam_log_count log K."""

    lam_e: float
    lam_a: float
    lam_log_count: float
    hard_bias: float
    keep: float  # 1 - smoothing

    @classmethod
    def of(cls, options: LossOptions) -> "_Numbers":
        lam = float(options.lam)
        of_divergence = {"symmetric": (lam / 2, -lam / 2, 0.0), "kl_qu": (lam, 0.0, lam), "kl_uq": (0.0, -lam, -lam)}
        return cls(*of_divergence[options.divergence], float(options.hard_bias), 1.0 - float(options.label_smoothing))


def _variant(target: Tensor, weight: Tensor | None, options: LossOptions) -> dict[str, bool]:
    """What the kernels of a loss are compiled for."""
    soft = target.is_floating_point()
    return {
        "SOFT": soft,
        "HAS_WEIGHT": weight is not None,
        "SMOOTHED": options.label_smoothing > 0,
        "HAS_DIVERGENCE": soft and options.lam > 0,
        "HAS_BIAS": soft and options.hard_bias != 0,
        "REDUCED": options.reduction != "none",
        "MEAN": options.reduction == "mean",
    }


def _loss_forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, saves: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    variant = _variant(target, weight, options)
    soft, device = variant["SOFT"], logits.device
    if not soft and _checks.can_look_at(target):
        _checks.check_range(target.long(), logits.shape[-1], options.ignore_index)
    launch = _lay([logits, target] if soft else [logits], [])
    labels, of_labels = ((), ()) if soft else ((target.contiguous(),), (launch.inner, 1, 0))
    losses = torch.empty(() if variant["REDUCED"] else logits.shape[:-1], dtype=torch.float32, device=device)
    denominator = torch.empty((), dtype=torch.float32, device=device)
    partial = torch.empty((2, launch.tiles_of_rows), dtype=torch.float32, device=device)
    fields = torch.empty((launch.num_rows if saves else 0, (1 + soft) * FIELDS.value), dtype=torch.float32, device=device)
    largest = torch.empty(launch.num_rows if saves and soft else 0, dtype=torch.int64, device=device)
    with _on_device(logits):
        _loss[(launch.tiles_of_rows,)](
            *launch.read, *labels, fields if weight is None else weight.contiguous(), losses, fields, largest, partial, _counter(device),
            denominator, *_Numbers.of(options), float(options.label_smoothing), int(options.ignore_index), *launch.rows, *of_labels,
            **variant, SAVES=saves, WHOLE=launch.tiles_a_row == 1, **launch.tile,
        )  # fmt: skip
    return losses, (fields, largest, denominator) if saves else ()


def _loss_backward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    saved: tuple[Tensor, ...],
    upstream: Tensor,
    gradient: Tensor | None,
    target_gradient: Tensor | None = None,
) -> None:
    variant, asked = _variant(target, weight, options), [gradient, target_gradient]
    soft, (fields, largest, denominator) = variant["SOFT"], saved
    launch = _lay([logits, target] if soft else [logits], asked)
    labels, of_labels = ((), ()) if soft else ((target.contiguous(),), (launch.inner, 1, 0))
    with _on_device(logits):
        _loss_gradient[(launch.tiles_of_rows * launch.tiles_a_row,)](
            *launch.read, *labels, fields if weight is None else weight.contiguous(), *(fields if x is None else x for x in launch.written),
            fields, largest, upstream.contiguous(), denominator, *_Numbers.of(options), int(options.ignore_index),
            *launch.rows[:6], *of_labels, *launch.rows[6:], launch.tiles_a_row,
            **variant, HAS_GRADIENT=gradient is not None, HAS_TARGET_GRADIENT=target_gradient is not None, **launch.tile,
        )  # fmt: skip
    _copy_back(asked, launch.written)


two_passes: TwoPasses | None = TwoPasses(_loss_forward, _loss_backward)


def _counter(device: torch.device) -> Tensor:
    """A zero that each launch sets to zero again. Launches of one stream share it, because they follow each other."""
    if device.type == "cpu":
        return _zero(device)
    module = torch.get_device_module(device)
    capturing = getattr(module, "is_current_stream_capturing", None)
    if capturing is not None and capturing():
        return _zero(device)  # of the graph, which may run beside any stream
    return _counter_of(device, module.current_stream(device).stream_id)


@cache
def _counter_of(device: torch.device, stream: int) -> Tensor:
    return _zero(device)


def _zero(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
