"""The cells of the paper with what was measured of them."""

import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..results import RunRecord, kept
from ..run.methods import BASELINE, OF_SOME_LOSSES
from ..run.recipe import Recipe
from ..stats import moments, paired_by_seed, spread
from ..verdicts import Judged, judge
from ..words import counted
from .cells import SCALES, Cell, Number, Scale

LOSS_FIELDS = {"loss", *OF_SOME_LOSSES}
FILES = {"data_root", "weights", "data_digest", "weights_digest"}  # where the files are, and what was found there
MACHINE = {"device", "threads", "processes", "precision", "channels_last", "compile", "evaluate_every"}  # leave the level of an error alone


class Entry(NamedTuple):
    """A cell, its runs, and the records of those that are finished."""

    cell: Cell
    recipes: list[Recipe]
    records: list[RunRecord]


def best_error(record: RunRecord) -> float:
    found = [row.get(f"{record.split}_error") for row in record.epochs]
    return float(min([record.measured.error, *(error for error in found if error is not None)]))


def setting(recipe: Recipe) -> tuple[tuple[str, Any], ...]:
    """Everything of a recipe but its loss, its seed, and where its files are: losses are compared where this is equal."""
    return tuple((name, value) for name, value in vars(recipe).items() if name not in LOSS_FIELDS | FILES | {"seed"})


