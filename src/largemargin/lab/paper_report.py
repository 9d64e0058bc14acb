"""The report of a reproduction: the paper's numbers beside ours, the figures, and everything that separates the two."""

import csv
import functools
import io
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from .compare import BASELINE, Difference, paired_difference
from .errors import LabError
from .files import write_text
from .paper import SCALES, TABLES, Cell, Entry, Number, Scale, assumptions
from .recipe import LOSSES, SYMBOLS, Recipe
from .report import STYLE, axes, color_of, software, svg

LOSS_FIELDS = {"loss", "divergence", *SYMBOLS}
PLACES = {"data_root", "weights", "data_digest", "weights_digest"}  # where the files are, and what was found there
MACHINE = {"device", "threads", "processes", "precision", "channels_last", "compile", "evaluate_every"}  # leave the level of an error alone
HARD_MAX = ("crammer_singer_hinge", "hard_margin_softplus")
TURN = 0.02  # of log(C - 1): a smaller fall or rise of rho-hat is not called one
MOST_CURVES = 6  # in one figure
UNTRAINED = 0.95  # of the error of a guess: a network that ends above it on its own training set has not been trained
EXPECTED = {"softmax": "falls", "label_smoothing": "falls and then rises", "large_margin": "falls and then rises"}  # Fig. 3
NOTE = (
    "Errors are top-1 in percent at the last epoch, mean ± std (n-1) over seeds. A difference is paired by seed, with its 95% Student-t "
    "interval: it covers the seeds, not the choice of test samples. Better or worse is said only where that interval excludes 0. "
    "Runs that diverged are counted, and left out of every mean and pair. The best measured epoch is chosen by the set that it is measured "
    "on: it flatters every method, and is given only because the program of the author's port prints such a number; the README of the port "
    "does not say of which epoch its errors are."
)
INSIDE = " “Inside” says that the interval contains the difference that the paper reports."


def recipe_of(record: dict[str, Any]) -> Recipe:
    return Recipe(**record["recipe"])


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """The last epoch on the set the run measured itself on."""
    return record["test"] or record["validation"] or {}


def split_of(record: dict[str, Any]) -> str:
    return "validation" if record["test"] is None and record["validation"] else "test"


def diverged(record: dict[str, Any]) -> bool:
    """A run that ended in numbers that are not finite: they are null in its record."""
    return measured(record).get("error") is None or measured(record).get("nll") is None or record["epochs"][-1]["train_loss"] is None


def best_error(record: dict[str, Any]) -> float:
    found = [row.get(f"{split_of(record)}_error") for row in record["epochs"]]
    return float(min([measured(record)["error"], *(error for error in found if error is not None)]))


def setting(recipe: Recipe) -> tuple[tuple[str, Any], ...]:
    """Everything of a recipe but its loss, its seed, and where its files are: losses are compared where this is equal."""
    return tuple((name, value) for name, value in vars(recipe).items() if name not in LOSS_FIELDS | PLACES | {"seed"})


def differing(recipe: Recipe, other: Recipe) -> dict[str, tuple[Any, Any]]:
    """Field by field where two recipes differ, beside seed and places."""
    pairs = zip(vars(recipe).items(), vars(other).values(), strict=True)
    return {name: (a, b) for (name, a), b in pairs if name not in PLACES | {"seed"} and a != b}


def recipes_of(entry: Entry) -> list[Recipe]:
    """What was run; where nothing was yet, what would be."""
    return [recipe_of(record) for record in entry.records] or list(entry.recipes)


