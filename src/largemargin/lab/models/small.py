"""The network for small images and quick runs."""

from torch import nn

from .network import Network


def small(in_channels: int, num_classes: int) -> Network:
    """Three 3x3 convolutions with batch norm, then the mean over positions and a linear classifier."""
    layers: list[nn.Module] = []
    for i, width in enumerate((32, 64, 128)):
        layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if i < 2 else []
        in_channels = width
    return Network(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(in_channels, num_classes))
