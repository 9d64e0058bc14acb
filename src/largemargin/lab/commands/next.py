"""What to do after a comparison: the command that uses its best model."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..comparison.table import Row
from ..results import kept, measured
from ..run.model import has_model
from ..run.recipe import BASELINE, Recipe


def recommended(rows: Sequence[Row]) -> Row | None:
    """The loss to use, at the smallest share of label noise: of those that are better than softmax that of least mean error, else softmax.

    Where softmax was not compared, that of least mean error.
    """
    rows = [row for row in rows if row.label_noise == min(other.label_noise for other in rows) and row.diverged < row.n]
    found = [row for row in rows if row.verdict == "better"] or [row for row in rows if row.loss == BASELINE] or rows
    return min(found, key=lambda row: row.error, default=None)


def next_command(rows: Sequence[Row], records: Sequence[dict[str, Any]], runs: Path) -> list[str]:
    """A line that names the command, if a run of the recommended loss has kept its model: that of least test error."""
    row = recommended(rows)
    if row is None:
        return []
    recipes = [
        (measured(record)["error"], Recipe(**record["recipe"]))
        for record in kept(records)
        if (record["recipe"]["loss"], record["recipe"]["label_noise"]) == (row.loss, row.label_noise)
    ]
    folders = [runs / recipe.id for _, recipe in sorted(recipes, key=lambda each: each[0])]
    best = next((folder for folder in folders if has_model(folder)), None)
    return [] if best is None else [f"to use the best run of {row.label}: largemargin predict {shlex.quote(str(best))} IMAGES"]
