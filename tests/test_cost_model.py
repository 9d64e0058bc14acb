"""The cost model counts what is held, sent and computed; the tables of docs/scaling.md are those of the record and of the model."""

import json
import sys
from pathlib import Path

import pytest
import torch

import on_ranks
from combinations import covering
from largemargin import linear_large_margin_cross_entropy
from largemargin.rows import collectives, shards, tiles
from largemargin.rows.parts import Part, merge
from measure import flop_of_products, peak_bytes

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import cost_model  # noqa: E402
import scaling_page  # noqa: E402
from cost_model import Cluster, Problem  # noqa: E402

RECORD = ROOT / "results" / "bench" / "scaling.json"
with_records = pytest.mark.skipif(not RECORD.is_file(), reason="the source distribution has no records")
SHAPE = 40, 16, 320  # rows, width, classes

# one tile; several; fewer rows than features, so that the classifier's gradient holds the logits
TILES = ((SHAPE, 10**6), (SHAPE, 2000), ((12, 16, 320), 1000))


@with_records
def test_a_process_holds_what_the_benchmark_measured():
    found = json.loads(RECORD.read_text())
    lines = {name: values for name, values in found["MiB a process"].items() if not name.startswith("classifier")}
    assert len(lines) == 5
    rows, width = found["rows, width"]
    for name, values in lines.items():
        ranks = int(name.split()[-2]) if name.endswith("ranks") else 1
        fused = name.startswith("ours") and "of logits" not in name
        for classes, measured in zip(found["classes"], values, strict=True):
            problem = Problem(rows, width, classes, ranks, fused=fused)
            assert cost_model.held(problem) / 2**20 == pytest.approx(measured, rel=0.1), (name, classes)


@pytest.mark.parametrize("ranks", [16, 64])
def test_merging_the_statistics_of_many_ranks_holds_45_bytes_a_row_and_rank(monkeypatch, ranks):
    rows = 2048
    monkeypatch.setattr(collectives, "all_gather", lambda values, group: values.expand(ranks, *values.shape).contiguous())
    part, target = Part(*(torch.rand(rows) for _ in range(6))), torch.zeros(rows, dtype=torch.long)
    peak = peak_bytes(lambda: merge(shards.exchange(part, target, None)))
    assert peak == pytest.approx(cost_model.MERGED * ranks * rows, rel=0.1)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("mesh_shape", "fused", "dtype"),
    covering(2, mesh_shape=[(1, 4), (2, 2), (4, 1)], fused=[True, False], dtype=[torch.float32, torch.bfloat16]),
    ids=str,
)
def test_a_rank_sends_what_the_model_counts(ranks, mesh_shape, fused, dtype):
    data_ranks, class_ranks = mesh_shape
    problem = Problem(*SHAPE, class_ranks, data_ranks, fused, dtype.itemsize)
    for calls in ranks.assert_on(4, on_ranks.exchanged, mesh_shape, SHAPE, fused, dtype):
        assert sorted(calls) == sorted(cost_model.exchanges(problem))
        by_ring = 0.0
        for kind, over, given in calls:
            others = (class_ranks if over == "classes" else data_ranks) - 1
            by_ring += given * others if kind == "all_gather" else 2 * given * others / (others + 1)
        assert cost_model.sent(problem) == pytest.approx(by_ring) and by_ring > 0


@pytest.mark.parametrize(("shape", "tile"), TILES, ids=str)
def test_the_products_of_one_device_take_the_flop_of_the_model(monkeypatch, shape, tile):
    monkeypatch.setattr(tiles, "TILE", tile)
    rows, width, classes = shape
    leaves = torch.randn(rows, width, requires_grad=True), torch.randn(classes, width, requires_grad=True)
    with torch.profiler.profile(with_flops=True) as profiler:
        linear_large_margin_cross_entropy(*leaves, torch.arange(rows)).backward()
    problem = Problem(rows, width, classes, tile=tile)
    assert flop_of_products(profiler) == cost_model.flop(problem)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("shape", "tile"), TILES, ids=str)
def test_the_products_of_a_rank_take_the_flop_of_the_model(ranks, shape, tile):
    rows, width, classes = shape
    problem = Problem(rows, width, classes, class_ranks=2, tile=tile)
    assert ranks.assert_on(2, on_ranks.flop, shape, tile) == [cost_model.flop(problem)] * 2


