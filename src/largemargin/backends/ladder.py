"""The ladder picks the backend of these rows.

    1. kernels exist for the device of the logits: ``cpu`` for the CPU, ``triton`` for GPUs
    2. they are installed: the CPU kernel was compiled, or triton is installed
    3. they take the dtype
    4. nothing differentiates or batches the operation itself: functorch transforms, forward mode, tensor subclasses and modes

If a step fails, the reference computes. A backend requested by name raises if step 1 or 2 fails, and warns once if step 3 or 4 fails.
"""

from functools import cache
from importlib import import_module
from typing import cast

import torch
from torch import Tensor

from .. import _checks, _torch
from .._backend_names import BACKENDS, OF_DEVICE, BackendName
from . import reference
from .protocol import Backend


@cache
def load(name: BackendName) -> Backend | str:
    """The backend of that name, or the reason why it cannot be used."""
    try:
        module = cast(Backend, import_module(f".{name}", __package__))
    except (ImportError, RuntimeError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        return f"{name} cannot be imported ({error}){f'; pip install {name}' if absent else ''}"
    return module.why_not() or module


def pick(logits: Tensor, backend: BackendName | None) -> Backend:
    """The backend that computes these rows in eager mode."""
    module = found(logits.device.type, backend)
    if module is None:
        return reference
    if logits.dtype not in module.DTYPES:
        reason = f"{str(logits.dtype).removeprefix('torch.')} logits"
    elif not _torch.is_unwatched() or not _torch.is_plain(logits) or _torch.is_zero_tensor(logits):
        reason = "under functorch transforms, forward mode, tensor subclasses, dispatch modes and tracing"
    else:
        return module
    if backend is not None:
        warn_once(backend, reason)
    return reference


def pick_for_loss(logits: Tensor, target: Tensor, weight: Tensor | None, backend: BackendName | None) -> Backend:
    """The backend whose kernels of the whole loss take these logits and this target; else the reference, which has none."""
    probabilities = target.is_floating_point()
    if not torch.compiler.is_compiling():
        if logits.numel() == 0:
            return reference
        picked = pick(logits, backend)
        if picked is reference:
            return reference
        fits = _torch.is_plain(target) and (weight is None or (_torch.is_plain(weight) and not weight.requires_grad))
        if fits and not (probabilities and _torch.is_zero_tensor(target)):
            return picked
    if probabilities:
        _checks.check_word("backend", backend, BACKENDS)
        if backend not in (None, "reference"):
            warn_once(backend, "these class probabilities")
    return reference


def found(device: str, backend: BackendName | None) -> Backend | None:
    """Steps 1 and 2: the kernels, or None for the reference."""
    name = OF_DEVICE.get(device) if backend is None else _requested(device, backend)
    module = None if name is None else load(name)
    if isinstance(module, str):
        if backend is not None:
            raise RuntimeError(f"backend={backend!r} cannot be used: {module}; backend=None uses the reference instead")
        return None
    return module


def kernels_of(logits: Tensor) -> Backend:
    """The kernels of the device of ``logits``, for the operators in compiled code."""
    name = OF_DEVICE[logits.device.type]
    module = load(name)
    if isinstance(module, str):
        raise RuntimeError(f"this compiled code calls the {name} kernels, but they cannot be used: {module}; compile it again here")
    return module


def _requested(device: str, backend: BackendName) -> BackendName | None:
    """Step 1 for a backend requested by name."""
    _checks.check_word("backend", backend, BACKENDS)
    if backend == "reference":
        return None
    if backend != OF_DEVICE.get(device) and not (backend == "triton" and getattr(load("triton"), "INTERPRETED", False)):
        raise ValueError(f"backend={backend!r} does not compute on {device}; backend=None picks one for the device of input")
    return backend


@cache
def warn_once(backend: str, reason: str) -> None:
    _checks.warn(f"backend={backend!r} does not compute {reason}: the reference path does")
