"""A run of as many processes as a launcher starts: ``torchrun ... tests/processes.py FOLDER BATCH [LOSS [NETWORK [STEP]]]``.

NETWORK ``plain``, the default, has no batch norm. The last process sends itself SIGTERM at its STEP-th step.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from largemargin.lab.data.images import digits
from largemargin.lab.run import train, trainer
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.recipe import Recipe


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh())
        self.classifier = nn.Linear(32, 10)

    def forward(self, images):
        return self.classifier(self.features(images))


def stop_at(count):
    optimizer: Any = torch.optim.SGD
    seen, step = 0, optimizer.step

    def stopping(self):
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    optimizer.step = stopping


def main(folder, batch_size, loss="large_margin", network="plain", step=0):
    whole = digits()
    parts = {name: getattr(whole, name)[:200] for name in ("train_images", "train_labels", "test_images", "test_labels")}
    world = int(os.environ["WORLD_SIZE"])
    if network == "plain":
        module: Any = trainer
        module.build = lambda *_: Plain()
    if step and int(os.environ["RANK"]) == world - 1:
        stop_at(step)
    recipe = Recipe(seed=0, epochs=4, batch_size=batch_size, crop_padding=1, processes=world, loss=loss, **LOSSES[loss])
    trainer.CHECKPOINT_SECONDS = 0.0
    train.train(recipe, dataclasses.replace(whole, **parts), folder, keep_checkpoint=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], *map(int, sys.argv[5:]))
