"""The ladder: who computes these rows.

    1. kernels exist for the device of the logits: ``cpu`` for the CPU, ``triton`` for GPUs
    2. they are there: compiled when the library was installed, or triton is installed
    3. they take the dtype
    4. nothing differentiates or batches the operation itself: functorch transforms, forward mode, tensor subclasses and modes

Where a step fails, the reference computes. Who names a backend is told: an error if it cannot be had here (1, 2), a warning, once, if
only these logits are not for it (3, 4).
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import _checks
from . import cpu

Backend = Literal["reference", "cpu", "triton"]
BACKENDS = (None, *get_args(Backend))

_OF_DEVICE = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}


@cache
def load(name: str) -> ModuleType | str:
    """The kernels of that name, or in words why they cannot be had."""
    if name == "cpu":
        return cpu.why_not() or cpu
    try:
        module = import_module(".triton", __package__)
    except (ImportError, RuntimeError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return f"triton cannot be imported ({error}){'; pip install triton' if absent else ''}"
    return module.why_not() or module


def unwatched() -> bool:
    """Whether operations happen as they are called: no functorch transform, forward mode, dispatch mode or tracing."""
    return (
        forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether the memory of a tensor holds its numbers: no subclass, other layout or lazy negation."""
    return (type(tensor) is Tensor or type(tensor) is Parameter) and tensor.layout is torch.strided and not tensor.is_neg()


def is_plain_gradient(upstream: Tensor) -> bool:
    """Whether this backward pass is neither to be differentiated again nor batched, and its upstream gradient has memory of its own."""
    return (
        not torch.is_grad_enabled()
        and unwatched()
        and is_plain(upstream)
        and torch._C._has_storage(upstream)  # a batch of gradients in disguise (is_grads_batched) has none
        and not upstream._is_zerotensor()
    )


def kernels(logits: Tensor, backend: Backend | None) -> Any:
    """The module of kernels for these rows, in eager mode; None for the reference."""
    module = found(logits.device.type, backend)
    if module is None:
        return None
    if logits.dtype not in module.DTYPES:
        reason = f"{str(logits.dtype).removeprefix('torch.')} logits"
    elif not unwatched() or not is_plain(logits) or logits._is_zerotensor():
        reason = "under functorch transforms, forward mode, tensor subclasses, dispatch modes and tracing"
    else:
        return module
    if backend is not None:
        warn_once(backend, reason)
    return None


def found(device: str, backend: Backend | None) -> Any:
    """The first two steps of the ladder: the module of kernels, or None for the reference."""
    name = _OF_DEVICE.get(device) if backend is None else _name(device, backend)
    module = None if name is None else load(name)
    if isinstance(module, str):
        if backend is not None:
            raise RuntimeError(f"backend={backend!r} cannot be used: {module}; backend=None takes the reference instead")
        return None
    return module


def kernels_of(logits: Tensor) -> Any:
    """The module of kernels of the device of ``logits``, which compiled code has asked for."""
    name = _OF_DEVICE[logits.device.type]
    module = load(name)
    if isinstance(module, str):
        raise RuntimeError(f"this compiled code calls the {name} kernels, and they cannot be used: {module}; compile it again here")
    return module


def is_of_device(module: ModuleType, device: str) -> bool:
    """Whether these kernels are those of the device, and not triton on the CPU."""
    return module is load(_OF_DEVICE[device])


def compiled_kernels(logits: Tensor, backend: Backend | None) -> bool:
    """Whether compiled code calls the kernels of the device; all it asks can be traced."""
    if forward_ad._current_level >= 0:
        return False
    from .compiled import takes  # torch._dynamo brings sympy, which eager mode does without

    taken: bool | str = takes(logits.device.type, str(logits.dtype), backend)
    if isinstance(taken, str):
        raise RuntimeError(taken)  # torch runs the code without compiling it, and that raises the error
    return taken


def _name(device: str, backend: Backend) -> str | None:
    """The first step of the ladder, for who names a backend."""
    _checks.check_word("backend", backend, BACKENDS)
    if backend == "reference":
        return None
    if backend != _OF_DEVICE.get(device) and not (backend == "triton" and interprets_triton()):
        raise ValueError(f"backend={backend!r} does not compute on {device}; backend=None chooses by the device of input")
    return backend


def refuse_all_classes(backend: Backend | None) -> None:
    """The statistics of all classes, for class probabilities, are the reference's alone."""
    _checks.check_word("backend", backend, BACKENDS)
    if backend not in (None, "reference"):
        warn_once(backend, "class probabilities")


def interprets_triton() -> bool:
    """Whether triton runs on the CPU, for tests (TRITON_INTERPRET=1)."""
    module = load("triton")
    return not isinstance(module, str) and bool(module.INTERPRETED)


@cache
def warn_once(backend: str, reason: str) -> None:
    _checks.warn(f"backend={backend!r} does not compute {reason}: the reference path does")
