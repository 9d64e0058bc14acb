"""The table of a comparison: a line for each loss at each share of label noise."""

import csv
import dataclasses
import io
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..directions import room
from ..metrics import ERROR, OF_LOGITS, Metric, metric_of
from ..results import Record, RunRecord, kept, who_diverged
from ..run.methods import BASELINE, SYMBOLS
from ..run.noise import UNTOLD, Noise, order_of, text_of
from ..run.planned import Planned
from ..run.recipe import Recipe
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
    mean: float  # of the metric
    std: float | None
    judged: Judged | None  # beside the baseline; None for the baseline, and for fewer than two pairs
    others: Mapping[str, float]  # the means of the other numbers
    metric: Metric = ERROR

    @property
    def verdict(self) -> str:
        return "n/a" if self.judged is None else self.judged.verdict


def summarise(
    records: Sequence[Record], outcomes: Outcomes | None = None, looks: int = 1, metric: Metric = ERROR, no_samples: str = ""
) -> list[Row]:
    """The lines of the table, in the order in which losses and noise first come; Holm's correction runs over all of them.

    ``outcomes`` are of runs on the same samples; with those of all pairs, the verdicts say what holds over samples too, and otherwise
    ``no_samples`` says why not. ``looks`` is how often the comparison was to be judged while seeds were added.
    """
    groups: dict[tuple[Noise, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.recipe.noise, record.recipe.loss), []).append(record)
    of_seeds = {key: {record.recipe.seed: record for record in kept(group)} for key, group in groups.items()}
    ordered = sorted(groups, key=lambda key: order_of(key[0]))
    pairs = {
        key: _paired(of_seeds[key], of_seeds.get((key[0], BASELINE), {}), metric, outcomes or {}) for key in ordered if key[1] != BASELINE
    }
    compared = {key: found for key, found in pairs.items() if found is not None}
    lost = {key: len(group) - len(of_seeds[key]) for key, group in groups.items()}
    named = [(groups[key][0].recipe.loss_label, BASELINE, found, lost[key]) for key, found in compared.items()]
    judged = judge(named, looks, metric.lower_is_better, metric.unit)
    rooms = {noise: _room(of_seeds[noise, BASELINE].values(), metric) for noise, _ in compared}
    judged = [
        dataclasses.replace(one, decimals=metric.decimals, room=rooms[noise], no_samples=no_samples or one.no_samples)
        for (noise, _), one in zip(compared, judged, strict=True)
    ]
    judgements = dict(zip(compared, judged, strict=True))
    others = [name for name in shared_scores(records) if name != metric.name]

    rows = []
    for key in ordered:
        scores = [record.scores for record in of_seeds[key].values()]
        values = [one[metric.name] for one in scores]
        rows.append(
            Row(
                label=groups[key][0].recipe.loss_label,
                loss=key[1],
                label_noise=key[0],
                n=len(groups[key]),
                diverged=lost[key],
                mean=mean_or_nan(values),
                std=statistics.stdev(values) if len(values) > 1 else None,
                judged=judgements.get(key),
                others={name: mean_or_nan([one[name] for one in scores]) for name in others},
                metric=metric,
            )
        )
    return rows


def _room(baseline: Collection[Record], metric: Metric) -> float | None:
    """The most that a loss can be better than these runs; None: not known."""
    return room(metric.name, statistics.fmean(record.scores[metric.name] for record in baseline), metric.lower_is_better)


def shared_scores(records: Sequence[Record]) -> list[str]:
    """The names of the numbers that all runs have."""
    return [name for name in records[0].scores if all(name in record.scores for record in records)]


def as_json(row: Row) -> dict[str, Any]:
    """A row for ``--json``, with what its verdict rests on."""
    plain = {name: getattr(row, name) for name in ("label", "loss", "label_noise", "n", "diverged")}
    plain |= {row.metric.name: row.mean, f"{row.metric.name}_std": row.std, **row.others}
    plain["judged"] = None if row.judged is None else {**dataclasses.asdict(row.judged), "sentences": row.judged.sentences()}
    return plain | {"verdict": None if row.loss == BASELINE else row.verdict}


