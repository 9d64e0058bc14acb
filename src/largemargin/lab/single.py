"""``largemargin train``: one recipe into one folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from . import data
from .checkpoint import check_same
from .errors import LabError
from .models import weights_digest
from .recipe import Recipe
from .train import WEIGHTS, train


def train_one(recipe: Recipe, out: Path, console: Console, tensorboard: bool = False, keep_checkpoint: bool = False) -> dict[str, Any]:
    """Train by the recipe into the folder ``out``, and say what came of it; a finished run is not repeated."""
    images = data.load(recipe.data, recipe.data_root, recipe.image_size, streamed=recipe.augmentation == "inception")
    weights = weights_digest(Path(recipe.weights)) if recipe.weights else ""
    recipe = dataclasses.replace(recipe, data_digest=images.digest(), weights_digest=weights)
    done = finished(recipe, out)
    if done is not None:
        console.print(f"{out} holds this run, finished: test error {done['test']['error']:.2f}%", markup=False, highlight=False)
        return done
    console.print(f"{recipe.loss_label}: {recipe.epochs} epochs of {recipe.network} on {recipe.data}, into {out}", markup=False)

    def say(row: dict[str, Any]) -> None:
        measured = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "epoch" and value is not None)
        console.print(f"epoch {row['epoch']}/{recipe.epochs}: {measured}", highlight=False, soft_wrap=True)

    record = train(recipe, images, out, say, tensorboard=tensorboard, keep_weights=True, keep_checkpoint=keep_checkpoint)
    split = "test" if record["test"] else "validation"
    console.print(
        f"{split} error {record[split]['error']:.2f}% after {recipe.epochs} epochs, {record['images_per_second']:.0f} images a second; "
        f"{out}: result.json metrics.csv {WEIGHTS}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return record


def finished(recipe: Recipe, out: Path) -> dict[str, Any] | None:
    """The record of the run in ``out``, if it is done; refuses a folder of something else."""
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        there = json.loads((out / "recipe.json").read_text())
        record: dict[str, Any] | None = json.loads((out / "result.json").read_text()) if (out / "result.json").is_file() else None
    except (OSError, ValueError) as error:
        raise LabError(f"--out {out} holds files that are not of a run; choose a new or empty folder") from error
    check_same(out, Recipe(**there).to_dict(), recipe)
    return record
