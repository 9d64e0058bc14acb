"""Metrics: each equals its definition, and sums over batches, objects and ranks are those of the whole."""

import copy
import itertools
import math
import pickle
import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import metrics_on_ranks
import oracle
import strategies
from combinations import every
from largemargin import metrics
from largemargin.lab._torchvision import import_torchvision
from largemargin.metrics import MarginMetrics
from measure import INF, RowScale, assert_within, same_bits
from properties import given, st
from registry import DTYPES


def margin_by_definition(f, y):
    target, others = oracle.target_and_others(f, y)
    return target - max(others) if others else oracle.INF


def log_odds_by_definition(f, y):
    target, others = oracle.target_and_others(f, y)
    return target - oracle.log_sum_exp(others) if others else oracle.INF


def entropy_by_definition(f, y):
    return -oracle.ctx.fsum(q_c * oracle.ctx.log(q_c) for q_c in oracle.posterior(f, y))


# metric -> its definition, and its natural scale
PER_ROW = {
    "margin": (metrics.margin, margin_by_definition, lambda row: row.log_odds),
    "rho_hat": (metrics.rho_hat, oracle.rho, lambda row: row.rho),
    "divergence": (metrics.divergence, oracle.symmetric, lambda row: row.spread),
    "kl_qu": (lambda *rows, **options: metrics.divergence(*rows, kind="kl_qu", **options), oracle.kl_qu, lambda row: row.neg_entropy),
    "kl_uq": (lambda *rows, **options: metrics.divergence(*rows, kind="kl_uq", **options), oracle.kl_uq, lambda row: row.mean_log_q),
    "log_odds": (metrics.log_odds, log_odds_by_definition, lambda row: row.log_odds),
    "nontarget_entropy": (metrics.nontarget_entropy, entropy_by_definition, lambda row: row.neg_entropy),
    "nll": (metrics.nll, oracle.softmax_loss, lambda row: row.log_odds),
}
COUNTS = {"accuracy": metrics.accuracy, "top2_error": lambda input, target, **options: metrics.topk_error(input, target, 2, **options)}
CALIBRATION = {"ece": metrics.ece, "adaptive_ece": metrics.adaptive_ece}
FUNCTIONS: dict[str, Any] = {name: function for name, (function, *_) in PER_ROW.items()} | COUNTS | CALIBRATION


