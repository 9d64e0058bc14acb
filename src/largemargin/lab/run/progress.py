"""How far a run is, and what it leaves of that in its folder."""

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .evaluate import Evaluation

CURVE_POINTS = 300  # the curve over training batches is averaged down to this many points
OF_A_SPLIT = ("error", "nll", "loss", "rho", "margin")  # the columns of an epoch, after the name of the split


@dataclass
class Progress:
    """All that a checkpoint holds beside weights and optimiser."""

    epoch: int = 0
    step: int = 0  # of this epoch, done
    totals: list[float] = field(default_factory=lambda: [0.0] * 4)  # the epoch's sums of loss, errors, rho-hat and margin over samples
    gradient_share: float = 0.0  # at the first step of this epoch
    rho_of_batches: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the epochs done
    training_seconds: float = 0.0
    seconds: float = 0.0

    def count(self, counted: list[list[float]], sizes: list[int]) -> None:
        """Take the counts of the last batches, batch by batch: the same sums wherever an epoch was cut."""
        if self.step == len(counted):  # the first of them is the first of the epoch
            self.gradient_share = counted[0][4]
        for (*sums, _), size in zip(counted, sizes, strict=True):
            self.totals = [total + value for total, value in zip(self.totals, sums, strict=True)]
            self.rho_of_batches.append(sums[2] / size)

    def finish_epoch(
        self, num_samples: int, rate: float, asymmetry: float | None, split: str, measured: tuple[Evaluation, float] | None
    ) -> None:
        """Add the row of the epoch, and go on to the next."""
        loss, errors, rho, margin = (total / num_samples for total in self.totals)
        of_split: dict[str, float | None] = dict.fromkeys(OF_A_SPLIT)
        if measured is not None:
            values, own = measured
            of_split = {name: own if name == "loss" else getattr(values, name) for name in OF_A_SPLIT}
        row = {
            "epoch": self.epoch + 1,
            "learning_rate": rate,
            "train_loss": loss,
            "train_error": 100 * errors,
            "train_rho": rho,
            "train_margin": margin,
            "gradient_share": self.gradient_share,
            "asymmetry": asymmetry,
            **{f"{split}_{name}": value for name, value in of_split.items()},
        }
        self.rows.append(row)
        self.epoch, self.step, self.totals, self.gradient_share = self.epoch + 1, 0, [0.0] * 4, 0.0


def metrics_csv(rows: list[dict[str, Any]]) -> str:
    """A line an epoch; empty where nothing was measured."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows(["" if value is None else value for value in row.values()] for row in rows)
    return text.getvalue()


def averaged(values: list[float]) -> dict[str, list[float]]:
    """The curve of ``values`` over batches, averaged over equal stretches so that a long run stays a small file."""
    stretches = np.array_split(np.asarray(values), min(CURVE_POINTS, len(values)))
    ends = np.cumsum([len(stretch) for stretch in stretches])
    return {"batch": ends.tolist(), "rho": [float(stretch.mean()) for stretch in stretches]}


def tracker(folder: Path, epoch: int) -> Any:
    """TensorBoard's event files in ``folder/events``; what an interrupted run wrote after its checkpoint is hidden."""
    from accelerate.tracking import TensorBoardTracker

    events = TensorBoardTracker("events", folder, purge_step=epoch + 1)
    events.start()
    return events
