"""Paired comparisons of methods over seeds and test samples: numbers in, numbers out."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .stopping import interrupts_end_at_once

Array = NDArray[np.float64]
Verdict = Literal["better", "worse", "inconclusive"]

CONFIDENCE = 0.95
LEVEL = 0.05  # of the family of all verdicts of a report, two-sided
POWER = 0.8
BOOTSTRAP_COVERAGE = {3: 0.77, 5: 0.86, 10: 0.9, 20: 0.93}  # by seeds, in the worse of two cases: benchmarks/interval_coverage.py
NO_SPREAD = 1e-9  # a smaller standard deviation is rounding


@dataclass(frozen=True)
class Interval:
    """A 95% confidence interval of a mean difference, in the unit of the differences."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Paired:
    """The differences ``method - baseline`` of paired runs, one for each seed, and what they say."""

    n: int  # pairs
    mean: float
    std: float  # over seeds, with n - 1
    over_seeds: Interval | None  # Student's t; None without spread
    p: float  # two-sided: the paired t test, or the sign-flip test if all pairs differ by the same amount
    sign_flip_p: float  # exact
    over_seeds_and_samples: Interval | None = None  # two-way random effects; None if the outcomes of the samples are not known
    bootstrap: Interval | None = None  # crossed, BCa

    @property
    def has_spread(self) -> bool:
        return self.std > NO_SPREAD

    @property
    def d_z(self) -> float | None:
        """The standardised paired difference, mean / std; None without spread."""
        return self.mean / self.std if self.has_spread else None

    @property
    def detectable(self) -> float | None:
        """The true difference that this many pairs of this spread detect 8 times in 10; None without spread."""
        return detectable_d_z(self.n) * self.std if self.has_spread else None

    def pairs_needed(self, difference: float) -> int | None:
        """The pairs of this spread that detect a true ``difference`` 8 times in 10; None without spread."""
        return pairs_needed(abs(difference) / self.std) if self.has_spread else None


def paired_by_seed(values: Mapping[int, float], baseline: Mapping[int, float]) -> Paired | None:
    """:func:`paired` of ``values - baseline`` over the seeds that both have."""
    return paired([values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())])


def paired(differences: ArrayLike, of_samples: ArrayLike | None = None) -> Paired | None:
    """What paired differences say; None for fewer than two pairs.

    Args:
        differences: shape ``(n,)``: method minus baseline for each seed.
        of_samples: shape ``(n, m)``: the same for each seed and test sample, whose mean over samples is ``differences``.

    Raises:
        ValueError: if a difference is not finite, or the shapes do not fit.
    """
    stats = _scipy().stats
    d = _finite(differences, 1)
    if len(d) < 2:
        return None
    std = float(d.std(ddof=1))
    flip = sign_flip_p(d)
    if std <= NO_SPREAD:
        interval, p = None, flip
    else:
        test = stats.ttest_1samp(d, 0.0)
        low, high = test.confidence_interval(CONFIDENCE)
        interval, p = Interval(float(low), float(high)), float(test.pvalue)
    both = bootstrap = None
    if of_samples is not None:
        matrix = _finite(of_samples, 2)
        if len(matrix) != len(d):
            raise ValueError(f"of_samples: expected a row for each of the {len(d)} seeds, got shape {matrix.shape}")
        both, bootstrap = two_way_interval(matrix), crossed_bootstrap(matrix)
    return Paired(len(d), float(d.mean()), std, interval, p, flip, both, bootstrap)


def two_way_interval(differences: ArrayLike) -> Interval | None:
    """The interval of the mean over seeds and samples, both random: ``d_is = mu + a_i + b_s + e_is``.

    The variance of the grand mean is ``var(a) / n + var(b) / m + var(e) / (n m)``, estimated from the mean squares of the two-way
    table, with Satterthwaite's degrees of freedom. Components below 0 count as 0. None without spread, or with one seed or sample.
    """
    stats = _scipy().stats
    d = _finite(differences, 2)
    n, m = d.shape
    if n < 2 or m < 2:
        return None
    mean, of_seeds, of_samples = d.mean(), d.mean(axis=1), d.mean(axis=0)
    squares_seeds = m * np.square(of_seeds - mean).sum()
    squares_samples = n * np.square(of_samples - mean).sum()
    squares = np.square(d - mean).sum()
    df = np.array([n - 1, m - 1, (n - 1) * (m - 1)])
    ms_seeds, ms_samples, ms_rest = np.array([squares_seeds, squares_samples, max(squares - squares_seeds - squares_samples, 0.0)]) / df
    # the three terms of the variance, each with the degrees of freedom of its mean square
    terms = np.array([max(ms_seeds, ms_rest), max(ms_samples, ms_rest), -ms_rest])
    variance = terms.sum() / (n * m)
    if variance <= NO_SPREAD**2:
        return None
    freedom = terms.sum() ** 2 / (np.square(terms) / df).sum()
    half = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * variance**0.5
    return Interval(float(mean - half), float(mean + half))


