"""Networks for features: a linear classifier, and a small multi-layer perceptron."""

from torch import nn

from .network import Network

HIDDEN = 128


def linear(num_features: int, num_classes: int) -> Network:
    """A linear classifier of the features as they are: multinomial logistic regression."""
    return Network(nn.Identity(), nn.Linear(num_features, num_classes))


def mlp(num_features: int, num_classes: int) -> Network:
    """Two hidden layers of 128 units with batch norm, and a linear classifier."""
    layers: list[nn.Module] = []
    for _ in range(2):
        layers += [nn.Linear(num_features, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True)]
        num_features = HIDDEN
    return Network(nn.Sequential(*layers), nn.Linear(HIDDEN, num_classes))
