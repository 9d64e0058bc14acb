"""``largemargin train``: one run, in this process or in all those that a launcher started."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import data
from ..arguments.options import given_fields, path_of
from ..data.samples import noun_of
from ..errors import LabError
from ..files import UNFINISHED
from ..models import DEFAULT_OF_FEATURES
from ..models.weights import weights_digest
from ..queue.locks import Lock
from ..results import RunRecord
from ..run.checkpoint import check_same
from ..run.environment import default_device, device_label
from ..run.methods import LOSSES, check_settings
from ..run.model import NAME as MODEL
from ..run.recipe import Recipe, unread
from ..run.rows import check_shares, sizes
from ..run.train import train
from ..stopping import Stopped
from ..words import counted, short
from .asked import given_save, missing, what_is_kept
from .progress import reading_images


def run(options: Any, console: Console) -> None:
    out = path_of(options.out)
    given = {"device": device_of(out), **given_fields(options), "processes": int(os.environ.get("WORLD_SIZE", 1))}
    check_settings([given["loss"]], given)
    data.check_image_size(given.get("data", "digits"), given.get("image_size"))
    if data.holds_features(given.get("data", "digits")):
        given = {"network": DEFAULT_OF_FEATURES, **given}
    recipe = Recipe(**{**data.suited_to(given.get("data", "digits"), given.get("image_size")), **LOSSES[given["loss"]], **given})
    main = int(os.environ.get("RANK", 0)) == 0
    console = console if main else Console(quiet=True)
    for line in unread(recipe, given):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    save = given_save(options, console)
    train_one(recipe, out, console, options.tensorboard, options.keep_checkpoint, graph=not options.eager, save=save)


def device_of(out: Path) -> str:
    """The device of the run in a folder, which can only go on there; where there is none, the default of this machine."""
    try:
        return str(json.loads((out / "recipe.json").read_text())["device"])
    except FileNotFoundError:
        return default_device()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise not_a_run(out) from error


def not_a_run(out: Path) -> LabError:
    return LabError(f"--out {out} holds files that are not of a run; choose a new or empty folder")


def train_one(
    recipe: Recipe,
    out: Path,
    console: Console,
    tensorboard: bool = False,
    keep_checkpoint: bool = False,
    graph: bool = True,
    save: bool = True,
) -> RunRecord:
    """Train by the recipe into the folder ``out``, and say what came of it; a finished run is not repeated."""
    with reading_images(console) as on_image:
        images = data.load_of(recipe, on_image)
    weights = weights_digest(recipe.weights) if recipe.weights else ""
    recipe = dataclasses.replace(recipe, data_digest=images.digest(), weights_digest=weights)
    save = save and not recipe.validation_fraction  # else it never sees the test set
    done = finished(recipe, out)
    if done is not None:
        console.print(f"{out} holds this run, finished: {error_of(done)}", markup=False, highlight=False)
        for line in missing([out], tensorboard=tensorboard, keep_checkpoint=keep_checkpoint, save=save):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return done
    check_shares(recipe, len(images.train_labels), len(images.classes), noun_of(images))  # before anything is written
    where = f"on {device_label(recipe.device)}, into {out}"
    console.print(sizes(recipe, images), markup=False, highlight=False)
    console.print(
        f"{recipe.loss_label}: {counted(recipe.epochs, 'epoch')} of {recipe.network} on {recipe.data}, {where}",
        markup=False,
        highlight=False,
    )
    if save:
        console.print(what_is_kept(recipe, images), markup=False, highlight=False)
    for note in images.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)

    def say(row: dict[str, Any]) -> None:
        measured = ", ".join(f"{name} {short(value)}" for name, value in row.items() if name != "epoch" and value is not None)
        console.print(f"epoch {row['epoch']}/{recipe.epochs}: {measured}", highlight=False, soft_wrap=True)

    try:
        with alone_in(out):
            left = train(
                recipe,
                images,
                out,
                say,
                tensorboard=tensorboard,
                save=save,
                keep_checkpoint=keep_checkpoint,
                graph=graph,
                on_message=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
            )
    except Stopped:
        console.print(f"told to stop; {out} holds a checkpoint. Run the same command to continue", markup=False, highlight=False)
        raise
    except OSError as error:
        raise LabError(f"--out {out} cannot be written: {error.strerror or error}; make room, or choose another folder") from error
    record = RunRecord.from_dict(left)
    console.print(
        f"{error_of(record)} after {counted(recipe.epochs, 'epoch')}, "
        f"{record.images_per_second:.0f} images a second; "
        f"{out}: result.json metrics.csv{f' {MODEL}' if save else ''}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return record


def error_of(record: RunRecord) -> str:
    """The error in words, and whether the run diverged."""
    reason = record.why_diverged
    return f"{record.split} error {record.measured.error:.2f}%" + (f" (diverged: {reason})" if reason else "")


@contextlib.contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keep other commands out of the folder meanwhile; leave no empty one behind. The first of several processes does it for all."""
    if int(os.environ.get("RANK", 0)):
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    lock = Lock.take(out)
    if lock is None:
        raise LabError(f"--out {out}: another process is training there; wait for it, or choose another folder")
    try:
        with lock:
            yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def finished(recipe: Recipe, out: Path) -> RunRecord | None:
    """The record of the run in ``out``, if it is done; refuses a folder of something else."""
    try:
        if not out.exists() or all(path.name.endswith((UNFINISHED, "lock")) for path in out.iterdir()):  # killed at its first file, say
            return None
        there = Recipe(**json.loads((out / "recipe.json").read_text()))
        record = RunRecord.from_dict(json.loads((out / "result.json").read_text())) if (out / "result.json").is_file() else None
        if record is not None:
            record.check_complete()
    except (OSError, ValueError, TypeError) as error:
        raise not_a_run(out) from error
    check_same(out, there.to_dict(), recipe)
    return record
