"""The statistics of a row: equal to the paper's quantities at 50 digits, their derivatives to float64, and their laws."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import strategies
from combinations import every
from largemargin import RowStats, divergence, row_stats, rowstats
from largemargin.rows.all_classes import all_row_stats, all_row_stats_jvp, all_row_stats_vjp
from largemargin.rowstats import Record, finish, record, row_stats_jvp, row_stats_vjp
from measure import INF, RowScale, assert_within, compiles, roundings, same_bits
from problems import vjp_scale
from properties import assume, given, st
from registry import DIVERGENCES, DTYPES

SMOOTH = ("log_odds", "neg_entropy", "mean_log_q", "rho", "spread")


def paper_stats(f: list[float], y: int) -> dict[str, object]:
    """The statistics in the paper's quantities: -l is the logit of (3), rho is (7), the rest is (10) and (8)."""
    target, others = oracle.target_and_others(f, y)
    log_count = oracle.ctx.log(max(len(others), 1))
    return {
        "log_odds": target - oracle.log_sum_exp(others),
        "neg_entropy": oracle.kl_qu(f, y) - log_count,
        "mean_log_q": -oracle.kl_uq(f, y) - log_count if others else 0,
        "rho": oracle.rho(f, y),
        "spread": 2 * oracle.symmetric(f, y),
        "num_nontargets": len(others),
    }


def plain_stats(f: Tensor, y: int) -> Tensor:
    """The statistics as one would first write them, for autograd in float64 at moderate logits; needs a non-target."""
    others = f[[c for c in range(len(f)) if c != y and f[c] != -INF]]
    log_q = others.log_softmax(0)
    entropy, mean = (log_q.exp() * log_q).sum(), log_q.mean()
    return torch.stack([f[y] - others.logsumexp(0), entropy, mean, others.logsumexp(0) - others.max(), entropy - mean])


def vjp(f: Tensor, y: Tensor, upstream: Tensor, backend: str | None = None) -> Tensor:
    """The gradient of the statistics contracted with ``upstream`` (5, ...), through the public function."""
    leaf = f.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(row_stats(leaf, y, backend=backend)[:5], leaf, tuple(upstream))
    return gradient


# agreement with the paper


@given(row=strategies.rows())
def test_statistics_equal_the_paper(row, device):
    scale, truths = RowScale(*row), paper_stats(*row)
    for dtype in DTYPES:
        stats = row_stats(torch.tensor(row.logits, dtype=dtype, device=device), torch.tensor(row.target, device=device))
        for name, truth in truths.items():
            assert_within(getattr(stats, name), float(truth), getattr(scale, name), 2)


@given(data=st.data())
def test_statistics_of_every_class_equal_the_paper(data, device):
    f = data.draw(strategies.rows(max_classes=12)).logits
    found = [all_row_stats(torch.tensor(f, dtype=dtype, device=device)) for dtype in DTYPES]
    for y in (y for y in range(len(f)) if f[y] != -INF):
        scale = RowScale(f, y)
        # peeling the arg-max j adds (a - l) to a and divides by K: a's terms are also as large as the lead of j
        scale.mean_log_q = scale.spread = max(scale.mean_log_q, scale.log_odds)
        for name, truth in paper_stats(f, y).items():
            for stats in found:
                assert_within(getattr(stats, name)[y], float(truth), getattr(scale, name), 4)


@given(row=strategies.rows(min_classes=2, scales=(1e-2, 1.0, 5.0, 30.0)))  # farther down torch's sigmoid underflows early
def test_probability_and_entropy_of_the_row_follow_from_the_statistics(row, device):
    stats = row_stats(torch.tensor(row.logits, dtype=torch.float64, device=device), torch.tensor(row.target, device=device))
    kept = [value for value in row.logits if value != -INF]
    p = oracle.posterior([*kept, 0.0], len(kept))  # (9) over all classes: those but an extra one
    p_y = p[sum(value != -INF for value in row.logits[: row.target])]
    scale = RowScale(*row)
    got = stats.log_odds.sigmoid()
    assert_within(got, float(p_y), float(p_y) * (1 + float(1 - p_y) * scale.log_odds), 2)
    binary = torch.special.entr(got) + torch.special.entr((-stats.log_odds).sigmoid())
    entropy = -oracle.ctx.fsum(value * oracle.ctx.log(value) for value in p)
    assert_within(binary - (-stats.log_odds).sigmoid() * stats.neg_entropy, float(entropy), 2 + scale.rho, 4)


