"""Which runs can still finish in the minutes that a command has: judged by what this machine takes for them."""

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .recipe import BASELINE, OF_SOME_LOSSES, Recipe
from .words import counted

CPU_BATCHES, GPU_BATCHES = 2, 40  # of a measured epoch


def cost_key(recipe: Recipe) -> tuple[Any, ...]:
    """Recipes with the same key take the same time for the same :func:`work`."""
    names = "network width dropout data data_digest image_size batch_size evaluate_every device threads precision channels_last compile"
    return (bool(recipe.validation_fraction), *(getattr(recipe, name) for name in names.split()))


def work(recipe: Recipe) -> float:
    """Passes over the whole training set."""
    return recipe.epochs * recipe.train_fraction * (1 - recipe.validation_fraction)


def pair_key(recipe: Recipe) -> Recipe:
    """The same for runs that differ in their loss alone: they are compared as pairs."""
    of_the_loss: dict[str, Any] = dict.fromkeys(OF_SOME_LOSSES)
    return dataclasses.replace(recipe, loss=BASELINE, **of_the_loss)


def finish(busy: Iterable[float], durations: Iterable[float], jobs: int) -> float:
    """When the last of ``durations`` ends, from now on, if each starts as soon as one of ``jobs`` places, busy for so long, is free."""
    places = sorted(busy)[-jobs:]
    places += [0.0] * (jobs - len(places))
    last = 0.0
    for duration in durations:
        soonest = min(range(jobs), key=places.__getitem__)
        places[soonest] += duration
        last = max(last, places[soonest])
    return last


class Cost(NamedTuple):
    """What runs take here, in seconds."""

    start: float  # of a process, until it trains
    of_a_pass: float  # over the whole training set, and its share of evaluations


class Budget:
    """Lets the runs of a pair start if all of them can finish in time, and otherwise none.

    The time counts from the making of this object. What a run takes is known from the runs of this command as soon as one has done two
    epochs. Until then ``measure`` says it, of a run that has the machine to itself.
    """

    def __init__(self, minutes: float, measure: Callable[[Recipe, Path], Cost] | None = None) -> None:
        self.minutes, self.deadline = minutes, time.monotonic() + 60 * minutes
        self._measure = measured_cost if measure is None else measure
        self._costs: dict[tuple[Any, ...], Cost] = {}
        self._running: dict[str, tuple[Recipe, float, int]] = {}  # since when, and epochs done
        self._accepted: set[str] = set()

    def plan(self, waiting: Sequence[Recipe], runs: Path, jobs: int) -> None:
        """Hear what there is to do."""
        self._runs, self._jobs = runs, min(jobs, len(waiting))

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def seconds(self, recipe: Recipe) -> float:
        """What a run takes, from its start to its end."""
        key = cost_key(recipe)
        if key not in self._costs:
            start, of_a_pass = self._measure(recipe, self._runs)
            # runs on an accelerator share it, those on the CPU have cores of their own
            self._costs[key] = Cost(start, of_a_pass * (1 if recipe.device == "cpu" else self._jobs))
        cost = self._costs[key]
        return cost.start + cost.of_a_pass * work(recipe)

    def allows(self, recipe: Recipe, waiting: Sequence[Recipe]) -> bool:
        """Whether a waiting run may start now."""
        if recipe.id in self._accepted:
            return True
        if self.left <= 0:
            return False
        pair = [other for other in waiting if pair_key(other) == pair_key(recipe)]
        before = [other for other in waiting if other.id in self._accepted]
        if finish(map(self._remaining, self._running), map(self.seconds, [*before, *pair]), self._jobs) > self.left:
            return False
        self._accepted |= {other.id for other in pair}
        return True

    def _remaining(self, run_id: str) -> float:
        recipe, since, _ = self._running[run_id]
        return max(0.0, self.seconds(recipe) - (time.monotonic() - since))

    def started(self, recipe: Recipe) -> None:
        self._running[recipe.id] = (recipe, time.monotonic(), 0)

    def epoch(self, recipe: Recipe, epoch: int) -> None:
        """Hear that an epoch is done. A run that goes on from a checkpoint does not begin with the first."""
        _, since, before = self._running.get(recipe.id, (recipe, 0.0, epoch))
        if before:
            of_an_epoch, key = (time.monotonic() - since) / (epoch - before), cost_key(recipe)
            self._costs[key] = self._costs.get(key, Cost(0.0, 0.0))._replace(of_a_pass=of_an_epoch * recipe.epochs / work(recipe))
        elif recipe.id in self._running:
            self._running[recipe.id] = (recipe, time.monotonic(), epoch)

    def ended(self, recipe: Recipe, done: bool) -> None:
        self._running.pop(recipe.id, None)
        if not done:  # it has had its time: a second attempt has to fit in what is left
            self._accepted.discard(recipe.id)

    def what_is_left(self, left: Sequence[Recipe], whole: int) -> str:
        """A line for the user: ``left`` of the ``whole`` runs, and about how long they take, where that is known."""
        seeds = " ".join(map(str, sorted({recipe.seed for recipe in left})))
        line = f"--minutes {self.minutes:g}: {len(left)} of {counted(whole, 'run')} left (seeds {seeds})"
        if all(cost_key(recipe) in self._costs for recipe in left):
            line += f", about {finish([], map(self.seconds, left), self._jobs) / 60:.1f} minutes"
        return f"{line}. The same command goes on with them; runs of one seed are started together or not at all."


def measured_cost(recipe: Recipe, runs: Path) -> Cost:
    """Of a few batches, trained and evaluated in a process of its own, which leaves no memory of a GPU in use."""
    import concurrent.futures
    import multiprocessing

    began = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        of_a_pass = pool.submit(_measured_pass, recipe, runs).result()
    return Cost(time.monotonic() - began, of_a_pass)


def _measured_pass(recipe: Recipe, runs: Path) -> float:
    from .executors.attempt import DataSets
    from .stopping import Told
    from .train import Run, start

    whole = DataSets().of(recipe, runs)
    few = whole.few(recipe.batch_size * (CPU_BATCHES if recipe.device == "cpu" else GPU_BATCHES))
    alone = dataclasses.replace(recipe, train_fraction=1.0, label_noise=0.0, validation_fraction=0.0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(alone, few, Path(folder), start(alone), Told())
        for epoch in range(2):  # the first compiles and warms up
            began = time.monotonic()
            run.train_epoch()
            trained = time.monotonic()
            run.evaluate()
            evaluated = time.monotonic()
            run.progress.epoch, run.progress.step = epoch + 1, 0
    of_training = (trained - began) * len(whole.train_labels) / len(few.train_labels)
    return of_training + (evaluated - trained) * len(whole.test_labels) / len(few.test_labels) / recipe.evaluate_every
