"""What ``lab.compare`` returns: the table, the page, and why runs failed."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comparison import table
from ..comparison.folder import finished_records
from ..comparison.own import OwnComparison
from ..comparison.recommendation import advice
from ..comparison.table import Row, cells, columns_of, remarks
from ..errors import NotDone
from ..pages import page
from ..words import counted
from .comparing import print_and_write
from .screen import Screen


@dataclass(frozen=True)
class Result:
    """What a comparison found: ``print`` it, or let a notebook show it."""

    rows: Sequence[Row]
    report: Path | None  # the page with figures; None where no run is finished
    failures: Mapping[str, str]  # why runs could not be done, by their names
    text: str
    html: str

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows as dictionaries of plain numbers, with their verdicts."""
        return [table.as_json(row) for row in self.rows]


def result_of_runs(comparison: OwnComparison, out: Path, failed: Sequence[NotDone]) -> Result:
    """The tables, the report and what failed."""
    if failed and not any(finished_records(comparison, out)):
        return result_without_runs(comparison, out, failed)
    text, screen = _screen()
    rows = print_and_write(comparison, out, screen, failed=failed)
    reasons = reasons_of(failed)
    said = [f"{name} failed and is left out: {reason} ({out / 'runs' / name / 'error.txt'})" for name, reason in reasons.items()]
    report = out / "report.html"
    for line in [*said, f"{report}  this table with figures; results.csv has a line for each run, runs/ a record"]:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    html = page(
        "result.html.j2",
        columns=columns_of(rows),
        rows=[cells(row, rows) for row in rows],
        judged=[row.judged for row in rows if row.judged is not None],
        sentences=[*remarks(finished_records(comparison, out)[1]), *advice(rows), *said],
        report=report,
    )
    return Result(rows, report, reasons, text.getvalue(), html)


def result_without_runs(comparison: OwnComparison, out: Path, failed: Sequence[NotDone]) -> Result:
    """Why there is no table: each reason once, with the text of one run that it stopped."""
    reasons = reasons_of(failed)
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    lines = [f"{reason} ({out / 'runs' / found[0] / 'error.txt'})" for reason, found in names.items()]
    said = f"No run of {comparison.function} finished, so there is no table; {counted(len(reasons), 'run')} failed:"
    if len(lines) == 1:
        sentences = [f"{said} {lines[0]}"]
    else:
        sentences = [said, *(f"{counted(len(found), 'run')}: {line}" for line, found in zip(lines, names.values(), strict=True))]
    text, screen = _screen()
    for line in sentences:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
    return Result((), None, reasons, text.getvalue(), page("result.html.j2", rows=(), judged=(), sentences=sentences, report=None))


def _screen() -> tuple[io.StringIO, Screen]:
    """A screen that prints into a text."""
    text = io.StringIO()
    return text, Screen(file=text, width=140, emoji=False, force_jupyter=False)


def reasons_of(failed: Sequence[NotDone]) -> dict[str, str]:
    """Why runs could not be done, by their names."""
    return {name: reason for error in failed for name, reason in error.reasons.items()}
