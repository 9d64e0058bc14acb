"""Mixup: the targets are class probabilities, and the loss takes them as nn.CrossEntropyLoss does.

    python examples/mixup.py

Seconds on two cores; needs scikit-learn, which ships the digits. What is shown is how it is written: on so few images, trained so
briefly, mixup need not lower the error.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from largemargin import LargeMarginCrossEntropyLoss

criterion = LargeMarginCrossEntropyLoss(lam=0.3)


def mix(images: Tensor, labels: Tensor, alpha: float = 0.2) -> tuple[Tensor, Tensor, Tensor, float]:
    """A batch laid over itself in another order: images, both labels of each, and the share of the first."""
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    partner = torch.randperm(len(images))
    return share * images + (1 - share) * images[partner], labels, labels[partner], share


def loss_by_probabilities(logits: Tensor, first: Tensor, second: Tensor, share: float) -> Tensor:
    """One call, on the shares of the classes in each image."""
    one_hot = torch.eye(10)
    return criterion(logits, share * one_hot[first] + (1 - share) * one_hot[second])


def loss_by_two_calls(logits: Tensor, first: Tensor, second: Tensor, share: float) -> Tensor:
    """What many training loops do. It is the same number."""
    return share * criterion(logits, first) + (1 - share) * criterion(logits, second)


def train(images: Tensor, labels: Tensor, mixed: bool, epochs: int = 40) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            if mixed:
                inputs, first, second, share = mix(images[batch], labels[batch])
                loss = loss_by_probabilities(network(inputs), first, second, share)
            else:
                loss = criterion(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def main() -> dict[str, float]:
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train_part, test_part = order[:500], order[500:]

    found = {}
    for name, mixed in [("plain", False), ("mixup", True)]:
        network = train(images[train_part], labels[train_part], mixed)
        with torch.no_grad():
            logits = network(images[test_part])
        found[f"{name} error"] = 100 * (logits.argmax(1) != labels[test_part]).float().mean().item()
        found[f"{name} nll"] = F.cross_entropy(logits, labels[test_part]).item()

    logits = torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    first, second = labels[:50], labels[50:100]
    found["by probabilities"] = loss_by_probabilities(logits, first, second, 0.7).item()
    found["by two calls"] = loss_by_two_calls(logits, first, second, 0.7).item()

    print("large margin, 500 digits to train on, one seed")
    for name in ("plain", "mixup"):
        print(f"{name:6} test error {found[f'{name} error']:.2f}%, negative log-likelihood {found[f'{name} nll']:.3f}")
    print(f"the loss of one mixed batch: {found['by probabilities']:.6f} from probabilities, {found['by two calls']:.6f} from two calls")
    return found


if __name__ == "__main__":
    main()
