"""What every network of the lab is made of."""

from torch import Tensor, nn


class Network(nn.Module):
    """Images to features (N, D), and features to logits by a linear classifier.

    `outside` holds the classifier's names in the library that the features come from, where they come from one.
    """

    def __init__(self, features: nn.Module, classifier: nn.Linear, outside: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.features = features
        self.classifier = classifier
        self.outside = outside

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W)."""
        logits: Tensor = self.classifier(self.features(images))
        return logits


def scaled(channels: int, width: float) -> int:
    """The share ``width`` of a number of channels, at least one."""
    return max(round(width * channels), 1)


def init_kaiming(network: Network) -> Network:
    """The network with the first weights of residual networks: He's by the fan out, and a classifier that starts small."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.normal_(network.classifier.weight, std=0.01)
    nn.init.zeros_(network.classifier.bias)
    return network
