"""The report of a comparison: one self-contained page with the table and the figures."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .compare import (
    CHOICE_COLUMNS,
    COLUMNS,
    NOTE,
    Choice,
    Comparison,
    Row,
    cells,
    choice_cells,
    choice_note,
    error_text,
    remarks,
    ties,
)
from .diverged import kept
from .evaluate import MARGIN_EDGES
from .pages import page
from .recipe import BASELINE, OF_SOME_LOSSES, Recipe
from .words import counted

# a palette that colour-blind readers can tell apart (Okabe and Ito); the baseline is grey
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5f00")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "largemargin",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
}

Records = Sequence[dict[str, Any]]


def render(comparison: Comparison, records: Records, rows: Sequence[Row], choices: Sequence[Choice] = ()) -> str:
    """The page, as HTML that needs nothing from outside."""
    noises = list(dict.fromkeys(row.label_noise for row in rows))
    sections = []
    for noise in noises:
        group = [row for row in rows if row.label_noise == noise]
        of_noise = [record for record in records if record["recipe"]["label_noise"] == noise]
        groups = by_loss(of_noise)
        colors = color_of(list(groups))
        figures = figures_of(kept(of_noise), colors)
        legend = [(label_of(group), colors[loss]) for loss, group in groups.items()]
        sections.append({"noise": noise, "legend": legend, "rows": [(row, cells(row)) for row in group], "figures": figures})
    first = records[0]
    return page(
        "report.html.j2",
        headline=[*headline(rows), *remarks(records)],
        overview=overview(rows),
        sections=sections,
        columns=COLUMNS,
        note=NOTE,
        choice=choice_cells(choices),
        choice_columns=CHOICE_COLUMNS,
        choice_note=" ".join([*ties(choices), choice_note(comparison)]),
        changed=changed(Recipe(**first["recipe"])),
        comparison=comparison,
        first=first,
        recipe=Recipe(**first["recipe"]),
        schedule=schedule(Recipe(**first["recipe"])),
        augmentation=augmentation(Recipe(**first["recipe"])),
        software=software(records),
        num_runs=len(records),
        seconds=sum(record["seconds"] for record in records),
        baseline=BASELINE,
    )


def figures_of(records: Records, colors: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Title, drawing and caption of each figure; none where every run diverged."""
    if not records:
        return []
    return [
        (
            "Learning curves",
            learning_curves(records, colors),
            "Test error after each epoch that was measured: the mean over seeds, and the span of all seeds as a band.",
        ),
        (
            "Margins",
            margin_histograms(records, colors),
            "f<sub>y</sub> − max f<sub>c</sub> of the test samples of all seeds; left of 0 they are misclassified.",
        ),
        (
            "The margin hidden in the loss",
            rho_curves(records, colors),
            "ρ̂ (eq. 7), the mean of each training batch, over training; the mean over seeds.",
        ),
    ]


def changed(recipe: Recipe) -> list[str]:
    """The fields of the recipe that are not the defaults and that the page does not tell elsewhere."""
    told = {*OF_SOME_LOSSES, "loss", "seed", "data", "data_root", "data_digest", "network", "train_fraction", "label_noise"}
    told |= {"epochs", "device", "validation_fraction", "batch_size", "momentum", "weight_decay", "learning_rate"}
    told |= {"augmentation", "crop_padding", "crop_fill", "flip"}
    default, values = Recipe(loss="softmax", seed=0).to_dict(), recipe.to_dict()
    return [f"{name} = {value}" for name, value in values.items() if name not in told and value != default[name]]


def schedule(recipe: Recipe) -> str:
    """The learning rate over the epochs, in words."""
    epochs = counted(recipe.epochs, "epoch")
    start, end = f"learning rate {recipe.learning_rate:g}", f"{recipe.learning_rate * recipe.final_factor:g}"
    match recipe.schedule:
        case "log":
            return f"{start} falling evenly in log scale to {end} over {epochs}"
        case "cosine":
            return f"{start} falling as half a cosine to {end} over {epochs}"
    return f"{start}, times {recipe.step_factor:g} at epochs {', '.join(map(str, recipe.milestones)) or 'none'}, {epochs}"


def augmentation(recipe: Recipe) -> str:
    """What is done to a training image, in words."""
    if recipe.augmentation == "inception":
        return "random resized crops, mirrored half the time, colours and PCA lighting changed"
    fill = "its reflection" if recipe.crop_fill == "reflect" else "the mean of the channel"
    moved = f"moved by up to {counted(recipe.crop_padding, 'pixel')} with {fill} at the border"
    return ", ".join([moved] * (recipe.crop_padding > 0) + ["mirrored half the time"] * recipe.flip) or "none"


def software(records: Records) -> list[str]:
    """The versions the runs were made with; more than one where a comparison went on after an update."""
    environments = (record["environment"] for record in records)
    texts = (f"largemargin {e['largemargin']} (commit {e['commit'][:10]}), torch {e['torch']}, Python {e['python']}" for e in environments)
    return list(dict.fromkeys(texts))


def headline(rows: Sequence[Row]) -> list[str]:
    """What the table says, in a sentence for each share of label noise."""
    sentences = []
    for noise in dict.fromkeys(row.label_noise for row in rows):
        where = f"With {100 * noise:g}% wrong training labels" if noise else "With the labels as they are"
        compared = [row for row in rows if row.label_noise == noise and row.difference is not None]
        decided = [row for row in compared if row.verdict != "inconclusive"]
        parts = [
            f"{row.label} is {row.verdict} than {BASELINE} by {abs(row.difference.mean):.2f} points"
            for row in sorted(decided, key=lambda row: row.error)
            if row.difference is not None
        ]
        if parts:
            sentences.append(f"{where}, {'; '.join(parts)}.")
        elif compared:
            sentences.append(f"{where}, these seeds do not tell the losses from {BASELINE}.")
    return sentences


