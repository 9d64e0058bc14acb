"""Scores of finished runs, checked so that every run of a method has its pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import LabError
from ..words import counted

Pair = tuple[str, int]  # data set and seed


@dataclass(frozen=True)
class Score:
    """The metrics of one run."""

    method: str
    seed: int
    data_set: str  # empty if there is only one
    metrics: Mapping[str, float]
    where: str  # the line or the file that it comes from
    wrong: NDArray[np.bool_] | None = None  # which test samples it gets wrong


@dataclass(frozen=True)
class Scores:
    """All runs: each method has a run for each pair, a data set and a seed. The baseline comes first."""

    source: str
    baseline: str
    of: Mapping[str, Mapping[Pair, Score]] = field(repr=False)  # by method
    no_samples: str = "it takes the predictions of the runs; give them with --predictions."  # why nothing is said of test samples

    @property
    def metrics(self) -> list[str]:
        return list(self._first.metrics)

    @property
    def data_sets(self) -> list[str]:
        return list(dict.fromkeys(data_set for data_set, _ in self.of[self.baseline]))

    @property
    def others(self) -> list[str]:
        return [method for method in self.of if method != self.baseline]

    @property
    def _first(self) -> Score:
        return next(iter(self.of[self.baseline].values()))

    def seeds(self, data_set: str) -> list[int]:
        return sorted(seed for of_data, seed in self.of[self.baseline] if of_data == data_set)

    def values(self, method: str, metric: str, data_set: str) -> list[float]:
        """One for each seed of the data set, in order."""
        return [self.of[method][data_set, seed].metrics[metric] for seed in self.seeds(data_set)]

    def wrong(self, method: str, data_set: str) -> Any:
        """Which samples each seed gets wrong, shape (seeds, samples); None if that is not known, or not of the same samples."""
        found = [self.of[method][data_set, seed].wrong for seed in self.seeds(data_set)]
        return None if self.no_samples or any(one is None for one in found) else np.array(found)


def collected(source: str, baseline: str | None, scores: Sequence[Score], no_samples: str = Scores.no_samples) -> Scores:
    """The runs by method and pair; raises LabError for what has no honest comparison."""
    of: dict[str, dict[Pair, Score]] = {}
    for score in scores:
        runs = of.setdefault(score.method, {})
        if (twin := runs.get((score.data_set, score.seed))) is not None:
            raise LabError(
                f"{source}: {twin.where} and {score.where} are both of method {score.method}, {_named(score.data_set, score.seed)}; each "
                "run must come once, so remove one or mend its seed"
            )
        runs[score.data_set, score.seed] = score
    if baseline is None:
        raise LabError(f"--baseline is missing: name the method of {source} that the others are compared with, {', '.join(of)}")
    if baseline not in of:
        raise LabError(f"--baseline {baseline} is not a method of {source}, which has {', '.join(of)}; name one of these")
    if len(of) < 2:
        raise LabError(f"{source} has no method but the baseline {baseline}; add the runs of another one")
    of = {baseline: of[baseline]} | of
    _check_pairs(source, of)
    for data_set in dict.fromkeys(data_set for data_set, _ in of[baseline]):
        seeds = [seed for of_data, seed in of[baseline] if of_data == data_set]
        if len(seeds) < 2:
            where = f" on data set {data_set}" if data_set else ""
            raise LabError(
                f"{source} has {counted(len(seeds), 'seed')}{where} ({seeds[0]}), and a difference without its spread over seeds shows "
                "nothing; run every method with at least 2 seeds, better 5"
            )
    return Scores(source, baseline, of, no_samples)


def _check_pairs(source: str, of: dict[str, dict[Pair, Score]]) -> None:
    """Every method has the pairs of all others."""
    owners = {pair: (method, score) for method, runs in reversed(of.items()) for pair, score in runs.items()}
    for method, runs in of.items():
        missing = [pair for pair in owners if pair not in runs]
        if missing:
            owner, score = owners[missing[0]]
            more = f" ({counted(len(missing), 'such run')} in all)" if len(missing) > 1 else ""
            raise LabError(
                f"{source}: method {method} has no run of {_named(*missing[0])}, and method {owner} has one ({score.where}){more}; runs "
                "are compared in pairs, so add the run, or remove the others of that seed"
            )


def _named(data_set: str, seed: int) -> str:
    return (f"data set {data_set}, " if data_set else "") + f"seed {seed}"
