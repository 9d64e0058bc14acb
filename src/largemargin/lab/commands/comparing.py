"""The path of every comparison: its runs, the choice of lam, the looks at the verdicts, the tables and the files of the report.

``largemargin compare`` takes it with networks for images, ``lab.compare`` with a training function of the user's own.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from ..comparison import page
from ..comparison.choose import choose, chosen_of, print_choices
from ..comparison.figures import overview
from ..comparison.folder import MARKER, finished_records, outcomes_of, reopen, why_no_samples, write_marker
from ..comparison.own import OwnComparison
from ..comparison.plan import Comparison
from ..comparison.recommendation import advice, is_clear
from ..comparison.table import Row, print_evidence, print_tables, remarks, results_csv, summarise
from ..comparison.table import as_json as row_as_json
from ..errors import LabError, NotDone
from ..files import write_text
from ..metrics import ERROR
from ..queue.budget import Budget
from ..results import result_of
from ..run.environment import device_label
from ..run.planned import Planned
from ..words import counted
from .asked import missing
from .progress import interrupted, run_with_progress, say_what_is_left

Compared = TypeVar("Compared", Comparison, OwnComparison)


def say_if_other(comparison: Comparison | OwnComparison, out: Path, console: Console) -> None:
    """Tell the user if the folder held another comparison."""
    if (out / MARKER).is_file() and _without_looks(reopen(out)) != _without_looks(comparison):
        console.print(f"{out} held a comparison with other options: its runs are kept, its table and report are replaced", markup=False)


def _without_looks(comparison: Comparison | OwnComparison) -> Comparison | OwnComparison:
    """The comparison before seeds are added."""
    return dataclasses.replace(comparison, seeds=()) if comparison.max_seeds else comparison


def do_runs(
    comparison: Compared, out: Path, jobs: int, console: Console, executor: str, budget: Budget | None, **options: Any
) -> tuple[Compared, list[NotDone]]:
    """Do what is left of a comparison. Return the comparison with the seeds that were added, and the errors of the runs that failed.

    ``options`` are those of :func:`~largemargin.lab.queue.runs.run_all`.
    """
    runs = out / "runs"
    failed: list[NotDone] = []

    def stage(recipes: Sequence[Planned], what: str, **options: Any) -> None:
        finished = [runs / recipe.id for recipe in recipes if result_of(recipe, runs) is not None]
        console.print(
            f"{counted(len(recipes), what)} of {comparison.subject}, {jobs} at a time on {device_label(comparison.device)}, into {out}"
            + (f"; {len(finished)} already done" if finished else ""),
            markup=False,
            highlight=False,
        )
        for line in missing(finished, **options):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        try:
            run_with_progress(recipes, runs, jobs, console, executor, budget=budget, **options)
        except NotDone as error:
            failed.append(error)
        except KeyboardInterrupt:
            raise interrupted(recipes, runs) from None

    def chosen() -> dict[Any, float]:
        validating = finished_records(comparison, out)[0]
        return chosen_of(choose(validating, comparison.metric(validating)))

    if comparison.choosing:
        stage(comparison.validating_recipes(), "validating run", **options | ({"save": False} if "save" in options else {}))
    if comparison.choosing and isinstance(comparison, Comparison):  # the result of another shows it
        validating = finished_records(comparison, out)[0]
        print_choices(comparison, choose(validating, comparison.metric(validating)), console)
    for seeds in comparison.looks:
        if seeds > len(comparison.seeds):
            comparison = dataclasses.replace(comparison, seeds=tuple(range(seeds)))
            write_marker(comparison, out)
        recipes: Sequence[Planned] = comparison.recipes(chosen())
        if recipes and (failed or len(recipes) == comparison.num_runs):  # there was time for all choices
            stage(recipes, "run", **options)
        if seeds == comparison.looks[-1]:
            break
        records = finished_records(comparison, out)[1]
        if len(records) < comparison.num_runs or is_clear(summarised(comparison, records, out)):
            break
    if budget is not None:
        tried = {name for error in failed for name in error.reasons}
        planned = [*(comparison.validating_recipes() if comparison.choosing else []), *recipes]
        say_what_is_left([recipe for recipe in planned if recipe.id not in tried], runs, budget, console)
    return comparison, failed


def summarised(comparison: Comparison | OwnComparison, records: Sequence[Any], out: Path | None) -> list[Row]:
    """The rows of the table; with the predictions in ``out``, over samples too."""
    metric, looks = comparison.metric(records), len(comparison.looks)
    outcomes = outcomes_of(records, out) if out is not None and metric == ERROR else {}
    return summarise(records, outcomes, looks, metric, why_no_samples(records, outcomes, metric))


def print_and_write(
    comparison: Comparison | OwnComparison, out: Path, console: Console, choices_too: bool = True, failed: Sequence[NotDone] = ()
) -> list[Row]:
    """The tables, and the files of the report, of the runs that are finished."""
    validating, records = finished_records(comparison, out)
    choices = choose(validating, comparison.metric(validating))
    if choices_too:
        print_choices(comparison, choices, console)
    if not records:
        if failed:
            raise failed[0]
        raise LabError(f"{out}: no run of its last comparison is finished yet; give that command again")
    with console.status("pairing the predictions of the runs"):
        rows = summarised(comparison, records, out)
    print_tables(rows, console)
    print_evidence(rows, console)
    if len(records) < comparison.num_runs:
        of_all = f"{len(records)} of {counted(comparison.num_runs, 'run')} {'is' if len(records) == 1 else 'are'} finished"
        console.print(f"{of_all} and in the table; run the command of the comparison again to do the others.", highlight=False)
    for sentence in [*remarks(records), *advice(rows)]:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    try:
        write_text(out / "results.csv", results_csv(records))
        if validating:
            write_text(out / "choice.csv", results_csv(validating, "validation"))
        else:
            (out / "choice.csv").unlink(missing_ok=True)  # of another comparison
        write_text(out / "errors.svg", overview(rows, background="white"))
        html, markdown = page.render(comparison, out, records, rows, choices)
        write_text(out / "report.html", html)
        write_text(out / "report.md", markdown)
    except OSError as error:
        raise LabError(
            f"{out} cannot be written to: {error.strerror or error}; the runs are kept; make room, then run largemargin report {out}"
        ) from error
    return rows


def as_json(comparison: Comparison | OwnComparison, rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """The document of ``--json``: what was compared, the table, the choices, and how far the runs are."""
    validating, records = finished_records(comparison, out)
    choices = [choice.as_json() for choice in choose(validating, comparison.metric(validating))]
    return {
        "out": str(out),
        "comparison": vars(comparison),
        "runs": {"finished": len(records), "planned": comparison.num_runs},
        "rows": [row_as_json(row) for row in rows],
        "choices": choices,
        "remarks": remarks(records),
    }
