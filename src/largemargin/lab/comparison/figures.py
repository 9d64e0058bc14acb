"""The figures of a comparison."""

import math
import statistics
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..drawing import BASELINE_COLOR, STYLE, axes, color_of, svg
from ..results import OfRecords, RunRecord, TrialRecord
from ..run.evaluate import MARGIN_EDGES
from ..run.methods import BASELINE
from ..run.noise import UNTOLD, text_of
from .choose import Choice, choice_columns
from .evidence import Array, Reliability
from .table import Row, score_text

Records = Sequence[RunRecord]
MOST_CLASSES = 24  # in a figure


def figures_of(records: Records, colors: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Title, drawing and caption of each figure; none where every run diverged."""
    if not records:
        return []
    curves = (
        "Learning curves",
        learning_curves(records, colors),
        "Test error after each epoch that was measured: the mean over seeds, and the span of all seeds as a band.",
    )
    measured = sum(row["test_error"] is not None for row in records[0].epochs)
    return [
        *([curves] if measured > 1 else []),  # one point is no curve
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


def figures_of_trials(records: Sequence[TrialRecord], colors: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The same of runs of a function: what it logged, and margins where it gave its logits."""
    found = []
    logged = next((name for name in ("loss", "train_loss") if records and all(curve_of(record, name) for record in records)), None)
    if logged is not None and len(curve_of(records[0], logged)) > 1:
        found.append(
            ("Learning curves", logged_curves(records, logged, colors), f"What run.log was given as {logged}: the mean over seeds.")
        )
    if records and all(record.measured is not None for record in records):
        caption = "f<sub>y</sub> − max f<sub>c</sub> of the samples of all seeds; left of 0 they are misclassified."
        found.append(("Margins", margin_histograms(records, colors), caption))
    return found


def curve_of(record: TrialRecord, name: str) -> dict[float, float]:
    """What was logged under this name, by the epoch."""
    return {row["epoch"]: row[name] for row in record.log if isinstance(row.get(name), int | float) and row.get("epoch") is not None}


def logged_curves(records: Sequence[TrialRecord], name: str, colors: Mapping[str, str]) -> str:
    """A number that the function logged, after each epoch that all seeds of a loss have: the mean over seeds."""
    with matplotlib.rc_context(STYLE):
        figure, ax = axes()
        for loss, group in by_loss(records).items():
            curves = [curve_of(record, name) for record in group]
            epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
            ax.plot(epochs, [statistics.fmean(curve[epoch] for curve in curves) for epoch in epochs], color=colors[loss], linewidth=1.6)
        ax.set_xlabel("epoch")
        ax.set_ylabel(name)
        return svg(figure)


def by_loss(records: Sequence[OfRecords]) -> dict[str, list[OfRecords]]:
    groups: dict[str, list[OfRecords]] = {}
    for record in records:
        groups.setdefault(record.recipe.loss, []).append(record)
    return groups


def overview(rows: Sequence[Row], background: str = "none") -> str:
    """The metric of every loss: each with its standard deviation over seeds, grouped by label noise."""
    with matplotlib.rc_context(STYLE):
        noises = list(dict.fromkeys(row.label_noise for row in rows))
        colors = color_of(list(dict.fromkeys(row.loss for row in rows)))
        figure = Figure(figsize=(7.2, 0.6 + 0.33 * len(rows) + 0.35 * len(noises)))
        panels = figure.subplots(len(noises), 1, squeeze=False)[:, 0]
        for panel, noise in zip(panels, noises, strict=True):
            group = [row for row in rows if row.label_noise == noise][::-1]
            for y, row in enumerate(group):
                mean, note = (0.0, score_text(row)) if row.diverged == row.n else (row.mean, row.metric.number(row.mean))
                panel.barh(y, mean, 0.62, color=colors[row.loss], alpha=0.85)
                panel.errorbar(mean, y, xerr=row.std, color="#222222", capsize=3, linewidth=1)
                panel.annotate(note, (mean + (row.std or 0), y), (5, 0), textcoords="offset points", va="center", fontsize=9)
            panel.set_yticks(range(len(group)), [row.label for row in group])
            panel.grid(axis="y", visible=False)
            panel.margins(x=0.12)
            if all(row.mean >= 0 for row in group if row.diverged < row.n):
                panel.set_xlim(left=0)
            if noise != UNTOLD:
                panel.set_title(f"label noise {text_of(noise)}")
        panels[-1].set_xlabel(f"{rows[0].metric.header} (mean ± std over seeds)")
        figure.tight_layout()
        return svg(figure, background)


def learning_curves(records: Records, colors: Mapping[str, str]) -> str:
    """Test error after each epoch: the mean over seeds, and the span of the seeds."""
    with matplotlib.rc_context(STYLE):
        figure, ax = axes()
        settled = 0.0
        for loss, group in by_loss(records).items():
            measured = [[row for row in record.epochs if row["test_error"] is not None] for record in group]
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


def margin_histograms(records: Sequence[RunRecord] | Sequence[TrialRecord], colors: Mapping[str, str]) -> str:
    """The margins of the test samples of all seeds."""
    with matplotlib.rc_context(STYLE):
        figure, ax = axes()
        edges = MARGIN_EDGES.tolist()
        used = [0.0]
        histograms: dict[str, list[Sequence[int]]] = {}
        for record in records:
            histograms.setdefault(record.recipe.loss, []).append(record.measured.margin_histogram if record.measured else [])
        for loss, group in histograms.items():
            counts = [sum(bins) for bins in zip(*group, strict=True)]
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
            curves = [record.rho_of_batches for record in group]
            ax.plot(
                curves[0]["batch"],
                [statistics.fmean(v) if None not in v else math.nan for v in zip(*(c["rho"] for c in curves), strict=True)],
                color=colors[loss],
                linewidth=1.3,
            )
        bound = math.log(len(records[0].classes) - 1)
        ax.axhline(bound, color="#222222", linewidth=0.8, linestyle=":")
        ax.annotate(
            "log(C − 1), its bound (4)", (0.01, bound), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9
        )
        ax.set_ylim(0, bound * 1.14 or 1.0)  # two classes have a bound of 0
        ax.set_xlabel("training batch")
        ax.set_ylabel("ρ̂ (nats)")
        return svg(figure)


def class_errors_figure(classes: Sequence[str], baseline: Array, method: Array, label: str, color: str) -> str:
    """The error of each class under both losses, the largest change on top; at most :data:`MOST_CLASSES`."""
    change = method - baseline
    order = np.argsort(-abs(np.nan_to_num(change)), kind="stable")[:MOST_CLASSES]
    order = order[np.argsort(-np.nan_to_num(change[order]), kind="stable")]  # the largest gain ends on top
    with matplotlib.rc_context(STYLE):
        figure, ax = axes(4.2, 0.9 + 0.22 * len(order))
        places = np.arange(len(order))
        ax.hlines(places, baseline[order], method[order], color="#999999", linewidth=1.2, zorder=1)
        ax.scatter(baseline[order], places, s=22, color=BASELINE_COLOR, label=BASELINE, zorder=2)
        ax.scatter(method[order], places, s=22, color=color, label=label, zorder=3)
        ax.set_yticks(places, [shortened(classes[i]) for i in order])
        ax.grid(axis="y", visible=False)
        ax.set_xlim(left=0)
        ax.set_xlabel("test error of the class %, mean over seeds")
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9, borderaxespad=0.2, handletextpad=0.1)
        return svg(figure)