@every("offset", [0.0, 1e2, 1e4, 1e5])
def test_a_common_offset_costs_no_digits(offset, rng, device):
    f = (torch.randn(16, 50, generator=rng, dtype=torch.float64).to(device) * 3 + offset).float()
    y = torch.randint(50, (16,), generator=rng).to(device)
    stats = row_stats(f, y)
    for n in range(16):
        row = f[n].tolist()
        for name, truth in paper_stats(row, int(y[n])).items():
            # 2e-6 absolute is what the record promises; a stored LSE is 4.9e-4 off at 1e4
            assert abs(float(truth) - getattr(stats, name)[n].item()) <= 2e-6 * max(1, abs(float(truth)) / 8), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_many_classes_lose_no_digits(dtype, rng, device):
    f = (torch.randn(40_000, generator=rng, dtype=torch.float64).to(device) * 4).to(dtype)
    stats = row_stats(f, torch.tensor(7, device=device))
    if dtype == torch.float64:
        others = torch.cat([f[:7], f[8:]])
        terms = [math.exp(value) for value in others.tolist()]
        total = math.fsum(terms)
        truth: tuple[Any, ...] = (
            f[7].item() - math.log(total),
            math.fsum(a * b for a, b in zip(terms, others.tolist(), strict=True)) / total - math.log(total),
            math.fsum(others.tolist()) / len(others) - math.log(total),
        )
        scale = RowScale(f.tolist(), 7)
    else:
        truth, scale = row_stats(f.double(), torch.tensor(7, device=device))[:3], RowScale(f.tolist(), 7)
    for name, value in zip(SMOOTH, truth, strict=False):
        assert_within(getattr(stats, name), value, getattr(scale, name), 4)


# laws


@pytest.mark.parametrize("dtype", DTYPES)
def test_shift_invariance(dtype, rng, device):
    # multiples of 1/8 and powers of two: the shifted logits are exact, so nothing at all may change
    f = torch.randint(-128, 129, (32, 20), generator=rng).to(device, dtype) / 8
    y = torch.randint(20, (32,), generator=rng).to(device)
    g = torch.randn(5, 32, generator=rng).to(device, dtype)
    for offset in (1.0, -64.0, 2.0**14, -(2.0**17)):
        assert all(same_bits(a, b) for a, b in zip(row_stats(f, y), row_stats(f + offset, y), strict=True))
        assert same_bits(vjp(f, y, g), vjp(f + offset, y, g))
        assert all(same_bits(a, b) for a, b in zip(all_row_stats(f), all_row_stats(f + offset), strict=True))


@given(row=strategies.rows(min_classes=2), data=st.data())
def test_permutation_of_the_classes(row, data, device):
    order = data.draw(st.permutations(range(len(row.logits))))
    f = torch.tensor(row.logits, dtype=torch.float32, device=device)
    plain = row_stats(f, torch.tensor(row.target, device=device))
    permuted = row_stats(f[order], torch.tensor(order.index(row.target), device=device))
    scale = RowScale(*row)
    for name in SMOOTH:
        assert_within(getattr(permuted, name), getattr(plain, name).double(), getattr(scale, name), 3)


def parts_of(draw, num_classes: int, count: int) -> list[list[int]]:
    part = draw(st.lists(st.integers(0, count - 1), min_size=num_classes, max_size=num_classes))
    return [[c for c in range(num_classes) if part[c] == k] for k in range(count)]


