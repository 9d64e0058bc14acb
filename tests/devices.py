"""Where tests compute: on the GPU where there is one, else on the CPU."""

import torch

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "xpu" if torch.xpu.is_available() else "cpu")
HAS_KERNELS = DEVICE.type in ("cuda", "xpu")  # those of Triton, compiled


def device_of(backend: str | None) -> torch.device:
    """Where a backend computes: the CPU's kernels on the CPU, Triton's on a GPU or interpreted, the reference and the default anywhere."""
    if backend == "cpu" or (backend == "triton" and not HAS_KERNELS):
        return CPU
    return DEVICE