def reliability_figure(found: Mapping[str, Reliability], colors: Mapping[str, str]) -> str:
    """How often a prediction is right, by the probability that the network gives it."""
    with matplotlib.rc_context(STYLE):
        figure, ax = axes()
        ax.plot([0, 1], [0, 1], color="#222222", linewidth=0.8, linestyle=":")
        for label, bins in found.items():
            full = bins.share > 0
            ax.plot(bins.confidence[full], bins.accuracy[full], color=colors[label], linewidth=1.2, label=label)
            ax.scatter(bins.confidence[full], bins.accuracy[full], s=4 + 120 * bins.share[full], color=colors[label], alpha=0.7)
        ax.set_xlim(0, 1.02)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel("probability of the predicted class")
        ax.set_ylabel("share that is right")
        ax.legend(loc="upper left", fontsize=9)
        return svg(figure)


def lambda_curve(choices: Sequence[Choice], colors: Mapping[str, str]) -> str:
    """The validation error by lambda: mean and standard deviation over seeds; the chosen one is filled."""
    with matplotlib.rc_context(STYLE):
        figure, ax = axes(5.2, 3.0)
        places = {lam: i for i, lam in enumerate(sorted({lam for choice in choices for lam in choice.errors}))}
        for k, choice in enumerate(choices):
            found = {lam: errors for lam, errors in sorted(choice.errors.items()) if errors}
            means = [statistics.fmean(errors) for errors in found.values()]
            stds = [statistics.stdev(errors) if len(errors) > 1 else 0.0 for errors in found.values()]
            shift = 0.06 * (k - (len(choices) - 1) / 2)
            x = [places[lam] + shift for lam in found]
            style = ("-", "--", ":", "-.")[k % 4]
            noise = f", label noise {text_of(choice.label_noise)}" if len({c.label_noise for c in choices}) > 1 else ""
            label = choice.loss.replace("_", " ") + noise
            color = colors[choice.loss]
            ax.errorbar(x, means, yerr=stds, color=color, linestyle=style, linewidth=1.4, capsize=3, marker="o", mfc="white", label=label)
            if choice.lam in found:
                ax.scatter([places[choice.lam] + shift], [means[list(found).index(choice.lam)]], s=40, color=color, zorder=5)
        ax.set_xticks(list(places.values()), [f"{lam:g}" for lam in places])
        ax.set_xlabel("λ")
        ax.set_ylabel(choice_columns(choices)[-2])
        ax.legend(fontsize=9)
        return svg(figure)


def shortened(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
