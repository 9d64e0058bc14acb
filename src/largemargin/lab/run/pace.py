"""How fast runs are on this machine."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..data.samples import Samples
from ..stopping import Told
from .machine import start
from .recipe import Recipe
from .trainer import Run


class Pace(NamedTuple):
    """Seconds for an image."""

    training: float
    evaluation: float


def with_any_samples(recipe: Recipe) -> Recipe:
    """The recipe without what chooses samples and labels: its pace is the same, and it takes any images."""
    whole = dataclasses.replace(recipe, train_fraction=1.0, long_tail=None, validation_fraction=0.0)
    return dataclasses.replace(whole, label_noise=0.0, noise_kind=None, milestones=())


def pace_of_one_batch(recipe: Recipe, few: Callable[[int], Samples], seconds: float, graph: bool = True) -> Pace:
    """Of a batch, or of as many images as a slow network takes ``seconds`` for; ``few`` gives so many images."""
    threads = torch.get_num_threads()
    try:
        first = measured_pace(recipe, few(2), graph=False)
        count = int(min(recipe.batch_size, max(2, seconds / max(first.training, 1e-6))))
        return measured_pace(recipe, few(count), graph)
    finally:
        torch.set_num_threads(threads)


def measured_pace(recipe: Recipe, images: Samples, graph: bool = True) -> Pace:
    """Of the second of two epochs on these images, in this process: the first compiles and warms up."""
    with tempfile.TemporaryDirectory() as folder:
        two = dataclasses.replace(recipe, epochs=2)
        run = Run(two, images, Path(folder), start(two), Told(), graph=graph)
        for epoch in range(2):
            began = time.monotonic()
            run.train_epoch()
            trained = time.monotonic()
            run.evaluate()
            evaluated = time.monotonic()
            run.progress.epoch, run.progress.step = epoch + 1, 0
    return Pace((trained - began) / len(images.train_labels), (evaluated - trained) / len(images.test_labels))
