"""What to do after a comparison: the command that uses its best model."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..comparison.recommendation import rank, recommended
from ..comparison.table import Row
from ..models import OF_FEATURES
from ..results import RunRecord, kept
from ..run.methods import BASELINE
from ..run.model import has_model
from ..run.noise import order_of


def advised(rows: Sequence[Row]) -> Row | None:
    """The loss to use, at the least label noise: the recommended one, else softmax. Where softmax was not compared, that of least error."""
    least = min((row.label_noise for row in rows), key=order_of, default=0.0)
    rows = [row for row in rows if row.label_noise == least and row.diverged < row.n]
    softmax = next((row for row in rows if row.loss == BASELINE), None)
    return recommended(rows) or softmax or min(rows, key=rank, default=None)


def next_command(rows: Sequence[Row], records: Sequence[RunRecord], runs: Path) -> list[str]:
    """A line that names the command, if a run of that loss has kept its model: that of least test error."""
    row = advised(rows)
    if row is None:
        return []
    found = [record for record in kept(records) if (record.recipe.loss, record.recipe.noise) == (row.loss, row.label_noise)]
    folders = [runs / record.recipe.id for record in sorted(found, key=lambda record: record.measured.error)]
    best = next((folder for folder in folders if has_model(folder)), None)
    what = "FILE" if found and found[0].recipe.network in OF_FEATURES else "IMAGES"
    return [] if best is None else [f"to use the best run of {row.label}: largemargin predict {shlex.quote(str(best))} {what}"]
