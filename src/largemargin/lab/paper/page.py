"""The report of a reproduction: the paper's numbers beside ours, the figures, and everything that separates the two."""

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from ..drawing import svg
from ..errors import LabError
from ..files import write_text
from ..pages import page
from ..results import RunRecord, kept, software, who_diverged
from ..run.methods import BASELINE
from ..stats import moments
from ..words import counted, listed
from .cells import TABLES, Scale, assumptions
from .figures import drawings_of
from .lines import (
    COLUMNS,
    MACHINE,
    Entry,
    Line,
    column_text,
    deviations,
    differing,
    full_size,
    lines_of,
    recipes_of,
    setting,
    unique_records,
)

NOTE = (
    "Errors are top-1 in percent at the last epoch, mean ± std (n-1) over seeds. A difference is paired by seed, with its 95% Student-t "
    "interval, unadjusted: it covers the seeds, not the choice of test samples. A verdict is a paired t test with Holm's correction for "
    "all verdicts of this report, so that an interval may exclude 0 and the verdict be inconclusive. "
    "Runs that diverged are counted, and left out of every mean and pair. The best measured epoch is chosen by the set that it is measured "
    "on: it flatters every method, and is given only because the program of the author's port prints such a number; the README of the port "
    "does not say of which epoch its errors are."
)
ONE_SEED = "A cell with one seed has no standard deviation and no interval: a sign or an order that rests on it is no evidence."
INSIDE = " “Inside” says that the interval contains the difference that the paper reports."


# what a deviation is called, with its value in %, or as it is
SHARES = {"train_fraction": "trained on {}% of the images", "width": "a network with {}% of the channels"}
EPOCHS = ("epochs", "evaluate_every")  # whose values are numbers of epochs
PHRASES = {
    "network": "the network is {}",
    "epochs": "trained for {}",
    "batch_size": "trained in batches of {}",
    "learning_rate": "trained with a learning rate of {} at first",
    "momentum": "trained with a momentum of {}",
    "weight_decay": "trained with a weight decay of {}",
    "evaluate_every": "measured on the test set once in {} and at the end",
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
        where = "all cells" if len(names) == len(entries) else listed(names)
        value = counted(ours, "epoch") if name in EPOCHS else value_text(100 * ours if name in SHARES else ours)
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


def headline(entries: Sequence[Entry], scale: Scale) -> list[str]:
    """What was run, and how far it may be compared with the paper."""
    names = dict.fromkeys(entry.cell.table for entry in entries)
    tables = [TABLES[name].title.partition(":")[0] if name in TABLES else name for name in names]
    planned = {recipe.id for entry in entries for recipe in entry.recipes}
    runs = unique_records(entries)
    seeds = sorted({record.recipe.seed for record in runs})
    lost = len(runs) - len(kept(runs))
    done = f"{len(runs)} of {counted(len(planned), 'run')} done" if len(runs) < len(planned) else counted(len(runs), "run")
    sentences = [
        f"{listed(tables)}: {counted(len(entries), 'cell')}, {done}"
        + (f", {lost} of them diverged" if lost else "")
        + (f"; n = {counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))})." if seeds else "."),
        f"Scale {scale.name}: {scale.description.rstrip('.')}.",
        *(
            f"Other than at this scale: {name} {ours}, in place of {usual}."
            for name, usual, ours in sorted(other_than_at_scale(entries, scale), key=str)
        ),
    ]
    if not full_size(entries):
        sentences.append(
            "This is not the paper's experiment at full size: its numbers are not comparable in level with the paper's. "
            "Only the order of the methods and the sign of their differences can be compared."
        )
    return sentences + who_diverged(runs)


def other_than_at_scale(entries: Sequence[Entry], scale: Scale) -> set[tuple[str, Any, Any]]:
    """Fields that the command gave, but for those of the machine: (field, at this scale, in the runs)."""
    pairs = [(entry.cell.recipes([0], scale)[0], recipe) for entry in entries for recipe in entry.recipes]
    return {(name, *values) for pair in pairs for name, values in differing(*pair).items() if name not in MACHINE}


def table_sentences(lines: Sequence[Line]) -> list[str]:
    """What a table says as a whole."""
    verdicts = [line.verdict for line in lines if line.judged is not None]
    sentences = []
    if verdicts:
        counts = [f"{verdicts.count(word)} {word}" for word in ("better", "worse", "inconclusive") if word in verdicts]
        sentences.append(f"Against {BASELINE}, of {counted(len(verdicts), 'cell')}: {', '.join(counts)}.")
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
    if any(len(line.errors) == 1 for line in lines):
        sentences.append(ONE_SEED)
    return sentences


def hardware(records: Sequence[RunRecord]) -> list[str]:
    """The machines of the runs, each with the number of runs it made."""
    counts: dict[str, int] = {}
    for record in records:
        recipe, machine = record.recipe, record.environment
        threads = machine.get("threads", recipe.threads)
        text = f"{machine['processor']}, device {recipe.device}, {counted(threads, 'thread')}"
        text += f", {recipe.processes} processes" if recipe.processes > 1 else ""
        text += f", {recipe.precision}" if recipe.precision != "float32" else ""
        counts[text] = counts.get(text, 0) + 1
    return [f"{text} ({counted(count, 'run')})" for text, count in counts.items()]


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
        cell, entry, judged = line.cell, line.entry, line.judged
        pairs: list[tuple[float | None, float | None]] = [
            *((number.mean, number.std) if number else (None, None) for number in (cell.paper, cell.port)),
            *(moments(values.values()) if values else (None, None) for values in (line.errors, line.best)),
        ]
        values = [cell.table, cell.row, cell.column, cell.name, scale.name, *(value for pair in pairs for value in pair)]
        values += [len(entry.records), len(entry.recipes), line.diverged, " ".join(map(str, sorted(line.errors)))]
        values += [line.baseline.cell.name if line.baseline else None]
        mean = statistics.fmean(line.pairs.values()) if line.pairs else None
        interval = judged.paired.over_seeds if judged else None
        values += [mean, *((interval.low, interval.high) if interval else (None, None)), line.verdict if judged else None]
        values += [line.paper_difference, line.inside, line.command]
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


def as_json(line: Line) -> dict[str, Any]:
    """A line for ``--json``."""
    cell, judged = line.cell, line.judged
    return {
        "cell": cell.name,
        "paper": cell.paper and vars(cell.paper),
        "port": cell.port and vars(cell.port),
        "errors": line.errors,
        "diverged": line.diverged,
        "runs": {"finished": len(line.entry.records), "planned": len(line.entry.recipes)},
        "judged": judged and dataclasses.asdict(judged),
        "verdict": judged and line.verdict,
    }


def write(out: Path, entries: Sequence[Entry], scale: Scale, command: str, console: Console) -> list[Line]:
    """Print the tables, write ``report.html``, ``report.md``, ``report.csv`` and the figures into ``out``; the lines of all tables."""
    lines = lines_of(entries, scale)
    tables: dict[str, list[Line]] = {}
    for line in lines:
        tables.setdefault(line.cell.table, []).append(line)
    sections = [section_of(name, group) for name, group in tables.items()]
    note = NOTE + INSIDE * any(line.inside is not None for line in lines)
    drawings, runs = drawings_of(lines, not full_size(entries)), unique_records(entries)
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
        "seconds": duration(sum(record.seconds for record in runs)),
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
    console.print(f"{out / 'report.html'}  this report with figures; report.md and report.csv lie beside it", markup=False, highlight=False)
    return lines
