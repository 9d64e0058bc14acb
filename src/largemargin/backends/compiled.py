"""The choice of a backend in compiled code. torch.compile can trace it."""

import torch
from torch import Tensor

from .. import _torch
from .._backend_names import OF_DEVICE, BackendName
from . import ladder


def has_kernels(logits: Tensor, backend: BackendName | None) -> bool:
    """Whether compiled code calls the kernels of the device, by the operators of :mod:`.registered`."""
    if _torch.is_forward_mode():
        return False
    taken: bool | str = _take(logits.device.type, str(logits.dtype), backend)
    if isinstance(taken, str):
        raise RuntimeError(taken)  # makes torch run the code uncompiled, which raises the error
    return taken


@torch.compiler.assume_constant_result  # imports torch._dynamo and sympy, so eager mode does not import this module
def _take(device: str, dtype: str, backend: BackendName | None) -> bool | str:
    """Whether the kernels of the device can be used, or the message of the error that eager code raises. It is called, not traced.

    An operator can call only the kernels of its device: for triton on the CPU the reference computes.
    """
    try:
        module = ladder.found(device, backend)
    except (RuntimeError, ValueError) as error:
        return str(error)
    if module is None or _torch.is_transformed():
        return False
    return module is ladder.load(OF_DEVICE[device]) and dtype in map(str, module.DTYPES)
