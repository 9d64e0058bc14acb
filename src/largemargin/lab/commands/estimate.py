"""About how long the runs of a comparison take, said before the first of them starts."""

import dataclasses
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from ..data.samples import Samples
from ..queue.budget import finish
from ..queue.runs import num_cores
from ..results import result_of
from ..run.pace import Pace, pace_of_one_batch, with_any_samples
from ..run.recipe import Recipe
from ..run.rows import choose_rows
from ..words import counted, hours

PROBE_SECONDS = 1.0  # of the measured step, about


def how_long(recipes: Sequence[Recipe], images: Samples, runs: Path, jobs: int, graph: bool) -> str | None:
    """A line for the user; None where no run is left to do.

    One step is measured for all: the recipes of a comparison differ in their loss, which takes a small part of it.
    """
    left = [recipe for recipe in recipes if result_of(recipe, runs) is None]
    if not left:
        return None
    try:
        pace = pace_of_one_batch(with_any_samples(left[0]), images.few, PROBE_SECONDS, graph)
    except Exception as error:  # the run itself meets it too, and leaves its traceback
        reason = " ".join("".join(traceback.format_exception_only(error)).split())
        return f"how long the runs take could not be measured: {reason}"
    finally:
        torch.cuda.empty_cache()  # the runs are other processes
    seconds = slowdown(left[0], min(jobs, len(left))) * finish([0.0] * jobs, durations(left, images, pace))
    milliseconds = f"{1000 * pace.training * left[0].batch_size:,.3g} ms"
    return f"about {hours(seconds)} for {counted(len(left), 'run')} (measured: {milliseconds} a step of {left[0].batch_size} images)"


def durations(recipes: Sequence[Recipe], images: Samples, pace: Pace) -> list[float]:
    """The seconds of each run."""
    samples: dict[tuple[float, float | None, float], tuple[int, int]] = {}
    seconds = []
    for recipe in recipes:
        key = recipe.train_fraction, recipe.long_tail, recipe.validation_fraction
        if key not in samples:
            clean = dataclasses.replace(recipe, label_noise=0.0, noise_kind=None)
            rows = choose_rows(clean, images.train_labels, len(images.classes))
            samples[key] = len(rows.training), len(rows.validation) or len(images.test_labels)
        training, held_out = samples[key]
        evaluations = -(-recipe.epochs // recipe.evaluate_every)
        seconds.append(pace.training * training * recipe.epochs + pace.evaluation * held_out * evaluations)
    return seconds


def slowdown(recipe: Recipe, jobs: int) -> float:
    """How much longer a run takes beside ``jobs`` - 1 others: all runs share an accelerator, and runs on the CPU share its cores."""
    return max(1.0, jobs * recipe.threads / num_cores()) if recipe.device == "cpu" else float(jobs)