def record_of(f: Tensor, classes: list[int], row: strategies.Row) -> Record:
    part = torch.full_like(f, -INF)
    members = [c for c in classes if c != row.target]
    part[members] = f[members]
    return record(part)


def merge(*records: Record) -> Record:
    return rowstats.merge(Record(*map(torch.stack, zip(*records, strict=True))))


@pytest.mark.parametrize("dtype", DTYPES)
@given(row=strategies.rows(min_classes=1), data=st.data())
def test_merge_equals_the_whole_and_is_associative(dtype, row, data, device):
    f = torch.tensor(row.logits, dtype=dtype, device=device)
    a, b, c = (record_of(f, classes, row) for classes in parts_of(data.draw, len(f), 3))
    scale = RowScale(*row)
    for merged in (merge(merge(a, b), c), merge(a, merge(b, c)), merge(c, merge(a, b))):
        stats = finish(merged, f[row.target])
        for name, truth in paper_stats(*row).items():
            assert_within(getattr(stats, name), float(truth), getattr(scale, name), 3)


@given(row=strategies.rows(min_classes=1))
def test_the_empty_record_is_the_identity_of_merge(row, device):
    f = torch.tensor(row.logits, device=device)
    whole, empty = record_of(f, list(range(len(f))), row), record_of(f, [], row)
    assert [value.item() for value in empty] == [-INF, 0, 0, 0, 0]
    for merged in (merge(whole, empty), merge(empty, whole)):
        assert all(same_bits(a, b) for a, b in zip(merged, whole, strict=True))


def test_merge_of_tiles_far_apart(device):
    # e^-20000 is 0: the lower tile must vanish from S and T, not turn them into 0 * inf
    low, high = torch.tensor([-2e4, -2.0001e4], device=device), torch.tensor([1.0, 0.0], device=device)
    merged = merge(record(low), record(high))
    assert merged.sum_exp.item() == pytest.approx(1 + math.exp(-1))
    assert merged.sum_exp_z.item() == pytest.approx(-math.exp(-1))
    assert merged.num_classes.item() == 4
    assert merged.sum_z.item() == pytest.approx(-1 - 2 * 20001 - 1, rel=1e-6)
    overflowing = merge(record(torch.tensor([-3e38], device=device)), record(torch.tensor([3e38], device=device)))
    assert [value.item() for value in overflowing[1:]] == [1, 0, -INF, 2]


@pytest.mark.parametrize("dtype", DTYPES)
@given(row=strategies.rows())
def test_rho_is_within_the_bounds_of_eq_4(dtype, row, device):
    stats = row_stats(torch.tensor(row.logits, dtype=dtype, device=device), torch.tensor(row.target, device=device))
    log_count = math.log(max(stats.num_nontargets.item(), 1))
    assert 0 <= stats.rho.item() <= log_count + 2 * torch.finfo(dtype).eps * log_count


