"""What compiled code asks about the operators of :mod:`largemargin._registered`."""

import torch

from . import ladder


@torch.compiler.assume_constant_result  # imports torch._dynamo and sympy, which eager mode does without
def takes(name: str, dtype: str) -> bool:
    """Whether these kernels are there, take the dtype, and no functorch transform is compiled with them; asked, not traced."""
    module = ladder.load(name)
    if torch._C._are_functorch_transforms_active():
        return False
    return not isinstance(module, str) and dtype in map(str, module.DTYPES)