def crossed_bootstrap(differences: ArrayLike, resamples: int = 2000) -> Interval | None:
    """The BCa interval of the mean if seeds and samples are drawn again, each with replacement.

    It is too narrow with few seeds: :data:`BOOTSTRAP_COVERAGE`. None without spread, or with one seed or sample.
    """
    stats = _scipy().stats
    d = _finite(differences, 2)
    if min(d.shape) < 2 or d.mean(axis=1).std() <= NO_SPREAD:
        return None
    total, of_seed, of_sample = d.sum(), d.sum(axis=1), d.sum(axis=0)

    def mean(seeds: Any, samples: Any, axis: int) -> Any:
        count = seeds.shape[axis] * samples.shape[axis]
        # the jackknife leaves out one seed or one sample; its sum is known
        if seeds.shape[axis] < len(of_seed):
            return (total - of_seed[_left_out(seeds, len(of_seed))]) / count
        if samples.shape[axis] < len(of_sample):
            return (total - of_sample[_left_out(samples, len(of_sample))]) / count
        drawn = zip(np.atleast_2d(seeds), np.atleast_2d(samples), strict=True)
        means = [np.bincount(i, minlength=len(of_seed)) @ d @ np.bincount(s, minlength=len(of_sample)) / count for i, s in drawn]
        return np.array(means) if seeds.ndim > 1 else means[0]

    found = stats.bootstrap(
        (np.arange(len(of_seed)), np.arange(len(of_sample))),
        mean,
        n_resamples=resamples,
        batch=100,  # indices of 100 resamples at a time
        vectorized=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(found.low), float(found.high))


def sign_flip_p(differences: ArrayLike) -> float:
    """The exact two-sided p of the sign-flip test: under the null each difference could as well have the other sign.

    Beyond 16 pairs it is estimated from 100,000 draws.
    """
    stats = _scipy().stats
    d = _finite(differences, 1)
    found = stats.permutation_test(
        (d,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=100_000,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def wilcoxon_p(differences: ArrayLike) -> float:
    """The exact two-sided p of Wilcoxon's signed-rank test: the sign-flip test of :func:`signed_ranks`.

    Differences of 0 are ranked and then count for neither side (Pratt). Beyond 16 differences p is estimated from 100,000 draws.
    """
    return sign_flip_p(signed_ranks(differences))


def signed_ranks(differences: ArrayLike) -> Array:
    """The rank of each difference by its size, with its sign; equal sizes share the mean of their ranks."""
    d = _finite(differences, 1)
    sizes = [float(f"{size:.9g}") for size in abs(d)]  # equal sizes differ by the rounding errors of the scores
    return np.asarray(np.sign(d) * _scipy().stats.rankdata(sizes))


def smallest_sign_flip_p(n: int) -> float:
    """The smallest p that ``n`` pairs allow."""
    return min(1.0, 2.0 ** (1 - n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: the family-wise error of all of them is held."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, worst = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def adjusted(p_values: Sequence[float], looks: int = 1) -> list[float]:
    """Holm's adjusted p values, times the number of planned looks at growing data (Bonferroni): the error of all looks is held."""
    return [min(1.0, looks * p) for p in holm(p_values)]


def verdict(mean: float, adjusted_p: float, lower_is_better: bool = True) -> Verdict:
    """Better or worse than the baseline if the adjusted p is below 5%."""
    if not adjusted_p < LEVEL:
        return "inconclusive"
    return "better" if (mean < 0) == lower_is_better else "worse"


@cache
def power(d_z: float, n: int) -> float:
    """The probability that a two-sided paired t test at 5% finds a standardised difference ``d_z`` with ``n`` pairs."""
    stats = _scipy().stats
    critical, shift = stats.t.ppf(1 - LEVEL / 2, n - 1) / (n - 1) ** 0.5, d_z * n**0.5
    # the noncentral t distribution, as a mean over the standard deviation: scipy's own gives NaN for few pairs and a large shift
    spread = stats.chi(n - 1)
    points = spread.ppf((np.arange(4000) + 0.5) / 4000)
    return float((stats.norm.sf(critical * points - shift) + stats.norm.cdf(-critical * points - shift)).mean())


@cache
def pairs_needed(d_z: float, at_most: int = 100_000) -> int | None:
    """The pairs by which a paired t test finds ``d_z`` 8 times in 10; None if more than ``at_most``."""
    if d_z <= 0:
        return None
    low, high = 1, 2  # power(low) < POWER <= power(high)
    while power(d_z, high) < POWER:
        low, high = high, 2 * high
        if low > at_most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(d_z, middle) >= POWER else (middle, high)
    return high


@cache
def detectable_d_z(n: int) -> float:
    """The standardised difference that ``n`` pairs find 8 times in 10."""
    optimize = _scipy().optimize
    high = 0.1
    while power(high, n) < POWER:
        high *= 2
    return float(optimize.brentq(lambda d_z: power(d_z, n) - POWER, high / 2, high, xtol=1e-6))


def _scipy() -> Any:
    with interrupts_end_at_once():
        import scipy.optimize
        import scipy.stats

    return scipy


def _left_out(indices: Any, count: int) -> Any:
    """The index that ``0 .. count - 1`` has and each row of ``indices`` has not."""
    return count * (count - 1) // 2 - indices.sum(axis=-1)


def _finite(values: ArrayLike, ndim: int) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim:
        raise ValueError(f"differences: expected {ndim} dimensions, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("differences: expected finite numbers; leave out the runs that diverged")
    return array


def mean_or_nan(values: Sequence[float]) -> float:
    """The mean; NaN of none."""
    return statistics.fmean(values) if values else float("nan")


def moments(values: Iterable[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation with n - 1; None of fewer than two values."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread(mean: float, std: float | None, decimals: int = 2) -> str:
    return f"{mean:.{decimals}f}" + ("" if std is None else f" ± {std:.{decimals}f}")
