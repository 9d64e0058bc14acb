"""How the figures of all reports are drawn."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .run.methods import BASELINE

# a palette that colour-blind readers can tell apart (Okabe and Ito); the baseline is grey
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5f00")
BASELINE_COLOR = "#555555"
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


def color_of(losses: Sequence[str]) -> dict[str, str]:
    others = [loss for loss in losses if loss != BASELINE]
    return {BASELINE: BASELINE_COLOR} | {loss: PALETTE[i % len(PALETTE)] for i, loss in enumerate(others)}


def svg(figure: Figure, background: str = "none") -> str:
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):  # what of it is read on writing: text stays text, and names do not change from one time to the next
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight", facecolor=background)
    return text.getvalue()[text.getvalue().index("<svg") :]


def axes(width: float = 4.2, height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()
