"""Which runs can still finish in the minutes that a command has, judged by how long runs take on this machine."""

import functools
import multiprocessing
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LabError
from ..run.pace import measured_pace, with_any_samples
from ..run.planned import Planned
from ..run.recipe import Recipe
from ..words import counted, hours
from .attempt import Inputs

CPU_BATCHES, GPU_BATCHES = 2, 40  # of a measured epoch
PATIENCE = 0.25  # of the time left: longer than this no measurement takes


@functools.cache
def cost_key(run: Planned) -> Hashable:
    """Kept, because a budget asks for it again and again."""
    return run.cost_key


@functools.cache
def pair_key(run: Planned) -> Hashable:
    """Kept, because a budget asks for it again and again."""
    return run.pair_key


def finish(places: Iterable[float], durations: Iterable[float]) -> float:
    """When the last of ``durations`` ends, if each starts at the place that is free first; ``places`` are free after so long."""
    free, last = list(places), 0.0
    for duration in durations:
        soonest = min(range(len(free)), key=free.__getitem__)
        free[soonest] += duration
        last = max(last, free[soonest])
    return last


class Cost(NamedTuple):
    """What runs take here, in seconds."""

    start: float  # of a process, until its first run trains
    of_a_pass: float  # over the whole training set, and its share of evaluations


class _Running:
    """A run that was started, and when its last epoch ended."""

    def __init__(self, recipe: Planned, start: float) -> None:
        self.recipe, self.begun, self.epochs = recipe, time.monotonic() + start, 0


class Budget:
    """Lets the runs of a pair start if all of them can finish in time, and otherwise none.

    The time counts from the making of this object. Before the first run starts, ``measure`` says what a run takes that has the machine to
    itself. As soon as a run has done two epochs, these say it.
    """

    def __init__(self, minutes: float, measure: "Callable[[Planned, Path, float], Cost] | None" = None, graph: bool = True) -> None:
        self.minutes, self.deadline = minutes, time.monotonic() + 60 * minutes
        self._measure: Callable[[Any, Path, float], Cost] = measure or functools.partial(measured_cost, graph=graph)
        self._costs: dict[Hashable, Cost] = {}
        self._running: dict[str, _Running] = {}
        self._processes = 0  # that were started
        self._accepted: set[str] = set()

    def plan(self, waiting: Sequence[Planned], runs: Path, jobs: int, say: Callable[[str], object] = lambda _: None) -> None:
        """Take the runs to be planned, of which ``jobs`` are done at a time, and measure what they take."""
        self._jobs, self._processes = min(jobs, len(waiting)), 0
        new = {cost_key(recipe): recipe for recipe in waiting if cost_key(recipe) not in self._costs}
        if new and self._measure is not nothing_known:
            say(f"measuring how long {'a run takes' if len(new) == 1 else f'{len(new)} kinds of runs take'} here")
        for key, recipe in new.items():
            start, of_a_pass = self._measure(recipe, runs, PATIENCE * self.left)
            # runs on an accelerator share it, those on the CPU have cores of their own
            self._costs[key] = Cost(start, of_a_pass * (1 if recipe.device == "cpu" else self._jobs))

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def seconds(self, recipe: Planned) -> float:
        """What a run takes, in a process that is there."""
        return self._costs[cost_key(recipe)].of_a_pass * recipe.work

    def choose(self, waiting: Sequence[Planned]) -> Planned | None:
        """The first of the waiting runs that may start now."""
        if accepted := next((recipe for recipe in waiting if recipe.id in self._accepted), None):
            return accepted
        pairs: dict[Hashable, list[Planned]] = {}
        for recipe in waiting:
            pairs.setdefault(pair_key(recipe), []).append(recipe)
        for pair in pairs.values():
            if finish(self._places(pair[0]), map(self.seconds, pair)) <= self.left:
                self._accepted |= {recipe.id for recipe in pair}
                return pair[0]
        return None

    def _places(self, recipe: Planned) -> list[float]:
        """After how long each process is free; one that is not there yet has to start."""
        busy = [self._remaining(running) for running in self._running.values()]
        idle = max(0, self._processes - len(busy))
        new = max(0, self._jobs - len(busy) - idle)
        return [*busy, *[0.0] * idle, *[self._costs[cost_key(recipe)].start] * new]

    def _remaining(self, running: _Running) -> float:
        of_an_epoch = self.seconds(running.recipe) / running.recipe.epochs
        left = (running.recipe.epochs - running.epochs) * of_an_epoch
        return max(0.0, left - (time.monotonic() - running.begun))

    def started(self, recipe: Planned) -> None:
        """Hear that a run was started."""
        new = len(self._running) >= self._processes
        self._processes += new
        self._running[recipe.id] = _Running(recipe, self._costs[cost_key(recipe)].start if new else 0.0)

    def epoch(self, recipe: Planned, epoch: int) -> None:
        """Hear that an epoch has ended. A run that goes on from a checkpoint does not begin with the first."""
        if (running := self._running.get(recipe.id)) is None:
            return
        now = time.monotonic()
        if running.epochs:
            of_an_epoch, key = (now - running.begun) / (epoch - running.epochs), cost_key(recipe)
            self._costs[key] = self._costs[key]._replace(of_a_pass=of_an_epoch * recipe.epochs / recipe.work)
        running.begun, running.epochs = now, epoch

    def ended(self, recipe: Planned, done: bool) -> None:
        """Hear that a run has ended."""
        running = self._running.pop(recipe.id, None)
        if running is not None and done and not running.epochs:  # it told of no epoch: its whole time says what a run takes
            self._costs[cost_key(recipe)] = Cost(0.0, (time.monotonic() - running.begun) / recipe.work)
        if not done:  # its time is spent: a second attempt must fit in the time left
            self._accepted.discard(recipe.id)

    def what_is_left(self, left: Sequence[Planned], whole: int) -> str:
        """A line for the user: ``left`` of the ``whole`` runs, and about how long they take."""
        seeds = sorted({recipe.seed for recipe in left})
        of_seeds = f"seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"
        line = f"--minutes {self.minutes:g}: {len(left)} of {counted(whole, 'run')} left ({of_seeds})"
        known = all(self._costs.get(cost_key(recipe), Cost(0.0, 0.0)).of_a_pass for recipe in left)
        if known:  # others were not planned: there was no time for what comes before them
            seconds = finish([0.0] * self._jobs, map(self.seconds, left))
            line += f", about {hours(seconds)}" if 0 < seconds < float("inf") else ", and there was no time to measure how long they take"
        if len(left) == whole:
            return f"{line}. None was started: the runs of one seed are started together or not at all. Give more minutes."
        return f"{line}. Run the same command to do them; the runs of one seed are started together or not at all."


