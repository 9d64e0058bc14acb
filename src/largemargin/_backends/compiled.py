"""What compiled code asks about the operators of :mod:`largemargin._registered`."""

import torch

from . import ladder


@torch.compiler.assume_constant_result  # imports torch._dynamo and sympy, which eager mode does without
def takes(device: str, dtype: str, backend: ladder.Backend | None) -> bool | str:
    """Whether the kernels of the device are there, take the dtype, and no functorch transform is compiled with them; asked, not traced.

    An operator knows the kernels of its device alone: for triton on the CPU the reference computes. Where eager code raises an error, its
    message.
    """
    try:
        module = ladder.found(device, backend)
    except (RuntimeError, ValueError) as error:
        return str(error)
    if module is None or torch._C._are_functorch_transforms_active():
        return False
    return ladder.is_of_device(module, device) and dtype in map(str, module.DTYPES)
