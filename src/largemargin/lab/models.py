"""The networks of the lab."""

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three 3x3 convolutions with batch norm, then the mean over positions and a linear classifier; for images from 8x8 pixels."""

    def __init__(self, in_channels: int, num_classes: int, widths: tuple[int, int, int] = (32, 64, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, width in enumerate(widths):
            layers += [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if i < 2 else []
            in_channels = width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


NETWORKS = {"small": SmallNet}


def build(network: str, in_channels: int, num_classes: int) -> nn.Module:
    """A new network by its name."""
    return NETWORKS[network](in_channels, num_classes)
