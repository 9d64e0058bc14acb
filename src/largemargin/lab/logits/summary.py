"""``largemargin inspect``: what a file of logits and labels says about a classifier, overall, class by class and row by row."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ... import metrics
from ..words import counted, printable
from .files import Labelled, Numbers, chunks, read

CHUNK = 2**22  # logits that are in float64 at a time: 32 MiB
# column -> key of MarginMetrics.compute(), factor, decimals
COLUMNS = {
    "n": ("rows", 1, 0),
    "error %": ("error", 100, 2),
    "margin": ("margin", 1, 3),
    "rho-hat": ("rho_hat", 1, 3),
    "divergence": ("divergence", 1, 3),
    "NLL": ("nll", 1, 4),
    "ECE %": ("ece", 100, 2),
}
NOTE = (
    "Means over rows; margin f_y - max f_c, rho-hat (eq. 7), divergence (eq. 8) and NLL in nats. "
    "Rows are counted from 0, in a CSV from the first line below the header."
)


def _tensors(labelled: Labelled, rows: "slice | Numbers") -> tuple[Tensor, Tensor]:
    return torch.from_numpy(labelled.logits[rows].astype(np.float64)), torch.from_numpy(labelled.labels[rows])


def summarise(path: Path, top: int, probabilities: bool = False) -> dict[str, Any]:
    """All that is printed, as plain numbers: shares in [0, 1] and nats."""
    labelled = read(path, probabilities)
    num_rows, num_classes = labelled.logits.shape
    margin, confidence = np.empty(num_rows), np.empty(num_rows)  # the latter in log-odds, which tell more apart
    prediction = np.empty(num_rows, dtype=np.int64)
    for rows in chunks(labelled.logits.shape, CHUNK):
        logits, labels = _tensors(labelled, rows)
        predicted = logits.argmax(-1)
        prediction[rows] = predicted
        margin[rows] = metrics.margin(logits, labels, reduction="none")
        confidence[rows] = metrics.log_odds(logits, predicted, reduction="none")

    overall = metrics.MarginMetrics()
    per_class = []
    by_class = np.argsort(labelled.labels, kind="stable")
    ends = np.cumsum(np.bincount(labelled.labels, minlength=num_classes))
    for c, name in enumerate(labelled.class_names):
        of_class = metrics.MarginMetrics()
        rows_of_class = by_class[(ends[c - 1] if c else 0) : ends[c]]
        for rows in chunks((len(rows_of_class), num_classes), CHUNK):
            of_class.update(*_tensors(labelled, rows_of_class[rows]))
        overall.merge(of_class)
        per_class.append({"class": c, "name": name, **_figures(of_class)})

    def row(i: int) -> dict[str, Any]:
        sigmoid = 1 / (1 + math.exp(-confidence[i]))
        names = {"row": i, "label": int(labelled.labels[i]), "prediction": int(prediction[i])}
        return names | {"confidence": sigmoid, "margin": float(margin[i])}

    mistakes = np.flatnonzero(prediction != labelled.labels)
    return {
        "file": str(path),
        "classes": num_classes,
        "warnings": list(labelled.warnings),
        "overall": _figures(overall),
        "per_class": per_class,
        "confident_mistakes": [row(int(i)) for i in mistakes[_smallest(-confidence[mistakes], top)]],
        "smallest_margins": [row(int(i)) for i in _smallest(margin, top)],
    }


def _smallest(values: Numbers, count: int) -> Numbers:
    """The indices of the smallest, of equal ones the first."""
    return np.argsort(values, kind="stable")[:count]


def _figures(counted: metrics.MarginMetrics) -> dict[str, float | None]:
    """``None`` where there are no rows."""
    figures = counted.compute()
    figures = {"error": 1 - figures["accuracy"]} | figures
    return {name: value if math.isfinite(value) else None for name, value in figures.items()} | {"rows": int(figures["rows"])}


def print_summary(summary: dict[str, Any], console: Console) -> None:
    """Print what a file says."""
    overall = summary["overall"]
    console.print(
        f"{summary['file']}: {counted(overall['rows'], 'row')}, {counted(summary['classes'], 'class')}",
        style="bold",
        markup=False,
        highlight=False,
    )
    for warning in summary["warnings"]:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)
    _print_table(console, list(COLUMNS), [_cells(overall)])
    console.print(
        f"adaptive ECE {100 * overall['adaptive_ece']:.2f} %, top-5 error {100 * overall['top5_error']:.2f} %, "
        f"non-target entropy {overall['nontarget_entropy']:.3f}",
        highlight=False,
    )
    console.print("\nby class", style="bold")
    _print_table(console, ["class", *COLUMNS], [[of_class["name"], *_cells(of_class)] for of_class in summary["per_class"]])
    names = [of_class["name"] for of_class in summary["per_class"]]
    for title, key in (("the most confident mistakes", "confident_mistakes"), ("the smallest margins", "smallest_margins")):
        console.print(f"\n{title}", style="bold")
        rows = [
            [str(row["row"]), names[row["label"]], names[row["prediction"]], f"{row['confidence']:.4f}", f"{row['margin']:.3f}"]
            for row in summary[key]
        ]
        if rows:
            _print_table(console, ["row", "label", "prediction", "confidence", "margin"], rows)
        else:
            console.print("none")
    console.print(NOTE, style="dim", highlight=False)


def _cells(figures: dict[str, Any]) -> list[str]:
    values = ((figures[key], factor, decimals) for key, factor, decimals in COLUMNS.values())
    return ["n/a" if value is None else f"{factor * value:.{decimals}f}" for value, factor, decimals in values]


def _print_table(console: Console, columns: list[str], rows: list[list[str]]) -> None:
    """No number is ever cut: where the terminal is narrow, lines wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(console.render_str(printable(cell), markup=False, highlight=False, emoji=False) for cell in row))
    console.print(table)