@dataclass(frozen=True)
class Line:
    """A cell of the paper with what was measured of it. Runs that diverged are counted and left out of every mean."""

    entry: Entry
    errors: dict[int, float]  # by seed
    best: dict[int, float]
    diverged: int
    baseline: Entry | None
    pairs: dict[int, float]  # by seed: error minus the baseline's
    difference: Difference | None
    command: str
    full_size: bool  # only then the level is the paper's

    @property
    def cell(self) -> Cell:
        return self.entry.cell

    @property
    def runs(self) -> str:
        done, planned = len(self.entry.records), len(self.entry.recipes)
        return f"{done}" if done == planned else f"{done} of {planned} runs"

    @property
    def status(self) -> str:
        done, planned = len(self.entry.records), len(self.entry.recipes)
        return "done" if done == planned else f"{done} of {planned} runs done" if done else "not run yet"

    @property
    def ours(self) -> str:
        if not self.entry.records:
            return "–"
        if not self.errors:
            return "diverged"
        return spread(*moments(self.errors.values())) + (f" ({self.diverged} diverged)" if self.diverged else "")

    @property
    def minus_baseline(self) -> str:
        if self.difference is not None:
            return f"{self.difference.mean:+.2f} [{self.difference.low:+.2f}, {self.difference.high:+.2f}]"
        return f"{next(iter(self.pairs.values())):+.2f} (one seed)" if self.pairs else "–"

    @property
    def verdict(self) -> str:
        return self.difference.verdict if self.difference is not None else "–"

    @property
    def paper_difference(self) -> float | None:
        if self.cell.paper is None or self.baseline is None or self.baseline.cell.paper is None:
            return None
        return self.cell.paper.mean - self.baseline.cell.paper.mean

    @property
    def inside(self) -> bool | None:
        """Whether the interval contains the paper's difference; None where one of them is not known, or the runs are not as large."""
        if self.difference is None or self.paper_difference is None or not self.full_size:
            return None
        return self.difference.low <= self.paper_difference <= self.difference.high

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


def moments(values: Iterable[float]) -> tuple[float, float | None]:
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def number_text(number: Number | None) -> str:
    return "–" if number is None else spread(number.mean, number.std)


def errors_of(entry: Entry) -> dict[int, float]:
    return {record["recipe"]["seed"]: measured(record)["error"] for record in entry.records if not diverged(record)}


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
    lines = []
    for entry in entries:
        errors, baseline = errors_of(entry), baseline_of(entry, entries)
        others = errors_of(baseline) if baseline is not None else {}
        lines.append(
            Line(
                entry=entry,
                errors=errors,
                best={record["recipe"]["seed"]: best_error(record) for record in entry.records if not diverged(record)},
                diverged=sum(map(diverged, entry.records)),
                baseline=baseline,
                pairs={seed: errors[seed] - others[seed] for seed in sorted(errors.keys() & others.keys())},
                difference=paired_difference(errors, others),
                command=command_of(entry, scale),
                full_size=full_size([entry]),
            )
        )
    return lines


