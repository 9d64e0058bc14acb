"""Paired statistics: known values, laws, and, slow, the error rates that they promise."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from largemargin.lab import stats
from largemargin.lab.comparison.design import looks_of

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.parametrize(("d_z", "pairs"), [(0.5, 34), (1, 10), (1.5, 6), (2, 5), (3, 4)])
def test_the_pairs_that_a_difference_needs(d_z, pairs):
    assert stats.pairs_needed(d_z) == pairs
    assert stats.power(d_z, pairs - 1) < stats.POWER <= stats.power(d_z, pairs)


def test_nothing_detects_a_difference_of_zero():
    assert stats.pairs_needed(0.0) is None
    assert stats.pairs_needed(1e-4) is None


@pytest.mark.parametrize("n", [2, 3, 5, 10, 100])
def test_the_detectable_difference_has_the_power(n):
    assert stats.power(stats.detectable_d_z(n), n) == pytest.approx(stats.POWER, abs=1e-5)


@pytest.mark.parametrize(("d_z", "n"), [(0.5, 34), (1.0, 3), (2.0, 5), (0.0, 7)])
def test_power_is_that_of_the_noncentral_t_distribution(d_z, n):
    noncentral, critical = scipy_stats.nct(n - 1, d_z * n**0.5), scipy_stats.t.ppf(0.975, n - 1)
    assert stats.power(d_z, n) == pytest.approx(noncentral.sf(critical) + noncentral.cdf(-critical), abs=2e-5)


def test_the_interval_over_seeds_is_students():
    found = stats.paired([-1.0, -2.0, -3.0, -2.5])
    low, high = scipy_stats.t.interval(0.95, 3, loc=found.mean, scale=found.std / 2)
    assert (found.over_seeds.low, found.over_seeds.high) == pytest.approx((low, high))
    assert found.p == pytest.approx(scipy_stats.ttest_rel([0, 0, 0, 0], [1.0, 2.0, 3.0, 2.5]).pvalue)
    assert found.d_z == pytest.approx(found.mean / found.std)


def test_one_pair_says_nothing():
    assert stats.paired([1.0]) is None


def test_a_diverged_run_is_refused():
    with pytest.raises(ValueError, match="leave out the runs that diverged"):
        stats.paired([1.0, float("nan"), 2.0])


@pytest.mark.parametrize(("n", "p"), [(2, 0.5), (5, 0.0625), (6, 0.03125)])
def test_equal_differences_are_judged_by_the_sign_flip_test_alone(n, p):
    found = stats.paired([-0.7] * n, np.full((n, 4), -0.7))
    assert found.p == found.sign_flip_p == p == stats.smallest_sign_flip_p(n)
    assert found.over_seeds is found.over_seeds_and_samples is found.bootstrap is None
    assert found.d_z is found.detectable is found.pairs_needed(1.0) is None


def test_no_difference_at_all_is_no_evidence():
    found = stats.paired([0.0] * 8)
    assert found.p == found.sign_flip_p == 1.0


def test_the_sign_flip_test_counts_all_signs():
    differences = [0.3, -0.1, 0.9, 0.4]
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1).T
    means = signs @ np.array(differences)
    assert stats.sign_flip_p(differences) == np.mean(abs(means) >= sum(differences) - 1e-12)


finite = st.floats(-10, 10, allow_nan=False).map(lambda value: round(value, 3))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms())
def test_holm_keeps_order_and_is_never_below_p(p_values, random):
    found = stats.holm(p_values)
    assert all(p <= q <= 1 for p, q in zip(p_values, found, strict=True))
    assert min(found) == min(1.0, len(p_values) * min(p_values))
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    assert [found[i] for i in order] == sorted(found)
    shuffled = random.sample(range(len(p_values)), len(p_values))
    assert stats.holm([p_values[i] for i in shuffled]) == [found[i] for i in shuffled]


def test_holm_of_one_is_p():
    assert stats.holm([0.03]) == [0.03]
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_planned_look_costs_its_share():
    assert looks_of(5, 20) == (5, 10, 15, 20)
    assert looks_of(5, 6) == (5, 6)
    assert looks_of(5, 5) == (5,)
    assert stats.adjusted([0.01, 0.5], looks=4) == [0.08, 1.0]


@pytest.mark.parametrize(
    ("mean", "p", "lower", "verdict"),
    [(-1, 0.01, True, "better"), (-1, 0.01, False, "worse"), (1, 0.01, True, "worse"), (-1, 0.05, True, "inconclusive")],
)
def test_the_verdict_rests_on_the_adjusted_p(mean, p, lower, verdict):
    assert stats.verdict(mean, p, lower) == verdict


@given(st.integers(2, 6), st.integers(2, 6), st.integers(0, 1000), finite)
def test_the_two_way_interval_moves_with_the_differences(n, m, seed, shift):
    d = np.random.default_rng(seed).normal(size=(n, m))
    found, moved = stats.two_way_interval(d), stats.two_way_interval(d + shift)
    assert (moved.low - shift, moved.high - shift) == pytest.approx((found.low, found.high), abs=1e-9)
    assert (found.low + found.high) / 2 == pytest.approx(d.mean())
    turned = stats.two_way_interval(d.T)  # seeds and samples have one role
    assert (turned.low, turned.high) == pytest.approx((found.low, found.high))


def test_the_two_way_variance_is_that_of_its_components():
    """With effects of seeds alone, the interval is Student's over seeds; with effects of samples alone, over samples."""
    rng = np.random.default_rng(0)
    seeds = rng.normal(size=(6, 1)) + np.zeros((1, 50))
    for d, values in ((seeds, seeds[:, 0]), (seeds.T, seeds[:, 0])):
        found = stats.two_way_interval(d)
        low, high = scipy_stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=scipy_stats.sem(values))
        assert (found.low, found.high) == pytest.approx((low, high))


