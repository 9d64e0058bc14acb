"""Segmentation in a training loop of your own, scored by the mean overlap (mIoU): which loss is better, by lab.compare.

    python examples/compare_segmentation.py

A minute on two cores; needs largemargin[lab]. Images, network and overlap are those of examples/segmentation.py: digits on a canvas,
whose grey pixels have no label.
"""

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits

from largemargin import lab

sys.path.insert(0, str(Path(__file__).parent))
from segmentation import UNLABELLED, make_images, make_network, mean_overlap


def train(run):
    data = load_digits()
    digits, labels = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    images, target = make_images(digits[:900], labels[:900], 200, torch.Generator().manual_seed(0))
    test_images, test_target = make_images(digits[900:], labels[900:], 200, torch.Generator().manual_seed(1))

    run.seed_everything()
    network = make_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for epoch in range(10):
        for rows in torch.randperm(len(images)).split(32):
            logits = network(images[rows]).movedim(1, -1)  # (N, H, W, C)
            labelled = target[rows] != UNLABELLED
            loss = run.loss(logits[labelled], target[rows][labelled])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.log(epoch=epoch, loss=loss.item())
    network.eval()
    with torch.no_grad():
        predicted = network(test_images).argmax(1)
    right = (predicted == test_target)[test_target != UNLABELLED]
    return {"mIoU": 100 * mean_overlap(predicted, test_target), "accuracy": 100 * right.float().mean()}


def main(out="runs/segmentation", seeds=5):
    result = lab.compare(train, losses=["softmax", "large_margin"], seeds=range(seeds), out=out)
    print(result)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
