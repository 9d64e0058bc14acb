"""The native CPU kernel ``cpu.cpp``, without autograd. Each call passes one C structure; the kernel checks the labels, and nothing else."""

import ctypes
import functools
import struct
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .. import _checks, backends
from ..loss import DIVERGENCES, HingeOptions, LossOptions
from ..rowstats import IGNORED, Cotangents, Record, RowStats, Softmax, accumulation_dtype
from .layout import lay_together
from .protocol import Predictions, TwoPasses, record_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in the order of Dtype in cpu.cpp
_SUFFIXES = (".so", ".dylib", ".dll")
_SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
CHECKS_LABELS = True
two_passes: TwoPasses | None = None


# the types of the fields of a job, with their codes in a struct
_Int64 = Annotated[int, "q"]
_Int32 = Annotated[int, "i"]
_Address = Annotated[int, "P"]
_Double = Annotated[float, "d"]
_Bool = Annotated[bool, "i"]


class _StatisticsJob(NamedTuple):
    """The addresses of the statistics of rows, or of the inputs of their gradient; 0 means none."""

    log_odds: _Address = 0
    neg_entropy: _Address = 0
    mean_log_q: _Address = 0
    rho: _Address = 0
    spread: _Address = 0
    num_nontargets: _Address = 0
    state: _Address = 0
    log_odds_grad: _Address = 0
    neg_entropy_grad: _Address = 0
    mean_log_q_grad: _Address = 0
    rho_grad: _Address = 0
    spread_grad: _Address = 0
    ahead: _Address = 0
    prediction_log_odds: _Address = 0


class _ProbabilitiesJob(NamedTuple):
    probabilities_outer_stride: _Int64 = 0
    probabilities_inner_stride: _Int64 = 0
    probabilities_class_stride: _Int64 = 0
    probabilities_gradient_outer_stride: _Int64 = 0
    probabilities_gradient_inner_stride: _Int64 = 0
    probabilities_gradient_class_stride: _Int64 = 0
    probabilities: _Address = 0
    probabilities_gradient: _Address = 0
    probabilities_dtype: _Int32 = 0


class _LossJob(NamedTuple):
    weight: _Address = 0
    losses: _Address = 0
    row_upstream: _Address = 0
    upstream: _Double = 1.0
    lam: _Double = 0.0
    hard_bias: _Double = 0.0
    label_smoothing: _Double = 0.0
    reduced: _Address = 0
    divergence: _Int32 = 0
    mean: _Bool = False


_NO_STATISTICS, _NO_PROBABILITIES, _NO_LOSS = _StatisticsJob(), _ProbabilitiesJob(), _LossJob()
KINDS = ("statistics", "gradient of statistics", "loss", "predictions", "gradient from kept e^z", "record")  # of a job, as in cpu.cpp
_STATISTICS, _STATISTICS_GRADIENT, _LOSS, _PREDICTIONS, _KEPT_GRADIENT, _RECORD = range(len(KINDS))


def _codes(job: type) -> dict[str, str]:
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(job, include_extras=True).items()}


_STRIDES = ("outer_stride", "inner_stride", "class_stride")
# struct Job of cpu.cpp: the name of each field and its type
FIELDS = {
    **dict.fromkeys(("outer", "inner", "num_classes", *_STRIDES, *(f"gradient_{name}" for name in _STRIDES)), "q"),
    **dict.fromkeys(("logits", "gradient", "target"), "P"),
    **{"ignore_index": "q", "dtype": "i", "num_threads": "i"},
    **_codes(_StatisticsJob),
    **_codes(_ProbabilitiesJob),
    **_codes(_LossJob),
    "kind": "i",
}
_JOB = struct.Struct(f"@{''.join(FIELDS.values())}0q")


def offsets() -> dict[str, int]:
    ends = map(struct.calcsize, accumulate(FIELDS.values(), initial="@"))
    next(ends)
    return {name: end - struct.calcsize(code) for (name, code), end in zip(FIELDS.items(), ends, strict=True)}


class _Kernel(NamedTuple):
    run: Any
    run_float64: Any
    isa: str
    path: Path


