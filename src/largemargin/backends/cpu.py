"""The native CPU kernel ``cpu.cpp``, without autograd. Each call passes one C structure; the kernel checks the labels, and nothing else."""

import ctypes
import functools
import struct
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from .. import _checks, backends
from ..loss import DIVERGENCES, HingeOptions, LossOptions
from ..rowstats import Cotangents, Record, RowStats, Softmax, accumulation_dtype
from .layout import Layout, lay, lay_together
from .protocol import Predictions, TwoPasses, for_kernel, record_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in the order of Dtype in cpu.cpp
_SUFFIXES = (".so", ".dylib", ".dll")
_SCALARS = {dtype: torch.empty((), dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}
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
_STATISTICS, _STATISTICS_GRADIENT, _LOSS, _PREDICTIONS = range(4)  # kinds of a job


def _codes(job: type) -> dict[str, str]:
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(job, include_extras=True).items()}


# struct Job of cpu.cpp: the name of each field and its type
FIELDS = {
    **dict.fromkeys(Layout._fields, "q"),
    **dict.fromkeys(("logits", "gradient", "target"), "P"),
    **{"ignore_index": "q", "dtype": "i", "num_threads": "i"},
    **_codes(_StatisticsJob),
    **_codes(_ProbabilitiesJob),
    **_codes(_LossJob),
    "kind": "i",
}
_JOB = struct.Struct(f"@{''.join(FIELDS.values())}0q")


def offsets() -> dict[str, int]:
    codes = "@"
    found = {}
    for name, code in FIELDS.items():
        codes += code
        found[name] = struct.calcsize(codes) - struct.calcsize(code)
    return found


class _Kernel(NamedTuple):
    run: Any
    run_float64: Any
    isa: str
    path: Path

    def __call__(self, dtype: torch.dtype, job: bytes) -> int:
        status: int = (self.run_float64 if dtype is torch.float64 else self.run)(job)
        return status


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
    if not agree or library.largemargin_sizeof_job() != _JOB.size:
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


@functools.cache
def _kernel() -> _Kernel | str:
    return kernel_for()


def why_not() -> str | None:
    kernel = _kernel()
    return kernel if isinstance(kernel, str) else None


def describe() -> str:
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
    statistics: _StatisticsJob = _NO_STATISTICS,
    loss: _LossJob = _NO_LOSS,
) -> None:
    """Run the kernel on ``logits`` (..., C) and int64 ``target`` (...); it writes ``gradient`` (..., C) if given."""
    kernel = _kernel()
    assert isinstance(kernel, _Kernel), kernel
    rows: tuple[int, ...]
    if logits.dim() == 2 and logits.is_contiguous() and (gradient is None or gradient.is_contiguous()):  # the fast path
        num_rows, num_classes = logits.shape
        rows, written = (1, num_rows, num_classes, 0, num_classes, 1, 0, num_classes, 1), gradient
    else:
        rows, logits, written = lay(logits, gradient)
    target = target.contiguous()
    dtype, num_threads = DTYPES.index(logits.dtype), torch.get_num_threads()
    pointers = logits.data_ptr(), _address(written), target.data_ptr()
    job = _JOB.pack(*rows, *pointers, ignore_index, dtype, num_threads, *statistics, *_NO_PROBABILITIES, *loss, kind)
    status = kernel(logits.dtype, job)
    if status == -1:
        if gradient is not None and written is not None and written is not gradient:
            gradient.copy_(written)
        return
    _check_memory(status, logits)
    _checks.check_range(target, logits.shape[-1], ignore_index)


def _check_memory(status: int, logits: Tensor) -> None:
    if status == -2:
        raise MemoryError(f"no memory for the scratch of the CPU kernel: a few rows of {logits.shape[-1]} classes per thread")


def row_stats(logits: Tensor, target: Tensor) -> tuple[RowStats, Softmax]:
    shape, dtype = logits.shape[:-1], accumulation_dtype(logits.dtype)
    stats = RowStats(*(torch.empty(shape, dtype=dtype, device="cpu") for _ in RowStats._fields))
    softmax = Softmax(torch.empty((3, *shape), dtype=dtype, device="cpu"), stats.num_nontargets)
    _run(_STATISTICS, logits, target, -1, None, _StatisticsJob(*map(_address, (*stats, softmax.state))))
    return stats, softmax


def predictions(logits: Tensor, target: Tensor, ignore_index: int) -> Predictions:
    shape = logits.shape[:-1]
    *stats, log_odds = torch.empty((7, *shape), dtype=accumulation_dtype(logits.dtype), device="cpu").unbind()
    ahead = torch.empty(shape, dtype=torch.int64, device="cpu")
    written = *map(_address, stats), *[0] * 5, _address(ahead), _address(log_odds)
    _run(_PREDICTIONS, logits, target, ignore_index, None, _StatisticsJob(*written))
    return Predictions(RowStats(*stats), log_odds, ahead)


