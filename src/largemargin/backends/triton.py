"""The Triton kernels: the statistics of rows and their gradient on CUDA, ROCm and XPU, in the symbols of rowstats.py.

A forward pass reads the logits once; a backward pass reads them once more and writes the gradient. Each program has a tile of rows by
classes. If classes are neighbours in memory, the tile is one row with as many classes as fit; for (N, C, d1, ...) it is many rows with a
few classes. Offsets have 64 bits, sums and gradients are float32 up to the final store, and nothing synchronises the device.
"""

import subprocess
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rowstats import Cotangents, Record, RowStats, Softmax
from .layout import Layout, lay
from .protocol import WholeLoss, for_kernel, record_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TILE = 16384  # elements of a tile held on chip
loss: WholeLoss | None = None


@triton.jit
def _tile(logits_ptr, target_ptr, rows, inner, outer_stride, inner_stride, class_stride, num_rows, num_classes, classes):
    """A tile of logits (rows, classes), -inf at targets and outside the tensor, and the targets (rows): -1 is ignored, -2 is elsewhere."""
    exists = rows < num_rows
    y = tl.load(target_ptr + rows, mask=exists, other=-1)
    starts = logits_ptr + (rows // inner) * outer_stride + (rows % inner) * inner_stride
    wanted = (y != -1)[:, None] & (classes < num_classes)[None, :] & (classes[None, :] != y[:, None])
    return tl.load(starts[:, None] + classes[None, :] * class_stride, mask=wanted, other=-float("inf")).to(tl.float32), y


@triton.jit
def _clamp(z):
    # for products with e^z, which is 0 below -1e4: the factor could overflow otherwise, and 0 * inf is NaN
    return tl.where(z < -1e4, -1e4, z)


# the last batch of an epoch has another number of rows, which must not compile the kernel again
@triton.jit(do_not_specialize=["num_rows"])
def _forward(
    logits_ptr, target_ptr, log_odds_ptr, neg_entropy_ptr, mean_log_q_ptr, rho_ptr, spread_ptr, num_nontargets_ptr, state_ptr,
    num_rows, num_classes, inner, outer_stride, inner_stride, class_stride, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m = tl.full([ROWS], -float("inf"), tl.float32)  # the record of the classes so far
    sum_exp = tl.zeros([ROWS], tl.float32)
    sum_exp_z = tl.zeros([ROWS], tl.float32)
    sum_z = tl.zeros([ROWS], tl.float32)
    count = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_classes, CLASSES):
        classes = start + tl.arange(0, CLASSES).to(tl.int64)
        f, _ = _tile(logits_ptr, target_ptr, rows, inner, outer_stride, inner_stride, class_stride, num_rows, num_classes, classes)
        largest = tl.maximum(m, tl.max(f, 1))  # may skip NaN, which makes every sum below NaN
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        d = tl.where(count == 0, 0.0, m - shift)
        scale = tl.exp(d)
        z = f - shift[:, None]
        exp_z = tl.exp(z)
        present = f != -float("inf")
        sum_exp_z = scale * sum_exp_z + tl.where(scale == 0, 0.0, scale * d) * sum_exp + tl.sum(exp_z * _clamp(z), 1)
        sum_exp = scale * sum_exp + tl.sum(exp_z, 1)
        sum_z = sum_z + d * count + tl.sum(tl.where(present, z, 0.0), 1)
        count += tl.sum(present.to(tl.float32), 1)
        m = largest

    exists = rows < num_rows
    y = tl.load(target_ptr + rows, mask=exists, other=-1)
    kept = y != -1
    starts = logits_ptr + (rows // inner) * outer_stride + (rows % inner) * inner_stride
    f_y = tl.load(starts + tl.where(y >= 0, y, 0) * class_stride, mask=y >= 0, other=0.0).to(tl.float32)
    alone = count == 0
    sum_exp = tl.where(alone, 1.0, sum_exp)
    log_sum_exp = tl.log(sum_exp)
    mean_q_z = sum_exp_z / sum_exp
    mean_u_z = sum_z / tl.maximum(count, 1.0)
    l = tl.where(alone, (f_y - f_y) + float("inf"), (f_y - m) - log_sum_exp)
    l = tl.where(f_y == float("inf"), float("nan"), l)
    tl.store(log_odds_ptr + rows, tl.where(kept, l, 0.0), mask=exists)
    tl.store(neg_entropy_ptr + rows, tl.where(kept, mean_q_z - log_sum_exp, 0.0), mask=exists)
    tl.store(mean_log_q_ptr + rows, tl.where(kept, mean_u_z - log_sum_exp, 0.0), mask=exists)
    tl.store(rho_ptr + rows, tl.where(kept, log_sum_exp, 0.0), mask=exists)
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
        classes = start + tl.arange(0, CLASSES).to(tl.int64)
        f, y = _tile(logits_ptr, target_ptr, rows, inner, outer_stride, inner_stride, class_stride, num_rows, num_classes, classes)
        live = (y != -1) & (count > 0)
        z = f - m[:, None]
        q = tl.exp(z) * inv_sum_exp[:, None]
        value = q * (g_e[:, None] * (_clamp(z) - mean_q_z[:, None]) - g_l[:, None])
        if HAS_A:
            # not added to g_l first: see row_stats_vjp in rowstats.py
            value += g_a[:, None] * (1.0 / tl.maximum(count, 1.0)[:, None] - q)
        if HAS_RHO:
            at = tl.where(f == m[:, None], classes[None, :], 9223372036854775807)
            first = tl.min(at, 1)
            at_max = (classes[None, :] == first[:, None]) & ~found[:, None]
            value += g_rho[:, None] * (q - at_max.to(tl.float32))
            found = found | (first < num_classes)
        value = tl.where((f != -float("inf")) & live[:, None], value, 0.0)
        on_target = g_l * (count > 0).to(tl.float32)  # NaN stays NaN
        value = tl.where((classes[None, :] == y[:, None]) & (y >= 0)[:, None], on_target[:, None], value)
        starts = gradient_ptr + (rows // inner) * grad_outer_stride + (rows % inner) * grad_inner_stride
        written = exists[:, None] & (classes < num_classes)[None, :]
        tl.store(starts[:, None] + classes[None, :] * grad_class_stride, value.to(gradient_ptr.dtype.element_ty), mask=written)


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


def _tile_shape(found: Layout) -> dict[str, int]:
    num_classes = triton.next_power_of_2(max(found.num_classes, 1))
    if found.class_stride == 1 or found.inner_stride != 1:
        classes = min(num_classes, MAX_TILE)
        rows = max(1, 1024 // classes)
    else:
        classes = min(num_classes, 32)
        rows = 64
    return {"ROWS": rows, "CLASSES": classes, "num_warps": min(max(rows * classes // 512, 1), 16)}


def _plain_rows(found: Layout) -> Layout:
    """Rows of one stride as outer rows, because division by an inner size of 1 costs nothing."""
    if found.outer != 1:
        return found
    return found._replace(outer=found.inner, inner=1, outer_stride=found.inner_stride, gradient_outer_stride=found.gradient_inner_stride)


def _on_device(tensor: Tensor) -> Any:
    """Makes the tensor's device current, because kernels start on the current device."""
    return torch.get_device_module(tensor.device).device(tensor.device) if tensor.device.type != "cpu" else nullcontext()


def row_stats(logits: Tensor, target: Tensor) -> tuple[RowStats, Softmax]:
    shape = logits.shape[:-1]
    stats = RowStats(*(torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in RowStats._fields))
    softmax = Softmax(torch.empty((3, *shape), dtype=torch.float32, device=logits.device), stats.num_nontargets)
    found, logits, _ = lay(logits, None)
    num_rows, tile, found = found.outer * found.inner, _tile_shape(found), _plain_rows(found)
    if num_rows:
        with _on_device(logits):
            _forward[(triton.cdiv(num_rows, tile["ROWS"]),)](
                logits, target.contiguous(), *stats, softmax.state,
                num_rows, found.num_classes, found.inner, found.outer_stride, found.inner_stride, found.class_stride, **tile,
            )  # fmt: skip
    return stats, softmax


def record(logits: Tensor, target: Tensor) -> Record:
    return record_of(*row_stats(logits, target))


def row_stats_backward(logits: Tensor, target: Tensor, softmax: Softmax, cotangents: Cotangents, gradient: Tensor | None = None) -> Tensor:
    upstream, state = for_kernel(cotangents), softmax.state
    if gradient is None:
        gradient = torch.empty_like(logits)
    found, logits, written = lay(logits, gradient)
    num_rows, tile, found = found.outer * found.inner, _tile_shape(found), _plain_rows(found)
    if num_rows:
        programs_a_row = 1 if upstream[-1] is not None else triton.cdiv(found.num_classes, tile["CLASSES"])
        with _on_device(logits):
            _backward[(triton.cdiv(num_rows, tile["ROWS"]) * programs_a_row,)](
                logits, target.contiguous(), written, softmax.num_nontargets, state, *(state if g is None else g for g in upstream),
                num_rows, found.num_classes, found.inner, *found[3:], programs_a_row, *(g is not None for g in upstream), **tile,
            )  # fmt: skip
        if written is not None and written is not gradient:
            gradient.copy_(written)
    return gradient
