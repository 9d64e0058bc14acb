"""Segmentation: logits (N, C, H, W), labels (N, H, W), and pixels without a label by ignore_index, as with nn.CrossEntropyLoss.

    python examples/segmentation.py

Half a minute on two cores; needs scikit-learn, which ships the digits. Each image is four digits side by side. A dark pixel is background,
a bright one belongs to the class of its digit, and the grey edge of a stroke is neither: it is left out.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from largemargin import LargeMarginCrossEntropyLoss

BACKGROUND, NUM_CLASSES, UNLABELLED = 10, 11, 255


def make_images(digits: Tensor, labels: Tensor, num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 16, 16) and the labels of their pixels (N, 16, 16)."""
    chosen = torch.randint(len(digits), (num_images, 2, 2), generator=generator)
    images = digits[chosen].permute(0, 1, 3, 2, 4).reshape(num_images, 16, 16)  # (N, 2, 2, 8, 8) before
    of_digit = labels[chosen].repeat_interleave(8, 1).repeat_interleave(8, 2)
    target = torch.where(images >= 0.5, of_digit, torch.where(images <= 0.1, BACKGROUND, UNLABELLED))
    return images.unsqueeze(1), target


def make_network() -> nn.Module:
    """Convolutions that see 11 pixels in each direction."""
    layers: list[nn.Module] = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()]
    for dilation in (2, 3, 2):
        layers += [nn.Conv2d(32, 32, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(32), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, NUM_CLASSES, 3, padding=1))


def train(criterion: nn.Module, images: Tensor, target: Tensor, epochs: int = 15) -> nn.Module:
    torch.manual_seed(0)
    network = make_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(32):
            loss = criterion(network(images[batch]), target[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def mean_overlap(predicted: Tensor, target: Tensor) -> float:
    """The mean intersection over union of the classes, over the pixels with a label."""
    counts = torch.bincount(NUM_CLASSES * target[target != UNLABELLED] + predicted[target != UNLABELLED], minlength=NUM_CLASSES**2)
    confusion = counts.reshape(NUM_CLASSES, NUM_CLASSES)
    both = confusion.diagonal()
    return (both / (confusion.sum(0) + confusion.sum(1) - both)).mean().item()


def main() -> dict[str, dict[str, float]]:
    data = load_digits()
    digits, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    images, target = make_images(digits[:900], labels[:900], 400, generator)
    test_images, test_target = make_images(digits[900:], labels[900:], 400, generator)
    labelled = test_target != UNLABELLED
    print(f"{1 - labelled.float().mean():.0%} of the pixels have no label; error and overlap (mean IoU) are over the others")

    found = {}
    for name, criterion in {
        "softmax": nn.CrossEntropyLoss(ignore_index=UNLABELLED),
        "large margin": LargeMarginCrossEntropyLoss(lam=0.3, ignore_index=UNLABELLED),
    }.items():
        network = train(criterion, images, target)
        with torch.no_grad():
            predicted = network(test_images).argmax(1)
        found[name] = {
            "error": 100 * (predicted != test_target)[labelled].float().mean().item(),
            "overlap": 100 * mean_overlap(predicted, test_target),
        }
        print(f"{name:14}error {found[name]['error']:5.2f}%   overlap {found[name]['overlap']:5.1f}%")
    return found


if __name__ == "__main__":
    main()
