"""Write your own loss in one line: row_stats gives the statistics that every loss needs, with exact gradients.

    python examples/own_loss.py

Seconds on two cores; needs scikit-learn, which ships the digits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from largemargin import divergence, large_margin_cross_entropy, metrics, row_stats


def focal(logits: Tensor, target: Tensor) -> Tensor:
    """(1 - p)^2 (-log p): rows that are right already count less."""
    l = row_stats(logits, target).log_odds
    return (torch.sigmoid(-l) ** 2 * F.softplus(-l)).mean()


def focal_with_margin(logits: Tensor, target: Tensor) -> Tensor:
    """The same, with the regulariser of the large margin."""
    stats = row_stats(logits, target)
    return (torch.sigmoid(-stats.log_odds) ** 2 * F.softplus(-stats.log_odds) + 0.3 * divergence(stats)).mean()


def near_the_boundary(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy in which a row with a margin of 0 counts twice as much as one with a large margin."""
    stats = row_stats(logits, target)
    margin = stats.log_odds + stats.rho
    return ((1 + torch.exp(-margin.abs())).detach() * F.softplus(-stats.log_odds)).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": F.cross_entropy,
    "large margin": large_margin_cross_entropy,
    "focal": focal,
    "focal with margin": focal_with_margin,
    "near the boundary": near_the_boundary,
}


def train(loss_of: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor, epochs: int = 40) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            loss = loss_of(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def main() -> dict[str, dict[str, float]]:
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train_part, test_part = order[:500], order[500:]

    print("500 digits to train on, one seed")
    print(f"{'':18}{'error':>8}{'margin':>8}{'ECE':>8}")
    found = {}
    for name, loss_of in LOSSES.items():
        network = train(loss_of, images[train_part], labels[train_part])
        with torch.no_grad():
            logits = network(images[test_part])
        found[name] = {
            "error": 100 * (1 - metrics.accuracy(logits, labels[test_part]).item()),
            "margin": metrics.margin(logits, labels[test_part]).item(),
            "ece": 100 * metrics.ece(logits, labels[test_part]).item(),
        }
        print(f"{name:18}{found[name]['error']:7.2f}%{found[name]['margin']:8.2f}{found[name]['ece']:7.2f}%")
    return found


if __name__ == "__main__":
    main()