def test_the_two_way_interval_by_hand():
    """Mean squares 8 (seeds), 2 (samples) and .5 (rest) of a 2 x 2 table: variance (8 + 2 - .5) / 4."""
    d = np.array([[1.0, 3.0], [-2.0, -1.0]])
    mean = d.mean()
    ms_seeds = 2 * sum((row.mean() - mean) ** 2 for row in d)
    ms_samples = 2 * sum((column.mean() - mean) ** 2 for column in d.T)
    ms_rest = ((d - mean) ** 2).sum() - ms_seeds - ms_samples
    variance = (ms_seeds + ms_samples - ms_rest) / 4
    freedom = (ms_seeds + ms_samples - ms_rest) ** 2 / (ms_seeds**2 + ms_samples**2 + ms_rest**2)
    found = stats.two_way_interval(d)
    assert found.high - mean == pytest.approx(scipy_stats.t.ppf(0.975, freedom) * variance**0.5)


def test_the_bootstrap_is_scipys_with_every_statistic_computed_in_full():
    d = np.random.default_rng(1).normal(0.5, 1, size=(4, 30))

    def mean(seeds, samples):
        return d[np.ix_(seeds, samples)].mean()

    expected = scipy_stats.bootstrap(
        (np.arange(4), np.arange(30)), mean, n_resamples=500, batch=100, vectorized=False, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    found = stats.crossed_bootstrap(d, resamples=500)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_one_seed_or_one_sample_has_no_two_way_interval(shape):
    d = np.random.default_rng(0).normal(size=shape)
    assert stats.two_way_interval(d) is None
    assert stats.crossed_bootstrap(d) is None


@pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="the source distribution has no records")
def test_the_coverage_that_reports_quote_is_the_recorded_one():
    record = json.loads((ROOT / "results" / "bench" / "interval_coverage.json").read_text())
    worst: dict[int, float] = {}
    for row in record["intervals"]:
        worst[row["seeds"]] = min(worst.get(row["seeds"], 1.0), row["bootstrap"])
        assert row["over_seeds"] > 0.93 and row["over_seeds_and_samples"] > 0.92
    assert {n: round(share, 2) for n, share in worst.items()} == stats.BOOTSTRAP_COVERAGE
    assert all(row["wrong"] < 0.055 for row in record["families"])


def assert_rate(share, count, nominal, slack=0.0):
    """Within four standard errors of a simulated rate, and ``slack``."""
    assert abs(share - nominal) <= slack + 4 * (nominal * (1 - nominal) / count) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("method_seeds", [0.05, 0.4])
def test_both_intervals_cover_as_often_as_they_say(n, method_seeds):
    import interval_coverage

    found = interval_coverage.coverage(n, 300, method_seeds, comparisons=1500, seed=1, bootstrap=False)
    assert_rate(found["over_seeds"], 1500, 0.95)
    # Satterthwaite's degrees of freedom are an approximation, which errs to the safe side where samples matter most
    assert_rate(found["over_seeds_and_samples"], 1500, 0.95, slack=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("methods", [1, 2, 5])
def test_no_report_has_a_wrong_verdict_more_often_than_one_in_twenty(methods):
    import interval_coverage

    single, adaptive = (interval_coverage.family_error(methods, looks, 4000, seed=1) for looks in ((5,), looks_of(5, 20)))
    limit = 0.05 + 4 * (0.05 * 0.95 / 4000) ** 0.5
    assert 0.02 < single < limit
    assert 0.01 < adaptive < limit


@pytest.mark.slow
def test_the_bootstrap_is_too_narrow_with_few_seeds():
    import interval_coverage

    found = interval_coverage.coverage(3, 300, 0.4, comparisons=300, seed=1)
    assert found["bootstrap"] < 0.85 < found["over_seeds_and_samples"]
