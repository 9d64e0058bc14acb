"""The native CPU kernel: ``cpu.cpp`` seen from Python, without autograd.

A call fills in one C structure and hands it over. Of its arguments only the labels are checked, and that by the kernel.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends, _checks
from . import LossOptions

DTYPES = (torch.float32, torch.bfloat16)
_SUFFIXES = (".so", ".dylib", ".dll")
_DIVERGENCES = {"symmetric": 0, "kl_qu": 1, "kl_uq": 2}
_STATISTICS, _STATISTICS_GRADIENT, _LOSS = range(3)

_Three = ctypes.c_int64 * 3


class _Job(ctypes.Structure):
    """Mirrors ``struct Job`` in cpu.cpp, where the fields are explained."""

    _fields_ = (
        ("outer", ctypes.c_int64),
        ("inner", ctypes.c_int64),
        ("num_classes", ctypes.c_int64),
        ("logits_strides", _Three),
        ("gradient_strides", _Three),
        ("logits", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("ignore_index", ctypes.c_int64),
        ("is_bfloat16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("stats", ctypes.c_void_p * 6),
        ("state", ctypes.c_void_p),
        ("grads", ctypes.c_void_p * 4),
        ("weight", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("row_upstream", ctypes.c_void_p),
        ("upstream", ctypes.c_double),
        ("lam", ctypes.c_double),
        ("hard_bias", ctypes.c_double),
        ("label_smoothing", ctypes.c_double),
        ("loss", ctypes.c_double),
        ("kind", ctypes.c_int32),
        ("divergence", ctypes.c_int32),
        ("mean", ctypes.c_int32),
    )


class _Kernel(NamedTuple):
    run: Any
    isa: str
    path: Path


@functools.cache
def _kernel() -> _Kernel | str:
    """The compiled kernel, or in words why there is none."""
    # an editable install keeps what was compiled apart from the sources; both folders belong to the package
    found = [path for folder in _backends.__path__ for path in sorted(Path(folder).glob("*largemargin_cpu.*")) if path.suffix in _SUFFIXES]
    if not found:
        return "it was not compiled: no C++ compiler worked when largemargin was installed; install one and reinstall largemargin"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"{found[0].name} could not be loaded: {error}"
    if library.largemargin_sizeof_job() != ctypes.sizeof(_Job):
        return f"{found[0]} is of another version of largemargin; reinstall largemargin"
    library.largemargin_isa.restype = ctypes.c_char_p
    isa = library.largemargin_isa().decode()
    run = getattr(library, f"largemargin_run_{isa}")
    run.argtypes, run.restype = (ctypes.c_void_p,), ctypes.c_int64
    return _Kernel(run, isa, found[0])


def why_not() -> str | None:
    """Why the kernel cannot be used on this machine, or None."""
    kernel = _kernel()
    return kernel if isinstance(kernel, str) else None


def describe() -> str:
    """The kernel in use, in a few words."""
    kernel = _kernel()
    assert isinstance(kernel, _Kernel), kernel
    return f"{kernel.path.name}, {kernel.isa}"


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class _Layout(NamedTuple):
    """Rows as two dimensions, with the strides of outer, inner and class in elements."""

    outer: int
    inner: int
    num_classes: int
    logits_strides: tuple[int, int, int]
    gradient_strides: tuple[int, int, int]


def _layout(logits: Tensor, gradient: Tensor | None) -> _Layout | None:
    """The rows of ``logits`` (..., C), and alike those of their gradient; None where two dimensions are not enough."""
    strides = logits.stride()
    gradient_strides = strides if gradient is None else gradient.stride()
    dims: list[tuple[int, int, int]] = []  # size and both strides, neighbours merged where one stride spans them
    for size, f, g in zip(logits.shape[:-1], strides[:-1], gradient_strides[:-1], strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1] == size * f and dims[-1][2] == size * g:
            dims[-1] = (dims[-1][0] * size, f, g)
        else:
            dims.append((size, f, g))
    if len(dims) > 2:
        return None
    (outer, f0, g0), (inner, f1, g1) = [(1, 0, 0)] * (2 - len(dims)) + dims
    num_classes = logits.shape[-1]
    f2, g2 = (1, 1) if num_classes == 1 else (strides[-1], gradient_strides[-1])  # the stride of a single class says nothing
    return _Layout(outer, inner, num_classes, (f0, f1, f2), (g0, g1, g2))


def _job(kind: int, logits: Tensor, target: Tensor, ignore_index: int, gradient: Tensor | None = None, **fields: Any) -> _Job:
    """Have the kernel work on ``logits`` (..., C), int64 ``target`` (...) and, where it is to be written, ``gradient`` (..., C)."""
    kernel = _kernel()
    assert isinstance(kernel, _Kernel), kernel
    layout = _layout(logits, gradient)
    written = gradient
    if layout is None:  # as in a crop of an image: no two strides lead from row to row
        logits = logits.contiguous()
        written = None if gradient is None else torch.empty_like(logits)
        layout = _layout(logits, written)
        assert layout is not None
    target = target.contiguous()
    job = _Job(
        *layout, logits.data_ptr(), _address(written), target.data_ptr(), ignore_index, logits.dtype == torch.bfloat16,
        torch.get_num_threads(), kind=kind, **fields,
    )  # fmt: skip
    status = kernel.run(ctypes.byref(job))
    if status == -2:
        raise MemoryError(f"no memory for the scratch of the CPU kernel, a few rows of {logits.shape[-1]} classes a thread")
    if status != -1:
        _checks.check_range(target, logits.shape[-1], ignore_index)
    if gradient is not None and written is not gradient:
        gradient.copy_(written)
    return job


def row_stats(logits: Tensor, target: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The fields of RowStats and the state (3, ...) their gradient needs; ``logits`` (..., C), ``target`` (...), -1 where ignored."""
    shape = logits.shape[:-1]
    stats = tuple(torch.empty(shape, device="cpu") for _ in range(6))
    state = torch.empty((3, *shape), device="cpu")
    _job(_STATISTICS, logits, target, -1, stats=(ctypes.c_void_p * 6)(*map(_address, stats)), state=_address(state))
    return stats, state