@every("dtype", DTYPES)
@every("num_classes", [2, 3, 10, 1001])
def test_rho_reaches_the_bounds_of_eq_4(num_classes, dtype, device):
    uniform = torch.full((num_classes,), -3.7, dtype=dtype, device=device)
    uniform[0] = 5.0
    assert_within(row_stats(uniform, torch.tensor(0, device=device)).rho, math.log(num_classes - 1), 1 + math.log(num_classes - 1), 1)
    isolated = uniform.clone()
    isolated[-1] += 1000.0  # the others are 1000 nats below it
    assert row_stats(isolated, torch.tensor(0, device=device)).rho.item() == 0


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@given(row=strategies.rows())
def test_divergences_are_nonnegative_up_to_rounding(kind, dtype, row, device):
    stats = row_stats(torch.tensor(row.logits, dtype=dtype, device=device), torch.tensor(row.target, device=device))
    value, count = divergence(stats, kind).item(), stats.num_nontargets.item()
    assert value >= -4 * torch.finfo(dtype).eps * (1 + math.log(max(count, 1)))
    if count <= 1:
        assert value == 0


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_of_nearly_uniform_rows(kind, rng, device):
    # here D = Var(f) / 2 is far below the rounding of log K
    f = torch.randn(200, 1000, generator=rng).to(device) * 1e-4
    f.requires_grad_()
    value = divergence(row_stats(f, torch.zeros(200, dtype=torch.int64, device=device)), kind)
    assert (value >= -4 * torch.finfo(torch.float32).eps * (1 + math.log(999))).all()
    (gradient,) = torch.autograd.grad(value.sum(), f)
    # to first order the gradient of every divergence is (f_c - mean f) / K
    others = f.detach()[:, 1:].double()
    first_order = (others - others.mean(1, keepdim=True)) / 999
    assert ((gradient[:, 1:] - first_order).abs() <= 1e-3 * first_order.abs().max()).all()


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_divergence_that_rounds_below_zero_keeps_its_gradient(kind, rng, device):
    f = (torch.randn(500, 10, generator=rng).to(device) * 1e-7).requires_grad_()
    value = divergence(row_stats(f, torch.zeros(500, dtype=torch.int64, device=device)), kind)
    (gradient,) = torch.autograd.grad(value.sum(), f)
    assert (value < 0).any()
    assert gradient[value < 0].any(1).all()


def test_symmetric_divergence_keeps_its_digits_when_nearly_uniform(rng, device):
    # log S cancels in (8) when it is computed as T/S - A/K: as e - a it would be wrong by eps * log K
    f = torch.randn(1000, generator=rng).to(device) * 1e-2
    got = divergence(row_stats(f, torch.tensor(0, device=device)))
    truth = float(oracle.symmetric(f.tolist(), 0))
    assert_within(got, truth, f.double().abs().max(), 4)


# derivatives


@given(row=strategies.rows(min_classes=2, scales=(1e-2, 1.0, 5.0), offsets=(0.0, 10.0)), data=st.data())
def test_vjp_equals_autograd_of_the_plain_formula(row, data, device):
    f, y = torch.tensor(row.logits, dtype=torch.float64, device=device), torch.tensor(row.target, device=device)
    assume(any(value != -INF for c, value in enumerate(row.logits) if c != row.target))  # the plain formula needs a non-target
    g = torch.tensor(data.draw(st.lists(st.floats(-2, 2), min_size=5, max_size=5)), dtype=torch.float64, device=device)
    others = sorted((value for c, value in enumerate(row.logits) if c != row.target), reverse=True)
    if len(others) > 1 and others[0] == others[1]:
        g[3] = 0  # autograd of max shares a tie out; test_rho_gradient_goes_to_the_first_maximum covers it
    leaf = f.clone().requires_grad_()
    (truth,) = torch.autograd.grad(plain_stats(leaf, row.target) @ g, leaf)
    # the plain formula passes through the absolute LSE and so has its own rounding, eps * |f|
    assert_within(
        vjp(f, y, g),
        truth,
        vjp_scale(f, y, g) + g.abs().sum() * (1 + f[f > -INF].abs().max()),
        4,
    )


@given(row=strategies.rows(min_classes=2), data=st.data())
def test_vjp_in_float32_equals_float64(row, data, device):
    f, y = torch.tensor(row.logits, device=device), torch.tensor(row.target, device=device)
    g = torch.tensor(data.draw(st.lists(st.floats(-2, 2, width=16), min_size=5, max_size=5)), device=device)
    if row_stats(f, y).num_nontargets > 0:
        assert_within(vjp(f, y, g), vjp(f.double(), y, g.double()), vjp_scale(f, y, g), 4)


