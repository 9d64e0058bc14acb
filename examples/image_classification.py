"""From nn.CrossEntropyLoss to the large margin in a plain torch loop: one import and one line. What changes is shown on handwritten digits.

    python examples/image_classification.py

Seconds on two cores; needs scikit-learn, which ships the 1797 digits.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from largemargin import LargeMarginCrossEntropyLoss
from largemargin.metrics import MarginMetrics

SEEDS = range(3)


def digits(num_train: int = 500) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, and for testing."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:num_train], order[num_train:]
    return images[train], labels[train], images[test], labels[test]


def make_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )


def train(criterion: nn.Module, images: Tensor, labels: Tensor, seed: int, epochs: int = 20) -> nn.Module:
    """The usual loop; nothing in it knows which loss it has."""
    torch.manual_seed(seed)
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            loss = criterion(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return network


def main() -> dict[str, dict[str, float]]:
    train_images, train_labels, test_images, test_labels = digits()
    criteria = {
        "softmax": nn.CrossEntropyLoss(),
        "large margin": LargeMarginCrossEntropyLoss(lam=0.3),  # the change
    }
    found = {}
    for name, criterion in criteria.items():
        metrics = MarginMetrics()
        for seed in SEEDS:
            network = train(criterion, train_images, train_labels, seed)
            with torch.no_grad():
                metrics.update(network(test_images), test_labels)
        found[name] = metrics.compute()

    print(f"{len(train_labels)} digits to train on, {len(test_labels)} to test on, mean of {len(SEEDS)} seeds")
    print(f"{'':14}{'error':>8}{'ECE':>8}{'margin':>8}{'rho-hat':>9}")
    for name, figures in found.items():
        error = 100 * (1 - figures["accuracy"])
        print(f"{name:14}{error:7.2f}%{100 * figures['ece']:7.2f}%{figures['margin']:8.2f}{figures['rho_hat']:9.2f}")
    print("margin: by how many nats the true class leads the next; rho-hat: the part of it that the loss demands, at most log 9 = 2.20")
    return found


if __name__ == "__main__":
    main()