def differing(recipe: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Field by field where two recipes differ, beside seed and places."""
    pairs = zip(vars(recipe).items(), vars(other).values(), strict=True)
    return {name: (a, b) for (name, a), b in pairs if name not in FILES | {"seed"} and a != b}


def recipes_of(entry: Entry) -> list[Recipe]:
    """What was run; where nothing was yet, what would be."""
    return [record.recipe for record in entry.records] or list(entry.recipes)


@dataclass(frozen=True)
class Line:
    """A cell of the paper with what was measured of it. Runs that diverged are counted and left out of every mean."""

    entry: Entry
    errors: dict[int, float]  # by seed
    best: dict[int, float]
    diverged: int
    baseline: Entry | None
    pairs: dict[int, float]  # by seed: error minus the baseline's
    judged: Judged | None  # beside the baseline; None for fewer than two pairs
    command: str
    full_size: bool  # only then the level is the paper's

    @property
    def cell(self) -> Cell:
        return self.entry.cell

    @property
    def runs(self) -> str:
        done, planned = len(self.entry.records), len(self.entry.recipes)
        return f"{done}" if done == planned else f"{done} of {counted(planned, 'run')}"

    @property
    def status(self) -> str:
        done, planned = len(self.entry.records), len(self.entry.recipes)
        return "done" if done == planned else f"{done} of {counted(planned, 'run')} done" if done else "not run yet"

    @property
    def ours(self) -> str:
        if not self.entry.records:
            return "–"
        if not self.errors:
            return "diverged"
        return spread(*moments(self.errors.values())) + (f" ({self.diverged} diverged)" if self.diverged else "")

    @property
    def minus_baseline(self) -> str:
        if self.judged is not None:
            return self.judged.text
        return f"{next(iter(self.pairs.values())):+.2f} (one seed)" if self.pairs else "–"

    @property
    def verdict(self) -> str:
        return self.judged.verdict if self.judged is not None else "–"

    @property
    def paper_difference(self) -> float | None:
        if self.cell.paper is None or self.baseline is None or self.baseline.cell.paper is None:
            return None
        return self.cell.paper.mean - self.baseline.cell.paper.mean

    @property
    def inside(self) -> bool | None:
        """Whether the interval contains the paper's difference; None where one of them is not known, or the runs are not as large."""
        interval = self.judged.paired.over_seeds if self.judged is not None else None
        if interval is None or self.paper_difference is None or not self.full_size:
            return None
        return interval.low <= self.paper_difference <= interval.high

    @property
    def paper_minus_baseline(self) -> str:
        if self.paper_difference is None:
            return "–"
        return f"{self.paper_difference:+.2f}" + {True: ", inside", False: ", outside", None: ""}[self.inside]

    def texts(self) -> tuple[str, ...]:
        """The cells of the long list, under COLUMNS."""
        name = ", ".join(text for text in (self.cell.row, column_text(self.cell)) if text)
        best = spread(*moments(self.best.values())) if self.best else "–"
        numbers = (number_text(self.cell.paper), number_text(self.cell.port), self.ours, self.runs)
        return (name, *numbers, self.minus_baseline, self.verdict, self.paper_minus_baseline, best)


COLUMNS = (
    "method",
    "paper %",
    "port %",
    "test error %",
    "n",
    "minus softmax [95%]",
    "verdict",
    "paper: minus softmax",
    "(best measured epoch)",
)


def column_text(cell: Cell) -> str:
    """The column of a cell, so that it can be read without its table."""
    if cell.table in ("study", "table3b"):
        noise = cell.settings["label_noise"]
        return f"{100 * noise:g}% wrong labels" if noise else "clean labels"
    if cell.table == "table3a":
        return f"{100 * cell.settings['train_fraction']:g}% of the samples"
    return f"λ={cell.column}" if cell.table == "table1" and cell.column else cell.column


def number_text(number: Number | None) -> str:
    return "–" if number is None else spread(number.mean, number.std)


def errors_of(entry: Entry) -> dict[int, float]:
    return {record.recipe.seed: record.measured.error for record in kept(entry.records)}


def baseline_of(entry: Entry, entries: Sequence[Entry]) -> Entry | None:
    """The softmax cell to compare with: of an otherwise equal recipe, and of the same table and column where there is one."""
    recipe = entry.recipes[0]
    if recipe.loss == BASELINE:
        return None

    def fit(other: Entry) -> tuple[bool, bool, bool]:
        return other.cell.table == entry.cell.table, other.cell.column == entry.cell.column, other.cell.paper is not None

    equal = [other for other in entries if other.recipes[0].loss == BASELINE and setting(other.recipes[0]) == setting(recipe)]
    return max(equal, key=fit, default=None)


def lines_of(entries: Sequence[Entry], scale: Scale) -> list[Line]:
    """The cells with what was measured of them; Holm's correction runs over all verdicts."""
    baselines = [baseline_of(entry, entries) for entry in entries]
    errors = [errors_of(entry) for entry in entries]
    others = [errors_of(baseline) if baseline is not None else {} for baseline in baselines]
    lost = [len(entry.records) - len(kept(entry.records)) for entry in entries]
    # a cell may stand in more than one table: the same runs have one verdict
    runs = [tuple(record.recipe.id for record in entry.records) for entry in entries]
    compared = {
        runs[i]: (entry.cell.name, BASELINE, found, lost[i])
        for i, entry in enumerate(entries)
        if (found := paired_by_seed(errors[i], others[i])) is not None
    }
    rooms = {runs[i]: statistics.fmean(others[i].values()) for i in range(len(entries)) if runs[i] in compared}
    judged = {key: replace(one, room=rooms[key]) for key, one in zip(compared, judge(list(compared.values())), strict=True)}
    return [
        Line(
            entry=entry,
            errors=errors[i],
            best={record.recipe.seed: best_error(record) for record in kept(entry.records)},
            diverged=lost[i],
            baseline=baselines[i],
            pairs={seed: errors[i][seed] - others[i][seed] for seed in sorted(errors[i].keys() & others[i].keys())},
            judged=judged.get(runs[i]),
            command=command_of(entry, scale),
            full_size=full_size([entry]),
        )
        for i, entry in enumerate(entries)
    ]


def command_of(entry: Entry, scale: Scale) -> str:
    """The command that makes exactly this cell."""
    seeds = [recipe.seed for recipe in entry.recipes]
    words = ["largemargin", "reproduce", entry.cell.table, "--cells", entry.cell.name, "--seeds", *map(str, seeds), "--scale", scale.name]
    planned = entry.cell.recipes(seeds[:1], scale)[0]
    changes = {name: value for name, (_, value) in differing(planned, entry.recipes[0]).items() if name != "processes"}
    words += recipe_options(changes)
    return shlex.join([*words, "--data-root", "DATA"])


def recipe_options(fields: Mapping[str, Any]) -> list[str]:
    """The options of ``largemargin reproduce`` that give these fields."""
    words = []
    for name, value in fields.items():
        words += ["--device" if name == "device" else f"--recipe.{name}", value if isinstance(value, str) else json.dumps(value)]
    return words


def deviations(entries: Sequence[Entry]) -> dict[tuple[str, Any, Any], list[str]]:
    """The fields by which runs differ from the full-size recipes of their cells: (field, full, run) with the names of the cells."""
    found: dict[tuple[str, Any, Any], list[str]] = {}
    for entry in entries:
        for recipe in recipes_of(entry):
            for name, (full, ours) in differing(entry.cell.recipes([recipe.seed], SCALES["full"])[0], recipe).items():
                names = found.setdefault((name, full, ours), [])
                if entry.cell.name not in names:
                    names.append(entry.cell.name)
    return found


def full_size(entries: Sequence[Entry]) -> bool:
    """Whether the runs differ from the full-size recipes in nothing but the machine."""
    return all(name in MACHINE for name, _, _ in deviations(entries))


def unique_records(entries: Sequence[Entry]) -> list[RunRecord]:
    """Every run once; a cell may stand in more than one table."""
    return list({record.recipe.id: record for entry in entries for record in entry.records}.values())
