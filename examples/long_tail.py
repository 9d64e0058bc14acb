"""Long-tailed and wrong labels on digits: softmax, the large margin, and both with logit adjustment, which is one line on the logits.

    python examples/long_tail.py

Under half a minute on two cores; needs scikit-learn, which ships the digits. The digit 0 has 100 images to train on and the 9 has 5; then
one label in ten is replaced by another. The test set is balanced, with all labels right.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from largemargin import large_margin_cross_entropy

SEEDS = range(5)


def loss_of(logits: Tensor, target: Tensor, class_counts: Tensor, lam: float, adjusted: bool) -> Tensor:
    """With lam = 0 this is the softmax loss. In training the log shares of the classes are added; at test they are not."""
    if adjusted:
        logits = logits + (class_counts / class_counts.sum()).log()
    return large_margin_cross_entropy(logits, target, lam=lam)


def long_tailed_digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, and for testing."""
    generator = torch.Generator().manual_seed(seed)
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    train, test = [], []
    for digit in range(10):
        own = torch.where(labels == digit)[0]
        own = own[torch.randperm(len(own), generator=generator)]
        train.append(own[: round(100 * 20 ** (-digit / 9))])
        test.append(own[-70:])
    chosen, held_out = torch.cat(train), torch.cat(test)
    given = labels[chosen]
    wrong = torch.rand(len(given), generator=generator) < 0.1
    given = torch.where(wrong, (given + torch.randint(1, 10, given.shape, generator=generator)) % 10, given)
    return images[chosen], given, images[held_out], labels[held_out]


def train(images: Tensor, labels: Tensor, lam: float, adjusted: bool, seed: int, epochs: int = 60) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    class_counts = torch.bincount(labels, minlength=10).clamp(min=1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(50):
            loss = loss_of(network(images[batch]), labels[batch], class_counts, lam, adjusted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network


def main() -> dict[str, dict[str, float]]:
    methods = {
        "softmax": (0.0, False),
        "large margin": (0.3, False),
        "large margin, lam=1": (1.0, False),
        "softmax, adjusted": (0.0, True),
        "large margin, adjusted": (0.3, True),
        "lam=1, adjusted": (1.0, True),
    }
    print(f"balanced test error, and that of the three rarest digits; mean of {len(SEEDS)} seeds")
    found = {}
    for name, (lam, adjusted) in methods.items():
        wrong, wrong_tail = [], []
        for seed in SEEDS:
            train_images, train_labels, test_images, test_labels = long_tailed_digits(seed)
            network = train(train_images, train_labels, lam, adjusted, seed)
            with torch.no_grad():
                missed = (network(test_images).argmax(1) != test_labels).float()
            wrong.append(missed.mean())
            wrong_tail.append(missed[test_labels >= 7].mean())
        found[name] = {"error": 100 * torch.stack(wrong).mean().item(), "tail error": 100 * torch.stack(wrong_tail).mean().item()}
        print(f"{name:24}{found[name]['error']:6.1f}%{found[name]['tail error']:8.1f}%")
    return found


if __name__ == "__main__":
    main()
