"""Howard et al., *MobileNets: efficient convolutional neural networks for mobile vision applications*, 2017."""

from torch import nn

from .network import Network, init_kaiming, scaled

# channels and stride of each block; the paper's table prints stride 2 for the last, against its own sizes
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]


def mobilenet(in_channels: int, num_classes: int, width: float = 1.0) -> Network:
    """Version 1: blocks of a 3x3 convolution in each channel and a 1x1 convolution over channels; `width` is its width multiplier."""
    channels = scaled(32, width)
    layers = _conv(in_channels, channels, 3, stride=2)
    for of_block, stride in BLOCKS:
        layers += _conv(channels, channels, 3, stride, groups=channels) + _conv(channels, scaled(of_block, width), 1)
        channels = scaled(of_block, width)
    network = Network(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(channels, num_classes))
    return init_kaiming(network)  # the first weights are left open there