def test_rho_gradient_goes_to_the_first_maximum(device):
    f = torch.tensor([0.0, 2.0, 9.0, 2.0], requires_grad=True, device=device)
    (gradient,) = torch.autograd.grad(row_stats(f, torch.tensor(2, device=device)).rho, f)
    q = torch.tensor([0.0, 2.0, 2.0], device=device).softmax(0)
    assert gradient[2] == 0
    assert_within(gradient[[0, 1, 3]], (q - torch.tensor([0.0, 1.0, 0.0], device=device)).double(), 1.0, 2)


def test_one_nontarget_has_no_regulariser_gradient_and_keeps_a_small_one(device):
    # with one non-target the e, a and spread terms are exactly 0, and must not drown g_l: 2e-9 at a lead of 20 nats
    f = torch.tensor([20.0, 0.0], requires_grad=True, device=device)
    stats = row_stats(f, torch.tensor(0, device=device))
    (gradient,) = torch.autograd.grad(stats[1:5], f, [torch.ones((), device=device)] * 4, retain_graph=True)
    assert gradient.tolist() == [0, 0]
    small = torch.tensor(2.06e-9, device=device)
    (gradient,) = torch.autograd.grad(stats[:5], f, [small, *[torch.ones((), device=device)] * 4])
    assert gradient.tolist() == [small.item(), -small.item()]


@pytest.mark.parametrize("dtype", DTYPES)
@given(row=strategies.rows(min_classes=1), data=st.data())
def test_gradient_row_sums_to_zero(dtype, row, data, device):
    f, y = torch.tensor(row.logits, dtype=dtype, device=device), torch.tensor(row.target, device=device)
    g = torch.tensor(data.draw(st.lists(st.floats(-2, 2, width=16), min_size=5, max_size=5)), dtype=dtype, device=device)
    gradient = vjp(f, y, g)
    if row_stats(f, y).num_nontargets == 0:
        assert not gradient.any()
    else:
        assert_within(gradient.double().sum(), 0.0, vjp_scale(f, y, g).sum(), 4, dtype)


def test_jvp_is_the_transpose_of_vjp(rng, device):
    f = torch.randn(7, 9, generator=rng, dtype=torch.float64).to(device) * 3
    f[0, 3] = f[1, :5] = -INF
    y = torch.tensor([0, 6, 2, 8, 4, -1, 3], device=device)  # -1: an ignored row, in the layout of the inner functions
    v = torch.randn(7, 9, generator=rng, dtype=torch.float64).to(device)
    grads = RowStats(*torch.randn(6, 7, generator=rng, dtype=torch.float64).to(device))
    forward = row_stats_jvp(f, y, v)
    left = sum((g * d).sum() for g, d in zip(grads[:5], forward[:5], strict=True))
    right = (row_stats_vjp(f, y, grads) * v).sum()
    assert_within(left, right, 7 * 9, 4)
    assert not forward.num_nontargets.any()
    assert not any(field[5] for field in forward)


@given(data=st.data())
def test_vjp_of_every_class_is_the_sum_of_the_vjps_of_each(data, device):
    f = torch.tensor(data.draw(strategies.rows(min_classes=1, max_classes=10)).logits, dtype=torch.float64, device=device)
    kept = [y for y in range(len(f)) if f[y] != -INF]
    size = len(f)
    grads = [
        torch.tensor(data.draw(st.lists(st.floats(-2, 2, width=16), min_size=size, max_size=size)), dtype=torch.float64, device=device)
        for _ in SMOOTH
    ]
    for g in grads:
        g[f == -INF] = 0  # a masked class as a target: its fields mean nothing
    got = all_row_stats_vjp(f, RowStats(*[*grads, torch.zeros(size, device=device)]))
    truth = sum(
        row_stats_vjp(f, torch.tensor(y, device=device), RowStats(*[*(g[y] for g in grads), torch.zeros((), device=device)])) for y in kept
    )
    # e^z z of the peeled form reaches its terms' size, the lead, before the sums cancel
    reach = 1 + (f[kept].max() - f[kept]).clamp(max=40).max()
    assert_within(got, truth, sum(g.abs().sum() for g in grads) * reach, 4)