@functools.cache
def _library() -> tuple[ctypes.CDLL, Path] | str:
    """The compiled library and its file, or the reason why there is none."""
    # an editable install keeps the library apart from the sources; both folders belong to the package
    found = [path for folder in backends.__path__ for path in sorted(Path(folder).glob("largemargin_cpu.*")) if path.suffix in _SUFFIXES]
    if not found:
        return "it was not compiled, because the installation of largemargin found no working C++ compiler; install one and reinstall"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return f"{found[0].name} could not be loaded: {error}"
    library.largemargin_offset_of.argtypes, library.largemargin_offset_of.restype = (ctypes.c_char_p,), ctypes.c_int64
    agree = all(library.largemargin_offset_of(name.encode()) == offset for name, offset in offsets().items())
    num_kinds = getattr(library, "largemargin_num_kinds", int)  # older kernels do not count them
    if not agree or library.largemargin_sizeof_job() != _JOB.size or num_kinds() != len(KINDS):
        return f"{found[0]} belongs to another version of largemargin; reinstall largemargin"
    library.largemargin_isa.restype = ctypes.c_char_p
    return library, found[0]


@functools.cache
def kernel_for(isa: str | None = None) -> _Kernel | str:
    """The kernel for an instruction set, by default the widest that this machine has."""
    library = _library()
    if isinstance(library, str):
        return library
    isa = isa or library[0].largemargin_isa().decode()
    run, run_float64 = (getattr(library[0], f"largemargin_run_{name}") for name in (isa, f"{isa}_float64"))
    for function in (run, run_float64):
        function.argtypes, function.restype = (ctypes.c_char_p,), ctypes.c_int64
    return _Kernel(run, run_float64, isa, library[1])


def why_not() -> str | None:
    kernel = kernel_for()
    return kernel if isinstance(kernel, str) else None


def describe() -> str:
    kernel = kernel_for()
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
    target_gradient: Tensor | None = None,
    statistics: _StatisticsJob = _NO_STATISTICS,
    loss: _LossJob = _NO_LOSS,
) -> None:
    """Run the kernel on ``logits`` (..., C) and int64 ``target`` (...), or probabilities (..., C); it writes the gradients given."""
    kernel = kernel_for()
    assert isinstance(kernel, _Kernel), kernel
    asked = written = [gradient, target_gradient]
    probabilities, labels = _NO_PROBABILITIES, 0
    if target.is_floating_point():
        wide = accumulation_dtype(logits.dtype)
        if torch.float64 in (wide, target.dtype):  # float64 goes with float64 alone
            target = target.to(wide)
        if target_gradient is not None and target_gradient.dtype is not target.dtype:
            target_gradient = torch.empty_like(target_gradient, dtype=target.dtype)
        laid = lay_together([logits, target], [gradient, target_gradient])
        (logits, target), written, (of_logits, of_target, *of_gradients) = laid.read, laid.written, laid.strides
        rows = laid.outer, laid.inner, logits.shape[-1], *of_logits, *of_gradients[0]
        pointers = target.data_ptr(), _address(written[1])
        probabilities = _ProbabilitiesJob(*of_target, *of_gradients[1], *pointers, DTYPES.index(target.dtype))
    else:
        target = target.contiguous()
        labels = target.data_ptr()
        if logits.dim() == 2 and logits.is_contiguous() and (gradient is None or gradient.is_contiguous()):  # the fast path
            num_rows, num_classes = logits.shape
            rows = 1, num_rows, num_classes, 0, num_classes, 1, 0, num_classes, 1
        else:
            laid = lay_together([logits], [gradient])
            (logits,), written, (of_logits, of_gradient) = laid.read, laid.written, laid.strides
            rows = laid.outer, laid.inner, logits.shape[-1], *of_logits, *of_gradient
    plain = logits.data_ptr(), _address(written[0]), labels, ignore_index, DTYPES.index(logits.dtype), torch.get_num_threads()
    run = kernel.run_float64 if logits.dtype is torch.float64 else kernel.run
    status = run(_JOB.pack(*rows, *plain, *statistics, *probabilities, *loss, kind))
    if status == -2:
        raise MemoryError(f"no memory for the scratch of the CPU kernel: a few rows of {logits.shape[-1]} classes per thread")
    if status != -1:
        _checks.check_range(target, logits.shape[-1], ignore_index)
    if written is not asked:
        for to, of in zip(asked, written, strict=False):
            if to is not None and of is not None and to is not of:
                to.copy_(of)


def row_stats(logits: Tensor, target: Tensor, ignore_index: int = IGNORED, keep_exp: bool = False) -> tuple[RowStats, Softmax]:
    kept = keep_exp and logits.dtype is accumulation_dtype(logits.dtype) and logits.is_contiguous()  # half precision would round
    return _row_stats(_STATISTICS, logits, target, ignore_index, torch.empty_like(logits) if kept else None)


