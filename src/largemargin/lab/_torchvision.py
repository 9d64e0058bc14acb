"""Import torchvision, also beside a CPU build of torch.

torchvision's published wheels hold operators built for CUDA. Beside a torch without CUDA they fail to load, and the import dies
with "operator torchvision::nms does not exist" (pytorch/vision#9085), though nothing here uses those operators. On that very error
their schemas are declared and the import is tried again. To be deleted when torchvision publishes CPU wheels.
"""

import sys
from typing import Any

import torch

from .stopping import interrupts_end_at_once

_libraries: list[Any] = []  # a declared schema lives as long as its library


def import_torchvision() -> Any:
    """torchvision; raises ImportError where it is not installed."""
    try:
        with interrupts_end_at_once():
            import torchvision.transforms.v2
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error) or torch.version.cuda is not None:
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        import torchvision.transforms.v2
    return torchvision
