"""Which runs diverged. A diverged run has no error that a mean may hold, and its loss is never called better."""

import math
from collections.abc import Sequence
from typing import Any

from .recipe import Recipe
from .words import counted

NOT_FINITE = "its numbers are not finite"
ONE_CLASS = "it predicts one class for every sample"


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


def verdict_of(verdict: str, diverged: int) -> str:
    """The verdict on a loss of which so many runs diverged: the seeds that are left do not make it better."""
    return "inconclusive" if diverged and verdict == "better" else verdict


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
