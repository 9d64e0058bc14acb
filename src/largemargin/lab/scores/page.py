"""The verdicts on scores as tables on the terminal, as a page, and as plain data."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from ... import __version__
from ..directions import phrase_of
from ..drawing import PALETTE, STYLE, svg
from ..errors import LabError
from ..files import write_json, write_text
from ..pages import page
from ..words import counted
from .judge import REFERENCES, Line, Overall, advice, family
from .runs import Scores

MARKER = "verdict.json"  # tells a folder of ours from one that is not
VERDICTS_ON_SCREEN = 4
NOTE = (
    "Mean ± std (n-1) over seeds. The interval is a 95% interval of the paired difference over seeds (Student's t, unadjusted). A verdict "
    "on a data set is a paired t test over seeds."
)


@dataclass(frozen=True)
class Verdicts:
    """All that is printed and written."""

    scores: Scores
    lines: Sequence[Line]
    overalls: Sequence[Overall]
    lower: dict[str, bool]  # by metric, whether a smaller value is better

    def columns(self, metric: str) -> list[str]:
        return [*["data set"] * self.several, "method", metric, f"minus {self.scores.baseline} [95%]", "verdict"]

    @property
    def several(self) -> bool:
        return len(self.scores.data_sets) > 1

    def of(self, metric: str) -> list[Line]:
        return [line for line in self.lines if line.metric == metric]

    def overall(self, metric: str) -> list[Overall]:
        return [found for found in self.overalls if found.metric == metric]

    def title(self, metric: str) -> str:
        seeds = sorted({line.n for line in self.of(metric)})
        many = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
        return f"{metric} ({phrase_of(self.lower[metric])}), {many}"

    @property
    def note(self) -> str:
        return f"{NOTE} {family(self.lines, self.overalls)}"


def cells(line: Line, several: bool) -> list[str]:
    """A line as text, under the columns of its metric."""
    score = f"{line.mean:.{line.decimals}f} ± {line.std:.{line.decimals}f}"
    found = ("–", "–") if line.judged is None else (line.judged.text, line.judged.verdict)
    return [*[line.data_set] * several, line.method, score, *found]


OVERALL_COLUMNS = ["method", "better on", "worse on", "median difference", "p", "verdict"]


def overall_cells(found: Overall) -> list[str]:
    """An overall verdict as text, under OVERALL_COLUMNS."""
    better, worse, _ = found.counts
    median = f"{found.median:+.{found.decimals}f}"
    return [found.method, str(better), str(worse), median, f"{found.adjusted_p:.3g}", found.verdict]


def print_verdicts(verdicts: Verdicts, console: Console) -> None:
    for metric in verdicts.scores.metrics:
        lines = verdicts.of(metric)
        console.print(f"\n{verdicts.title(metric)}", style="bold", highlight=False, markup=False)
        _print_table(console, verdicts.columns(metric), [cells(line, verdicts.several) for line in lines])
        if overalls := verdicts.overall(metric):
            sets = counted(len(verdicts.scores.data_sets), "data set")
            console.print(f"{metric} over {sets} (Wilcoxon signed-rank test)", style="bold", highlight=False, markup=False)
            _print_table(console, OVERALL_COLUMNS, [overall_cells(found) for found in overalls])
    console.print(verdicts.note, style="dim", highlight=False)
    _print_evidence(verdicts, console)
    console.print()
    for sentence in advice(verdicts.lines, verdicts.overalls):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _print_evidence(verdicts: Verdicts, console: Console) -> None:
    """What the verdicts rest on: of several data sets the overall ones, of more than a few the report tells it."""
    shown: list[Any] = list(verdicts.overalls) or [line.judged for line in verdicts.lines if line.judged is not None]
    if len(shown) > VERDICTS_ON_SCREEN:
        console.print("What each verdict rests on: report.html and report.md.", style="dim", highlight=False)
        return
    for found in shown:
        metric = found.metric if isinstance(found, Overall) else found.unit.removeprefix("in ")
        console.print(f"\n{found.method} beside {found.baseline}, {metric}: {found.verdict}", style="bold", highlight=False, markup=False)
        for sentence in found.sentences():
            console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)


def _print_table(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """No number is ever cut: where the terminal is narrow, lines wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(
            console.render_str(column, markup=False, highlight=False, emoji=False),
            justify="left" if column in ("data set", "method", "verdict") else "right",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(console.render_str(cell, markup=False, highlight=False, emoji=False) for cell in row))
    console.print(table)


def as_json(verdicts: Verdicts) -> dict[str, Any]:
    """The document of ``--json``."""
    return {
        "largemargin": "verdict",
        "version": __version__,
        "scores": verdicts.scores.source,
        "baseline": verdicts.scores.baseline,
        "metrics": {metric: phrase_of(lower) for metric, lower in verdicts.lower.items()},
        "rows": [_line_as_json(line) for line in verdicts.lines],
        "overall": [
            {**dataclasses.asdict(found), "median": found.median, "verdict": found.verdict, "sentences": found.sentences()}
            for found in verdicts.overalls
        ],
        "advice": advice(verdicts.lines, verdicts.overalls),
    }


def _line_as_json(line: Line) -> dict[str, Any]:
    plain = dataclasses.asdict(line)
    plain["judged"] = None if line.judged is None else {**plain["judged"], "sentences": line.judged.sentences()}
    return plain | {"verdict": line.verdict}


