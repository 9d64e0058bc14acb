"""Zagoruyko and Komodakis, *Wide residual networks*, BMVC 2016."""

import torch.nn.functional as F
from torch import Tensor, nn

from .network import Network, scaled


class Block(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, and a way past them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if in_channels != out_channels else None

    def forward(self, input: Tensor) -> Tensor:
        """Images of `out_channels` channels."""
        first = F.relu(self.norm1(input))
        second = self.dropout(F.relu(self.norm2(self.conv1(first))))
        # a shortcut with weights starts after the first ReLU, one without before it
        output: Tensor = self.conv2(second) + (input if self.shortcut is None else self.shortcut(first))
        return output


def wrn28_10(in_channels: int, num_classes: int, width: float = 1.0, dropout: float = 0.0) -> Network:
    """Depth 28, ten times as wide; `dropout` is between the convolutions of a block.

    `width` scales the blocks and, as its authors' factor, not the first convolution: 0.2 is their WRN-28-2.
    """
    layers: list[nn.Module] = [nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)]
    channels = 16
    for of_group, stride in ((160, 1), (320, 2), (640, 2)):
        for i in range(4):  # (28 - 4) / 6
            layers.append(Block(channels, scaled(of_group, width), stride if i == 0 else 1, dropout))
            channels = scaled(of_group, width)
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = Network(nn.Sequential(*layers), nn.Linear(channels, num_classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
    # left open there: the first scales of batch norm; here they are 1, in the authors' port uniform in [0, 1]
    nn.init.zeros_(network.classifier.bias)
    return network