def row_stats_backward(
    logits: Tensor, target: Tensor, num_nontargets: Tensor, state: Tensor, grads: Sequence[Tensor | None]
) -> Tensor:
    """The gradient with respect to ``logits`` from those of the first five fields, of which any may be None."""
    g_l, g_e, g_a, g_rho, g_spread = grads
    if g_spread is not None:  # spread = e - a
        g_e = g_spread if g_e is None else g_e + g_spread
        g_a = -g_spread if g_a is None else g_a - g_spread
    upstream = [None if g is None else g.contiguous() for g in (g_l, g_e, g_a, g_rho)]
    gradient = torch.empty_like(logits)
    _job(
        _STATISTICS_GRADIENT, logits, target, -1, gradient, stats=(ctypes.c_void_p * 6)(*[None] * 5, num_nontargets.data_ptr()),
        state=state.data_ptr(), grads=(ctypes.c_void_p * 4)(*map(_address, upstream)),
    )  # fmt: skip
    return gradient


def loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    gradient: Tensor | None = None,
    upstream: float | Tensor = 1.0,
) -> Tensor:
    """The reduced loss of rows ``logits`` (..., C) with labels ``target`` (...); writes its gradient, times ``upstream``, if given one.

    ``gradient`` may be ``logits`` itself. ``upstream`` is a number, or one for each row where the reduction is ``"none"``.
    """
    weight = None if weight is None else weight.to(torch.float32).contiguous()
    losses = torch.empty(logits.shape[:-1], device="cpu") if options.reduction == "none" else None
    row_upstream = upstream.contiguous() if isinstance(upstream, Tensor) else None
    job = _job(
        _LOSS, logits, target, options.ignore_index, gradient, weight=_address(weight), losses=_address(losses),
        row_upstream=_address(row_upstream), upstream=1.0 if row_upstream is not None else upstream, lam=options.lam,
        hard_bias=options.hard_bias, label_smoothing=options.label_smoothing, divergence=_DIVERGENCES[options.divergence],
        mean=options.reduction == "mean",
    )  # fmt: skip
    return torch.scalar_tensor(job.loss, dtype=torch.float32, device="cpu") if losses is None else losses
