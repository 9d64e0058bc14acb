"""Classes split over ranks: the loss and its gradient are those of the whole logits, and every rank has the same."""

import itertools
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

import on_ranks
from combinations import covering
from forked import context
from largemargin import large_margin_cross_entropy, sharded_large_margin_cross_entropy
from largemargin.rows import collectives
from measure import assert_within, same_bits
from ranks import Ranks
from registry import DIVERGENCES

pytestmark = pytest.mark.xdist_group("ranks")

# one rank; two alike; uneven ones, of which one holds a single class, the target of row 0; more ranks than classes; empty ones
SIZES = ((7,), (4, 4), (1, 6, 3), (1, 1, 1, 0), (0, 5, 0), (2, 0, 1500, 3), (1,), (0, 1))
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"lam": 0.0, "hard_bias": 1.0},
    {"divergence": "kl_qu", "lam": 1.5, "label_smoothing": 0.2},
    {"divergence": "kl_uq", "label_smoothing": 1.0, "ignore_index": 0},
)


def assert_same_everywhere(losses: list[torch.Tensor]) -> None:
    assert all(same_bits(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_whole_logits(ranks, sizes):
    cases = itertools.product(("none", "sum", "mean"), (False, True), OPTIONS)
    given = [(sizes, (), weighted, {**options, "reduction": reduction}) for reduction, weighted, options in cases]
    for losses in ranks.assert_on_each(len(sizes), on_ranks.equals_whole, given):
        assert_same_everywhere(losses)


def test_equals_the_whole_logits_of_images(ranks):
    for reduction, weighted in itertools.product(("none", "sum", "mean"), (False, True)):
        options = {"reduction": reduction, "label_smoothing": 0.1}
        assert_same_everywhere(ranks.assert_on(3, on_ranks.equals_whole, (3, 0, 4), (2, 3), weighted, options))


SOFT = {
    "reduction": ("none", "sum", "mean"),
    "divergence": DIVERGENCES,
    "lam": (0.0, 0.3),
    "hard_bias": (0.0, 1.0),
    "label_smoothing": (0.0, 0.2, 1.0),
    "weighted": (False, True),
    "lead": (0.0, 30.0),
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_probabilities_equal_those_of_the_whole_logits(ranks, sizes):
    given = []
    for case in covering(2, **SOFT):
        options = dict(zip(SOFT, case, strict=True))
        given.append((sizes, (), options.pop("weighted"), options.pop("lead"), options))
    for losses in ranks.assert_on_each(len(sizes), on_ranks.soft_equals_whole, given):
        assert_same_everywhere(losses)


def test_probabilities_equal_those_of_the_whole_logits_of_images(ranks):
    for reduction in ("none", "mean"):
        options = {"reduction": reduction, "label_smoothing": 0.1}
        assert_same_everywhere(ranks.assert_on(3, on_ranks.soft_equals_whole, (3, 0, 4), (2, 3), True, 0.0, options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_probabilities_in_lower_precision_are_within_roundings_of_float64(ranks, dtype):
    for sizes in ((4, 4), (0, 1500, 2)):
        assert_same_everywhere(ranks.assert_on(len(sizes), on_ranks.soft_by_kernels, sizes, dtype))


def test_probabilities_may_be_wider_than_logits(ranks):
    ranks.assert_on(2, on_ranks.soft_in_two_dtypes)


def test_probabilities_of_odd_rows(ranks):
    ranks.assert_on(2, on_ranks.soft_of_odd_rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(4, 4), (1, 6, 3), (0, 1500, 2)], ids=str)
def test_lower_precision_is_within_roundings_of_float64(ranks, sizes, dtype):
    for inner in ((), (5,)):
        for options in ({"reduction": "none"}, {"reduction": "mean", "label_smoothing": 0.1}):
            assert_same_everywhere(ranks.assert_on(len(sizes), on_ranks.by_kernels, sizes, inner, dtype, options))


@pytest.mark.parametrize(
    ("mesh", "places"),
    [
        ((4,), ("classes",)),
        ((4,), ("rows",)),
        ((4,), ("",)),
        ((2, 2), ("rows", "classes")),
        ((2, 2), ("classes", "inner")),
        ((2, 2), ("classes", "classes")),
        ((2, 2), ("classes", "")),
        ((2, 2), ("sum", "classes")),
    ],
    ids=str,
)
def test_dtensor_logits_take_their_classes_from_where_they_are(ranks, mesh, places):
    labels: tuple[tuple[torch.dtype, dict[str, Any]], ...] = ((torch.int64, {}), (torch.uint8, {"ignore_index": 255}))
    losses: tuple[dict[str, Any], ...] = ({}, {"weighted": True, "label_smoothing": 0.1})
    given = [
        (mesh, places, dtype, {**options, **ignoring, "reduction": reduction})
        for reduction, (dtype, ignoring), options in covering(2, reduction=("none", "sum", "mean"), labels=labels, options=losses)
    ]
    for found in ranks.assert_on_each(4, on_ranks.equals_whole_as_dtensor, given):
        assert_same_everywhere(found)


def test_a_classifier_under_tensor_parallelism(ranks):
    ranks.assert_on(4, on_ranks.under_tensor_parallelism)


# the linear layer and its loss: in one tile, in several, and in the memory of the classifier's gradient

BOTH = ((True, True),)


@pytest.mark.parametrize(("shape", "tile"), [((6, 3), 2**20), ((6, 3), 8), ((4, 9), 8), ((0, 3), 8)], ids=str)
@pytest.mark.parametrize("sizes", [(7,), (4, 4), (1, 6, 3), (1, 1, 1, 0), (0, 5, 0)], ids=str)
def test_linear_equals_the_whole_classifier(ranks, sizes, shape, tile):
    cases = itertools.product(("none", "sum", "mean"), (False, True), ({}, OPTIONS[2]))
    given = [(sizes, shape, tile, weighted, BOTH, {**options, "reduction": reduction}) for reduction, weighted, options in cases]
    for losses in ranks.assert_on_each(len(sizes), on_ranks.linear_equals_whole, given):
        assert_same_everywhere(losses)


@pytest.mark.parametrize(
    "needed",
    [((True, False),), ((False, True),), ((False, False),), ((True, True), (False, True), (False, False)), ((False, False), (True, False))],
    ids=str,
)
@pytest.mark.parametrize(("shape", "tile"), [((6, 3), 2**20), ((6, 3), 8), ((4, 9), 8)], ids=str)
def test_a_rank_that_needs_no_gradient_still_contributes(ranks, needed, shape, tile):
    assert_same_everywhere(ranks.assert_on(3, on_ranks.linear_equals_whole, (2, 5, 3), shape, tile, False, needed, {}))


@pytest.mark.parametrize(("shape", "tile"), [((6, 3), 2**20), ((6, 3), 8), ((0, 3), 8)], ids=str)
@pytest.mark.parametrize("sizes", [(7,), (1, 6, 3), (1, 1, 1, 0), (0, 5, 0)], ids=str)
def test_linear_takes_the_probabilities_of_its_classes(ranks, sizes, shape, tile):
    cases = itertools.product(("none", "sum", "mean"), ({}, OPTIONS[2]))
    given = [(sizes, shape, tile, BOTH, {**options, "reduction": reduction}) for reduction, options in cases]
    for losses in ranks.assert_on_each(len(sizes), on_ranks.soft_linear_equals_whole, given):
        assert_same_everywhere(losses)


@pytest.mark.parametrize("needed", [((True, False),), ((False, True),), ((True, True), (False, True), (False, False))], ids=str)
def test_a_rank_that_needs_no_gradient_of_probabilities_still_contributes(ranks, needed):
    for tile in (2**20, 8):
        assert_same_everywhere(ranks.assert_on(3, on_ranks.soft_linear_equals_whole, (2, 5, 3), (6, 3), tile, needed, {}))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tile", [2**20, 8])
def test_linear_in_lower_precision_is_within_roundings_of_float64(ranks, tile, dtype, reduction):
    assert_same_everywhere(ranks.assert_on(3, on_ranks.linear_by_kernels, (2, 0, 9), tile, dtype, reduction))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_pass_is_the_gradient_of_its_own_upstream(ranks, reduction):
    ranks.assert_on(2, on_ranks.every_pass_is_its_own, reduction)


def test_what_is_wrong_on_one_rank_is_refused_on_all(ranks):
    ranks.assert_on(2, on_ranks.refuses)


def test_without_a_group_the_classes_here_are_all():
    logits, target = torch.randn(4, 3), torch.tensor([0, 2, 1, -100])
    loss = sharded_large_margin_cross_entropy(logits, target, group=None, class_start=0, num_classes=3)
    assert same_bits(loss, large_margin_cross_entropy(logits, target))
    with pytest.raises(ValueError, match="group=None means that this process has all 3 classes"):
        sharded_large_margin_cross_entropy(logits, target, group=None, num_classes=6)
    with pytest.raises(TypeError, match=r"group must be a .*ProcessGroup, got 'WORLD'"):
        sharded_large_margin_cross_entropy(logits, target, group="WORLD")


# the classifier as a module


def test_a_head_trains_and_predicts_as_the_whole_classifier_and_starts_alike_on_any_number_of_ranks(ranks):
    initial = [classifier for size in (1, 2, 3, 4) for classifier in ranks.assert_on(size, on_ranks.head_equals_linear)]
    assert all(same_bits(classifier, initial[0]) for classifier in initial)
    assert len(initial[0].unique()) == initial[0].numel()


def test_a_head_takes_the_probabilities_of_its_classes(ranks):
    for size in (2, 4):
        ranks.assert_on(size, on_ranks.head_takes_probabilities)


def test_a_mesh_of_data_and_classes_trains_as_one_device(ranks):
    ranks.assert_on(4, on_ranks.on_a_mesh)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_rows_of_every_rank_train_as_one_batch(ranks, size):
    ranks.assert_on(size, on_ranks.on_own_rows)


def test_a_checkpoint_of_four_ranks_goes_on_on_two_and_on_one(ranks, tmp_path):
    expected = ranks.assert_on(4, on_ranks.save, str(tmp_path))
    for size in (2, 1, 3):
        for classifier in ranks.assert_on(size, on_ranks.load, str(tmp_path)):
            assert_within(classifier, expected[0], 1, 64)


@pytest.mark.parametrize("size", [1, 3])
def test_a_head_goes_on_from_one_device(ranks, size):
    ranks.assert_on(size, on_ranks.from_one_device)


def test_what_a_head_refuses(ranks):
    ranks.assert_on(2, on_ranks.misused_head)


@pytest.mark.parametrize("num_classes", [2, 3, 5, 9])
def test_the_best_classes_are_classes_even_where_logits_are_masked(ranks, num_classes):
    ranks.assert_on(4, on_ranks.top_of_masked_classes, num_classes)


def test_gradients_are_clipped_by_the_norm_of_all_ranks(ranks):
    ranks.assert_on(3, on_ranks.clipped)


def test_a_head_of_the_meta_device(ranks):
    ranks.assert_on(2, on_ranks.on_meta)


@pytest.mark.parametrize(
    ("backend", "device"),
    [("cuda:fake", "cpu"), pytest.param("nccl", "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_a_head_is_built_on_the_cpu_where_its_group_carries_no_tensors_of_the_cpu(backend, device, tmp_path):
    with ProcessPoolExecutor(1, context()) as process:  # the group is of a process of its own
        assert process.submit(on_ranks.built_on_the_cpu, backend, device, str(tmp_path)).result() == {device}


def test_what_goes_around_goes_on_a_device_that_the_group_carries(ranks):
    ranks.assert_on(2, on_ranks.carried_elsewhere)
    ranks.assert_on(2, on_ranks.carried_in_place)


# under transforms and hooks


def test_compiled_code_breaks_at_the_losses(ranks):
    ranks.assert_on(2, on_ranks.compiled)


def test_infinite_gradients_and_hooks_on_saved_tensors(ranks):
    ranks.assert_on(2, on_ranks.odd_passes)


# what it costs, and how it ends


@pytest.mark.parametrize("weighted", [False, True])
def test_one_gather_and_one_reduction(ranks, weighted):
    ranks.assert_on(2, on_ranks.traffic, weighted)


def test_two_gathers_and_one_reduction_for_probabilities(ranks):
    ranks.assert_on(2, on_ranks.traffic_of_probabilities)


def test_a_rank_holds_its_gradients_and_a_tile(ranks):
    ranks.assert_on(2, on_ranks.memory)
    ranks.assert_on(2, on_ranks.memory_of_probabilities)


def test_an_assertion_that_fails_on_a_rank_fails_the_test():
    ranks = Ranks(2)
    try:
        with pytest.raises(AssertionError, match=r"^rank 1: (?s:.*)AssertionError: as it should"):
            ranks.assert_on(2, on_ranks.fails_on_the_second)
    finally:
        ranks.stop()


def test_survivors_of_a_killed_rank_end_soon_and_say_why():
    ranks = Ranks(3)
    try:
        first, dead, last = ranks.assert_on(3, on_ranks.loses_a_rank, may_die=(1,))  # "no answer" as long as gloo would wait
    finally:
        ranks.stop()
    assert dead == "died"
    for rank, said in ((0, first), (2, last)):
        assert f"rank {rank} lost the ranks [0, 1, 2] of its group: one of them died, failed" in said


def test_what_a_backend_cannot_do_is_said_in_its_own_words(ranks):
    for kind, said in ranks.assert_on(2, on_ranks.asks_too_much):
        assert kind is RuntimeError and "scalar type" in said and "lost" not in said


GONE = (
    RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:27282. This is typically caused by a remote worker crashing."),
    RuntimeError("[pair.cc:537] Read error [127.0.0.1]:7045: Connection reset by peer"),
    RuntimeError("[unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete"),
    RuntimeError("Application timeout caused pair closure"),
    dist.DistBackendError(
        "NCCL error: ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
    ),
    dist.DistBackendError("NCCL communicator was aborted on rank 1."),
    dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cuda//0"),
    dist.DistNetworkError("failed to recv, got 0 bytes"),
)
HERE = (
    RuntimeError("No backend type associated with device type cpu"),
    RuntimeError("ProcessGroupGloo::allgather: invalid tensor size at index 0 (expected (4), got (3))"),
    dist.DistBackendError("NCCL error: ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000"),
    torch.OutOfMemoryError("CUDA out of memory"),
)


@pytest.mark.parametrize("error", GONE, ids=str)
def test_an_error_of_a_lost_peer_names_the_ranks(error, monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [0, 1, 2])
    with pytest.raises(RuntimeError, match=r"^rank 1 lost the ranks \[0, 1, 2\] of its group") as raised, collectives._exchange(None):
        raise error
    assert raised.value.__cause__ is error and str(error) in str(raised.value)


@pytest.mark.parametrize("error", HERE, ids=str)
def test_any_other_error_of_a_collective_is_raised_as_it_is(error):
    with pytest.raises(type(error)) as raised, collectives._exchange(None):
        raise error
    assert raised.value is error