def nothing_known(recipe: Planned, runs: Path, patience: float) -> Cost:
    """Of a run that cannot be measured beforehand: the first of them start, and those that ended say what the others take."""
    return Cost(0.0, 0.0)


def measured_cost(recipe: Recipe, runs: Path, patience: float, graph: bool = True) -> Cost:
    """Of a few batches, trained and evaluated in a process of its own, which leaves no memory of a GPU in use.

    What takes longer than ``patience`` seconds counts as endless.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure_a_pass, args=(theirs, recipe, runs, graph), daemon=True)
    began = time.monotonic()
    process.start()
    theirs.close()
    try:
        if not ours.poll(patience):
            return Cost(0.0, float("inf"))
        found = ours.recv()
    except EOFError as error:
        raise LabError(f"--minutes: the process that measures how long {recipe.id} takes died; leave --minutes out to see why") from error
    finally:
        process.kill()
        process.join()
    if isinstance(found, str):
        raise LabError(f"--minutes: could not measure how long {recipe.id} takes: {found}")
    of_a_pass, of_the_measurement = found
    return Cost(time.monotonic() - began - of_the_measurement, of_a_pass)


def _measure_a_pass(pipe: Any, recipe: Recipe, runs: Path, graph: bool) -> None:
    try:
        pipe.send(_measured_pass(recipe, runs, graph))
    except Exception as error:  # told by the process that asked
        pipe.send(f"{type(error).__name__}: {error}")


def _measured_pass(recipe: Recipe, runs: Path, graph: bool) -> tuple[float, float]:
    """The seconds of a pass, and those of the epoch from which they follow."""
    whole = Inputs().data_set(recipe, runs)
    few = whole.few(recipe.batch_size * (CPU_BATCHES if recipe.device == "cpu" else GPU_BATCHES))
    pace = measured_pace(with_any_samples(recipe), few, graph)
    of_evaluation = pace.evaluation * len(whole.test_labels) / recipe.evaluate_every
    of_the_epoch = pace.training * len(few.train_labels) + pace.evaluation * len(few.test_labels)
    return pace.training * len(whole.train_labels) + of_evaluation, of_the_epoch
