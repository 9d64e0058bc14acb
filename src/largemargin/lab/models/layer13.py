"""The network of 13 layers for CIFAR, in two forms: nine convolutions, two max-poolings, the mean over positions and the classifier.

The paper names Tarvainen and Valpola, *Mean teachers are better role models*, NeurIPS 2017, but the code published with it has 3x3
convolutions where theirs has 1x1, and none of their noise, dropout and leaky units. `layer13` is the published code's form.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .network import Network, init_kaiming, scaled


class GaussianNoise(nn.Module):
    """In training, adds normal noise to the images."""

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std

    def forward(self, images: Tensor) -> Tensor:
        """The images, noisy in training."""
        return images + self.std * torch.randn_like(images) if self.training else images


Unit = Callable[[], nn.Module]


def _stage(in_channels: int, widths: tuple[int, int, int], unit: Unit, last_kernel: int = 3, padding: int = 1) -> list[nn.Module]:
    """Three convolutions; `padding` is that of the first, and `last_kernel` that of the other two."""
    layers: list[nn.Module] = []
    for i, width in enumerate(widths):
        kernel, pad = (3, padding) if i == 0 else (last_kernel, last_kernel // 2)
        layers += [nn.Conv2d(in_channels, width, kernel, padding=pad, bias=False), nn.BatchNorm2d(width), unit()]
        in_channels = width
    return layers


def _features(in_channels: int, widths: tuple[int, int, int], unit: Unit, last_kernel: int, dropout: float) -> list[nn.Module]:
    a, b, c = widths
    layers: list[nn.Module] = []
    for width in (a, b):
        layers += [*_stage(in_channels, (width, width, width), unit), nn.MaxPool2d(2)]
        layers += [nn.Dropout(dropout)] if dropout else []
        in_channels = width
    return [*layers, *_stage(b, (c, b, a), unit, last_kernel, padding=0), nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def layer13(in_channels: int, num_classes: int, width: float = 1.0) -> Network:
    """The form of the paper's code, each of its numbers of channels times `width`."""
    a, b, c = (scaled(channels, width) for channels in (128, 256, 512))
    features = _features(in_channels, (a, b, c), partial(nn.ReLU, inplace=True), last_kernel=3, dropout=0.0)
    return init_kaiming(Network(nn.Sequential(*features), nn.Linear(a, num_classes)))


def layer13_mean_teacher(in_channels: int, num_classes: int) -> Network:
    """The form of the mean teachers: 1x1 convolutions last, leaky units, dropout, and noise on the images.

    In place of their weight norm with first scales from the data there is batch norm, whose outputs start at the same scale.
    """
    features = _features(in_channels, (128, 256, 512), partial(nn.LeakyReLU, 0.1, inplace=True), last_kernel=1, dropout=0.5)
    return init_kaiming(Network(nn.Sequential(GaussianNoise(0.15), *features), nn.Linear(128, num_classes)))
