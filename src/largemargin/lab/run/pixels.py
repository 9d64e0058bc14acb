"""From any image to an input of a network, as the images of the held-out set were made inputs."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.decode import fitted, shown
from ..errors import LabError


@dataclass(frozen=True)
class Pixels:
    """Size and normalisation of inputs; called with a PIL image, gives a tensor (C, H, W)."""

    image_size: tuple[int, int]  # height and width
    resize: int  # pixels of the shorter side before the centre is cropped
    mean: tuple[float, ...]  # of pixels from 0 to 255, for each channel
    std: tuple[float, ...]

    @property
    def in_channels(self) -> int:
        return len(self.mean)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (self.in_channels, *self.image_size)

    @functools.cached_property
    def _fitted(self) -> Callable[[Any], Tensor]:
        height, width = self.image_size
        return fitted(self.resize if height == width else self.image_size, self.image_size)

    @functools.cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def __call__(self, image: Any) -> Tensor:
        return self.of_picture(shown(image).image)

    def of_picture(self, picture: Any) -> Tensor:
        """That of a PIL image in RGB that is upright already."""
        if self.in_channels not in (1, 3):
            raise LabError(f"the network takes images of {self.in_channels} channels, and a picture has 1 or 3; give it tensors")
        mean, std = self._moments
        return self._fitted(picture.convert("L") if self.in_channels == 1 else picture).float().sub_(mean).div_(std)