def test_jvp_of_every_class_is_the_transpose_of_its_vjp(rng, device):
    f = torch.randn(6, 8, generator=rng, dtype=torch.float64).to(device) * 4
    f[1, 2] = f[2, :4] = -INF
    v = torch.randn(6, 8, generator=rng, dtype=torch.float64).to(device)
    grads = RowStats(*(torch.randn(6, 6, 8, generator=rng, dtype=torch.float64).to(device) * (f != -INF)))
    forward = all_row_stats_jvp(f, v)
    left = sum((g * d).sum() for g, d in zip(grads[:5], forward[:5], strict=True))
    assert_within(left, (all_row_stats_vjp(f, grads) * v).sum(), 6 * 8 * 8, 8)


# shapes and dtypes


@every("shape", [(4,), (3, 4), (3, 4, 2), (3, 4, 2, 5), (0, 4), (3, 4, 0), (3, 1)])
def test_statistics_have_the_shape_of_the_target(shape, rng, device):
    f = torch.randn(shape, generator=rng).to(device)
    y = torch.zeros(shape[:1] * (len(shape) > 1) + shape[2:], dtype=torch.int64, device=device)
    stats = row_stats(f, y)
    assert isinstance(stats, RowStats)
    assert all(field.shape == y.shape and field.dtype == torch.float32 for field in stats)


def test_k_dimensional_input_equals_the_flattened_rows(rng, device):
    f = torch.randn(3, 5, 2, 4, generator=rng).to(device)
    y = torch.randint(5, (3, 2, 4), generator=rng).to(device)
    flat = row_stats(f.permute(0, 2, 3, 1).reshape(-1, 5), y.flatten())
    for field, expected in zip(row_stats(f, y), flat, strict=True):
        assert_within(field.flatten(), expected.double(), 8.0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, rng, device):
    f = (torch.randn(6, 30, generator=rng).to(device) * 20).to(dtype)
    y = torch.randint(30, (6,), generator=rng).to(device)
    expected = row_stats(f.float(), y, backend="reference")
    assert all(same_bits(a, b) for a, b in zip(row_stats(f, y, backend="reference"), expected, strict=True))
    g = torch.randn(5, 6, generator=rng).to(device)
    assert same_bits(vjp(f, y, g, "reference"), vjp(f.float(), y, g, "reference").to(dtype))


def test_the_count_carries_no_gradient(rng, device):
    stats = row_stats(torch.randn(2, 3, generator=rng).to(device).requires_grad_(), torch.tensor([0, 1], device=device))
    assert [field.requires_grad for field in stats] == [True] * 5 + [False]


# ignored rows, masked classes, odd values


@every("garbage", [math.nan, INF, -INF, 3e38])
@every("ignore_index", [-100, 1, 255])
def test_ignored_rows_give_zero_whatever_they_hold(garbage, ignore_index, rng, device):
    f = torch.randn(3, 4, generator=rng, dtype=torch.float64).to(device)
    f[1] = garbage
    f.requires_grad_()
    y = torch.tensor([0, ignore_index, 3], device=device)
    stats = row_stats(f, y, ignore_index=ignore_index)
    assert all(field[1] == 0 for field in stats)
    (first,) = torch.autograd.grad(sum((field**2).sum() for field in stats[:5]), f, create_graph=True)
    assert not first[1].any()
    assert first[[0, 2]].isfinite().all() and first[[0, 2]].any()
    (second,) = torch.autograd.grad((first**2).sum(), f)
    assert not second[1].any()
    assert second[[0, 2]].isfinite().all() and second[[0, 2]].any()