def record(logits: Tensor, target: Tensor) -> Record:
    return record_of(*row_stats(logits, target))


def row_stats_backward(logits: Tensor, target: Tensor, softmax: Softmax, cotangents: Cotangents, gradient: Tensor | None = None) -> Tensor:
    if gradient is not None and gradient.dtype != logits.dtype:
        return gradient.copy_(row_stats_backward(logits, target, softmax, cotangents))
    if gradient is None:
        gradient = torch.empty_like(logits)
    dtype = accumulation_dtype(logits.dtype)
    if any(x is not None and x.dtype != dtype for x in (*softmax, *cotangents)):  # hooks on saved tensors may have changed the logits
        softmax = Softmax(*(x.to(dtype) for x in softmax))
        cotangents = Cotangents(*(None if g is None else g.to(dtype) for g in cotangents))
    state, num_nontargets = softmax.state.contiguous(), softmax.num_nontargets.contiguous()
    upstream = for_kernel(cotangents)  # keeps these tensors alive during the call
    of_l, of_e, of_a, of_rho = map(_address, upstream)
    statistics = _StatisticsJob(
        num_nontargets=num_nontargets.data_ptr(),
        state=state.data_ptr(),
        log_odds_grad=of_l,
        neg_entropy_grad=of_e,
        mean_log_q_grad=of_a,
        rho_grad=of_rho,
    )
    _run(_STATISTICS_GRADIENT, logits, target, -1, gradient, statistics)
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
    dtype = accumulation_dtype(logits.dtype)
    weight = None if weight is None else weight.to(dtype).contiguous()
    losses, row_upstream = _losses_of(logits, options), upstream.to(dtype).contiguous() if isinstance(upstream, Tensor) else None
    job = _loss_job(options, weight, losses, upstream, row_upstream)
    if target.is_floating_point():
        _run_on_probabilities(logits, target, options.ignore_index, gradient, target_gradient, job)
    else:
        _run(_LOSS, logits, target, options.ignore_index, gradient, loss=job)
    return losses


def _run_on_probabilities(
    logits: Tensor, probabilities: Tensor, ignore_index: int, gradient: Tensor | None, target_gradient: Tensor | None, loss: _LossJob
) -> None:
    kernel = _kernel()
    assert isinstance(kernel, _Kernel), kernel
    wide, wanted = accumulation_dtype(logits.dtype), target_gradient
    # float64 goes with float64 alone
    taken = probabilities if torch.float64 not in (wide, probabilities.dtype) else probabilities.to(wide)
    if wanted is not None and wanted.dtype is not taken.dtype:
        wanted = torch.empty_like(wanted, dtype=taken.dtype)
    laid = lay_together([logits, taken], [gradient, wanted])
    (f, t), (g, g_t) = laid.read, laid.written
    of_f, of_t, of_g, of_g_t = laid.strides
    rows = Layout(laid.outer, laid.inner, logits.shape[-1], *of_f, *of_g)
    job = _ProbabilitiesJob(*of_t, *of_g_t, t.data_ptr(), _address(g_t), DTYPES.index(t.dtype))
    plain = f.data_ptr(), _address(g), 0, ignore_index, DTYPES.index(f.dtype), torch.get_num_threads()
    _check_memory(kernel(f.dtype, _JOB.pack(*rows, *plain, *_NO_STATISTICS, *job, *loss, _LOSS)), logits)
    for asked, computed in ((gradient, g), (target_gradient, g_t)):
        if asked is not None and computed is not None and asked is not computed:
            asked.copy_(computed)


def _losses_of(logits: Tensor, options: LossOptions | HingeOptions) -> Tensor:
    """The memory of the result."""
    if options.reduction == "none":
        return logits.new_empty(logits.shape[:-1], dtype=accumulation_dtype(logits.dtype))
    return torch.empty_like(_SCALARS[accumulation_dtype(logits.dtype)])  # takes half the time of new_empty(())


def _loss_job(
    options: LossOptions | HingeOptions, weight: Tensor | None, losses: Tensor, upstream: float | Tensor, row_upstream: Tensor | None
) -> _LossJob:
    if isinstance(options, HingeOptions):
        kind = len(DIVERGENCES) + (0 if options.soft else 1)
        lam, hard_bias, label_smoothing, reduction = 0.0, options.margin, 0.0, options.reduction
    else:
        lam, divergence, hard_bias, label_smoothing, _, reduction, _ = options
        kind = DIVERGENCES.index(divergence)
    address, factor = losses.data_ptr(), 1.0 if isinstance(upstream, Tensor) else upstream
    a_row, reduced = (address, 0) if reduction == "none" else (0, address)
    # by position, in the order of the class: names take a microsecond in every call
    return _LossJob(
        _address(weight), a_row, _address(row_upstream), factor, lam, hard_bias, label_smoothing, reduced, kind, reduction == "mean"
    )
