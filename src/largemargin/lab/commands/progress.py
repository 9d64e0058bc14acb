"""How many runs are shown while they last."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import LabError
from ..queue.budget import Budget
from ..queue.runs import run_all, threads_note
from ..results import Record, num_finished, result_of
from ..run.planned import Note, Planned, text_of
from ..words import counted


def interrupted(recipes: Sequence[Planned], runs: Path) -> LabError:
    """What to say in place of a KeyboardInterrupt."""
    done = num_finished(recipes, runs)
    kept = f"{done} of {counted(len(recipes), 'run')} {'is' if done == 1 else 'are'} done and kept in {runs.parent}"
    return LabError(f"interrupted; {kept}. Run the same command to continue.")


def say_what_is_left(recipes: Sequence[Planned], runs: Path, budget: Budget, console: Console) -> None:
    """Where the budget did not allow all runs; raises LabError where there is not a single record."""
    left = [recipe for recipe in recipes if result_of(recipe, runs) is None]
    if not left:
        return
    line = budget.what_is_left(left, len(recipes))
    if len(left) == len(recipes):
        raise LabError(line)
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def reading_images(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Hears how many images of how many are decoded, and shows it: a bar on a terminal, elsewhere a line at the start and each minute."""
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("reading images", start=False)

            def show(done: int, total: int) -> None:
                if done == 1:
                    progress.start_task(task)
                progress.update(task, completed=done, total=total)

            yield show
        return
    last = 0.0

    def say(done: int, total: int) -> None:
        nonlocal last
        if done == 1 or time.monotonic() - last > 60:
            last = time.monotonic()
            line = f"reading {counted(total, 'image')}" if done == 1 else f"{done} of {counted(total, 'image')} read"
            console.print(line, markup=False, highlight=False)

    yield say


def run_with_progress(
    recipes: Sequence[Planned], runs: Path, jobs: int, console: Console, executor: str = "local", **options: Any
) -> list[Record]:
    """A live display on a terminal; elsewhere a line for each finished run, and one a minute. ``options`` are of :func:`run_all`."""

    def on_message(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    if executor == "local" and (note := threads_note(recipes, jobs)):
        on_message(note)
    finished = {recipe.id for recipe in recipes if result_of(recipe, runs) is not None}
    if not console.is_terminal:
        last = time.monotonic()
        epochs, total_epochs = 0, sum(recipe.epochs for recipe in recipes if recipe.id not in finished)

        def on_epoch(recipe: Planned, epoch: int | Note) -> None:
            nonlocal last, epochs
            if isinstance(epoch, Note):
                return
            epochs += 1
            if time.monotonic() - last > 60 and total_epochs > len(recipes):  # of runs of one epoch, each has a line of its own
                last = time.monotonic()
                console.print(f"{epochs} of {counted(total_epochs, 'epoch')} of all runs", markup=False, highlight=False)
            if epoch == recipe.epochs:
                finished.add(recipe.id)
                console.print(
                    f"[{len(finished)}/{len(recipes)}] {text_of(recipe)}",
                    markup=False,
                )

        return run_all(recipes, runs, jobs, on_epoch, executor, on_message=on_message, **options)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = progress.add_task("epochs of all runs", total=sum(recipe.epochs for recipe in recipes if recipe.id not in finished))
        bars: dict[str, Any] = {}
        seen: dict[str, int] = {}

        def on_epoch(recipe: Planned, epoch: int | Note) -> None:
            label = text_of(recipe)
            if recipe.id not in bars:
                bars[recipe.id] = progress.add_task(label, total=recipe.epochs)
            if isinstance(epoch, Note):
                progress.update(bars[recipe.id], description=f"{label}: {epoch}")
                return
            progress.update(bars[recipe.id], completed=epoch)
            progress.update(total, advance=epoch - seen.get(recipe.id, 0))
            seen[recipe.id] = epoch
            if epoch == recipe.epochs:
                progress.remove_task(bars[recipe.id])

        return run_all(recipes, runs, jobs, on_epoch, executor, on_message=on_message, **options)


def given_jobs(options: Any) -> int | None:
    """The number of ``--jobs``, None for what suits the device."""
    return None if options.jobs is None else int(options.jobs)


def given_budget(options: Any) -> Budget | None:
    """That of ``--minutes``, which counts from here on."""
    if options.minutes is None:
        return None
    if options.executor != "local":
        raise LabError(f"--minutes is for --executor local, got --executor {options.executor}; leave one of them out")
    return Budget(float(options.minutes), graph=not options.eager)