def tensors(batch: strategies.Batch, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    logits = torch.tensor(batch.logits, dtype=dtype, device=device).reshape(-1, batch.num_classes)
    return logits, torch.tensor(batch.targets, dtype=torch.int64, device=device)


def kept_rows(batch: strategies.Batch) -> list[strategies.Row]:
    rows = zip(batch.logits, batch.targets, strict=True)
    return [strategies.Row(f, y) for f, y in rows if y != batch.ignore_index]


def drawn(rng: torch.Generator, device: torch.device, rows: int = 200, classes: int = 6, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits that are right more often than not, and labels."""
    target = torch.randint(classes, (rows,), generator=rng).to(device)
    logits = scale * torch.randn(rows, classes, generator=rng, dtype=torch.float64).to(device)
    return logits.scatter_add(1, target[:, None], torch.full((rows, 1), scale, dtype=torch.float64, device=device)), target


def probabilities(f) -> list[float]:
    largest = max(f)
    exps = [math.exp(value - largest) for value in f]
    return [value / math.fsum(exps) for value in exps]


def confidence_and_gap(f, y) -> tuple[float, float]:
    confidence = max(probabilities(f))
    return confidence, confidence - (f.index(max(f)) == y)


def ece_by_definition(rows, num_bins: int) -> float:
    bins = [0.0] * num_bins
    for f, y in rows:
        confidence, gap = confidence_and_gap(f, y)
        bins[max(0, math.ceil(confidence * num_bins - 1e-6) - 1)] += gap
    return sum(map(abs, bins)) / len(rows) if rows else math.nan


def assert_same_figures(left: dict[str, float], right: dict[str, float]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        # a mean of large terms of both signs may be small: the logits of the strategies reach 1e5
        assert left[name] == pytest.approx(right[name], rel=1e-12, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("name", PER_ROW)
@given(row=strategies.rows())
def test_values_of_rows_equal_their_definitions(name, row, device):
    function, definition, scale = PER_ROW[name]
    truth, size = float(definition(*row)), scale(RowScale(*row))
    for dtype in DTYPES:
        value = function(
            torch.tensor([row.logits], dtype=dtype, device=device), torch.tensor([row.target], device=device), reduction="none"
        )
        assert value.dtype == dtype and value.shape == (1,)
        assert_within(value[0], truth, size, 4)


@pytest.mark.parametrize("name", PER_ROW)
@given(batch=strategies.batches(scales=(1.0, 5.0), offsets=(0.0,)))
def test_reductions_are_over_the_rows_that_are_not_ignored(name, batch, device):
    function, definition, _ = PER_ROW[name]
    values = [float(definition(*row)) for row in kept_rows(batch)]
    options = {"ignore_index": batch.ignore_index}
    total = function(*tensors(batch, device), reduction="sum", **options)
    mean = function(*tensors(batch, device), **options)
    assert total.dtype == mean.dtype == torch.float64 and total.shape == mean.shape == ()
    assert total.item() == pytest.approx(sum(values), rel=1e-12, abs=1e-11, nan_ok=True)
    assert mean.item() == pytest.approx(sum(values) / len(values) if values else math.nan, rel=1e-12, abs=1e-11, nan_ok=True)
    rows = function(*tensors(batch, device), reduction="none", **options)
    assert not rows[torch.tensor(batch.targets, dtype=torch.int64, device=device) == batch.ignore_index].any()


@given(batch=strategies.batches(), k=st.integers(1, 13))
def test_errors_are_counted_by_sorting(batch, k, device):
    ranked = [(sorted((c for c in range(len(f)) if f[c] > -INF), key=lambda c: (-f[c], c)), y) for f, y in kept_rows(batch)]
    options = {"ignore_index": batch.ignore_index, "reduction": "sum"}
    assert metrics.accuracy(*tensors(batch, device), **options) == sum(order[0] == y for order, y in ranked)
    assert metrics.topk_error(*tensors(batch, device), k, **options) == sum(y not in order[:k] for order, y in ranked)


@given(batch=strategies.batches())
def test_top_1_error_is_one_minus_accuracy(batch, device):
    options = {"ignore_index": batch.ignore_index}
    logits, target = tensors(batch, device)
    assert_within(metrics.topk_error(logits, target, 1, **options), 1 - metrics.accuracy(logits, target, **options), 1.0, 1)


def test_a_masked_target_is_never_in_the_top_k(device):
    logits, target = torch.tensor([[1.0, -INF, 0.0]], device=device), torch.tensor([1], device=device)
    assert metrics.topk_error(logits, target, 3) == 1 and metrics.accuracy(logits, target) == 0
    assert metrics.margin(logits, target) == -INF and metrics.nll(logits, target) == INF


@pytest.mark.parametrize("num_bins", [1, 2, 15])
@given(batch=strategies.batches(scales=(1e-2, 1.0, 5.0), offsets=(0.0,), masked=False))
def test_ece_equals_its_definition(num_bins, batch, device):
    value = metrics.ece(*tensors(batch, device), num_bins=num_bins, ignore_index=batch.ignore_index)
    assert value.item() == pytest.approx(ece_by_definition(kept_rows(batch), num_bins), abs=1e-12, nan_ok=True)


def test_ece_equals_its_definition_on_many_rows(rng, device):
    logits, target = drawn(rng, device)
    rows = list(zip(logits.tolist(), target.tolist(), strict=True))
    assert metrics.ece(logits, target).item() == pytest.approx(ece_by_definition(rows, 15), abs=1e-13)


def test_a_confidence_on_an_edge_is_in_the_bin_below(device):
    logits, target = (
        torch.zeros(2, 3, dtype=torch.float64, device=device),
        torch.tensor([0, 1], device=device),
    )  # 1/3, once right and once wrong
    above = torch.tensor([[0.01, 0.0, 0.0]], device=device)  # right
    both = torch.cat([logits, above]), torch.cat([target, torch.tensor([0], device=device)])
    apart = (abs(2 / 3 - 1) + abs(probabilities(above[0].tolist())[0] - 1)) / 3
    assert metrics.ece(*both, num_bins=3).item() == pytest.approx(apart, abs=1e-9)


@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_adaptive_ece_is_that_of_the_sorted_rows_within_its_bound(num_bins, rng, device):
    for rows in (60, 240, 3000):
        logits, target = drawn(rng, device, rows)
        gaps = sorted(confidence_and_gap(f, y) for f, y in zip(logits.tolist(), target.tolist(), strict=True))
        size = rows // num_bins
        definition = sum(abs(sum(gap for _, gap in gaps[b * size : (b + 1) * size])) for b in range(num_bins)) / rows
        cell = [math.floor((math.log(p / (1 - p)) + 16) * 256) for p, _ in gaps]
        tied = sum(cell.count(cell[b * size - 1]) * (cell[b * size] == cell[b * size - 1]) for b in range(1, num_bins)) / rows
        assert abs(metrics.adaptive_ece(logits, target, num_bins=num_bins).item() - definition) <= tied + 1e-12
        assert tied < 0.25  # it says something


def test_adaptive_ece_shares_a_row_on_a_cut(device):
    logits = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]], dtype=torch.float64, device=device)
    target = torch.tensor([0, 1, 1], device=device)
    low, middle, high = (confidence_and_gap(f, y)[1] for f, y in zip(logits.tolist(), target.tolist(), strict=True))
    expected = (abs(low + middle / 2) + abs(middle / 2 + high)) / 3
    assert metrics.adaptive_ece(logits, target, num_bins=2).item() == pytest.approx(expected, abs=1e-12)


def test_one_bin_is_the_mean_gap_of_both(rng, device):
    logits, target = drawn(rng, device)
    gap = abs(sum(confidence_and_gap(f, y)[1] for f, y in zip(logits.tolist(), target.tolist(), strict=True))) / len(target)
    for function in CALIBRATION.values():
        assert function(logits, target, num_bins=1).item() == pytest.approx(gap, abs=1e-12)


@every("name", FUNCTIONS)
def test_k_dimensions_equal_the_flattened_rows(name, rng, device):
    input, target = torch.randn(3, 5, 2, 4, generator=rng).to(device), torch.randint(5, (3, 2, 4), generator=rng).to(device)
    target[0, 0] = -100
    flat = input.movedim(1, -1).reshape(-1, 5), target.flatten()
    assert_within(FUNCTIONS[name](input, target), FUNCTIONS[name](*flat), 8.0, 4, torch.float32)
    if name not in CALIBRATION:
        assert FUNCTIONS[name](input, target, reduction="none").shape == target.shape
    one_row = FUNCTIONS[name](input[0, :, 1, 1], target[0, 1, 1])
    assert_within(one_row, FUNCTIONS[name](input[:1, :, 1, 1], target[:1, 1, 1]), 8.0, 4, torch.float32)


@every("dtype", [torch.float16, torch.bfloat16])
@every("name", FUNCTIONS)
def test_half_precision_is_computed_in_float32(name, dtype, rng, device):
    input, target = (torch.randn(40, 5, generator=rng).to(device) * 5).to(dtype), torch.randint(5, (40,), generator=rng).to(device)
    # 40 nats at most; within roundings of float32, and not of the input's
    assert_within(FUNCTIONS[name](input, target), FUNCTIONS[name](input.double(), target), 40.0, 1, torch.float32)
    if name in PER_ROW:
        assert FUNCTIONS[name](input, target, reduction="none").dtype == torch.float32


def test_means_are_summed_in_float64(device):
    # in float32 a sum of 2e5 such values is off by far more
    input = torch.tensor([[1000.1, 0.0]], device=device).expand(200_000, 2)
    exact = input[0, 0].double().item()
    assert metrics.margin(input, torch.zeros(200_000, dtype=torch.long, device=device)).item() == pytest.approx(exact, rel=1e-12)


@every("garbage", [math.nan, INF, -INF])
@every("name", FUNCTIONS)
def test_ignored_rows_never_leak(name, garbage, rng, device):
    input, target = torch.randn(3, 5, generator=rng).to(device), torch.tensor([0, -100, 2], device=device)
    input[1] = garbage
    assert same_bits(FUNCTIONS[name](input, target), FUNCTIONS[name](input[[0, 2]], target[[0, 2]]))


@every("row", [[INF, 1.0, 0.0], [0.0, INF, 0.0], [math.nan, 1.0, 0.0], [0.0, math.nan, 0.0], [-INF, -INF, -INF]])
def test_rows_without_statistics_are_nan_and_wrong(row, device):
    input, target = torch.tensor([row, [2.0, 1.5, 0.0]], device=device), torch.tensor([0, 0], device=device)
    for name, (function, *_) in PER_ROW.items():
        assert function(input, target, reduction="none").isnan().tolist() == [True, False], name
        assert function(input, target).isnan(), name
    assert metrics.accuracy(input, target) == 0.5 and metrics.topk_error(input, target, 3) == 0.5
    assert all(function(input, target).isnan() for function in CALIBRATION.values())


def test_the_stream_counts_rows_without_statistics_and_leaves_them_out(rng, device):
    input, target = drawn(rng, device, 20)
    whole, clean = MarginMetrics(), MarginMetrics()
    clean.update(input[3:], target[3:])
    input[0, 1], input[1, 0], input[2] = math.nan, INF, -INF
    whole.update(input, target)
    figures, expected = whole.compute(), clean.compute()
    assert figures["rows"] == 20 and figures["invalid_rows"] == 3
    assert figures["accuracy"] == pytest.approx(expected["accuracy"] * 17 / 20)
    assert figures["top5_error"] == pytest.approx((expected["top5_error"] * 17 + 3) / 20)
    for name in (*PER_ROW, *CALIBRATION):
        assert figures[name] == pytest.approx(expected[name], rel=1e-12), name


@every("name", FUNCTIONS)
def test_no_rows_is_nan(name, device):
    assert FUNCTIONS[name](torch.zeros(0, 4, device=device), torch.zeros(0, dtype=torch.long, device=device)).isnan()
    assert FUNCTIONS[name](torch.zeros(2, 4, device=device), torch.full((2,), -100, device=device)).isnan()


@every("name", FUNCTIONS)
def test_nothing_is_recorded_for_a_gradient(name, rng, device):
    input = torch.randn(4, 3, generator=rng).to(device).requires_grad_()
    before = input.detach().clone()
    assert not FUNCTIONS[name](input, torch.arange(4, device=device) % 3).requires_grad
    assert torch.equal(input.detach(), before)


# the stream


@given(batch=strategies.batches(scales=(1.0, 30.0), offsets=(0.0, 1e4)), num_bins=st.sampled_from([1, 15]))
def test_the_stream_has_the_figures_of_the_functions(batch, num_bins, device):
    options = {"ignore_index": batch.ignore_index}
    stream = MarginMetrics(num_bins=num_bins, top_k=2, **options)
    rows = tensors(batch, device)
    assert stream.update(*rows) is None
    figures = stream.compute()
    assert all(type(value) is float for value in figures.values())
    expected = {name: function(*rows, **options).item() for name, function in FUNCTIONS.items() if name not in CALIBRATION}
    expected |= {name: function(*rows, num_bins=num_bins, **options).item() for name, function in CALIBRATION.items()}
    assert figures.keys() == expected.keys() | {"rows", "invalid_rows"}
    assert figures["rows"] == len(kept_rows(batch)) and figures["invalid_rows"] == 0
    assert_same_figures({name: figures[name] for name in expected}, expected)


@given(batch=strategies.batches(max_rows=9), seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 9), max_size=3))
def test_any_split_in_any_order_gives_the_whole(batch, seed, cuts, device):
    logits, target = tensors(batch, device)
    whole = MarginMetrics(top_k=2, ignore_index=batch.ignore_index)
    whole.update(logits, target)
    order = torch.tensor(random.Random(seed).sample(range(len(target)), len(target)), dtype=torch.int64, device=device)
    merged = MarginMetrics(top_k=2, ignore_index=batch.ignore_index)
    for start, end in itertools.pairwise([0, *sorted(cuts), len(target)]):
        part = MarginMetrics(top_k=2, ignore_index=batch.ignore_index)
        part.update(logits[order[start:end]], target[order[start:end]])
        part.merge(merged)
        merged = part
    assert_same_figures(merged.compute(), whole.compute())


def test_reset_forgets_and_a_copy_is_independent(rng, device):
    stream, empty = MarginMetrics(), MarginMetrics().compute()
    assert empty["rows"] == 0 and all(math.isnan(value) for name, value in empty.items() if "rows" not in name)
    stream.update(*drawn(rng, device))
    kept = copy.deepcopy(stream)
    assert pickle.loads(pickle.dumps(stream)).compute() == kept.compute()
    stream.reset()
    assert stream.compute()["rows"] == 0 and kept.compute()["rows"] == 200


def test_without_ranks_reduce_is_a_copy(rng, device):
    stream = MarginMetrics()
    stream.update(*drawn(rng, device))
    whole = stream.reduce()
    assert whole is not stream and whole.compute() == stream.compute()


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_together_have_the_figures_of_the_whole(ranks, size):
    whole = MarginMetrics(num_bins=10, top_k=2)
    parts = [metrics_on_ranks.rows_of(rank) for rank in range(size)]
    whole.update(*(torch.cat(part) for part in zip(*parts, strict=True)))
    for rank, (together, own) in enumerate(ranks.assert_on(size, metrics_on_ranks.reduced)):
        assert_same_figures(together, whole.compute())
        assert own["rows"] == len(parts[rank][1])


def test_streams_that_count_differently_are_not_merged():
    with pytest.raises(ValueError, match="other must have num_bins=15 to be merged, got num_bins=10"):
        MarginMetrics().merge(MarginMetrics(num_bins=10))
    with pytest.raises(ValueError, match="other must have top_k=5 to be merged, got top_k=1"):
        MarginMetrics().merge(MarginMetrics(top_k=1))
    with pytest.raises(TypeError, match="other must be a MarginMetrics, got 3"):
        MarginMetrics().merge(3)


@pytest.mark.parametrize("call", [MarginMetrics, lambda **options: metrics.ece(torch.zeros(1, 2), torch.tensor([0]), **options)])
def test_bad_counts_are_named(call):
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        call(num_bins=0)
    with pytest.raises(TypeError, match=r"num_bins must be an int, got 1\.5"):
        call(num_bins=1.5)


def test_bad_arguments_are_named():
    rows = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="reduction must be one of 'none', 'mean', 'sum'; got 'avg'"):
        metrics.margin(*rows, reduction="avg")
    with pytest.raises(ValueError, match="kind must be one of 'symmetric', 'kl_qu', 'kl_uq'; got 'kl'"):
        metrics.divergence(*rows, kind="kl")
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        metrics.topk_error(*rows, 0)
    with pytest.raises(IndexError, match=r"target must hold class indices in \[0, 3\)"):
        metrics.nll(rows[0], torch.tensor([0, 3]))  # on a GPU labels are not looked at
    with pytest.raises(RuntimeError, match="target must be int64 class indices"):
        MarginMetrics().update(rows[0], rows[0])


# torchmetrics, where it is installed


def test_torchmetrics_has_the_same_figures(rng, device):
    import_torchvision()  # torchmetrics imports it, and it may not import by itself
    torchmetrics = pytest.importorskip("torchmetrics")
    logits, target = drawn(rng, device)
    stream, metric = MarginMetrics(top_k=2), metrics.as_torchmetric(top_k=2)
    of_batch = metric(logits[:50], target[:50])
    stream.update(logits[:50], target[:50])
    assert_same_figures({name: value.item() for name, value in of_batch.items()}, stream.compute())
    metric.update(logits[50:], target[50:])
    stream.update(logits[50:], target[50:])
    for same in (metric, copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone(), metric.float()):
        assert isinstance(same, torchmetrics.Metric)
        assert_same_figures({name: value.item() for name, value in same.compute().items()}, stream.compute())
    metric.reset()
    collection = torchmetrics.MetricCollection([metric])
    collection.update(logits, target)
    assert collection.compute()["rows"] == 200


def test_the_install_line_is_said_where_torchmetrics_is_absent_and_not_where_it_is_broken(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match="pip install torchmetrics"):
        metrics.as_torchmetric()
    monkeypatch.delitem(sys.modules, "torchmetrics")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torchmetrics.py").write_text("import what_it_needs")
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        metrics.as_torchmetric()


# super-symmetry


def simplex(num_classes: int) -> Tensor:
    return torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes


def distance_by_search(weight: Tensor) -> float:
    """The definition, with v found by golden-section search."""
    weight = weight.cpu().double()
    centred = weight - weight.mean(0)
    gram, form = centred @ centred.T, simplex(len(weight)) * len(weight) / (len(weight) - 1)
    low, high = 0.0, gram.trace().item()
    distance = lambda v: ((gram - v * form).norm() / gram.norm()).item()  # noqa: E731
    for _ in range(100):
        a, b = high - 0.618 * (high - low), low + 0.618 * (high - low)
        low, high = (low, b) if distance(a) < distance(b) else (a, high)
    return distance((low + high) / 2)


def test_the_ideal_form_is_that_of_the_paper_and_has_distance_0(rng, device):
    for num_classes in (2, 3, 10):
        weight = simplex(num_classes).to(device)
        v = (num_classes - 1) / num_classes
        gram = torch.full((num_classes, num_classes), -v / (num_classes - 1), dtype=torch.float64).fill_diagonal_(v)
        assert_within(weight @ weight.T, gram, 1.0, 8)
        basis = torch.linalg.qr(torch.randn(num_classes + 3, num_classes, generator=rng, dtype=torch.float64).to(device)).Q
        low = torch.linalg.svd(weight)[0][:, : num_classes - 1]  # C - 1 features are enough
        shift = torch.randn(num_classes, generator=rng).to(device)
        for same in (weight, 1e-30 * weight, 1e30 * weight, weight + shift, weight @ basis.T, low):
            assert metrics.super_symmetry(same) < 1e-13


@every("shape", [(2, 1), (2, 5), (3, 2), (10, 4), (10, 9), (10, 10), (5, 40)])
def test_super_symmetry_is_the_distance_to_the_nearest_form(shape, rng, device):
    weight = torch.randn(shape, generator=rng).to(device)
    distance = metrics.super_symmetry(weight)
    # near 0 the search is no better than the square root of a rounding
    assert distance.item() == pytest.approx(distance_by_search(weight), rel=1e-6, abs=1e-7)
    for same in (3.5 * weight, weight + torch.arange(shape[1], device=device), weight.flip(0), weight.flip(1)):
        assert metrics.super_symmetry(same).item() == pytest.approx(distance.item(), abs=2e-6)
    assert distance >= math.sqrt(max(0.0, 1 - shape[1] / (shape[0] - 1))) - 1e-12


def test_super_symmetry_of_rows_on_a_line_is_its_bound(device):
    weight = torch.arange(5.0, device=device)[:, None] * torch.tensor([[1.0, 2.0, -1.0, 0.5, 3.0, 1.0]], device=device)
    assert metrics.super_symmetry(weight).item() == pytest.approx(math.sqrt(3 / 4), abs=1e-12)
    assert metrics.super_symmetry(weight[:, :1]).item() == pytest.approx(math.sqrt(3 / 4), abs=1e-12)


def test_super_symmetry_of_equal_rows_is_nan(device):
    assert metrics.super_symmetry(torch.ones(3, 4, device=device)).isnan()


def test_super_symmetry_takes_a_parameter_and_half_precision(rng, device):
    layer = torch.nn.Linear(6, 4).to(device)
    value = metrics.super_symmetry(layer.weight)
    assert not value.requires_grad
    half = layer.weight.detach().bfloat16()
    assert same_bits(metrics.super_symmetry(half), metrics.super_symmetry(half.float()))


@pytest.mark.parametrize("weight", [torch.zeros(3), torch.zeros(1, 3), torch.zeros(3, 3, dtype=torch.long)], ids=str)
def test_super_symmetry_names_a_bad_weight(weight):
    with pytest.raises(ValueError, match=r"weight must be floating of shape \(C, D\) with C >= 2, got"):
        metrics.super_symmetry(weight)


def test_super_symmetry_needs_a_tensor():
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor"):
        metrics.super_symmetry([[1.0], [2.0]])


@pytest.mark.parametrize("name", ["top_k", "num_bins"])
def test_what_the_sums_were_made_with_cannot_be_changed(name):
    with pytest.raises(AttributeError):
        setattr(MarginMetrics(), name, 2)