@pytest.mark.parametrize("dtype", DTYPES)
@given(row=strategies.rows(min_classes=2), data=st.data())
def test_masked_classes_equal_the_deleted_row(dtype, row, data, device):
    keep = [c for c, value in enumerate(row.logits) if value != -INF]
    f, y = torch.tensor(row.logits, dtype=dtype, device=device), torch.tensor(row.target, device=device)
    deleted, deleted_y = f[keep], torch.tensor(keep.index(row.target), device=device)
    scale = RowScale(*row)
    for name in (*SMOOTH, "num_nontargets"):
        assert_within(getattr(row_stats(f, y), name), getattr(row_stats(deleted, deleted_y), name).double(), getattr(scale, name), 3)
    g = torch.tensor(data.draw(st.lists(st.floats(-2, 2, width=16), min_size=5, max_size=5)), dtype=dtype, device=device)
    gradient = vjp(f, y, g)
    assert not gradient[f == -INF].any()
    if len(keep) > 1:
        assert_within(gradient[keep], vjp(deleted, deleted_y, g).double(), vjp_scale(deleted, deleted_y, g), 4)


@every("row", [[INF, 1.0, 0.0], [1.0, INF, 0.0], [INF, INF, 0.0], [math.nan, 1.0, 0.0], [1.0, math.nan, 0.0], [-INF] * 3])
def test_not_a_number_in_gives_not_a_number_out(row, device):
    stats = row_stats(torch.tensor([row, [1.0, 2.0, 3.0]], device=device), torch.tensor([0, 0], device=device))
    assert stats.log_odds[0].isnan()
    assert all(field[1].isfinite() for field in stats)  # and only there


@pytest.mark.parametrize("dtype", DTYPES)
@every("single", [INF, -INF, math.nan])
def test_a_target_alone_in_its_row_must_be_finite(single, dtype, device):
    assert row_stats(torch.tensor([single], dtype=dtype, device=device), torch.tensor(0, device=device)).log_odds.isnan()


def test_masked_target_has_log_odds_minus_infinity_and_the_same_divergence(device):
    f = torch.tensor([[-INF, 1.0, 3.0, 0.5], [9.0, 1.0, 3.0, 0.5]], requires_grad=True, device=device)
    stats = row_stats(f, torch.tensor([0, 0], device=device))
    assert stats.log_odds[0] == -INF
    assert all(same_bits(field[0], field[1]) for field in stats[1:])
    (gradient,) = torch.autograd.grad(stats.log_odds[0], f)
    assert gradient[0, 0] == 1
    assert_within(gradient[0, 1:], -torch.tensor([1.0, 3.0, 0.5]).double().softmax(0), 1.0, 2)


@pytest.mark.parametrize("row", [[3.0], [3.0, -INF, -INF]])
def test_no_nontarget_left(row, device):
    f = torch.tensor(row, requires_grad=True, device=device)
    stats = row_stats(f, torch.tensor(0, device=device))
    assert [value.item() for value in stats] == [INF, 0, 0, 0, 0, 0]
    assert all(divergence(stats, kind) == 0 for kind in DIVERGENCES)
    (gradient,) = torch.autograd.grad(stats[:5], f, [torch.ones((), device=device)] * 5)
    assert not gradient.any()


@every("mask", [-1e4, -1e9, torch.finfo(torch.float32).min])
@every("upstream", [1.0, 65536.0])
def test_a_large_finite_mask_gives_a_finite_gradient(mask, upstream, device):
    # masking by finfo.min is common, 65536 is the first factor of a loss scaler: q_c = 0 there, and 0 * overflow is NaN
    f = torch.tensor([1.0, 2.0, mask, 0.0], device=device)
    g = torch.full((5,), upstream, device=device)
    gradient = vjp(f, torch.tensor(0, device=device), g)
    truth = vjp(f.double(), torch.tensor(0, device=device), g.double())
    assert_within(gradient, truth, upstream * 10, 4)


def test_a_large_finite_mask_gives_a_finite_gradient_for_every_class(device):
    f = torch.tensor([1.0, 2.0, torch.finfo(torch.float32).min, 0.0], device=device)
    g = torch.tensor([65536.0, 65536.0, 0.0, 65536.0], device=device)
    got = all_row_stats_vjp(f, RowStats(g, g, g, g, g, g))
    truth = all_row_stats_vjp(f.double(), RowStats(*[g.double()] * 6))
    assert truth.isfinite().all()
    assert_within(got, truth, 65536.0 * 10, 4)


