"""The table of a comparison: a line for each loss at each share of label noise."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..results import RunRecord, kept, who_diverged
from ..run.methods import BASELINE, LOSSES, SYMBOLS
from ..run.noise import Noise, order_of, text_of
from ..stats import Paired, mean_or_nan, paired, spread
from ..verdicts import Judged, judge
from ..words import counted

VERDICTS_ON_SCREEN = 4
Outcomes = Mapping[str, NDArray[np.bool_]]  # by the id of a run: which test samples its network gets wrong


@dataclass(frozen=True)
class Row:
    """One line of the table: a loss at a share of label noise, over its seeds. ``std`` is over seeds, with n - 1.

    Runs that diverged are counted and are in no mean; where all did, the means are NaN.
    """

    label: str
    loss: str
    label_noise: Noise
    n: int  # runs, with those that diverged
    diverged: int
    error: float
    error_std: float | None
    judged: Judged | None  # beside the baseline; None for the baseline, and for fewer than two pairs
    margin: float
    rho: float
    ece: float
    nll: float

    @property
    def verdict(self) -> str:
        return "n/a" if self.judged is None else self.judged.verdict


def summarise(records: Sequence[RunRecord], outcomes: Outcomes | None = None, looks: int = 1) -> list[Row]:
    """The lines of the table, in the order in which losses and noise first come; Holm's correction runs over all of them.

    ``outcomes`` are of runs on the same samples; with those of all pairs, the verdicts say what holds over samples too. ``looks`` is how
    often the comparison was to be judged while seeds were added.
    """
    groups: dict[tuple[Noise, str], list[RunRecord]] = {}
    for record in records:
        groups.setdefault((record.recipe.noise, record.recipe.loss), []).append(record)
    of_seeds = {key: {record.recipe.seed: record for record in kept(group)} for key, group in groups.items()}
    ordered = sorted(groups, key=lambda key: order_of(key[0]))
    pairs = {key: _paired(of_seeds[key], of_seeds.get((key[0], BASELINE), {}), outcomes or {}) for key in ordered if key[1] != BASELINE}
    compared = {key: found for key, found in pairs.items() if found is not None}
    lost = {key: len(group) - len(of_seeds[key]) for key, group in groups.items()}
    named = [(groups[key][0].recipe.loss_label, BASELINE, found, lost[key]) for key, found in compared.items()]
    judged = dict(zip(compared, judge(named, looks), strict=True))

    rows = []
    for key in ordered:
        errors = [record.measured.error for record in of_seeds[key].values()]
        means = {name: mean_or_nan([getattr(r.measured, name) for r in of_seeds[key].values()]) for name in ("margin", "rho", "ece", "nll")}
        rows.append(
            Row(
                label=groups[key][0].recipe.loss_label,
                loss=key[1],
                label_noise=key[0],
                n=len(groups[key]),
                diverged=lost[key],
                error=mean_or_nan(errors),
                error_std=statistics.stdev(errors) if len(errors) > 1 else None,
                judged=judged.get(key),
                **means,
            )
        )
    return rows


def as_json(row: Row) -> dict[str, Any]:
    """A row for ``--json``, with what its verdict rests on."""
    plain = dataclasses.asdict(row)
    plain["judged"] = None if row.judged is None else {**plain["judged"], "sentences": row.judged.sentences()}
    return plain | {"verdict": None if row.loss == BASELINE else row.verdict}


def _paired(method: Mapping[int, RunRecord], baseline: Mapping[int, RunRecord], outcomes: Outcomes) -> Paired | None:
    """The pairs of two losses, over the seeds that both have."""
    seeds = sorted(method.keys() & baseline.keys())
    differences = [method[seed].measured.error - baseline[seed].measured.error for seed in seeds]
    wrong = [[outcomes.get(runs[seed].recipe.id) for seed in seeds] for runs in (method, baseline)]
    if len(seeds) < 2 or any(found is None for found in wrong[0] + wrong[1]):
        return paired(differences)
    ours, theirs = (np.array(found, dtype=np.float64) for found in wrong)
    return paired(differences, 100 * (ours - theirs))


COLUMNS = ("loss", "test error %", "minus softmax [95%]", "verdict", "margin", "rho-hat", "ECE %", "NLL")
NOTE = (
    "Test error at the last epoch, mean ± std (n-1) over seeds. The interval is a 95% interval of the paired difference over seeds "
    "(Student's t, unadjusted): it covers the seeds, not the choice of test samples. A verdict is a paired t test with Holm's correction "
    "for all verdicts of this report. One seed has no interval. Runs that diverged are in no mean and no pair."
)


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a row as text, under COLUMNS."""
    difference = "n/a" if row.judged is None else row.judged.text
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
    if records[0].recipe.unverified:
        sentences.append(f"The files of {records[0].recipe.data} were taken without their published md5 (--unverified).")
    return sentences + who_diverged(records)


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """A table for each share of label noise; in two parts where the terminal is narrow."""
    for noise in dict.fromkeys(row.label_noise for row in rows):
        group = [row for row in rows if row.label_noise == noise]
        seeds = sorted({row.n for row in group})
        title = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds; some runs are missing"
        console.print(f"\nlabel noise {text_of(noise)}, {title}", style="bold", highlight=False)
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


def print_evidence(rows: Sequence[Row], console: Console) -> None:
    """What each verdict rests on; of more than :data:`VERDICTS_ON_SCREEN` the reports tell it."""
    judged = [(row.label_noise, row.judged) for row in rows if row.judged is not None]
    if len(judged) > VERDICTS_ON_SCREEN:
        console.print("What each verdict rests on: report.html and report.md.", style="dim", highlight=False)
        return
    for noise, found in judged:
        where = f", label noise {text_of(noise)}" if noise else ""
        console.print(f"\n{found.method} beside {found.baseline}{where}: {found.verdict}", style="bold", highlight=False, markup=False)
        for sentence in found.sentences():
            console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)


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
    names = ("data", "network", "loss", *SYMBOLS, "label_noise", "noise_kind", "long_tail", "train_fraction", "seed", "epochs")
    numbers = ("error", "margin", "rho", "ece", "nll")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *(f"{split}_{name}" for name in numbers), "train_error", "seconds", "diverged"])
    for record in records:
        values = [getattr(record.recipe, name) for name in names] + [getattr(record.measured, name) for name in numbers]
        values += [record.epochs[-1].get("train_error") if record.epochs else None, round(record.seconds, 2), record.why_diverged]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()
