"""The runs of a comparison: every loss with every seed at every share of label noise, and before them those that choose among lambdas.

This module is read by the command line before anything heavy is imported, so it needs the standard library alone.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from ..metrics import ERROR, Metric
from ..run.noise import Noise
from ..run.planned import Planned

Chosen = Mapping[tuple[str, Noise], float]  # the lam of a loss at a share of label noise
Run = TypeVar("Run", bound=Planned)

FIRST_LOOK, MAX_SEEDS = 5, 20  # of --seeds auto


def looks_of(first: int, most: int) -> tuple[int, ...]:
    """How many pairs there are at each of at most 4 looks, evenly spaced."""
    return tuple(sorted({first, *(first + (most - first) * step // 3 for step in (1, 2, 3))}))


class Design(Generic[Run]):
    """What all comparisons have; a subclass says what one run is."""

    losses: tuple[str, ...]  # their names
    lam: tuple[float, ...]
    seeds: tuple[int, ...]
    label_noise: tuple[Noise, ...]
    validation_fraction: float
    max_seeds: int | None
    device: str

    @property
    def noun(self) -> str:
        """What a sample of the test set is called."""
        return "sample"

    def planned(self, loss: str, seed: int, noise: Noise, *, lam: float, **more: Any) -> Run:
        """The run of this loss and this seed; a validating one with ``validation_fraction``."""
        raise NotImplementedError

    def has_lam(self, loss: str) -> bool:
        """Whether lam is a setting of this loss."""
        raise NotImplementedError

    def command(self) -> str:
        """What makes this comparison again."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Of the report."""
        raise NotImplementedError

    @property
    def subject(self) -> str:
        """What a run is of, after "15 runs of"."""
        raise NotImplementedError

    def told(self) -> dict[str, Any]:
        """What ``compare.json`` holds of it."""
        raise NotImplementedError

    @property
    def choice_note(self) -> str:
        """What stands under the table of choices."""
        raise NotImplementedError

    def metric(self, records: Sequence[Any]) -> Metric:
        """The number that the runs of these records are compared by."""
        return ERROR

    @property
    def choosing(self) -> tuple[str, ...]:
        """The losses whose lam has to be chosen."""
        return tuple(loss for loss in self.losses if self.has_lam(loss)) if len(self.lam) > 1 else ()

    @property
    def looks(self) -> tuple[int, ...]:
        """How many seeds there are at each look at the verdicts; one look where the seeds are given."""
        return looks_of(FIRST_LOOK, self.max_seeds) if self.max_seeds else (len(self.seeds),)

    @property
    def num_runs(self) -> int:
        """Runs that measure themselves on the test set, when all are done."""
        return len(self.losses) * len(self.seeds) * len(self.label_noise)

    def validating_recipes(self) -> list[Run]:
        """The runs by which lam is chosen: each measures itself on a part of its training set and never sees the test set."""
        return [
            self.planned(loss, seed, noise, lam=lam, validation_fraction=self.validation_fraction)
            for seed in self.seeds[: self.looks[0]]  # seeds that are added change no choice
            for noise in self.label_noise
            for loss in self.choosing
            for lam in self.lam
        ]

    def recipes(self, chosen: Chosen | None = None) -> list[Run]:
        """The runs compared, seed by seed, so that pairs are finished together; without those whose lam is not chosen yet."""
        runs = []
        for seed, noise, loss in itertools.product(self.seeds, self.label_noise, self.losses):
            lam = (chosen or {}).get((loss, noise)) if loss in self.choosing else self.lam[0]
            if lam is not None:
                runs.append(self.planned(loss, seed, noise, lam=lam))
        return runs

    @property
    def example(self) -> Run:
        """One of its runs, for what they share."""
        return self.planned(self.losses[0], self.seeds[0], self.label_noise[0], lam=self.lam[0])

    def all_recipes(self) -> list[Run]:
        """The validating runs and the runs compared, before any lam is chosen: the first of the given ones stands for it."""
        any_lam = {(loss, noise): self.lam[0] for loss in self.choosing for noise in self.label_noise}
        return [*self.validating_recipes(), *self.recipes(any_lam)] if self.choosing else self.recipes()