def _row_stats(kind: int, logits: Tensor, target: Tensor, ignore_index: int, exp_z: Tensor | None = None) -> tuple[RowStats, Softmax]:
    dtype = accumulation_dtype(logits.dtype)
    # empty_like and new_empty take half the time of empty; views of one tensor could not be written in place
    log_odds = torch.empty_like(target, dtype=dtype, memory_format=torch.contiguous_format)
    stats = RowStats(log_odds, *[torch.empty_like(log_odds) for _ in RowStats._fields[1:]])
    softmax = Softmax(log_odds.new_empty((3, *log_odds.shape)), stats.num_nontargets, exp_z)
    _run(kind, logits, target, ignore_index, exp_z, statistics=_StatisticsJob(*map(_address, (*stats, softmax.state))))
    return stats, softmax


def predictions(logits: Tensor, target: Tensor, ignore_index: int) -> Predictions:
    shape = logits.shape[:-1]
    *stats, log_odds = torch.empty((7, *shape), dtype=accumulation_dtype(logits.dtype), device="cpu").unbind()
    ahead = torch.empty(shape, dtype=torch.int64, device="cpu")
    written = *map(_address, stats), *[0] * 6, _address(ahead), _address(log_odds)
    _run(_PREDICTIONS, logits, target, ignore_index, None, statistics=_StatisticsJob(*written))
    return Predictions(RowStats(*stats), log_odds, ahead)


def record(logits: Tensor, target: Tensor) -> Record:
    return record_of(*_row_stats(_RECORD, logits, target, IGNORED))


def row_stats_backward(
    logits: Tensor,
    target: Tensor,
    softmax: Softmax,
    cotangents: Cotangents,
    gradient: Tensor | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    if gradient is not None and gradient.dtype != logits.dtype:
        return gradient.copy_(row_stats_backward(logits, target, softmax, cotangents, ignore_index=ignore_index))
    dtype = accumulation_dtype(logits.dtype)
    if any(x is not None and x.dtype != dtype for x in (*softmax, *cotangents)):  # hooks on saved tensors may have changed the logits
        softmax = Softmax(softmax.state.to(dtype), softmax.num_nontargets.to(dtype))
        cotangents = Cotangents(*(None if g is None else g.to(dtype) for g in cotangents))
    kind = _STATISTICS_GRADIENT
    if gradient is None and softmax.exp_z is not None and softmax.exp_z.dtype is logits.dtype:
        kind, gradient = _KEPT_GRADIENT, softmax.exp_z
    elif gradient is None:
        gradient = torch.empty_like(logits)
    state, num_nontargets = softmax.state.contiguous(), softmax.num_nontargets.contiguous()
    upstream = [None if g is None else g.contiguous() for g in cotangents]  # keeps these tensors alive during the call
    addresses = num_nontargets.data_ptr(), state.data_ptr(), *map(_address, upstream)
    statistics = _StatisticsJob(0, 0, 0, 0, 0, *addresses)  # by position: names take a microsecond in every call
    _run(kind, logits, target, ignore_index, gradient, statistics=statistics)
    return gradient


def loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions | HingeOptions,
    gradient: Tensor | None = None,
    target_gradient: Tensor | None = None,
    upstream: float | Tensor = 1.0,
) -> Tensor:
    dtype, reduction = accumulation_dtype(logits.dtype), options.reduction
    weight = None if weight is None else weight.to(dtype).contiguous()
    factor, row_upstream = (1.0, upstream.to(dtype).contiguous()) if isinstance(upstream, Tensor) else (upstream, None)
    if reduction == "none":
        losses = logits.new_empty(logits.shape[:-1], dtype=dtype)
        a_row, reduced = losses.data_ptr(), 0
    else:
        losses = torch.empty_like(_SCALARS[dtype])  # takes half the time of new_empty(())
        a_row, reduced = 0, losses.data_ptr()
    if isinstance(options, HingeOptions):
        lam, hard_bias, divergence = 0.0, options.margin, len(DIVERGENCES) + (not options.soft)
    else:
        lam, hard_bias, divergence = options.lam, options.hard_bias, DIVERGENCES.index(options.divergence)
    # by position, in the order of the class: names take a microsecond in every call
    numbers = factor, lam, hard_bias, options.label_smoothing, reduced, divergence, reduction == "mean"
    job = _LossJob(_address(weight), a_row, _address(row_upstream), *numbers)
    _run(_LOSS, logits, target, options.ignore_index, gradient, target_gradient, loss=job)
    return losses
