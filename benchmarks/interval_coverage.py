"""How often intervals and verdicts are right, in simulated comparisons whose truth is known: results/bench/interval_coverage.json."""

import argparse
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from common import write
from largemargin.lab import stats
from largemargin.lab.comparison.design import looks_of

Array = NDArray[np.float64]

# standard deviations of the score by which a method gets a sample wrong: of samples, seeds, samples of one method, and the rest
SAMPLES, SEEDS, METHOD_SAMPLES, REST = 1.5, 0.1, 0.3, 0.6
# of seeds of one method: in the first case the choice of test samples matters most, in the second the choice of seeds
METHOD_SEEDS = (0.05, 0.4)
OFFSET = -1.5  # some 20% errors
SAMPLES_A_SET = 500


def outcomes(rng: np.random.Generator, n: int, m: int, method_seeds: float) -> tuple[Array, float]:
    """Differences (n, m) of the errors of two equally good methods in percent; the mean over all seeds with just these samples."""
    samples, seeds = rng.normal(0, SAMPLES, m), rng.normal(0, SEEDS, (n, 1))
    wrong, truth = [], []
    for _ in range(2):
        of_method = rng.normal(0, METHOD_SAMPLES, m)
        score = OFFSET + samples + of_method + seeds + rng.normal(0, method_seeds, (n, 1)) + rng.normal(0, REST, (n, m))
        wrong.append(100.0 * (score > 0))
        spread = np.sqrt(SEEDS**2 + method_seeds**2 + REST**2)
        truth.append(100 * scipy_stats.norm.cdf((OFFSET + samples + of_method) / spread).mean())
    return wrong[0] - wrong[1], float(truth[0] - truth[1])


def covers(interval: stats.Interval | None, truth: float) -> bool:
    """An interval that cannot be computed says nothing wrong."""
    return interval is None or interval.low <= truth <= interval.high


def coverage(n: int, m: int, method_seeds: float, comparisons: int, seed: int, bootstrap: bool = True) -> dict[str, float]:
    """The share of intervals that hold the truth: over seeds for these samples, and over seeds and samples, where it is 0."""
    rng = np.random.default_rng([seed, n, m])
    counts = {"over_seeds": 0, "over_seeds_and_samples": 0} | ({"bootstrap": 0} if bootstrap else {})
    for _ in range(comparisons):
        differences, truth = outcomes(rng, n, m, method_seeds)
        found = stats.paired(differences.mean(axis=1))
        assert found is not None
        counts["over_seeds"] += covers(found.over_seeds, truth)
        counts["over_seeds_and_samples"] += covers(stats.two_way_interval(differences), 0.0)
        if bootstrap:
            counts["bootstrap"] += covers(stats.crossed_bootstrap(differences, resamples=1000), 0.0)
    return {name: count / comparisons for name, count in counts.items()}


def family_error(methods: int, looks: tuple[int, ...], comparisons: int, seed: int) -> float:
    """The share of reports with a wrong verdict, of methods that equal their baseline; pairs are added at each of the looks."""
    rng = np.random.default_rng([seed, methods, *looks])
    wrong = 0
    for _ in range(comparisons):
        errors = rng.normal(size=(looks[-1], methods + 1))
        differences = errors[:, 1:] - errors[:, :1]  # all methods have one baseline
        for n in looks:
            p_values = np.atleast_1d(scipy_stats.ttest_1samp(differences[:n], 0.0).pvalue)
            if min(stats.adjusted(p_values.tolist(), len(looks))) < stats.LEVEL:
                wrong += 1
                break
    return wrong / comparisons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comparisons", type=int, default=2000)
    comparisons = parser.parse_args().comparisons
    intervals = [
        {"method_seeds": spread, "seeds": n, "samples": SAMPLES_A_SET} | coverage(n, SAMPLES_A_SET, spread, comparisons, seed=0)
        for spread in METHOD_SEEDS
        for n in (3, 5, 10, 20)
    ]
    families: list[dict[str, Any]] = [
        {"methods": methods, "looks": looks, "wrong": family_error(methods, looks, 5 * comparisons, seed=0)}
        for methods in (1, 5)
        for looks in ((5,), looks_of(5, 20))
    ]
    for row in [*intervals, *families]:
        print(row)
    write("interval_coverage", {"comparisons": comparisons, "intervals": intervals, "families": families})


if __name__ == "__main__":
    main()