@pytest.fixture
def half(monkeypatch):
    """A layer of half precision goes the way of a GPU, with products that cost nothing; the list of what they read and write."""
    moved: list[int] = []

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, beta: int) -> None:
        moved.append(a.nbytes + b.nbytes + (1 + beta) * out.nbytes)
        out.zero_()

    monkeypatch.setattr(tiles, "_add_product", product)
    monkeypatch.setattr(tiles.Layer, "is_half", property(lambda layer: layer.input.dtype == torch.bfloat16))
    return moved


# float32 goes the way of a CPU, whose tiles have at least half of the classifier's numbers
OF_TILES = [(torch.float32, 2**17, 4), (torch.float32, 2**19, 2), (torch.bfloat16, 2**17, 8), (torch.bfloat16, 2**20, 1)]


@pytest.mark.parametrize(("dtype", "tile", "num_tiles"), OF_TILES, ids=str)
def test_tiles_hold_and_move_what_the_model_counts(monkeypatch, half, dtype, tile, num_tiles):
    monkeypatch.setattr(tiles, "TILE", tile)
    problem = Problem(64, 32, 2**14, itemsize=dtype.itemsize, tile=tile)
    features, classifier = (torch.ones(n, problem.width, dtype=dtype, requires_grad=True) for n in (problem.rows, problem.classes))
    target = torch.arange(problem.rows)

    def step() -> None:
        torch.autograd.grad(linear_large_margin_cross_entropy(features, classifier, target), (features, classifier))

    assert problem.num_tiles == num_tiles
    assert peak_bytes(step) + features.nbytes + classifier.nbytes == pytest.approx(cost_model.held(problem), rel=0.1)
    half.clear()
    step()
    assert sum(half) == pytest.approx(cost_model.moved_by_products(problem), rel=0.05)


def test_seconds_are_counts_over_rates():
    problem = Problem(4096, 512, 10**7, class_ranks=16, data_ranks=4, itemsize=2, tile=tiles.TILE_OF_GPU)
    rates = {"flop": 1e12, "memory": 1e9, "inside": 1e8, "between": 1e7}
    parts = cost_model.seconds(problem, Cluster(**rates))
    faster = cost_model.seconds(problem, Cluster(**{name: 2 * rate for name, rate in rates.items()}))
    assert parts == pytest.approx({name: 2 * value for name, value in faster.items()})
    assert parts["loss"] == cost_model.moved_by_loss(problem) / 1e9
    assert parts["products"] == max(cost_model.flop(problem) / 1e12, cost_model.moved_by_products(problem) / 1e9)
    over = {
        name: sum(e.sent(ranks) for e in cost_model.exchanges(problem) if e.over == name) for name, ranks in (("classes", 16), ("data", 4))
    }
    # 8 ranks of classes lie in each of two machines and use 8 links together; the 4 ranks of data have one link each
    assert parts["classes"] == pytest.approx(over["classes"] / 8e7) and parts["data"] == pytest.approx(over["data"] / 1e7)


def test_messages_take_their_latency_even_if_they_are_empty():
    cluster = Cluster(1e12, 1e9, 1e8, 1e7, latency_inside=1.0, latency_between=10.0)
    across, inside = Problem(1, 1, 1, class_ranks=16), Problem(1, 1, 1, class_ranks=4)
    empty = {kind: cost_model.Exchange(kind, "classes", 0) for kind in ("all_gather", "all_reduce")}
    assert cost_model.seconds_of(empty["all_gather"], inside, cluster) == 4 - 1
    assert cost_model.seconds_of(empty["all_reduce"], inside, cluster) == 2 * 2
    assert cost_model.seconds_of(empty["all_gather"], across, cluster) == 14 + 2 * 10
    assert cost_model.seconds_of(empty["all_reduce"], across, cluster) == 2 * (3 + 10)


def test_the_best_mesh_is_the_fastest_that_fits():
    problems = cost_model.meshes(64, 512, 10**7, 64)
    assert [(p.class_ranks, p.data_ranks, p.rows) for p in problems] == [(2**i, 2 ** (6 - i), 64 * 2**i) for i in range(7)]
    found = cost_model.best(problems, cost_model.H100, 20e9)
    assert found is not None and cost_model.held_in_training(found) <= 20e9
    for problem in problems:
        times = [sum(cost_model.seconds_in_training(p, cost_model.H100).values()) for p in (found, problem)]
        assert times[0] <= times[1] or cost_model.held_in_training(problem) > 20e9
    assert cost_model.best(problems, cost_model.H100, 1e9) is None


@with_records
def test_the_tables_of_the_page_are_those_of_the_record_and_the_model():
    text = scaling_page.PAGE.read_text()
    assert len(scaling_page.BLOCK.findall(text)) == 4
    assert scaling_page.page(text) == text
