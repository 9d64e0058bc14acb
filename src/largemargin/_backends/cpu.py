"""The native CPU kernel: ``cpu.cpp`` seen from Python, without autograd.

A call fills in one C structure and hands it over. Of its arguments only the labels are checked, and that by the kernel.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backends, _checks
from . import LossOptions, folded
from .layout import lay

DTYPES = (torch.float32, torch.bfloat16)
_SUFFIXES = (".so", ".dylib", ".dll")
_DIVERGENCES = {"symmetric": 0, "kl_qu": 1, "kl_uq": 2}
_STATISTICS, _STATISTICS_GRADIENT, _LOSS = range(3)

# struct Job of cpu.cpp: the rows and their strides, pointers, ignore_index; dtype and threads; the statistics; the loss
_JOB = struct.Struct("@3q 3q 3q 3P q 2i 6P P 4P 3P 4d P 3i 4x")
_NO_STATISTICS, _NO_LOSS = (0,) * 11, (0, 0, 0, 1.0, 0.0, 0.0, 0.0, 0, 0, 0)


class _Kernel(NamedTuple):
    run: Any
    isa: str
    path: Path


@functools.cache
def _library() -> tuple[ctypes.CDLL, Path] | str:
    """The compiled library and its file, or in words why there is none."""
    # an editable install keeps what was compiled apart from the sources; both folders belong to the package
    found = [path for folder in _backends.__path__ for path in sorted(Path(folder).glob("largemargin_cpu.*")) if path.suffix in _SUFFIXES]
    if not found:
        return "it was not compiled: no C++ compiler worked when largemargin was installed; install one and reinstall largemargin"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"{found[0].name} could not be loaded: {error}"
    if library.largemargin_sizeof_job() != _JOB.size:
        return f"{found[0]} is of another version of largemargin; reinstall largemargin"
    library.largemargin_isa.restype = ctypes.c_char_p
    return library, found[0]


@functools.cache
def kernel_for(isa: str | None = None) -> _Kernel | str:
    """The kernel for an instruction set, by default the widest of this machine."""
    library = _library()
    if isinstance(library, str):
        return library
    isa = isa or library[0].largemargin_isa().decode()
    run = getattr(library[0], f"largemargin_run_{isa}")
    run.argtypes, run.restype = (ctypes.c_char_p,), ctypes.c_int64
    return _Kernel(run, isa, library[1])


@functools.cache
def _kernel() -> _Kernel | str:
    return kernel_for()


def why_not() -> str | None:
    """Why the kernel cannot be used on this machine, or None."""
    kernel = _kernel()
    return kernel if isinstance(kernel, str) else None


def describe() -> str:
    """The kernel in use, in a few words."""
    kernel = _kernel()
    assert isinstance(kernel, _Kernel), kernel
    return f"{kernel.path.name}, {kernel.isa}"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _run(
    kind: int,
    logits: Tensor,
    target: Tensor,
    ignore_index: int,
    gradient: Tensor | None,
    statistics: Sequence[int],
    loss: Sequence[float],
) -> None:
    """Have the kernel work on ``logits`` (..., C), int64 ``target`` (...) and, where it is to be written, ``gradient`` (..., C)."""
    kernel = _kernel()
    assert isinstance(kernel, _Kernel), kernel
    rows: Sequence[int]
    if logits.dim() == 2 and logits.is_contiguous() and (gradient is None or gradient.is_contiguous()):  # the usual case, quickly
        num_rows, num_classes = logits.shape
        rows, written = (1, num_rows, num_classes, 0, num_classes, 1, 0, num_classes, 1), gradient
    else:
        rows, logits, written = lay(logits, gradient)
    target = target.contiguous()
    job = _JOB.pack(
        *rows, logits.data_ptr(), _address(written), target.data_ptr(), ignore_index,
        logits.dtype is torch.bfloat16, torch.get_num_threads(),
        *statistics, *loss, kind,
    )  # fmt: skip
    status = kernel.run(job)
    if status == -1:
        if gradient is not None and written is not None and written is not gradient:
            gradient.copy_(written)
        return
    if status == -2:
        raise MemoryError(f"no memory for the scratch of the CPU kernel, a few rows of {logits.shape[-1]} classes a thread")
    _checks.check_range(target, logits.shape[-1], ignore_index)


def row_stats(logits: Tensor, target: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The fields of RowStats and the state (3, ...) their gradient needs; ``logits`` (..., C), ``target`` (...), -1 where ignored."""
    shape = logits.shape[:-1]
    stats = tuple(torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(6))
    state = torch.empty((3, *shape), dtype=torch.float32, device="cpu")
    _run(_STATISTICS, logits, target, -1, None, (*map(_address, (*stats, state)), *[0] * 4), _NO_LOSS)
    return stats, state


def row_stats_backward(
    logits: Tensor,
    target: Tensor,
    num_nontargets: Tensor,
    state: Tensor,
    grads: Sequence[Tensor | None],
    gradient: Tensor | None = None,
) -> Tensor:
    """The gradient with respect to ``logits`` from those of the first five fields, of which any may be None.

    It is written to ``gradient``, where that is given: it may be ``logits`` itself, unless there is one of rho.
    """
    upstream = folded(grads)
    if gradient is not None and gradient.dtype != logits.dtype:
        return gradient.copy_(row_stats_backward(logits, target, num_nontargets, state, grads))
    if gradient is None:
        gradient = torch.empty_like(logits)
    num_nontargets, state = num_nontargets.contiguous(), state.contiguous()
    statistics = (*[0] * 5, num_nontargets.data_ptr(), state.data_ptr(), *map(_address, upstream))
    _run(_STATISTICS_GRADIENT, logits, target, -1, gradient, statistics, _NO_LOSS)
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
    lam, divergence, hard_bias, label_smoothing, ignore_index, reduction = options
    if weight is not None:
        weight = weight.to(torch.float32).contiguous()
    a_row = reduction == "none"
    losses = logits.new_empty(logits.shape[:-1] if a_row else (), dtype=torch.float32)
    each, reduced = (losses.data_ptr(), 0) if a_row else (0, losses.data_ptr())
    row_upstream, factor = (upstream.contiguous(), 1.0) if isinstance(upstream, Tensor) else (None, upstream)
    numbers = (factor, lam, hard_bias, label_smoothing, reduced, _DIVERGENCES[divergence], reduction == "mean")
    _run(_LOSS, logits, target, ignore_index, gradient, _NO_STATISTICS, (_address(weight), each, _address(row_upstream), *numbers))
    return losses