def _paired(method: Mapping[int, Record], baseline: Mapping[int, Record], metric: Metric, outcomes: Outcomes) -> Paired | None:
    """The pairs of two losses, over the seeds that both have."""
    seeds = sorted(method.keys() & baseline.keys())
    differences = [method[seed].scores[metric.name] - baseline[seed].scores[metric.name] for seed in seeds]
    wrong = [[outcomes.get(runs[seed].recipe.id) for seed in seeds] for runs in (method, baseline)]
    if len(seeds) < 2 or any(found is None for found in wrong[0] + wrong[1]):
        return paired(differences)
    ours, theirs = (np.array(found, dtype=np.float64) for found in wrong)
    return paired(differences, 100 * (ours - theirs))


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The headers of the table; that of the metric says what is better."""
    first = rows[0]
    return ("loss", first.metric.header, f"minus {BASELINE} [95%]", "verdict", *(other_metric(name, rows).header for name in first.others))


def other_metric(name: str, rows: Sequence[Row]) -> Metric:
    """One of the numbers beside the metric."""
    return OF_LOGITS.get(name) or dataclasses.replace(metric_of(name, [row.others[name] for row in rows]), header=name)


def note_of(metric: Metric) -> str:
    """What stands under the table."""
    what = "Test error at the end of training" if metric == ERROR else f"The {metric.name} of a run"
    return (
        f"{what}, mean ± std (n-1) over seeds. The interval is a 95% interval of the paired difference over seeds (Student's t, "
        "unadjusted): it covers the seeds, not the choice of test samples. A verdict is a paired t test with Holm's correction for all "
        "verdicts of this report. One seed has no interval. Runs that diverged are in no mean and no pair."
    )


def cells(row: Row, rows: Sequence[Row] = ()) -> tuple[str, ...]:
    """The cells of a row as text, under :func:`columns_of`; ``rows`` are all of its table."""
    difference = "n/a" if row.judged is None else row.judged.text
    verdict = row.verdict
    if row.loss == BASELINE:
        difference, verdict = "–", "–"
    beside = ["n/a" if row.diverged == row.n else other_metric(name, rows or [row]).number(value) for name, value in row.others.items()]
    return (row.label, score_text(row), difference, verdict, *beside)


def score_text(row: Row) -> str:
    """Mean and spread, and how many runs diverged."""
    if row.diverged == row.n:
        return "diverged"
    return spread(row.mean, row.std, row.metric.decimals) + (f" ({row.diverged} diverged)" if row.diverged else "")


def remarks(records: Sequence[Record]) -> list[str]:
    """What explains a table that says less than was hoped for."""
    if not records:
        return []
    losses = dict.fromkeys(record.recipe.loss for record in records)
    sentences = []
    if BASELINE not in losses:
        sentences.append(f"{BASELINE} is not among the losses, so there is nothing to measure differences from; add it to --losses.")
    if len(records[0].classes) == 2 and any("lam" in record.recipe.settings for record in records):
        sentences.append("With two classes the large-margin regulariser is 0: lam changes nothing.")
    first = records[0].recipe
    if isinstance(first, Recipe) and first.unverified:
        sentences.append(f"The files of {first.data} were taken without their published md5 (--unverified).")
    return sentences + who_diverged(records)


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """A table for each share of label noise; in two parts where the terminal is narrow."""
    for noise in dict.fromkeys(row.label_noise for row in rows):
        group = [row for row in rows if row.label_noise == noise]
        seeds = sorted({row.n for row in group})
        title = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds; some runs are missing"
        where = f"label noise {text_of(noise)}, " if noise != UNTOLD else ""
        console.print(f"\n{where}{title}", style="bold", highlight=False)
        unbounded, columns = console.options.update(width=10_000), columns_of(group)
        layouts = ([table(group, range(len(columns)))], [table(group, range(4)), table(group, (0, *range(4, len(columns))))])
        for tables in layouts:
            if all(Measurement.get(console, unbounded, part).maximum <= console.width for part in tables):
                console.print(*tables)
                break
        else:  # narrower still: no number is ever cut
            for row in group:
                console.print(
                    f"{row.label}:",
                    *(f"{name} {text}," for name, text in zip(columns[1:], cells(row, group)[1:], strict=True)),
                    soft_wrap=True,
                    highlight=False,
                    markup=False,
                )
    console.print(note_of(rows[0].metric), style="dim")


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
    result, names = Table(box=box.SIMPLE_HEAD, pad_edge=False), columns_of(rows)
    for i in columns:
        width = max(len(names[i]), *(len(cells(row, rows)[i]) for row in rows))
        result.add_column(names[i], justify="left" if i in (0, 3) else "right", no_wrap=True, min_width=width)
    for row in rows:
        result.add_row(*(cells(row, rows)[i] for i in columns))
    return result


def results_csv(records: Sequence[Record], split: str = "test") -> str:
    """One line a run."""
    text = io.StringIO()
    names, numbers = _names_of(records[0].recipe), shared_scores(records)
    writer = csv.writer(text, lineterminator="\n")
    of_training = ("train_error",) if isinstance(records[0], RunRecord) else ()
    writer.writerow([*names, *(f"{split}_{name}" for name in numbers), *of_training, "seconds", "diverged"])
    for record in records:
        recipe = record.recipe
        values = [getattr(recipe, name, recipe.settings.get(name)) for name in names] + [record.scores[name] for name in numbers]
        values += [record.epochs[-1].get("train_error") if isinstance(record, RunRecord) and record.epochs else None] * len(of_training)
        values += [round(record.seconds, 2), record.why_diverged]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def _names_of(recipe: Planned) -> tuple[str, ...]:
    """What tells a run from the others."""
    if not isinstance(recipe, Recipe):
        return ("loss", *SYMBOLS, "seed")
    return ("data", "network", "loss", *SYMBOLS, "label_noise", "noise_kind", "long_tail", "train_fraction", "seed", "epochs")