def results_csv(verdicts: Verdicts) -> str:
    """A line for each method, metric and data set."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("data_set metric better method seeds mean std difference low high p adjusted_p verdict".split())
    for line in verdicts.lines:
        direction = "lower" if verdicts.lower[line.metric] else "higher"
        row: list[Any] = [line.data_set, line.metric, direction, line.method, line.n, line.mean, line.std]
        if line.judged is not None:
            interval = line.judged.paired.over_seeds
            low, high = ("", "") if interval is None else (interval.low, interval.high)
            row += [line.judged.paired.mean, low, high, line.judged.paired.p, line.judged.adjusted_p, line.judged.verdict]
        writer.writerow(row + [""] * (13 - len(row)))
    return text.getvalue()


def earlier(out: Path) -> dict[str, Any] | None:
    """The document of the verdict that the folder holds, None for an empty folder; raises LabError for one that holds something else."""
    if out.is_file():
        raise LabError(f"--out {out} is a file, not a folder; choose a new or empty folder")
    try:
        if not out.exists() or not any(out.iterdir()):
            return None
        found: dict[str, Any] = json.loads((out / MARKER).read_text())
        if found["largemargin"] != "verdict":
            raise ValueError("it is of something else")
        subject(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"--out {out} holds files that are not of a verdict; choose a new or empty folder") from error
    return found


def subject(document: Mapping[str, Any]) -> list[Any]:
    """What a verdict is on."""
    methods = [row["method"] for row in document["rows"]]
    return [document["scores"], document["baseline"], list(document["metrics"]), sorted(set(methods))]


def write(verdicts: Verdicts, out: Path) -> None:
    """``report.html``, ``report.md``, ``results.csv`` and ``verdict.json``."""
    several = verdicts.several
    sections = [
        {
            "title": verdicts.title(metric),
            "columns": verdicts.columns(metric),
            "rows": [cells(line, several) for line in verdicts.of(metric)],
            "overall": [overall_cells(found) for found in verdicts.overall(metric)],
            "overalls": verdicts.overall(metric),
            "figure": differences(verdicts, metric),
            "judged": [(line.data_set, line.judged) for line in verdicts.of(metric) if line.judged is not None],
        }
        for metric in verdicts.scores.metrics
    ]
    content: dict[str, Any] = {
        "source": verdicts.scores.source,
        "baseline": verdicts.scores.baseline,
        "advice": advice(verdicts.lines, verdicts.overalls),
        "basis": basis(verdicts),
        "sections": sections,
        "overall_columns": OVERALL_COLUMNS,
        "note": verdicts.note,
        "references": REFERENCES if several else "",
        "version": __version__,
    }
    try:
        write_json(out / MARKER, as_json(verdicts))
        write_text(out / "results.csv", results_csv(verdicts))
        write_text(out / "report.md", page("verdict.md.j2", **content))
        write_text(out / "report.html", page("verdict.html.j2", **content))
    except OSError as error:
        raise LabError(f"--out {out} cannot be written to: {error.strerror or error}; choose another folder") from error


def basis(verdicts: Verdicts) -> str:
    """What the verdicts rest on, in a sentence."""
    scores = verdicts.scores
    runs = sum(len(of_method) for of_method in scores.of.values())
    data = f" on {len(scores.data_sets)} data sets" if verdicts.several else ""
    return f"This rests on {counted(runs, 'run')} of {counted(len(scores.of), 'method')}{data}. Runs of one seed are pairs."


def differences(verdicts: Verdicts, metric: str) -> str:
    """The paired differences: of each seed with their interval, or with several data sets the mean of each."""
    lines = [line for line in verdicts.of(metric) if line.judged is not None]
    methods = verdicts.scores.others
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 0.4 * len(methods)))
        panel = figure.subplots()
        for y, method in enumerate(reversed(methods)):
            color = PALETTE[methods.index(method) % len(PALETTE)]
            of_method = [line for line in lines if line.method == method and line.judged is not None]
            if verdicts.several:
                points = [line.judged.paired.mean for line in of_method if line.judged is not None]
            else:
                points = _pairs(verdicts.scores, metric, method)
                judged = of_method[0].judged
                assert judged is not None
                interval, mean = judged.paired.over_seeds, judged.paired.mean
                if interval is not None:
                    panel.plot([interval.low, interval.high], [y, y], color=color, linewidth=1.6)
                panel.plot([mean], [y], "D", color=color, markersize=6)
            panel.plot(points, [y] * len(points), "o", color=color, alpha=0.45, markersize=5, markeredgewidth=0)
        panel.axvline(0, color="#222222", linewidth=0.8)
        panel.set_yticks(range(len(methods)), methods[::-1])
        panel.set_ylim(-0.6, len(methods) - 0.4)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel(f"{metric} minus that of {verdicts.scores.baseline} ({phrase_of(verdicts.lower[metric])})")
        return svg(figure)


def _pairs(scores: Scores, metric: str, method: str) -> list[float]:
    (data_set,) = scores.data_sets
    ours, theirs = (scores.values(name, metric, data_set) for name in (method, scores.baseline))
    return [a - b for a, b in zip(ours, theirs, strict=True)]
