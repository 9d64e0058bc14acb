"""A run of as many processes as a launcher starts, with a network without batch norm: ``torchrun ... tests/processes.py FOLDER BATCH``."""

import dataclasses
import os
import sys
from pathlib import Path

from torch import nn

from largemargin.lab import data, train
from largemargin.lab.recipe import Recipe


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh())
        self.classifier = nn.Linear(32, 10)

    def forward(self, images):
        return self.classifier(self.features(images))


def main(folder, batch_size):
    whole = data.digits()
    parts = {name: getattr(whole, name)[:200] for name in ("train_images", "train_labels", "test_images", "test_labels")}
    train.build = lambda *_: Plain()
    recipe = Recipe(
        loss="large_margin", lam=0.3, seed=0, epochs=4, batch_size=batch_size, crop_padding=1, processes=int(os.environ["WORLD_SIZE"])
    )
    train.CHECKPOINT_SECONDS = 0.0
    train.train(recipe, dataclasses.replace(whole, **parts), folder, keep_checkpoint=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
