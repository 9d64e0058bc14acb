"""Many runs, a few at a time: what is finished is never done again, what is interrupted goes on, what fails is tried once more."""

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import records
from .budget import Budget
from .errors import LabError, RunFailed
from .executors import EXECUTORS
from .executors.attempt import Job, Outcome
from .recipe import Recipe
from .words import counted

ATTEMPTS = 2
GRACE_SECONDS = 20.0  # for the checkpoints of interrupted runs
MEMORY_OF_A_RUN = 12 * 2**30  # bytes of a GPU: a guess, above the largest network for CIFAR at batch 128
HELD_SECONDS = 2.0  # between two looks at a run that another process does


def result_of(recipe: Recipe, runs: Path) -> dict[str, Any] | None:
    """The record of a finished run, or None."""
    path = runs / recipe.id / "result.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        records.check(record)
        if Recipe(**record["recipe"]).id != recipe.id or not {"test", "epochs", "environment"} <= record.keys():
            raise ValueError("it is of another run")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LabError(f"{path} is not the record of its run ({error}); remove it to run it again") from error
    return record


def num_finished(recipes: Sequence[Recipe], runs: Path) -> int:
    """How many of these runs have their record."""
    return sum(result_of(recipe, runs) is not None for recipe in recipes)


class Plan:
    """What is left to do. A run that fails goes to the end of the line, once; one that another process does is asked for again.

    With a ``budget`` only the runs that it allows are given out.
    """

    def __init__(
        self, recipes: Sequence[Recipe], on_message: Callable[[str], object] = lambda _: None, budget: Budget | None = None
    ) -> None:
        self._waiting = deque(recipes)
        self._held: deque[tuple[float, Recipe]] = deque()
        self._running: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._on_message = on_message
        self._held_before = False
        self._budget = budget
        self._said: set[str] = set()
        self.reasons: dict[str, str] = {}  # of the last failure of each run
        self.refused: set[str] = set()  # runs for which the user must mend something

    @property
    def unfinished(self) -> bool:
        waits = bool(self._held) and (self._budget is None or self._budget.left > 0)  # for another process
        return waits or bool(self._running) or self._next() is not None

    def take(self) -> Recipe | None:
        """The next run, or None where there is none now."""
        if self._held and self._held[0][0] <= time.monotonic() and (self._budget is not None or not self._waiting):
            self._waiting.append(self._held.popleft()[1])
        recipe = self._next()
        if recipe is None:
            return None
        self._waiting.remove(recipe)
        self._running.add(recipe.id)
        if self._budget is not None:
            self._budget.started(recipe)
        return recipe

    def _next(self) -> Recipe | None:
        if self._budget is None:
            return self._waiting[0] if self._waiting else None
        return self._budget.choose(self._waiting)

    def epoch(self, recipe: Recipe, epoch: int) -> None:
        """Hear that a run has done an epoch."""
        if self._budget is not None:
            self._budget.epoch(recipe, epoch)

    def say(self, recipe: Recipe, line: str) -> None:
        """Pass on what a run has to say, once for all runs of its loss."""
        if (line := f"{recipe.loss}: {line}") not in self._said:
            self._said.add(line)
            self._on_message(line)

    def ended(self, recipe: Recipe, outcome: Outcome) -> None:
        """Hear how an attempt at a run that was taken ended."""
        self._running.remove(recipe.id)
        if self._budget is not None:
            self._budget.ended(recipe, outcome.kind == "done")
        if outcome.kind == "held":
            self._held.append((time.monotonic() + HELD_SECONDS, recipe))
            if not self._held_before:
                self._held_before = True
                self._on_message(f"{recipe.id} is being done by another process; it is waited for, and any other such run")
        elif outcome.kind != "done":
            self.reasons[recipe.id] = outcome.reason
            self._failures[recipe.id] += 1
            if outcome.kind == "refused":
                self.refused.add(recipe.id)
            if outcome.kind == "failed" and self._failures[recipe.id] < ATTEMPTS:  # an error of the user's is no better the second time
                self._waiting.append(recipe)


def run_all(
    recipes: Sequence[Recipe],
    runs: Path,
    jobs: int,
    on_epoch: Callable[[Recipe, int], object],
    executor: str = "local",
    *,
    on_message: Callable[[str], object] = lambda _: None,
    work: str = "largemargin.lab.train:train",
    budget: Budget | None = None,
    **options_of_a_run: Any,
) -> list[dict[str, Any]]:
    """Do the runs that are not finished, ``jobs`` at a time; the records of all, in order.

    ``on_epoch(recipe, epoch)`` hears of every epoch that ends, ``on_message`` a line for the user; ``options_of_a_run`` are keyword
    arguments of ``work``, by name the function that does a run. A run that fails leaves its traceback in its folder, does not stop the
    others and is tried once more after them. An interrupt, or SIGTERM, ends the processes and leaves finished runs and checkpoints in
    place. With ``executor="ray"``, ``jobs`` runs share each GPU and a Ray cluster decides how many are done at a time. With a ``budget``
    the runs that it does not allow are left for another time.
    """
    if executor not in EXECUTORS:
        raise LabError(f"--executor {executor}: choose one of {', '.join(EXECUTORS)}")
    waiting = list({recipe.id: recipe for recipe in recipes if result_of(recipe, runs) is None}.values())
    plan = Plan(waiting, on_message, budget)
    if waiting:
        if budget is not None:
            budget.plan(waiting, runs.resolve(), jobs, on_message)
        if executor == "ray":
            from .executors.ray_cluster import execute
        else:
            from .executors.local import execute
        execute(plan, Job(runs.resolve(), work, options_of_a_run), jobs, on_epoch)
    failed = [recipe for recipe in recipes if result_of(recipe, runs) is None and (budget is None or recipe.id in plan.reasons)]
    if failed:
        reason = plan.reasons.get(failed[0].id, "it left no record")
        if (text := runs / failed[0].id / "error.txt").is_file():
            reason += f" (whole text: {text})"
        kind = LabError if all(recipe.id in plan.refused for recipe in failed) else RunFailed
        raise kind(
            f"{len(failed)} of {counted(len(recipes), 'run')} could not be done: {reason}. The others are kept; the same command goes on."
        )
    return [record for recipe in recipes if (record := result_of(recipe, runs)) is not None]


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(device: str, streamed: bool, on_cpu: int) -> int:
    """How many runs to do at a time; ``on_cpu`` where the device is no GPU of CUDA.

    A run leaves a GPU idle while the host starts it, draws an epoch and writes. A run that reads image files has as many processes as
    there are cores already. Three runs need three times the memory.
    """
    if not device.startswith("cuda"):
        return on_cpu
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return 1 if streamed else max(1, min(3, num_cores() // 2, free // MEMORY_OF_A_RUN))


def threads_note(recipes: Sequence[Recipe], jobs: int) -> str | None:
    """A line of warning where the runs of the CPU want more threads at a time than there are cores."""
    cores, threads = num_cores(), max((recipe.threads for recipe in recipes if recipe.device == "cpu"), default=0)
    jobs = min(jobs, len(recipes))
    if jobs * threads <= cores:
        return None
    return f"{counted(jobs, 'run')} at a time of {counted(threads, 'thread')} share {counted(cores, 'core')}: fewer --jobs may be faster"


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt meanwhile, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
