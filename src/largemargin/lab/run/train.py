"""The training loop: one recipe, one run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ..data.samples import Samples
from ..files import remove_unfinished, write_json
from ..predictions import NAME as PREDICTIONS
from ..stopping import told_to_stop
from . import checkpoint, model
from .feeds import Feed
from .machine import start
from .progress import tracker
from .recipe import Recipe
from .rows import save_rows
from .trainer import Run


def train(
    recipe: Recipe,
    data: Samples,
    folder: Path,
    on_epoch: Callable[[dict[str, Any]], object] = lambda _: None,
    on_end: Callable[[nn.Module, Feed], object] = lambda *_: None,
    *,
    tensorboard: bool = False,
    save: bool = False,
    keep_checkpoint: bool = False,
    graph: bool = True,
    on_message: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Train by the recipe, write ``result.json`` into ``folder`` and return what it holds. Goes on from a checkpoint found there.

    SIGTERM ends the run after a checkpoint, by SystemExit.

    Args:
        on_epoch: called with the measurements of each epoch.
        on_end: called with the network in eval mode and its data.
        tensorboard: write event files.
        save: leave the model and its predictions for the test set, if the run measures itself there.
        keep_checkpoint: leave the last state of the whole run.
        graph: on a GPU, replay the steps as a CUDA graph.
        on_message: called with a line for the user if a CUDA graph or compiled code cannot be used.
    """
    accelerator = start(recipe)
    with told_to_stop() as told:
        run = Run(recipe, data, folder, accelerator, told, graph=graph, on_message=on_message)
        if run.main:
            remove_unfinished(folder)
            write_json(folder / "recipe.json", recipe.to_dict())
            save_rows(run.feed.rows, folder / "training_set.npz")
        events = tracker(folder, run.progress.epoch) if tensorboard and run.main else None
        measured = None
        while run.progress.epoch < recipe.epochs:
            run.train_epoch()
            measured = run.finish_epoch()
            row = run.progress.rows[-1]
            if events is not None:
                events.log({name: value for name, value in row.items() if value is not None}, step=row["epoch"])
            if run.progress.epoch < recipe.epochs:
                run.save_if_due()
            on_epoch(row)
        if events is not None:
            events.finish()
        if measured is None:  # it was stopped after its last epoch
            measured, _ = run.evaluate()
        on_end(run.method.network, run.feed)
        record = run.record(measured)
        if run.main:
            if keep_checkpoint:
                run.save()
            if save and run.feed.split == "test":
                model.save(folder / model.NAME, run.method.network, recipe, run.feed)
                run.predictions(data.test_files).save(folder / PREDICTIONS)
            write_json(folder / "result.json", record)
            if not keep_checkpoint:
                (folder / checkpoint.NAME).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
    return record
