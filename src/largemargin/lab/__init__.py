"""The experiment tool: the same network under several losses and seeds, on the same data (``pip install "largemargin[lab]"``)."""

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

# installed by largemargin[lab]
NEEDED = (
    *("jsonargparse", "rich", "sklearn", "scipy", "matplotlib", "jinja2", "torchvision", "PIL"),
    *("accelerate", "safetensors", "tensorboard"),
)

# of these, what a command does without
SPARED = {"reproduce": ("sklearn", "tensorboard")}


def load(model: str | os.PathLike[str]) -> "tuple[nn.Module, Callable[[Any], Tensor], tuple[str, ...]]":
    """The model of a run as ``(network, transform, classes)``; ``model`` is the run's folder or its ``model.safetensors``.

    ``network(images)`` gives logits (N, C) and is in eval mode, on the CPU. ``transform(picture)`` takes a PIL image and gives an input
    (channels, H, W), with the pixels that the held-out images had in training. For a run on features it takes numbers (N, D), or (D,)
    for one sample, and standardises them. ``classes[i]`` names logit i.
    """
    found = importlib.import_module(".run.model", __package__).load(model)
    return found.network, found.pixels, found.classes
