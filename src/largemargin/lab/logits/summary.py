"""``largemargin inspect``: what a file of logits and labels says about a classifier, overall, class by class and row by row."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import LabError
from ..predictions import NAME as PREDICTIONS
from ..words import counted, printable
from .by_class import figures, rows_of
from .files import Numbers, read

CHUNK = 2**17  # logits that are in float64 at a time: 1 MiB, which stays in a cache
WORST = 20  # classes that are printed
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


def summarise(path: Path, top: int, probabilities: bool = False) -> dict[str, Any]:
    """All that is printed, as plain numbers: shares in [0, 1] and nats."""
    labelled = read(path, probabilities)
    rows, num_classes = rows_of(labelled, CHUNK), labelled.logits.shape[1]
    (overall,) = figures(rows, np.zeros_like(rows.labels), 1)
    per_class = zip(labelled.class_names, figures(rows, rows.labels, num_classes), strict=True)
    margin = rows.values["margin"]

    def row(i: int) -> dict[str, Any]:
        sigmoid = 1 / (1 + math.exp(-rows.confidence[i]))
        names: dict[str, Any] = {"row": i} if labelled.files is None else {"row": i, "file": str(labelled.files[i])}
        names |= {"label": int(rows.labels[i]), "prediction": int(rows.predictions[i])}
        return names | {"confidence": sigmoid, "margin": float(margin[i])}

    mistakes = np.flatnonzero(~rows.right)
    return {
        "file": str(path),
        "classes": num_classes,
        "warnings": list(labelled.warnings),
        "overall": _plain(overall),
        "per_class": [{"class": c, "name": name, **_plain(of_class)} for c, (name, of_class) in enumerate(per_class)],
        "confident_mistakes": [row(int(i)) for i in mistakes[_smallest(-rows.confidence[mistakes], top)]],
        "smallest_margins": [row(int(i)) for i in _smallest(margin, top)],
    }


def _smallest(values: Numbers, count: int) -> Numbers:
    """The indices of the smallest, of equal ones the first."""
    return np.argsort(values, kind="stable")[:count]


def _plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    """``None`` where there are no rows."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()} | {"rows": int(figures["rows"])}


def worst(per_class: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The classes of the largest error, of equal ones those of more rows first; all in their order where there are no more than that."""
    if len(per_class) <= count:
        return list(per_class)
    counted = [of_class for of_class in per_class if of_class["rows"]]
    return sorted(counted, key=lambda of_class: (-of_class["error"], -of_class["rows"]))[:count]


def file_of(folder: Path) -> Path:
    """A file of logits as it is; of the folder of a run its predictions, and of another folder itself, which is then refused."""
    if not folder.is_dir():
        return folder
    if (folder / PREDICTIONS).is_file():
        return folder / PREDICTIONS
    if (folder / "result.json").is_file():
        raise LabError(
            f"{folder} is a run that kept no {PREDICTIONS} (--no-save, reproduce and runs that choose lam keep none, nor did earlier "
            "versions); to have them, remove the folder and give the run's command again"
        )
    return folder


def print_summary(summary: dict[str, Any], console: Console, all_classes: bool = False) -> None:
    """Print what a file, or a run's folder, says."""
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
    shown = summary["per_class"] if all_classes else worst(summary["per_class"], WORST)
    few = len(shown) < len(summary["per_class"])
    title = f"the {len(shown)} classes of the largest error (--classes all prints all {summary['classes']})" if few else "by class"
    console.print(f"\n{title}", style="bold", highlight=False)
    _print_table(console, ["class", *COLUMNS], [[of_class["name"], *_cells(of_class)] for of_class in shown])
    names = [of_class["name"] for of_class in summary["per_class"]]
    for title, key in (("the most confident mistakes", "confident_mistakes"), ("the smallest margins", "smallest_margins")):
        console.print(f"\n{title}", style="bold")
        files = any("file" in row for row in summary[key])
        rows = [
            [
                str(row["row"]),
                *([row["file"]] if files else []),
                names[row["label"]],
                names[row["prediction"]],
                f"{row['confidence']:.4f}",
                f"{row['margin']:.3f}",
            ]
            for row in summary[key]
        ]
        if rows:
            _print_table(console, ["row", *(["file"] if files else []), "label", "prediction", "confidence", "margin"], rows)
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
        table.add_column(column, justify="left" if column in ("class", "file") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(console.render_str(printable(cell), markup=False, highlight=False, emoji=False) for cell in row))
    console.print(table)
