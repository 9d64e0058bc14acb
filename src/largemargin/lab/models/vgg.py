"""VGG-16 with batch norm, also after the fully connected layers, and its modified form.

Sources: Simonyan and Zisserman, *Very deep convolutional networks for large-scale image recognition*, ICLR 2015; Kobayashi,
*Analyzing filters toward efficient ConvNet*, CVPR 2018, for the modified one.
"""

from torch import nn

from .network import Network, scaled

CONVOLUTIONS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
FULL = 4096  # features of a fully connected layer
EPS = 1e-4  # of batch norm, as in the paper's code


def _conv(in_channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
    return [conv, nn.BatchNorm2d(out_channels, EPS), nn.ReLU(inplace=True)]


def _full(in_features: int, out_features: int) -> list[nn.Module]:
    return [nn.Linear(in_features, out_features), nn.BatchNorm1d(out_features, EPS), nn.ReLU(inplace=True)]


def _convolutions(in_channels: int, width: float) -> list[nn.Module]:
    """Thirteen convolutions with a max-pooling after each group."""
    layers: list[nn.Module] = []
    for group in CONVOLUTIONS:
        for channels in group:
            layers += _conv(in_channels, scaled(channels, width), 3)
            in_channels = scaled(channels, width)
        layers.append(nn.MaxPool2d(2))
    return layers


def _network(layers: list[nn.Module], num_features: int, num_classes: int) -> Network:
    network = Network(nn.Sequential(*layers), nn.Linear(num_features, num_classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return network


def vgg16(in_channels: int, num_classes: int, width: float = 1.0) -> Network:
    """Without dropout, which the batch norm of the fully connected layers stands in for; `width` scales all channels and features."""
    last, full = scaled(CONVOLUTIONS[-1][-1], width), scaled(FULL, width)
    layers = [*_convolutions(in_channels, width), nn.AdaptiveAvgPool2d(7), nn.Flatten(), *_full(last * 7 * 7, full), *_full(full, full)]
    return _network(layers, full, num_classes)


def vgg16_mod(in_channels: int, num_classes: int, width: float = 1.0) -> Network:
    """A 1x1 convolution to 4096 channels and the mean over positions in place of the last max-pooling and the first full layer.

    `width` scales all channels and features.
    """
    last, full = scaled(CONVOLUTIONS[-1][-1], width), scaled(FULL, width)
    layers = [*_convolutions(in_channels, width)[:-1], *_conv(last, full, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *_full(full, full)]
    return _network(layers, full, num_classes)