def color_of(losses: Sequence[str]) -> dict[str, str]:
    others = [loss for loss in losses if loss != BASELINE]
    return {BASELINE: "#555555"} | {loss: PALETTE[i % len(PALETTE)] for i, loss in enumerate(others)}


def by_loss(records: Records) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["recipe"]["loss"], []).append(record)
    return groups


def label_of(group: Records) -> str:
    return Recipe(**group[0]["recipe"]).loss_label


def svg(figure: Figure, background: str = "none") -> str:
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):  # what of it is read on writing: text stays text, and names do not change from one time to the next
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight", facecolor=background)
    return text.getvalue()[text.getvalue().index("<svg") :]


def axes(width: float = 4.2, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def overview(rows: Sequence[Row], background: str = "none") -> str:
    """Test error of every loss: each with its standard deviation over seeds, grouped by label noise."""
    with matplotlib.rc_context(STYLE):
        noises = list(dict.fromkeys(row.label_noise for row in rows))
        colors = color_of(list(dict.fromkeys(row.loss for row in rows)))
        figure = Figure(figsize=(7.2, 0.6 + 0.33 * len(rows) + 0.35 * len(noises)))
        panels = figure.subplots(len(noises), 1, squeeze=False)[:, 0]
        for panel, noise in zip(panels, noises, strict=True):
            group = [row for row in rows if row.label_noise == noise][::-1]
            for y, row in enumerate(group):
                error, note = (0.0, error_text(row)) if row.diverged == row.n else (row.error, f"{row.error:.2f}")
                panel.barh(y, error, 0.62, color=colors[row.loss], alpha=0.85)
                panel.errorbar(error, y, xerr=row.error_std, color="#222222", capsize=3, linewidth=1)
                panel.annotate(note, (error + (row.error_std or 0), y), (5, 0), textcoords="offset points", va="center", fontsize=9)
            panel.set_yticks(range(len(group)), [row.label for row in group])
            panel.grid(axis="y", visible=False)
            panel.margins(x=0.12)
            panel.set_xlim(left=0)
            panel.set_title(f"label noise {noise:g}")
        panels[-1].set_xlabel("test error % (mean ± std over seeds)")
        figure.tight_layout()
        return svg(figure, background)


def learning_curves(records: Records, colors: Mapping[str, str]) -> str:
    """Test error after each epoch: the mean over seeds, and the span of the seeds."""
    with matplotlib.rc_context(STYLE):
        figure, ax = axes()
        settled = 0.0
        for loss, group in by_loss(records).items():
            measured = [[row for row in record["epochs"] if row["test_error"] is not None] for record in group]
            by_epoch = list(zip(*([row["test_error"] for row in rows] for rows in measured), strict=True))
            epochs = [row["epoch"] for row in measured[0]]
            low, high = [min(errors) for errors in by_epoch], [max(errors) for errors in by_epoch]
            ax.plot(
                epochs,
                [statistics.fmean(errors) for errors in by_epoch],
                color=colors[loss],
                linewidth=1.6,
                marker="o" if len(by_epoch) == 1 else None,
            )
            ax.fill_between(epochs, low, high, color=colors[loss], alpha=0.15, linewidth=0)
            settled = max(settled, *high[len(high) // 5 :])
        ax.set_ylim(0, 1.1 * settled or 1.0)  # the first fifth may run out at the top
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("epoch")
        ax.set_ylabel("test error %")
        return svg(figure)


def margin_histograms(records: Records, colors: Mapping[str, str]) -> str:
    """The margins of the test samples of all seeds."""
    with matplotlib.rc_context(STYLE):
        figure, ax = axes()
        edges = MARGIN_EDGES.tolist()
        used = [0.0]
        for loss, group in by_loss(records).items():
            counts = [sum(bins) for bins in zip(*(record["test"]["margin_histogram"] for record in group), strict=True)]
            total = sum(counts) or 1
            ax.stairs([100 * count / total for count in counts], edges, color=colors[loss], linewidth=1.4)
            used += [edge for edge, count in zip(edges, counts, strict=False) if count / total > 5e-4]
        ax.axvline(0, color="#222222", linewidth=0.8)
        ax.set_xlim(min(used) - 1, max(used) + 1.5)
        ax.set_xlabel("margin (nats)")
        ax.set_ylabel("% of test samples")
        return svg(figure)


def rho_curves(records: Records, colors: Mapping[str, str]) -> str:
    """The margin hidden in the loss, over training batches: the paper's Fig. 3."""
    with matplotlib.rc_context(STYLE):
        figure, ax = axes()
        for loss, group in by_loss(records).items():
            curves = [record["rho_of_batches"] for record in group]
            ax.plot(
                curves[0]["batch"],
                [statistics.fmean(v) if None not in v else math.nan for v in zip(*(c["rho"] for c in curves), strict=True)],
                color=colors[loss],
                linewidth=1.3,
            )
        bound = math.log(len(records[0]["classes"]) - 1)
        ax.axhline(bound, color="#222222", linewidth=0.8, linestyle=":")
        ax.annotate(
            "log(C − 1), its bound (4)", (0.01, bound), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9
        )
        ax.set_ylim(0, bound * 1.14 or 1.0)  # two classes have a bound of 0
        ax.set_xlabel("training batch")
        ax.set_ylabel("ρ̂ (nats)")
        return svg(figure)
