"""Runs of as many processes as a launcher starts: ``torchrun ... tests/processes.py FOLDER [STEP]``.

Without STEP, every case of :data:`CASES` is trained in its own folder of FOLDER. With STEP, only ``broken`` is, whose last process sends
itself SIGTERM at its STEP-th step.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from largemargin.lab.data.images import ImageSet
from largemargin.lab.run import train, trainer
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.recipe import Recipe


class Case(NamedTuple):
    batch_size: int  # of 200 samples
    loss: str = "large_margin"
    network: str = "plain"  # which has no batch norm


CASES = {
    "even": Case(64),
    "odd": Case(199),
    "odd_last": Case(27, "center"),  # whose last batch has 11
    "one_of_two": Case(199, "crammer_singer_hinge"),
    "whole": Case(20, network="small"),
    "broken": Case(20, network="small"),
}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh())
        self.classifier = nn.Linear(32, 10)

    def forward(self, images):
        return self.classifier(self.features(images))


def noise():
    """Images of noise: 200 to train on and as many to test."""
    images = torch.randint(0, 256, (400, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(400) % 10
    return ImageSet(images[:200], labels[:200], images[200:], labels[200:], tuple("0123456789"))


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


def run(name, folder, processes):
    """Train a case."""
    case = CASES[name]
    module: Any = trainer
    before = module.build, module.CHECKPOINT_SECONDS
    try:
        module.CHECKPOINT_SECONDS = 0.0
        if case.network == "plain":
            module.build = lambda *_: Plain()
        settings: dict[str, Any] = LOSSES[case.loss]
        recipe = Recipe(seed=0, epochs=4, batch_size=case.batch_size, crop_padding=1, processes=processes, loss=case.loss, **settings)
        return train.train(recipe, noise(), folder, keep_checkpoint=True)
    finally:
        module.build, module.CHECKPOINT_SECONDS = before


def main(folder, step=0):
    world = int(os.environ["WORLD_SIZE"])
    if step and int(os.environ["RANK"]) == world - 1:
        stop_at(step)
    for name in ["broken"] if step else CASES:
        run(name, folder / name, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
