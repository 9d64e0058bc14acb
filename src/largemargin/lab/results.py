"""The records of runs as they are read back from ``result.json``: what has another form is refused before it is counted with.

A diverged run has no error that a mean may hold, and its loss is never called better.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import LabError
from .run.recipe import Recipe
from .words import counted

NOT_FINITE = "its numbers are not finite"
ONE_CLASS = "it predicts one class for every sample"

MEASURED = ("error", "nll", "ece", "margin", "rho", "margin_histogram")  # what a report needs of a split
OF_A_REPORT = ("num_train", "num_test", "classes", "seconds", "rho_of_batches", "epochs", "environment")


def check(record: Any) -> None:
    """Raises ValueError, and says what is wrong, for a record that no run has written."""
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    for split in ("test", "validation"):
        values = record.get(split)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{split} is {values!r}, not an object")
        _check_numbers(split, ((name, value) for name, value in values.items() if name != "margin_histogram"))
        _check_numbers(f"{split}.margin_histogram", enumerate(_list(f"{split}.margin_histogram", values.get("margin_histogram", []))))
    for i, row in enumerate(_list("epochs", record.get("epochs", []))):
        if not isinstance(row, dict):
            raise ValueError(f"epochs[{i}] is {row!r}, not an object")
        _check_numbers(f"epochs[{i}]", row.items())
    _check_numbers("the record", ((name, record[name]) for name in ("seconds", "images_per_second", "num_train") if name in record))
    _list("classes", record.get("classes", []))
    for name in ("recipe", "environment"):
        if not isinstance(record.get(name), dict):
            raise ValueError(f"{name} is {record.get(name)!r}, not an object")


def check_complete(record: Mapping[str, Any]) -> None:
    """Raises ValueError for a record that lacks what a report needs."""
    split = next((name for name in ("test", "validation") if record.get(name)), "test")
    missing = [name for name in OF_A_REPORT if name not in record]
    missing += [f"{split}.{name}" for name in MEASURED if name not in (record.get(split) or {})]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")


def _check_numbers(where: str, values: Iterable[tuple[Any, Any]]) -> None:
    for name, value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where}: {name} is {value!r}, not a number")


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {value!r}, not a list")
    return value


def result_of(recipe: Recipe, runs: Path) -> dict[str, Any] | None:
    """The record of a finished run, or None."""
    path = runs / recipe.id / "result.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        check(record)
        if Recipe(**record["recipe"]).id != recipe.id or not {"test", "epochs", "environment"} <= record.keys():
            raise ValueError("it is of another run")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LabError(f"{path} is not the record of its run ({error}); remove it to run it again") from error
    return record


def num_finished(recipes: Sequence[Recipe], runs: Path) -> int:
    """How many of these runs have their record."""
    return sum(result_of(recipe, runs) is not None for recipe in recipes)


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """The last epoch on the set that the run measured itself on."""
    return record.get("test") or record.get("validation") or {}


def why_diverged(record: dict[str, Any]) -> str:
    """The reason, or an empty string for a run that did not diverge."""
    of_split, epochs = measured(record), record.get("epochs") or [{}]
    numbers = [of_split.get(name, 0.0) for name in ("error", "nll", "ece", "margin", "rho")] + [epochs[-1].get("train_loss", 0.0)]
    if not of_split or not all(map(finite, numbers)):
        return NOT_FINITE
    # a record of an older version does not say how many classes were predicted
    if of_split.get("predicted_classes", 2) < 2 <= of_split.get("target_classes", 2):
        return ONE_CLASS
    return ""


def finite(value: float | None) -> bool:
    """Whether it is a finite number; a record on disk has null for one that is not."""
    return value is not None and math.isfinite(value)


def kept(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of the runs that did not diverge."""
    return [record for record in records if not why_diverged(record)]


def who_diverged(records: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence that names the runs that diverged, if any did."""
    found = [(Recipe(**record["recipe"]), reason) for record in records if (reason := why_diverged(record))]
    if not found:
        return []
    names = [f"{recipe.loss_label}, label noise {recipe.label_noise:g}, seed {recipe.seed} ({reason})" for recipe, reason in found[:10]]
    rest = f"; and {len(found) - 10} more" if len(found) > 10 else ""
    return [
        f"{len(found)} of {counted(len(records), 'run')} diverged: {'; '.join(names)}{rest}. Means and pairs leave them out, and a loss "
        "with a diverged run is not called better. A smaller learning rate, or more epochs, may help."
    ]


def software(records: Sequence[dict[str, Any]]) -> list[str]:
    """The versions the runs were made with; more than one where a comparison went on after an update."""
    environments = (record["environment"] for record in records)
    texts = (f"largemargin {e['largemargin']} (commit {e['commit'][:10]}), torch {e['torch']}, Python {e['python']}" for e in environments)
    return list(dict.fromkeys(texts))
