"""The records of runs, as they are read back from ``result.json``: what has another form is refused before it is counted with.

A :class:`RunRecord` is of a network for images, a :class:`TrialRecord` of a function of the user's own. A table takes either.

A diverged run has no error that a mean may hold, and its loss is never called better.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

from .errors import LabError
from .run.evaluate import SCORES, Evaluation
from .run.planned import Planned, text_of
from .run.recipe import Recipe
from .trial.trial import Trial
from .words import counted

NOT_FINITE = "its numbers are not finite"
ONE_CLASS = "it predicts one class for every sample"
NUMBERS = ("error", "nll", "ece", "margin", "rho")
OF_A_REPORT = ("num_train", "num_test", "classes", "seconds", "rho_of_batches", "epochs", "environment")


class Record(Protocol):
    """What a queue and a table read of a finished run."""

    @property
    def recipe(self) -> Planned: ...

    @property
    def scores(self) -> Mapping[str, float]:
        """Its numbers by their names."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def num_test(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def environment(self) -> Mapping[str, Any]: ...

    @property
    def why_diverged(self) -> str:
        """The reason, or an empty string for a run that did not diverge."""

    def check_complete(self) -> None:
        """Raises ValueError for a record that lacks what a report needs."""


OfRecords = TypeVar("OfRecords", bound=Record)


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
    def scores(self) -> Mapping[str, float]:
        """Means over the samples; NaN where nothing was measured."""
        return {name: getattr(self.measured, name) if self.test or self.validation else math.nan for name in SCORES}

    @property
    def why_diverged(self) -> str:
        """The reason, or an empty string for a run that did not diverge."""
        if not (self.test or self.validation):
            return NOT_FINITE
        of_split, loss = self.measured, self.epochs[-1].get("train_loss", 0.0) if self.epochs else 0.0
        if loss is None or not all(map(math.isfinite, (loss, *(getattr(of_split, name) for name in NUMBERS)))):
            return NOT_FINITE
        return ONE_CLASS if of_split.predicted_classes < 2 <= of_split.target_classes else ""


@dataclass(frozen=True)
class TrialRecord:
    """What a finished run of a function left of itself. A number that was not finite is NaN."""

    recipe: Trial
    scores: Mapping[str, float]
    digest: str = ""  # of the source of the function and its loss
    measured: Evaluation | None = None  # what run.score() computed
    asked_to_hold_out: bool = False  # whether the function asked which samples are held out
    num_test: int = 0  # samples of run.score(); 0 where it was not called
    num_classes: int = 0
    seconds: float = 0.0
    environment: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()  # what run.log() was given

    @classmethod
    def from_dict(cls, record: Any) -> "TrialRecord":
        """The record in a file; raises ValueError, and says what is wrong, for one that no run has written."""
        _check(record | {"recipe": record["trial"]})
        _check_numbers("scores", record["scores"].items())
        names = {field.name for field in dataclasses.fields(cls)} - {"recipe", "scores", "measured"}
        plain = {name: value for name, value in record.items() if name in names}
        scores = {name: math.nan if value is None else float(value) for name, value in record["scores"].items()}
        return cls(Trial(**record["trial"]), scores, measured=_evaluation(record.get("measured")), **plain)

    def check_complete(self) -> None:
        """Nothing that a report needs can be lacking."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.num_classes)))

    @property
    def why_diverged(self) -> str:
        """The reason, or an empty string for a run that did not diverge."""
        if not all(map(math.isfinite, self.scores.values())):
            return NOT_FINITE
        return ONE_CLASS if self.measured and self.measured.predicted_classes < 2 <= self.measured.target_classes else ""


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


@overload
def result_of(recipe: Recipe, runs: Path) -> RunRecord | None: ...


@overload
def result_of(recipe: Trial, runs: Path) -> TrialRecord | None: ...


@overload
def result_of(recipe: Planned, runs: Path) -> Record | None: ...


def result_of(recipe: Planned, runs: Path) -> Record | None:
    """The record of a finished run, or None."""
    path = runs / recipe.id / "result.json"
    if not path.is_file():
        return None
    record: Record
    try:
        found = json.loads(path.read_text())
        record = TrialRecord.from_dict(found) if isinstance(recipe, Trial) else RunRecord.from_dict(found)
        if record.recipe.id != recipe.id or not (isinstance(recipe, Trial) or {"test", "epochs"} <= found.keys()):
            raise ValueError("it is of another run")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LabError(f"{path} is not the record of its run ({error}); remove it to run it again") from error
    return record


def num_finished(recipes: Sequence[Planned], runs: Path) -> int:
    """How many of these runs have their record."""
    return sum(result_of(recipe, runs) is not None for recipe in recipes)


def kept(records: Sequence[OfRecords]) -> list[OfRecords]:
    """The records of the runs that did not diverge."""
    return [record for record in records if not record.why_diverged]


def who_diverged(records: Sequence[Record]) -> list[str]:
    """A sentence that names the runs that diverged, if any did."""
    found = [(record.recipe, record.why_diverged) for record in records if record.why_diverged]
    if not found:
        return []
    names = [f"{text_of(recipe)} ({reason})" for recipe, reason in found[:10]]
    rest = f"; and {len(found) - 10} more" if len(found) > 10 else ""
    return [
        f"{len(found)} of {counted(len(records), 'run')} diverged: {'; '.join(names)}{rest}. Means and pairs leave them out, and a loss "
        "with a diverged run is not called better. A smaller learning rate, or more epochs, may help."
    ]


def software(records: Sequence[Record]) -> list[str]:
    """The versions the runs were made with; more than one where a comparison went on after an update."""
    environments = (record.environment for record in records)
    texts = (f"largemargin {e['largemargin']} (commit {e['commit'][:10]}), torch {e['torch']}, Python {e['python']}" for e in environments)
    return list(dict.fromkeys(texts))
