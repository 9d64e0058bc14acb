"""``largemargin reproduce --dry-run``: the runs, and about how long they take here."""

import dataclasses
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from ..data import SETS
from ..data.images import ImageSet
from ..paper.plan import Reproduction, say_what_is_left_out
from ..run.environment import check_device
from ..run.pace import Pace, pace_of_one_batch, with_any_samples
from ..run.recipe import Recipe
from ..words import counted, hours

PROBE_SECONDS = 3.0  # of one measured step, about


def dry_run(reproduction: Reproduction, console: Console) -> None:
    """Print every run and about how long it takes here; writes nothing, and needs no data."""
    plan = reproduction.plan()
    check_device(plan[0][1][0].device)
    say_what_is_left_out(reproduction, console)
    measured: dict[tuple[Any, ...], Pace] = {}
    seconds: dict[str, float] = {}
    table = Table("cell", "seed", "network", "data", "images", "epochs", "about", box=box.SIMPLE_HEAD, pad_edge=False)
    for cell, recipes in plan:
        for recipe in recipes:
            key = step_of(recipe)
            if key not in measured:
                measured[key] = pace_of(recipe)
            size = SETS[recipe.data]
            images, evaluations = round(size.training * recipe.train_fraction), -(-recipe.epochs // recipe.evaluate_every)
            pace = measured[key]
            seconds[recipe.id] = pace.training * images * recipe.epochs + pace.evaluation * size.test * evaluations
            table.add_row(
                cell.name, str(recipe.seed), recipe.network, recipe.data, f"{images:,}", str(recipe.epochs), hours(seconds[recipe.id])
            )
    console.print(table, highlight=False)
    total, device = hours(sum(seconds.values())), plan[0][1][0].device
    console.print(
        f"{counted(len(seconds), 'run')}, about {total} one after another: an estimate from a training step and an evaluation of each "
        f"network on {device} with made-up images, without the reading of data; runs that are finished count too. Nothing was written.",
        highlight=False,
        soft_wrap=True,
    )


def step_of(recipe: Recipe) -> tuple[Any, ...]:
    """What the time of a training step depends on, near enough."""
    return (recipe.network, recipe.width, recipe.precision, recipe.channels_last, recipe.batch_size, recipe.data, recipe.device)


def pace_of(recipe: Recipe) -> Pace:
    """Measured with made-up images; slow networks are given fewer of them."""
    alone = dataclasses.replace(with_any_samples(recipe), augmentation="shift")
    return pace_of_one_batch(alone, lambda count: made_up(recipe, count), PROBE_SECONDS, graph=False)


def made_up(recipe: Recipe, count: int) -> ImageSet:
    """So many images of noise for training and for testing, of the size and the classes of the data set."""
    size = SETS[recipe.data]
    images = torch.randint(0, 256, (count, 3, size.pixels, size.pixels), dtype=torch.uint8)
    labels = torch.arange(count) % size.classes
    return ImageSet(images, labels, images, labels, tuple(map(str, range(size.classes))))
