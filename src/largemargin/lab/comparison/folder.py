"""The folder of a comparison: what was asked for, and the records of the runs that are finished."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import LabError
from ..files import write_json
from ..metrics import ERROR, Metric
from ..predictions import NAME, Predictions
from ..results import Record, RunRecord, TrialRecord, result_of
from ..run.environment import default_device
from ..run.planned import Planned
from .choose import choose, chosen_of
from .design import Design
from .own import OwnComparison
from .plan import Comparison

MARKER = "compare.json"  # tells a folder of ours from one that is not


def check_folder(out: Path) -> None:
    """Say why ``out`` cannot be ours, before anything is written."""
    try:
        if out.exists() and any(out.iterdir()):
            reopen(out)
    except OSError as error:
        raise LabError(f"--out {out} cannot be used: {error.strerror or error}; choose another folder") from error
    except LabError as error:
        raise LabError(f"--out {out} holds files that are not of a comparison; choose a new or empty folder") from error


def device_of(out: Path) -> str:
    """The device of the comparison in a folder, whose runs can only go on there; where there is none, the default of this machine."""
    return reopen(out).device if (out / MARKER).is_file() else default_device()


def reopen(out: Path) -> Comparison | OwnComparison:
    """The comparison of a folder: of images, or of a function of the user's own."""
    try:
        marker = json.loads((out / MARKER).read_text())
        if marker["largemargin"] != "compare":
            raise ValueError("it is of something else")
        return OwnComparison.from_dict(marker["own"]) if "own" in marker else Comparison.from_dict(marker["comparison"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(
            f"{out} is not the folder of a comparison or a reproduction: it has no readable {MARKER} or reproduce.json"
        ) from error


def write_marker(comparison: Design[Any], out: Path) -> None:
    """Say in the folder what is compared there."""
    write_json(out / MARKER, {"largemargin": "compare", **comparison.told()})


@overload
def finished_records(comparison: Comparison, out: Path) -> tuple[list[RunRecord], list[RunRecord]]: ...


@overload
def finished_records(comparison: Design[Any], out: Path) -> tuple[Sequence[Record], Sequence[Record]]: ...


def finished_records(comparison: Design[Any], out: Path) -> tuple[Sequence[Record], Sequence[Record]]:
    """The records of the comparison's finished runs: of the validating ones, and of those compared.

    A lam is chosen when all of its validating runs are finished; runs with it are counted from then on.
    """
    validating = [(recipe, complete_record(recipe, out / "runs")) for recipe in comparison.validating_recipes()]
    unfinished = {(recipe.loss, recipe.noise) for recipe, record in validating if record is None}
    complete = [record for recipe, record in validating if record is not None and (recipe.loss, recipe.noise) not in unfinished]
    recipes = comparison.recipes(chosen_of(choose(complete, comparison.metric(complete))))
    return complete, [record for recipe in recipes if (record := complete_record(recipe, out / "runs")) is not None]


def complete_record(recipe: Planned, runs: Path) -> Record | None:
    """The record of a finished run with all that a report needs, or None."""
    record = result_of(recipe, runs)
    if record is not None:
        try:
            record.check_complete()
        except ValueError as error:
            raise LabError(f"{runs / recipe.id / 'result.json'} is not a whole record ({error}); remove it to run it again") from error
    return record


def predictions_of(record: Record, out: Path) -> Predictions | None:
    """What the network of a run said of the test set, if the run kept it."""
    path = out / "runs" / record.recipe.id / NAME
    return Predictions.load(path) if path.is_file() else None


def outcomes_of(records: Sequence[Record], out: Path) -> dict[str, NDArray[np.bool_]]:
    """Which test samples each run gets wrong, by the id of the run; only of runs that were measured on the samples of the first."""
    found: dict[str, NDArray[np.bool_]] = {}
    first: Predictions | None = None
    for record in records:
        predictions = predictions_of(record, out)
        if predictions is None:
            continue
        first = first or Predictions(predictions.logits[:0], predictions.labels, predictions.ids, predictions.predicted)
        if np.array_equal(first.ids, predictions.ids) and np.array_equal(first.labels, predictions.labels):
            found[record.recipe.id] = predictions.wrong
    return found


def why_no_samples(records: Sequence[Record], outcomes: Mapping[str, object], metric: Metric) -> str:
    """Why seeds and samples cannot be crossed, where more is known than that: the end of a sentence, or nothing."""
    if metric != ERROR:
        return f"{metric.name} is known of whole runs, not of single samples: only the error of run.score is."
    if any(isinstance(record, TrialRecord) for record in records) and outcomes and len(outcomes) < len(records):
        return "run.score was given other ids or other targets in some runs."
    return ""
