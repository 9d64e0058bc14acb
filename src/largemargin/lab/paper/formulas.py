"""``largemargin reproduce fig1|fig2|fig4``: the figures of the paper that are computed, as tables beside the paper's formulas."""

import csv
import io
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ... import divergence, metrics, row_stats
from ..data.images import digits as digits_data
from ..drawing import PALETTE, STYLE
from ..errors import LabError
from ..files import write_text
from ..run.methods import LOSSES
from ..run.recipe import Recipe
from ..run.train import train

FIGURE_4_AT = (0.6, 0.75, 0.9, 0.99, 0.999)
EPOCHS = 10  # of the networks of figure 2


class Reproduced(NamedTuple):
    """A figure as a table, the chart it belongs to, and what to know of it."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    chart: Figure | None
    note: str


def figure_1() -> Reproduced:
    """Hinge and softmax as losses of the biased margin xi = f_c* - f_y + rho, eqs. (1) and (3)."""
    xi = torch.linspace(-4, 4, 9, dtype=torch.float64)
    hinge, softplus = xi.relu(), F.softplus(xi)
    # the softmax loss is the softplus of the margin biased by rho-hat: on logits, not only in the formula
    logits, target = torch.randn(1000, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(1000) % 10
    biased = F.softplus(row_stats(logits, target).rho - metrics.margin(logits, target, reduction="none"))
    gap = (biased - F.cross_entropy(logits, target, reduction="none")).abs().max().item()
    figure, axes = _axes("ξ = f_c* − f_y + ρ", "L(ξ)")
    fine = torch.linspace(-4, 4, 161)
    axes.plot(fine, fine.relu(), color=PALETTE[1], label="hinge, ρ = 1")
    axes.plot(fine, F.softplus(fine), color=PALETTE[0], label="softmax, ρ = ρ̂ = log Σ exp(f_c − f_c*)")
    axes.legend()
    rows = [(f"{x:g}", f"{h:.4f}", f"{s:.4f}") for x, h, s in zip(xi.tolist(), hinge.tolist(), softplus.tolist(), strict=True)]
    note = f"softplus(f_c* - f_y + rho-hat) and torch's cross-entropy differ by {gap:.0e} at most, on 1000 rows of 10 random logits."
    return Reproduced("Figure 1: the losses of a biased margin", ("xi", "hinge max(0, xi)", "softmax softplus(xi)"), rows, figure, note)


def figure_2() -> Reproduced:
    """Which bias each method has, on the logits of networks trained with it: digits, ten epochs, training set."""
    digits = digits_data()
    rows = []
    for loss, own in (
        ("crammer_singer_hinge", "1"),
        ("softmax", "rho-hat"),
        ("modified", "rho-hat + 1"),
        ("lsoftmax", "rho-hat + |w_y||x|(cos - psi)"),
        ("gaussian_mixture", "rho-hat + alpha d_y"),
        ("large_margin", "rho-hat, made larger"),
    ):
        seen: list[tuple[Tensor, Tensor]] = []

        def see(network: Any, feed: Any, seen: list[tuple[Tensor, Tensor]] = seen) -> None:
            with torch.no_grad():
                features, head = network.features(feed.normalize(digits.train_images)), network.classifier
                plain = head.eval()(features)
                head.train()
                edited = plain if isinstance(head, nn.Linear) else head(features, digits.train_labels)
            seen.append((plain, edited))

        with tempfile.TemporaryDirectory() as folder:
            train(Recipe(loss=loss, seed=0, epochs=EPOCHS, **LOSSES[loss]), digits, Path(folder), on_end=see)
        (plain, edited), target = seen[0], digits.train_labels
        of_target = (plain - edited).gather(1, target.unsqueeze(1)).mean().item()
        extra = {"modified": 1.0, "crammer_singer_hinge": 1.0}.get(loss, of_target)
        rho = 0.0 if loss == "crammer_singer_hinge" else metrics.rho_hat(plain, target).item()
        margin = metrics.margin(plain, target).item()
        rows.append((loss.replace("_", " "), own, f"{rho:.3f}", f"{extra:.3f}", f"{rho + extra:.3f}", f"{margin:.2f}"))
    header = ("method", "bias", "rho-hat", "extra", "together", "margin f_y - f_c*")
    note = (
        f"Means in nats over the {len(digits.train_labels)} training images of digits, after {EPOCHS} epochs of the small network, seed 0. "
        "The hinge has no softmax and no rho-hat. The annealed methods are at the end of their schedules."
    )
    return Reproduced("Figure 2: the bias that each method adds", header, rows, None, note)


def figure_4() -> Reproduced:
    """The divergences of (8) and (10) for two non-target classes with shares q and 1 - q."""

    def at(q: Tensor) -> list[Tensor]:
        # the target's logit is in none of them
        logits = torch.stack([torch.zeros_like(q), q.log(), (1 - q).log()], dim=1)
        stats = row_stats(logits, torch.zeros(len(q), dtype=torch.int64))
        return [divergence(stats, kind) for kind in ("kl_qu", "kl_uq", "symmetric")]

    points = torch.tensor(FIGURE_4_AT, dtype=torch.float64)
    rows = [
        (f"{q:g}", *(f"{v:.4f}" for v in values)) for q, *values in zip(points.tolist(), *(v.tolist() for v in at(points)), strict=True)
    ]
    figure, axes = _axes("q", "divergence from (½, ½), nats")
    fine = torch.linspace(0.5, 0.9995, 400, dtype=torch.float64)
    for values, label, colour in zip(at(fine), ("D(q‖u)", "D(u‖q)", "(8): half their sum"), PALETTE, strict=False):
        axes.plot(fine, values, color=colour, label=label)
    axes.legend()
    header = ("q", "D(q||u)", "D(u||q)", "symmetric (8)")
    note = "D(q||u) ends at log 2 = 0.6931; the others have no end."
    return Reproduced("Figure 4: divergences of two categories (q, 1 - q)", header, rows, figure, note)


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    return figure, axes


FIGURES: dict[str, Callable[[], Reproduced]] = {"fig1": figure_1, "fig2": figure_2, "fig4": figure_4}


def draw(name: str, out: Path, console: Console) -> None:
    """Print the table, and write it and its chart into ``out``."""
    try:
        out.mkdir(parents=True, exist_ok=True)  # before anything is computed
    except OSError as error:
        raise LabError(f"{out} cannot be a folder: {error.strerror}; give another with --out") from error
    found = FIGURES[name]()
    table = Table(*found.header, title=found.title, title_justify="left", box=box.SIMPLE_HEAD)
    for row in found.rows:
        table.add_row(*row)
    console.print(table, highlight=False)
    console.print(found.note, highlight=False)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([found.header, *found.rows])
    write_text(out / f"{name}.csv", text.getvalue())
    written = [f"{name}.csv"]
    if found.chart is not None:
        with matplotlib.rc_context(STYLE):
            found.chart.savefig(out / f"{name}.svg", metadata={"Date": None})
        written.append(f"{name}.svg")
    console.print(f"{out}: {', '.join(written)}", highlight=False, soft_wrap=True)
