"""The table of a comparison: a line for each loss at each share of label noise."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..results import RunRecord, kept, who_diverged
from ..run.methods import BASELINE, LOSSES, SYMBOLS
from ..stats import Difference, mean_or_nan, paired_difference, spread, verdict_of
from ..words import counted


@dataclass(frozen=True)
class Row:
    """One line of the table: a loss at a share of label noise, over its seeds. ``std`` is over seeds, with n - 1.

    Runs that diverged are counted and are in no mean; where all did, the means are NaN.
    """

    label: str
    loss: str
    label_noise: float
    n: int  # runs, with those that diverged
    diverged: int
    error: float
    error_std: float | None
    difference: Difference | None
    margin: float
    rho: float
    ece: float
    nll: float

    @property
    def verdict(self) -> str:
        return "n/a" if self.difference is None else verdict_of(self.difference.verdict, self.diverged)


def summarise(records: Sequence[RunRecord]) -> list[Row]:
    """The lines of the table, in the order in which losses and noise first come."""
    groups: dict[tuple[float, str], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.recipe.label_noise, record.recipe.loss), []).append(record)

    def errors_by_seed(noise: float, loss: str) -> dict[int, float]:
        return {record.recipe.seed: record.measured.error for record in kept(groups.get((noise, loss), []))}

    rows = []
    for (noise, loss), group in sorted(groups.items(), key=lambda item: item[0][0]):
        errors = errors_by_seed(noise, loss)
        means = {name: mean_or_nan([getattr(record.measured, name) for record in kept(group)]) for name in ("margin", "rho", "ece", "nll")}
        rows.append(
            Row(
                label=group[0].recipe.loss_label,
                loss=loss,
                label_noise=noise,
                n=len(group),
                diverged=len(group) - len(errors),
                error=mean_or_nan(list(errors.values())),
                error_std=statistics.stdev(errors.values()) if len(errors) > 1 else None,
                difference=None if loss == BASELINE else paired_difference(errors, errors_by_seed(noise, BASELINE)),
                **means,
            )
        )
    return rows


def as_json(row: Row) -> dict[str, Any]:
    """A row for ``--json``."""
    return dataclasses.asdict(row) | {"verdict": None if row.loss == BASELINE else row.verdict}


COLUMNS = ("loss", "test error %", "minus softmax [95%]", "verdict", "margin", "rho-hat", "ECE %", "NLL")
NOTE = (
    "Test error at the last epoch, mean ± std (n-1) over seeds. The interval is of the paired difference over seeds (Student t): "
    "it covers the seeds, not the choice of test samples. One seed has no interval. Runs that diverged are in no mean and no pair."
)


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a row as text, under COLUMNS."""
    difference = "n/a" if row.difference is None else row.difference.text
    verdict = row.verdict
    if row.loss == BASELINE:
        difference, verdict = "–", "–"
    error = error_text(row)
    if row.diverged == row.n:
        return (row.label, error, difference, verdict, *["n/a"] * 4)
    return (row.label, error, difference, verdict, f"{row.margin:.2f}", f"{row.rho:.2f}", f"{row.ece:.2f}", f"{row.nll:.3f}")


def error_text(row: Row) -> str:
    """Mean and spread, and how many runs diverged."""
    if row.diverged == row.n:
        return "diverged"
    return spread(row.error, row.error_std) + (f" ({row.diverged} diverged)" if row.diverged else "")


def remarks(records: Sequence[RunRecord]) -> list[str]:
    """What explains a table that says less than was hoped for."""
    losses = dict.fromkeys(record.recipe.loss for record in records)
    sentences = []
    if BASELINE not in losses:
        sentences.append(f"{BASELINE} is not among the losses, so there is nothing to measure differences from; add it to --losses.")
    if len(records[0].classes) == 2 and any("lam" in LOSSES[loss] for loss in losses):
        sentences.append("With two classes the large-margin regulariser is 0: lam changes nothing.")
    return sentences + who_diverged(records)


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """A table for each share of label noise; in two parts where the terminal is narrow."""
    for noise in dict.fromkeys(row.label_noise for row in rows):
        group = [row for row in rows if row.label_noise == noise]
        seeds = sorted({row.n for row in group})
        title = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds; some runs are missing"
        console.print(f"\nlabel noise {noise:g}, {title}", style="bold", highlight=False)
        unbounded = console.options.update(width=10_000)
        layouts = ([table(group, range(8))], [table(group, (0, 1, 2, 3)), table(group, (0, 4, 5, 6, 7))])
        for tables in layouts:
            if all(Measurement.get(console, unbounded, part).maximum <= console.width for part in tables):
                console.print(*tables)
                break
        else:  # narrower still: no number is ever cut
            for row in group:
                console.print(
                    f"{row.label}:",
                    *(f"{name} {text}," for name, text in zip(COLUMNS[1:], cells(row)[1:], strict=True)),
                    soft_wrap=True,
                    highlight=False,
                    markup=False,
                )
    console.print(NOTE, style="dim")


def table(rows: Sequence[Row], columns: Sequence[int]) -> Table:
    """These columns of the rows."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i in columns:
        width = max(len(COLUMNS[i]), *(len(cells(row)[i]) for row in rows))
        result.add_column(COLUMNS[i], justify="left" if i in (0, 3) else "right", no_wrap=True, min_width=width)
    for row in rows:
        result.add_row(*(cells(row)[i] for i in columns))
    return result


def results_csv(records: Sequence[RunRecord], split: str = "test") -> str:
    """One line a run."""
    text = io.StringIO()
    names = ("data", "network", "loss", *SYMBOLS, "label_noise", "train_fraction", "seed", "epochs")
    numbers = ("error", "margin", "rho", "ece", "nll")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *(f"{split}_{name}" for name in numbers), "seconds", "diverged"])
    for record in records:
        values = [getattr(record.recipe, name) for name in names] + [getattr(record.measured, name) for name in numbers]
        values += [round(record.seconds, 2), record.why_diverged]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()