def command_of(entry: Entry, scale: Scale) -> str:
    """The command that makes exactly this cell."""
    seeds = [recipe.seed for recipe in entry.recipes]
    words = ["largemargin", "reproduce", entry.cell.table, "--cells", entry.cell.name, "--seeds", *map(str, seeds), "--scale", scale.name]
    planned = entry.cell.recipes(seeds[:1], scale)[0]
    for name, (_, value) in differing(planned, entry.recipes[0]).items():
        if name != "processes":
            words += [f"--recipe.{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join([*words, "--data-root", "DATA"])


def join(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


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


# what a deviation is called, with its value in %, or as it is
SHARES = {"train_fraction": "trained on {}% of the images", "width": "a network with {}% of the channels"}
PHRASES = {
    "network": "the network is {}",
    "epochs": "trained for {} epochs",
    "batch_size": "trained in batches of {}",
    "learning_rate": "trained with a learning rate of {} at first",
    "momentum": "trained with a momentum of {}",
    "weight_decay": "trained with a weight decay of {}",
    "evaluate_every": "measured on the test set every {} epochs and at the end",
    "precision": "the network computes in {}",
    "channels_last": "images with channels last in memory: {}",
    "device": "computed on {}",
    "threads": "threads of a run: {}",
    "processes": "processes that share each batch: {}",
    "compile": "compiled by {}",
}


def value_text(value: Any) -> str:
    if isinstance(value, str):
        return value or "none"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def deviation_sentences(entries: Sequence[Entry]) -> list[str]:
    sentences = []
    for (name, full, ours), names in deviations(entries).items():
        where = "all cells" if len(names) == len(entries) else join(names)
        value = value_text(100 * ours) if name in SHARES else value_text(ours)
        phrase = (SHARES | PHRASES).get(name, f"{name.replace('_', ' ')}: {{}}").format(value)
        whose = "full size" if name in MACHINE else "paper"
        sentences.append(f"{where}: {phrase} ({name} {value_text(ours)}; {whose} {value_text(full)}).".replace("all cells", "All cells"))
    for processes, batch in dict.fromkeys((recipe.processes, recipe.batch_size) for entry in entries for recipe in recipes_of(entry)):
        if processes > 1:
            sentences.append(
                f"The batch of {batch} is shared by {processes} processes, {batch / processes:g} samples each: "
                "where the network has BatchNorm, its statistics are of that many samples."
            )
    return sentences


def runs_of(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Every run once; a cell may stand in more than one table."""
    return list({recipe_of(record).id: record for entry in entries for record in entry.records}.values())


def headline(entries: Sequence[Entry], scale: Scale) -> list[str]:
    """What was run, and how far it may be compared with the paper."""
    names = dict.fromkeys(entry.cell.table for entry in entries)
    tables = [TABLES[name].title.partition(":")[0] if name in TABLES else name for name in names]
    planned = {recipe.id for entry in entries for recipe in entry.recipes}
    runs = runs_of(entries)
    seeds = sorted({record["recipe"]["seed"] for record in runs})
    lost = sum(map(diverged, runs))
    done = f"{len(runs)} of {len(planned)} runs done" if len(runs) < len(planned) else f"{len(runs)} runs"
    sentences = [
        f"{join(tables)}: {len(entries)} cell{'s' * (len(entries) != 1)}, {done}"
        + (f", {lost} of them diverged" if lost else "")
        + (f"; n = {len(seeds)} seed{'s' * (len(seeds) != 1)} ({', '.join(map(str, seeds))})." if seeds else "."),
        f"Scale {scale.name}: {scale.description.rstrip('.')}.",
    ]
    if not full_size(entries):
        sentences.append(
            "This is not the paper's experiment at full size: its numbers are not comparable in level with the paper's. "
            "Only the order of the methods and the sign of their differences can be compared."
        )
    return sentences


def table_sentences(lines: Sequence[Line]) -> list[str]:
    """What a table says as a whole."""
    told = [line.difference.verdict for line in lines if line.difference is not None]
    sentences = []
    if told:
        counts = [f"{told.count(word)} {word}" for word in ("better", "worse", "not told apart") if word in told]
        sentences.append(f"Against {BASELINE}, of {len(told)} cell{'s' * (len(told) != 1)}: {', '.join(counts)}.")
    signs = [statistics.fmean(line.pairs.values()) * line.paper_difference > 0 for line in lines if line.pairs and line.paper_difference]
    if signs:
        sentences.append(f"The sign of the mean difference is the paper's in {sum(signs)} of {len(signs)}.")
    insides = [line.inside for line in lines if line.inside is not None]
    if insides:
        sentences.append(f"The interval contains the paper's difference in {sum(insides)} of {len(insides)}.")
    order = [
        (moments(a.errors.values())[0] - moments(b.errors.values())[0]) * (a.cell.paper.mean - b.cell.paper.mean)
        for a, b in combinations([line for line in lines if line.errors], 2)
        if a.cell.paper and b.cell.paper and setting(a.entry.recipes[0]) == setting(b.entry.recipes[0])
    ]
    order = [product for product in order if product]
    if order:
        alike = sum(product > 0 for product in order)
        sentences.append(f"Pairs of cells in the same setting whose mean errors are in the paper's order: {alike} of {len(order)}.")
    return sentences


def hardware(records: Sequence[dict[str, Any]]) -> list[str]:
    """The machines of the runs, each with the number of runs it made."""
    counts: dict[str, int] = {}
    for record in records:
        recipe, machine = recipe_of(record), record["environment"]
        threads = machine.get("threads", recipe.threads)
        text = f"{machine['processor']}, device {recipe.device}, {threads} thread{'s' * (threads != 1)}"
        text += f", {recipe.processes} processes" if recipe.processes > 1 else ""
        text += f", {recipe.precision}" if recipe.precision != "float32" else ""
        counts[text] = counts.get(text, 0) + 1
    return [f"{text} ({count} run{'s' * (count != 1)})" for text, count in counts.items()]


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Drawing(NamedTuple):
    """A figure with what it says."""

    name: str  # of its file, without .svg
    title: str
    figure: Figure
    caption: str
    sentences: list[str]


Curves = dict[str, list[dict[str, Any]]]  # the records of a method, by its label


def usual(recipe: Recipe) -> bool:
    """Whether the loss has the paper's own numbers."""
    return recipe.divergence in (None, "symmetric") and all(getattr(recipe, name) == value for name, value in LOSSES[recipe.loss].items())


def settings_of(entries: Sequence[Entry]) -> dict[str, tuple[Curves, Curves]]:
    """The runs that did not diverge, by setting and method: those to show, and those left out.

    All are shown where they are at most MOST_CURVES; else one of each loss, with the paper's own numbers, or the first there is.
    """
    groups: dict[Any, dict[Recipe, dict[str, Any]]] = {}
    for record in runs_of(entries):
        if not diverged(record):
            recipe = recipe_of(record)
            groups.setdefault(setting(recipe), {})[recipe] = record
    result: dict[str, tuple[Curves, Curves]] = {}
    for runs in groups.values():
        curves: Curves = {}
        for recipe in sorted(runs, key=lambda recipe: (list(LOSSES).index(recipe.loss), not usual(recipe))):
            curves.setdefault(recipe.loss_label, []).append(runs[recipe])
        first = {records[0]["recipe"]["loss"]: label for label, records in reversed(curves.items())}
        shown = set(curves) if len(curves) <= MOST_CURVES else set(first.values())
        title = setting_title(next(iter(runs)))
        while title in result:
            title += " (another setting)"
        result[title] = (
            {label: records for label, records in curves.items() if label in shown},
            {label: records for label, records in curves.items() if label not in shown},
        )
    return result


def of_losses(curves: Curves, losses: Iterable[str]) -> Curves:
    return {label: records for label, records in curves.items() if records[0]["recipe"]["loss"] in losses}


def setting_title(recipe: Recipe) -> str:
    parts = [Path(recipe.data).name, recipe.network]
    parts += [f"{100 * recipe.train_fraction:g}% of the training set"] if recipe.train_fraction < 1 else []
    parts += [f"{100 * recipe.label_noise:g}% wrong labels"] if recipe.label_noise else []
    return ", ".join(parts)


def by_epoch(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[list[float]]]:
    """The epochs in which a number was measured, and its values over seeds."""
    values: dict[int, list[float]] = {}
    for record in records:
        for row in record["epochs"]:
            if (value := row.get(name.format(split=split_of(record)))) is not None:
                values.setdefault(row["epoch"], []).append(value)
    return sorted(values), [values[epoch] for epoch in sorted(values)]


def draw(ax: Axes, curves: Curves, name: str, factor: float = 1.0) -> None:
    """A line for the mean over seeds of each method, and the span of all seeds as a band."""
    colors = color_of(list(curves))
    for label, records in curves.items():
        epochs, values = by_epoch(records, name)
        if epochs:
            means = [factor * statistics.fmean(of_epoch) for of_epoch in values]
            ax.plot(epochs, means, color=colors[label], label=label, linewidth=1.5, marker="o" if len(epochs) == 1 else None)
            low, high = ([factor * end(of_epoch) for of_epoch in values] for end in (min, max))
            ax.fill_between(epochs, low, high, color=colors[label], alpha=0.15, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize=8)


def styled(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def within(*arguments: Any) -> Any:
        with matplotlib.rc_context(STYLE):
            return function(*arguments)

    return within


def movement(curve: Sequence[float], threshold: float) -> str:
    """How a curve moves, in words; what is not larger than ``threshold`` is no movement."""
    start, end, low, high = curve[0], curve[-1], min(curve), max(curve)
    if start - low > threshold and end - low > threshold:
        return "falls and then rises"
    if high - start > threshold and high - end > threshold:
        return "rises and then falls"
    return "falls" if start - end > threshold else "rises" if end - start > threshold else "stays level"


def as_in_figure_3(recipe: Recipe) -> bool:
    """Whether the paper's figure is of such a run, be it larger: the 13-layer network on CIFAR-100, clean labels, the same loss."""
    return recipe.data == "cifar100" and recipe.network == "layer13" and not recipe.label_noise and usual(recipe)


@styled
def rho_drawing(curves: Curves) -> tuple[Figure, list[str]] | None:
    """Fig. 3: the margin hidden in the loss, over training."""
    shown = {label: records for label, records in of_losses(curves, EXPECTED).items() if by_epoch(records, "train_rho")[0]}
    if not shown:
        return None
    bound = math.log(max(len(next(iter(shown.values()))[0]["classes"]) - 1, 1))
    figure, ax = axes()
    draw(ax, shown, "train_rho")
    ax.axhline(bound, color="#222222", linewidth=0.9, linestyle=":")
    ax.annotate("log(C − 1)", (0.01, bound), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9)
    ax.set_ylim(0, 1.14 * bound or 1.0)  # two classes have a bound of 0
    ax.set_ylabel("ρ̂ (nats)")
    sentences = []
    for label, records in shown.items():
        epochs, values = by_epoch(records, "train_rho")
        curve = [statistics.fmean(of_epoch) for of_epoch in values]
        expected = EXPECTED[records[0]["recipe"]["loss"]]
        if len(curve) < 3:
            sentences.append(f"{label}: {len(curve)} epoch{'s' * (len(curve) != 1)}, too few to tell how ρ̂ moves.")
            continue
        moves = movement(curve, TURN * bound)
        lowest = curve.index(min(curve))
        agrees = "agrees with" if moves == expected else "does not agree with"
        points = {0: "", lowest: "lowest ", len(curve) - 1: ""} | {i: "" for i in (0, len(curve) - 1)}
        told = ", ".join(f"{points[i]}{curve[i]:.2f} nats in epoch {epochs[i]}" for i in sorted(points))
        sentences.append(
            f"{label}: ρ̂ {moves} ({told})"
            + (f"; this {agrees} the paper, where it {expected}." if as_in_figure_3(recipe_of(records[0])) else ".")
        )
    sentences.append(f"A fall or a rise is called one from {100 * TURN:g}% of log(C − 1) = {TURN * bound:.3f} nats on.")
    return figure, sentences


@styled
def error_drawing(curves: Curves) -> tuple[Figure, list[str]] | None:
    """The error on the test set by epoch."""
    if not any(by_epoch(records, "{split}_error")[0] for records in curves.values()):
        return None
    figure, ax = axes()
    draw(ax, curves, "{split}_error")
    ax.set_ylabel(f"{' / '.join(sorted({split_of(record) for records in curves.values() for record in records}))} error %")
    return figure, []


@styled
def symmetry_drawing(curves: Curves) -> tuple[Figure, list[str]] | None:
    """How far the classifier's weight is from super-symmetry."""
    shown = {label: records for label, records in of_losses(curves, EXPECTED).items() if by_epoch(records, "asymmetry")[0]}
    if not shown:
        return None
    figure, ax = axes()
    draw(ax, shown, "asymmetry")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("distance to super-symmetry")
    last = {label: last_by_seed(records, "asymmetry") for label, records in shown.items()}
    ends = [f"{statistics.fmean(values.values()):.4g} for {label}" for label, values in last.items() if values]
    sentences = [f"In the last epoch the distance to super-symmetry is {join(ends)}."] if ends else []
    for label, values in last.items():
        pairs = values.keys() & last.get(BASELINE, {}).keys()
        if label == BASELINE or not pairs:
            continue
        difference = paired_difference(values, last[BASELINE])
        if difference is None:
            (seed,) = pairs
            word = "nearer" if values[seed] < last[BASELINE][seed] else "not nearer"
            sentences.append(f"{label} ends {word} to super-symmetry than {BASELINE} in one seed, and one seed is no evidence.")
        else:
            told = {
                "better": f"{label} ends nearer to super-symmetry than {BASELINE}",
                "worse": f"{label} ends farther from super-symmetry than {BASELINE}",
            }.get(difference.verdict, f"These seeds do not tell whether {label} ends nearer to super-symmetry than {BASELINE}")
            sentences.append(f"{told} (difference {difference.mean:+.3g}, 95% [{difference.low:+.3g}, {difference.high:+.3g}]).")
    return figure, sentences


def last_by_seed(records: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    found = {record["recipe"]["seed"]: record["epochs"][-1].get(name) for record in records}
    return {seed: value for seed, value in found.items() if value is not None}


@styled
def share_drawing(curves: Curves) -> tuple[Figure, list[str]] | None:
    """How many logits have a gradient under the losses with a hard maximum, and whether they train."""
    shown = of_losses(curves, (BASELINE, *HARD_MAX))
    if not any(records[0]["recipe"]["loss"] in HARD_MAX for records in shown.values()):
        return None
    figure, ax = axes()
    draw(ax, shown, "gradient_share", 100.0)
    ax.set_ylim(0, 104)
    ax.set_ylabel("logits with a gradient %")
    sentences = []
    for label, records in shown.items():
        _, values = by_epoch(records, "gradient_share")
        shares = [value for of_epoch in values for value in of_epoch]
        errors = list(last_by_seed(records, "train_error").values())
        chance = 100 * (1 - 1 / len(records[0]["classes"]))
        parts = [f"on average {100 * statistics.fmean(shares):.3g}% of the logits have a gradient that is not zero"] if shares else []
        if errors:
            error = statistics.fmean(errors)
            word = "not trained" if error > UNTRAINED * chance else "trained"
            parts.append(f"it ends with a training error of {error:.2f}% (chance {chance:.2f}%): {word}")
        if parts:
            sentences.append(f"{label}: {'; '.join(parts)}.")
    sentences.append(f"A network is called trained where its error on its own training set is at most {100 * UNTRAINED:g}% of chance.")
    return figure, sentences


def swept_field(entries: Sequence[Entry]) -> str | None:
    """The number along which a table has curves."""
    for name in ("train_fraction", "label_noise", "lam"):
        if any(len({entry.cell.settings[name] for entry in row}) > 1 for row in swept_rows(entries, name).values()):
            return name
    return None


def swept_rows(entries: Sequence[Entry], field: str) -> dict[str, list[Entry]]:
    """The cells of each row that has this number."""
    rows: dict[str, list[Entry]] = {}
    for entry in entries:
        if field in entry.cell.settings:
            rows.setdefault(entry.cell.row, []).append(entry)
    return rows


@styled
def sweep_drawing(lines: Sequence[Line], apart: bool) -> tuple[Figure, list[str]] | None:
    """The error over what a table varies, with the paper's curves: on axes of their own where the levels are not comparable."""
    field = swept_field([line.entry for line in lines])
    if field is None:
        return None
    rows = swept_rows([line.entry for line in lines], field)
    of_entry = {id(line.entry): line for line in lines}
    colors = color_of([row for row, entries in rows.items() if entries[0].recipes[0].loss != BASELINE])
    figure = Figure(figsize=(4.2, 4.6 if apart else 3.0))
    panels = figure.subplots(2 if apart else 1, 1, squeeze=False, sharex=True)[:, 0]
    for row, entries in rows.items():
        color = colors.get(row, colors[BASELINE])
        found = sorted(((entry.cell.settings[field], of_entry[id(entry)]) for entry in entries), key=lambda point: point[0])
        ours = [(x, *moments(line.errors.values())) for x, line in found if line.errors]
        theirs = [(x, line.cell.paper) for x, line in found if line.cell.paper is not None]
        if theirs:
            means = [number.mean for _, number in theirs]
            panels[-1].plot(
                [x for x, _ in theirs], means, color=color, linestyle="--", linewidth=1, marker="o", markersize=4, markerfacecolor="none",
                label=row if apart else f"{row} (paper)",
            )  # fmt: skip
        if ours:
            bars = [std or 0.0 for _, _, std in ours]
            panels[0].errorbar(
                [x for x, *_ in ours], [mean for _, mean, _ in ours], bars, color=color, linewidth=1.5, marker="o", markersize=4, capsize=2,
                label=row,
            )  # fmt: skip
    for panel, whose in zip(panels, ("ours, ", "paper, ") if apart else ("",), strict=True):
        panel.set_ylabel(f"{whose}error %")
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=7)
    names = {"lam": "λ", "train_fraction": "share of the training set", "label_noise": "share of wrong training labels"}
    panels[-1].set_xlabel(names[field])
    return figure, []


def drawings_of(lines: Sequence[Line], reduced: bool) -> list[Drawing]:
    """Every figure that the runs allow."""
    result = []
    tables: dict[str, list[Line]] = {}
    for line in lines:
        tables.setdefault(line.cell.table, []).append(line)
    for table, group in tables.items():
        if any(line.errors for line in group) and (drawn := sweep_drawing(group, reduced)) is not None:
            caption = "Ours with the standard deviation over seeds; the paper's points are hollow, their lines dashed."
            result.append(Drawing(f"{table}-errors", f"{table}: error", drawn[0], caption, drawn[1]))
    kinds = (
        (
            *("fig3", "Fig. 3: the margin hidden in the loss", rho_drawing, EXPECTED),
            "ρ̂ (eq. 7) in training, the mean over the batches of each epoch. ",
        ),
        ("errors", "Error by epoch", error_drawing, LOSSES, "In the epochs that were evaluated. "),
        ("symmetry", "Super-symmetry", symmetry_drawing, EXPECTED, "Distance of the classifier's weight to super-symmetry. "),
        (
            *("gradients", "Gradients of the losses with a hard maximum", share_drawing, HARD_MAX),
            "Logits of the first batch of each epoch. ",
        ),
    )
    for i, (title, (curves, left_out)) in enumerate(settings_of([line.entry for line in lines]).items()):
        for name, heading, function, losses, caption in kinds:
            if (drawn := function(curves)) is not None:
                caption += "Mean over seeds, the span of all seeds as a band."
                if missing := list(of_losses(left_out, losses)):
                    caption += f" One method of each loss is shown; left out: {join(missing)}."
                result.append(Drawing(f"{name}-{i + 1}" if i else name, f"{heading} ({title})", drawn[0], caption, drawn[1]))
    return result


class Section(NamedTuple):
    """A table of the paper."""

    name: str
    lines: list[Line]
    corner: str  # what the columns are
    columns: list[str]
    matrix: list[tuple[str, list[Line | None]]]  # rows as in the paper; empty where one column is all there is
    sentences: list[str]


def section_of(name: str, lines: list[Line]) -> Section:
    columns = list(dict.fromkeys(column_text(line.cell) for line in lines))
    places = {(line.cell.row, column_text(line.cell)): line for line in lines}
    matrix = [(row, [places.get((row, column)) for column in columns]) for row in dict.fromkeys(line.cell.row for line in lines)]
    notes = dict.fromkeys(f"{line.cell.row}: {line.cell.note}." for line in lines if line.cell.note)
    title, corner = (TABLES[name].title, TABLES[name].columns) if name in TABLES else (name, "")
    headings = [column or f"no {corner}" for column in columns]
    return Section(title, lines, corner, headings, matrix if len(columns) > 1 else [], [*table_sentences(lines), *notes])


def results_csv(lines: Sequence[Line], scale: Scale) -> str:
    """One line a cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    numbers = [f"{whose}_{what}" for whose in ("paper", "port", "ours", "best_epoch") for what in ("mean", "std")]
    runs = ("runs", "runs_planned", "runs_diverged", "seeds")
    differences = ("baseline", "difference", "low", "high", "verdict", "paper_difference", "paper_inside")
    writer.writerow(["table", "row", "column", "cell", "scale", *numbers, *runs, *differences, "command"])
    for line in lines:
        cell, entry, d = line.cell, line.entry, line.difference
        pairs: list[tuple[float | None, float | None]] = [
            *((number.mean, number.std) if number else (None, None) for number in (cell.paper, cell.port)),
            *(moments(values.values()) if values else (None, None) for values in (line.errors, line.best)),
        ]
        values = [cell.table, cell.row, cell.column, cell.name, scale.name, *(value for pair in pairs for value in pair)]
        values += [len(entry.records), len(entry.recipes), line.diverged, " ".join(map(str, sorted(line.errors)))]
        values += [line.baseline.cell.name if line.baseline else None]
        mean = statistics.fmean(line.pairs.values()) if line.pairs else None
        values += [mean, *((d.low, d.high, d.verdict) if d else (None, None, None)), line.paper_difference, line.inside, line.command]
        writer.writerow(["" if value is None else round(value, 6) if isinstance(value, float) else value for value in values])
    return text.getvalue()


def print_lines(sections: Sequence[Section], console: Console) -> None:
    """A table for each of the paper's; a line for each cell where the terminal is too narrow for it."""
    for section in sections:
        console.print(f"\n{section.name}", style="bold", highlight=False, markup=False)
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        used = [i for i in range(len(COLUMNS) - 1) if i != 2 or any(line.cell.port for line in section.lines)]
        for i in used:
            width = max(len(COLUMNS[i]), *(len(line.texts()[i]) for line in section.lines))
            shown.add_column(COLUMNS[i], justify="left" if i in (0, 6) else "right", no_wrap=True, min_width=width)
        for line in section.lines:
            shown.add_row(*(line.texts()[i] for i in used))
        if Measurement.get(console, console.options.update(width=10_000), shown).maximum <= console.width:
            console.print(shown, markup=False)
        else:
            for line in section.lines:
                numbers = ", ".join(f"{COLUMNS[i]} {line.texts()[i]}" for i in used[1:] if line.texts()[i] != "–")
                console.print(f"{line.texts()[0]}: {numbers}", soft_wrap=True, highlight=False, markup=False)
        for sentence in section.sentences:
            console.print(sentence, highlight=False, markup=False)
        for line in section.lines:
            if not line.entry.records:
                console.print(f"not run yet: {line.command}", soft_wrap=True, highlight=False, markup=False)


def write(out: Path, entries: Sequence[Entry], scale: Scale, command: str, console: Console) -> None:
    """Print the tables, and write ``report.html``, ``report.md``, ``report.csv`` and the figures into ``out``."""
    lines = lines_of(entries, scale)
    tables: dict[str, list[Line]] = {}
    for line in lines:
        tables.setdefault(line.cell.table, []).append(line)
    sections = [section_of(name, group) for name, group in tables.items()]
    note = NOTE + INSIDE * any(line.inside is not None for line in lines)
    drawings, runs = drawings_of(lines, not full_size(entries)), runs_of(entries)
    content = {
        "headline": headline(entries, scale),
        "sections": sections,
        "columns": COLUMNS,
        "note": note,
        "lines": lines,
        "assumptions": list(dict.fromkeys(sentence for entry in entries for sentence in assumptions(entry.cell, scale))),
        "deviations": deviation_sentences(entries),
        "hardware": hardware(runs),
        "software": software(runs),
        "seconds": duration(sum(record["seconds"] for record in runs)),
        "command": command,
    }
    try:
        for drawing in drawings:
            write_text(out / f"{drawing.name}.svg", svg(drawing.figure, "white"))
        write_text(out / "report.csv", results_csv(lines, scale))
        write_text(out / "report.md", page("paper.md.j2", drawings=drawings, **content))
        write_text(out / "report.html", page("paper.html.j2", drawings=[(d, svg(d.figure)) for d in drawings], **content))
    except OSError as error:
        raise LabError(f"--out {out} cannot be written to: {error.strerror or error}; the runs are kept, choose another folder") from error
    for sentence in headline(entries, scale):
        console.print(sentence, highlight=False, markup=False)
    print_lines(sections, console)
    for drawing in drawings:
        if drawing.sentences:
            console.print(f"\n{drawing.title}", style="bold", highlight=False, markup=False)
        for sentence in drawing.sentences:
            console.print(sentence, highlight=False, markup=False)
    console.print(note, style="dim")
    console.print(f"{out / 'report.html'}  the same with figures; report.md and report.csv beside it", markup=False, highlight=False)


def page(template: str, **content: Any) -> str:
    environment = jinja2.Environment(autoescape=template.endswith(".html.j2"), undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["md"] = lambda text: str(text).replace("\\", "\\\\").replace("|", "\\|").replace("*", "\\*")
    return environment.from_string(files("largemargin.lab").joinpath(f"templates/{template}").read_text()).render(**content)
