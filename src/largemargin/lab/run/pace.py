"""How fast runs are on this machine."""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from ..data.samples import Samples
from ..stopping import Told
from .machine import start
from .recipe import Recipe
from .trainer import Run


class Pace(NamedTuple):
    """Seconds for an image."""

    training: float
    evaluation: float


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
