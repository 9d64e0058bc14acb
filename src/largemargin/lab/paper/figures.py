"""The figures of a reproduction, each with the sentences that say what is seen."""

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..drawing import STYLE, axes, color_of
from ..results import NOT_FINITE, RunRecord
from ..run.methods import BASELINE, LOSSES
from ..run.recipe import Recipe
from ..stats import moments, paired_by_seed, verdict
from ..words import counted, listed
from .lines import Entry, Line, setting, unique_records

HARD_MAX = ("crammer_singer_hinge", "hard_margin_softplus")
TURN = 0.02  # of log(C - 1): a smaller fall or rise of rho-hat is not called one
MOST_CURVES = 6  # in one figure
UNTRAINED = 0.95  # of the error of a guess: a network that ends above it on its own training set has not been trained
EXPECTED = {"softmax": "falls", "label_smoothing": "falls and then rises", "large_margin": "falls and then rises"}  # Fig. 3


class Drawing(NamedTuple):
    """A figure with what it says."""

    name: str  # of its file, without .svg
    title: str
    figure: Figure
    caption: str
    sentences: list[str]


Curves = dict[str, list[RunRecord]]  # the records of a method, by its label


def usual(recipe: Recipe) -> bool:
    """Whether the loss has the paper's own numbers."""
    return recipe.divergence in (None, "symmetric") and all(getattr(recipe, name) == value for name, value in LOSSES[recipe.loss].items())


def settings_of(entries: Sequence[Entry]) -> dict[str, tuple[Curves, Curves]]:
    """The runs whose numbers are finite, by setting and method: those to show, and those left out.

    All are shown where they are at most MOST_CURVES; else one of each loss, with the paper's own numbers, or the first there is.
    """
    groups: dict[Any, dict[Recipe, RunRecord]] = {}
    for record in unique_records(entries):
        if record.why_diverged != NOT_FINITE:
            recipe = record.recipe
            groups.setdefault(setting(recipe), {})[recipe] = record
    result: dict[str, tuple[Curves, Curves]] = {}
    for runs in groups.values():
        curves: Curves = {}
        for recipe in sorted(runs, key=lambda recipe: (list(LOSSES).index(recipe.loss), not usual(recipe))):
            curves.setdefault(recipe.loss_label, []).append(runs[recipe])
        first = {records[0].recipe.loss: label for label, records in reversed(curves.items())}
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
    return {label: records for label, records in curves.items() if records[0].recipe.loss in losses}


def setting_title(recipe: Recipe) -> str:
    parts = [Path(recipe.data).name, recipe.network]
    parts += [f"{100 * recipe.train_fraction:g}% of the training set"] if recipe.train_fraction < 1 else []
    parts += [f"{100 * recipe.label_noise:g}% wrong labels"] if recipe.label_noise else []
    return ", ".join(parts)


def by_epoch(records: Sequence[RunRecord], name: str) -> tuple[list[int], list[list[float]]]:
    """The epochs in which a number was measured, and its values over seeds."""
    values: dict[int, list[float]] = {}
    for record in records:
        for row in record.epochs:
            if (value := row.get(name.format(split=record.split))) is not None:
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
        ax.legend(fontsize=8, loc="upper right")  # to look for the best place takes long


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
    bound = math.log(max(len(next(iter(shown.values()))[0].classes) - 1, 1))
    figure, ax = axes()
    draw(ax, shown, "train_rho")
    ax.axhline(bound, color="#222222", linewidth=0.9, linestyle=":")
    ax.annotate("log(C − 1)", (0.01, bound), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9)
    ax.set_ylim(0, 1.5 * bound or 1.0)  # the legend stands above the bound, which is 0 of two classes
    ax.set_ylabel("ρ̂ (nats)")
    sentences = []
    for label, records in shown.items():
        epochs, values = by_epoch(records, "train_rho")
        curve = [statistics.fmean(of_epoch) for of_epoch in values]
        expected = EXPECTED[records[0].recipe.loss]
        if len(curve) < 3:
            sentences.append(f"{label}: {counted(len(curve), 'epoch')}, too few to tell how ρ̂ moves.")
            continue
        moves = movement(curve, TURN * bound)
        lowest = curve.index(min(curve))
        agrees = "agrees with" if moves == expected else "does not agree with"
        points = {0: "", lowest: "lowest ", len(curve) - 1: ""} | {i: "" for i in (0, len(curve) - 1)}
        told = ", ".join(f"{points[i]}{curve[i]:.2f} nats in epoch {epochs[i]}" for i in sorted(points))
        sentences.append(
            f"{label}: ρ̂ {moves} ({told})"
            + (f"; this {agrees} the paper, where it {expected}." if as_in_figure_3(records[0].recipe) else ".")
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
    ax.set_ylabel(f"{' / '.join(sorted({record.split for records in curves.values() for record in records}))} error %")
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
    sentences = [f"In the last epoch the distance to super-symmetry (heads.super_symmetry_penalty) is {listed(ends)}."] if ends else []
    for label, values in last.items():
        pairs = values.keys() & last.get(BASELINE, {}).keys()
        if label == BASELINE or not pairs:
            continue
        difference = paired_by_seed(values, last[BASELINE])
        if difference is None:
            (seed,) = pairs
            word = "nearer" if values[seed] < last[BASELINE][seed] else "not nearer"
            sentences.append(f"{label} ends {word} to super-symmetry than {BASELINE} in one seed, and one seed is no evidence.")
        else:
            told = {
                "better": f"{label} ends nearer to super-symmetry than {BASELINE}",
                "worse": f"{label} ends farther from super-symmetry than {BASELINE}",
            }.get(
                verdict(difference.mean, difference.p),
                f"These seeds do not tell whether {label} ends nearer to super-symmetry than {BASELINE}",
            )
            interval = difference.over_seeds
            of_seeds = "no spread" if interval is None else f"95% [{interval.low:+.3g}, {interval.high:+.3g}]"
            sentences.append(f"{told} (difference {difference.mean:+.3g}, {of_seeds}).")
    return figure, sentences


def last_by_seed(records: Sequence[RunRecord], name: str) -> dict[int, float]:
    found = {record.recipe.seed: record.epochs[-1].get(name) for record in records}
    return {seed: value for seed, value in found.items() if value is not None}


@styled
def share_drawing(curves: Curves) -> tuple[Figure, list[str]] | None:
    """How many logits have a gradient under the losses with a hard maximum, and whether they train."""
    shown = of_losses(curves, (BASELINE, *HARD_MAX))
    if not any(records[0].recipe.loss in HARD_MAX for records in shown.values()):
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
        chance = 100 * (1 - 1 / len(records[0].classes))
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
            panel.legend(fontsize=7, loc="upper right")
    names = {"lam": "λ", "train_fraction": "share of the training set", "label_noise": "share of wrong training labels"}
    panels[-1].set_xlabel(names[field])
    return figure, []


def over_seeds(curves: Curves) -> str:
    """What a line of a figure is of."""
    alone = all(len(records) == 1 for records in curves.values())
    return "One seed." if alone else "Mean over seeds, the span of all seeds as a band."


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
                caption += over_seeds(curves)
                if missing := list(of_losses(left_out, losses)):
                    caption += f" One method of each loss is shown; left out: {listed(missing)}."
                result.append(Drawing(f"{name}-{i + 1}" if i else name, f"{heading} ({title})", drawn[0], caption, drawn[1]))
    return result
