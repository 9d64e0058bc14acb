"""The records of runs, as they are read back from ``result.json``: what has another form is refused before it is counted with.

A diverged run has no error that a mean may hold, and its loss is never called better.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import LabError
from .run.evaluate import Evaluation
from .run.noise import text_of
from .run.recipe import Recipe
from .words import counted

NOT_FINITE = "its numbers are not finite"
ONE_CLASS = "it predicts one class for every sample"
NUMBERS = ("error", "nll", "ece", "margin", "rho")
OF_A_REPORT = ("num_train", "num_test", "classes", "seconds", "rho_of_batches", "epochs", "environment")


@dataclass(frozen=True)
class RunRecord:
    """What a finished run left of itself. A number that was not finite is NaN."""

    recipe: Recipe
    test: Evaluation | None = None  # of the last epoch; None for a run that measured itself on a part of its training set
    validation: Evaluation | None = None
    classes: tuple[str, ...] = ()
    num_train: int = 0
    num_test: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    epochs: Sequence[Mapping[str, Any]] = ()  # a row of metrics.csv each
    rho_of_batches: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    lacking: tuple[str, ...] = ()  # what a report needs and the file does not hold

    @classmethod
    def from_dict(cls, record: Any) -> "RunRecord":
        """The record in a file; raises ValueError, and says what is wrong, for one that no run has written."""
        _check(record)
        splits: dict[str, Any] = {name: _evaluation(record.get(name)) for name in ("test", "validation")}
        missing = [name for name in OF_A_REPORT if name not in record]
        split = "validation" if splits["validation"] and not splits["test"] else "test"
        missing += [f"{split}.{name}" for name in (*NUMBERS, "margin_histogram") if name not in (record.get(split) or {})]
        names = {field.name for field in dataclasses.fields(cls)} - {"recipe", "classes", *splits}
        plain = {name: value for name, value in record.items() if name in names}
        return cls(Recipe(**record["recipe"]), **splits, classes=tuple(record.get("classes", ())), lacking=tuple(missing), **plain)

    def check_complete(self) -> None:
        """Raises ValueError for a record that lacks what a report needs."""
        if self.lacking:
            raise ValueError(f"it lacks {', '.join(self.lacking)}")

    @property
    def split(self) -> str:
        """What the run measured itself on: ``test`` or ``validation``."""
        return "validation" if self.validation and not self.test else "test"

    @property
    def measured(self) -> Evaluation:
        """The last epoch on that split."""
        of_split = self.validation if self.split == "validation" else self.test
        if of_split is None:
            raise LabError(f"the record of {self.recipe.id} holds no measurement; remove its folder to run it again")
        return of_split

    @property
    def why_diverged(self) -> str:
        """The reason, or an empty string for a run that did not diverge."""
        if not (self.test or self.validation):
            return NOT_FINITE
        of_split, loss = self.measured, self.epochs[-1].get("train_loss", 0.0) if self.epochs else 0.0
        if loss is None or not all(map(math.isfinite, (loss, *(getattr(of_split, name) for name in NUMBERS)))):
            return NOT_FINITE
        return ONE_CLASS if of_split.predicted_classes < 2 <= of_split.target_classes else ""


def _evaluation(values: dict[str, Any] | None) -> Evaluation | None:
    if not values:
        return None
    numbers: dict[str, Any] = {name: math.nan if (value := values.get(name, 0.0)) is None else value for name in NUMBERS}
    # a record of an older version does not say how many classes were predicted
    classes = {name: values.get(name, 2) for name in ("predicted_classes", "target_classes")}
    return Evaluation(**numbers, margin_histogram=values.get("margin_histogram", []), **classes)


def _check(record: Any) -> None:
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


def _check_numbers(where: str, values: Iterable[tuple[Any, Any]]) -> None:
    for name, value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where}: {name} is {value!r}, not a number")


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {value!r}, not a list")
    return value


def result_of(recipe: Recipe, runs: Path) -> RunRecord | None:
    """The record of a finished run, or None."""
    path = runs / recipe.id / "result.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        record = RunRecord.from_dict(found)
        if record.recipe.id != recipe.id or not {"test", "epochs"} <= found.keys():
            raise ValueError("it is of another run")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LabError(f"{path} is not the record of its run ({error}); remove it to run it again") from error
    return record


def num_finished(recipes: Sequence[Recipe], runs: Path) -> int:
    """How many of these runs have their record."""
    return sum(result_of(recipe, runs) is not None for recipe in recipes)


def kept(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The records of the runs that did not diverge."""
    return [record for record in records if not record.why_diverged]


def who_diverged(records: Sequence[RunRecord]) -> list[str]:
    """A sentence that names the runs that diverged, if any did."""
    found = [(record.recipe, record.why_diverged) for record in records if record.why_diverged]
    if not found:
        return []
    names = [f"{recipe.loss_label}, label noise {text_of(recipe.noise)}, seed {recipe.seed} ({reason})" for recipe, reason in found[:10]]
    rest = f"; and {len(found) - 10} more" if len(found) > 10 else ""
    return [
        f"{len(found)} of {counted(len(records), 'run')} diverged: {'; '.join(names)}{rest}. Means and pairs leave them out, and a loss "
        "with a diverged run is not called better. A smaller learning rate, or more epochs, may help."
    ]


def software(records: Sequence[RunRecord]) -> list[str]:
    """The versions the runs were made with; more than one where a comparison went on after an update."""
    environments = (record.environment for record in records)
    texts = (f"largemargin {e['largemargin']} (commit {e['commit'][:10]}), torch {e['torch']}, Python {e['python']}" for e in environments)
    return list(dict.fromkeys(texts))