@pytest.mark.parametrize("label", [-1, 4, 100, -(2**40)])
def test_labels_out_of_range_raise_index_error(label, rng):
    f = torch.randn(3, 4, generator=rng)
    with pytest.raises(IndexError, match=str(label)):
        row_stats(f, torch.tensor([0, label, 1]))  # on a GPU labels are not looked at


@compiles
def test_labels_out_of_range_are_nan_when_compiled(rng, device):
    f = torch.randn(4, 4, generator=rng).to(device).requires_grad_()
    compiled = torch.compile(row_stats, fullgraph=True, backend="aot_eager")
    stats = compiled(f, torch.tensor([0, 4, -1, -100], device=device))
    for field in stats:
        assert field.isnan().tolist() == [False, True, True, False]
    (gradient,) = torch.autograd.grad(stats.log_odds[[0, 3]].sum(), f)
    assert gradient.isfinite().all()


def test_backends_are_words(rng, device):
    f, y = torch.randn(3, 4, generator=rng).to(device), torch.tensor([0, 1, 2], device=device)
    assert all(same_bits(a, b) for a, b in zip(row_stats(f, y), row_stats(f, y, backend="reference"), strict=True))
    with pytest.raises(ValueError, match="backend"):
        row_stats(f, y, backend="foo")


def test_probabilities_have_no_row_statistics(rng, device):
    with pytest.raises(RuntimeError, match="target"):
        row_stats(torch.randn(3, 4, generator=rng).to(device), torch.rand(3, 4, generator=rng).to(device))


def test_divergence_rejects_an_unknown_kind(rng, device):
    with pytest.raises(ValueError, match="kind"):
        divergence(row_stats(torch.randn(3, 4, generator=rng).to(device), torch.tensor([0, 1, 2], device=device)), "foo")


@every("lead", strategies.LEADS)
def test_leads_cost_no_digits(lead, rng, device):
    others = torch.randn(20, generator=rng).to(device) * 2
    f = torch.cat([(others.max() + lead)[None], others])
    stats, scale = row_stats(f, torch.tensor(0, device=device)), RowScale(f.tolist(), 0)
    for name, truth in paper_stats(f.tolist(), 0).items():
        assert roundings(getattr(stats, name), float(truth), getattr(scale, name)).item() <= 1.5
    # the divergence does not know how far the target leads
    behind = torch.cat([torch.zeros(1, device=device), others])
    assert all(same_bits(a, b) for a, b in zip(stats[1:], row_stats(behind, torch.tensor(0, device=device))[1:], strict=True))


def test_a_difference_of_finite_logits_may_overflow(device):
    f, y = torch.tensor([0.0, 3e38, -3e38, 3e38], device=device), torch.tensor(0, device=device)
    stats = row_stats(f, y)
    assert stats.log_odds == -3e38
    assert_within(stats.rho, math.log(2), 1.0, 1)
    assert_within(stats.neg_entropy, -math.log(2), 1.0, 1)
    assert stats.spread == INF and stats.mean_log_q == -INF  # 2e38 is the mean of differences one of which is 6e38
    gradient = vjp(f, y, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0], device=device))
    truth = vjp(f.double(), y, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0], device=device).double())
    assert_within(gradient, truth, 4.0, 1)


def test_the_statistics_of_stored_programs_are_the_statistics(rng):
    logits = torch.randn(6, 5, generator=rng, dtype=torch.float64)
    logits[1, 1:] = -INF  # a lone class, if it is the target
    target = torch.tensor([0, 0, 4, -1, 2, 1])
    for name, got, expected in zip(
        RowStats._fields, rowstats.row_stats_by_autograd(logits, target), rowstats.row_stats(logits, target), strict=True
    ):
        assert same_bits(got, expected), name
