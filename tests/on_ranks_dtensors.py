"""What the ranks of the tests of DTensors do: each function runs in a process of its own, on every rank of ``group``."""

import copy
import itertools
from collections.abc import Callable
from functools import partial
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from devices import CPU
from largemargin import (
    ClassParallelLinear,
    heads,
    large_margin_cross_entropy,
    linear_large_margin_cross_entropy,
    metrics,
    row_stats,
    sharded_large_margin_cross_entropy,
    sharded_linear_large_margin_cross_entropy,
)
from largemargin.heads.super_symmetric import super_symmetry_penalty
from largemargin.lab._torchvision import import_torchvision
from measure import assert_within, same_bits
from on_ranks import Rows
from registry import HEADS, HINGES
from row_losses import OTHERS

FUNCTIONS: dict[str, Callable[..., Tensor]] = {hinge.function.__name__: hinge.function for hinge in HINGES}
# those that can be split by classes or by rows
SPLIT = ("lsoftmax", "cosface", "arcface", "arcface_insightface", "mixture", "mixture_diagonal", "center")
KINDS = ("lsoftmax", "cosface", "mixture_diagonal", "center")  # one of each class: the others have another margin or no variances
PLACES = {"rows": Shard(0), "classes": Shard(1), "inner": Shard(-1), "": Replicate()}


def placed(rows: Rows, mesh_shape: tuple[int, ...], places: tuple[str, ...]) -> DTensor:
    mesh = init_device_mesh("cpu", mesh_shape)
    return distribute_tensor(rows.logits, mesh, [PLACES[place] for place in places])


def tied(num_classes: int) -> Rows:
    """Rows in whose largest non-target classes there are ties, within a rank and between ranks, and one row with a masked target."""
    rows = Rows(CPU, num_classes, 10, (3,))
    rows.logits[3, 1:] = 2.0
    rows.logits[4, [0, num_classes - 1]] = 9.0
    rows.logits[5, rows.target[5, 0]] = -torch.inf
    return rows


def hinge_equals_whole(
    group: dist.ProcessGroup, name: str, mesh_shape: tuple[int, ...], places: tuple[str, ...], num_classes: int, options: dict
) -> Tensor:
    function, rows = FUNCTIONS[name], tied(num_classes)
    weight = rows.weight if options.pop("weighted", False) else None
    logits = placed(rows, mesh_shape, places).requires_grad_()
    loss = function(logits, rows.target, weight, **options)
    assert isinstance(loss, DTensor)
    upstream = rows.upstream if loss.dim() else rows.upstream.flatten()[0]
    (loss * distribute_tensor(upstream, loss.device_mesh, loss.placements) if loss.dim() else loss * upstream).sum().backward()

    leaf = rows.logits.clone().requires_grad_()
    expected = function(leaf, rows.target, weight, **options)
    (expected * upstream).nan_to_num(posinf=0.0).sum().backward()
    assert_within(loss.full_tensor(), expected.detach(), 16 + expected.detach().abs().nan_to_num(posinf=0.0), 4)
    if expected.isfinite().all():
        assert_within(cast(DTensor, logits.grad).full_tensor(), leaf.grad, 16, 4)
    return loss.full_tensor().detach()


def row_losses_equal_whole(group: dist.ProcessGroup, mesh_shape: tuple[int, ...], places: tuple[str, ...]) -> None:
    """Every other loss of class indices, with the regulariser, the options of its case, and each reduction."""
    for case, reduction in zip(OTHERS, itertools.cycle(("none", "sum", "mean"))):
        rows = tied(9)
        options = {**case.options, **case.of_classes(9), "lam": 0.3, "reduction": reduction}
        logits, leaf = placed(rows, mesh_shape, places).requires_grad_(), rows.logits.clone().requires_grad_()
        loss, expected = (case.function(f, rows.target, rows.weight, **options) for f in (logits, leaf))
        whole = cast(DTensor, loss).full_tensor()
        assert_within(whole, expected.detach(), 64 + expected.detach().abs().nan_to_num(posinf=0.0), 8)
        whole[whole.isfinite()].sum().backward()
        expected[expected.isfinite()].sum().backward()
        assert_within(cast(DTensor, logits.grad).full_tensor(), leaf.grad, 64, 8)


def statistics_equal_whole(group: dist.ProcessGroup, mesh_shape: tuple[int, ...], places: tuple[str, ...], num_classes: int) -> Tensor:
    rows = tied(num_classes)
    logits = placed(rows, mesh_shape, places).requires_grad_()
    leaf = rows.logits.clone().requires_grad_()
    found, expected = row_stats(logits, rows.target), row_stats(leaf, rows.target)
    for name in found._fields:
        field, whole = getattr(found, name), getattr(expected, name)
        assert isinstance(field, DTensor)
        assert_within(field.full_tensor(), whole.detach(), 16, 8)
        if name == "num_nontargets":
            continue
        upstream = distribute_tensor(rows.upstream, field.device_mesh, field.placements)
        (gradient,) = torch.autograd.grad((field * upstream).sum(), logits, retain_graph=True)
        (truth,) = torch.autograd.grad((whole * rows.upstream).sum(), leaf, retain_graph=True)
        assert_within(cast(DTensor, gradient).full_tensor(), truth, 16, 8)
    return cast(DTensor, found.rho).full_tensor().detach()


MEASURES: dict[str, Callable[..., Tensor]] = {
    "margin": metrics.margin,
    "rho_hat": metrics.rho_hat,
    "divergence": metrics.divergence,
    "log_odds": metrics.log_odds,
    "nontarget_entropy": metrics.nontarget_entropy,
    "nll": metrics.nll,
    "accuracy": metrics.accuracy,
    "topk_error": metrics.topk_error,
    "ece": metrics.ece,
    "adaptive_ece": metrics.adaptive_ece,
}


def metrics_equal_whole(group: dist.ProcessGroup, mesh_shape: tuple[int, ...], places: tuple[str, ...]) -> None:
    rows = Rows(CPU, 9, 10, (3,))
    logits = placed(rows, mesh_shape, places)
    for measure in MEASURES.values():
        assert same_bits(measure(logits, rows.target), measure(rows.logits, rows.target))
        target = distribute_tensor(rows.target, logits.device_mesh, [Replicate()] * logits.device_mesh.ndim)
        assert same_bits(measure(logits, target), measure(rows.logits, rows.target))
    streams = metrics.MarginMetrics(), metrics.MarginMetrics()
    for stream, input in zip(streams, (logits, rows.logits), strict=True):
        stream.update(input, rows.target)
    assert streams[0].compute() == streams[1].compute()
    import_torchvision()  # torchmetrics imports it, and it may not import by itself
    torchmetric = metrics.as_torchmetric(num_bins=4)
    torchmetric.update(logits, rows.target)
    assert float(torchmetric.compute()["accuracy"]) == streams[1].compute()["accuracy"]


def logits_of_a_class_parallel_layer_go_everywhere(group: dist.ProcessGroup) -> None:
    head = ClassParallelLinear(5, 11, group=group, dtype=torch.float64)
    features, target = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.arange(7)
    logits = cast(DTensor, head(features))
    whole = logits.full_tensor().detach()
    for function in FUNCTIONS.values():
        assert_within(cast(DTensor, function(logits, target)).full_tensor(), function(whole, target), 16, 4)
    assert_within(cast(DTensor, row_stats(logits, target).rho).full_tensor(), row_stats(whole, target).rho, 16, 4)
    for measure in MEASURES.values():
        assert same_bits(measure(logits.detach(), target), measure(whole, target))
    weight = head.state_dict()["weight"]
    assert same_bits(metrics.super_symmetry(weight), metrics.super_symmetry(weight.full_tensor()))


def a_class_parallel_layer_names_features_that_it_cannot_take(group: dist.ProcessGroup) -> None:
    head = ClassParallelLinear(5, 11, group=group)
    # not init_device_mesh, which makes a group: all ranks must take part, or their later groups have different names
    mesh = DeviceMesh.from_group(group, "cpu")
    features = distribute_tensor(torch.randn(7, 5), mesh, [Replicate()])
    for call in (head, head.topk):
        with pytest.raises(TypeError, match=r"^input is a DTensor, but weight is not; pass input\.full_tensor\(\)"):
            call(features)


def a_plain_input_wants_a_plain_target(group: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    logits, target = torch.randn(7, 9), distribute_tensor(torch.arange(7), mesh, [Replicate()])
    probabilities = distribute_tensor(torch.full((7, 9), 1 / 9), mesh, [Replicate()])
    functions: tuple[Callable[..., object], ...] = (*FUNCTIONS.values(), row_stats, large_margin_cross_entropy)
    for function in functions:
        with pytest.raises(TypeError, match=r"^target is a DTensor.*target\.full_tensor\(\)"):
            function(logits, target)
    with pytest.raises(TypeError, match=r"^target is a DTensor"):
        large_margin_cross_entropy(logits, probabilities)
    with pytest.raises(TypeError, match=r"^target is a DTensor"):
        linear_large_margin_cross_entropy(logits, torch.eye(9), target)
    with pytest.raises(TypeError, match=r"^target is a DTensor"):
        sharded_large_margin_cross_entropy(logits, target, group=group)
    with pytest.raises(TypeError, match=r"^target is a DTensor"):
        sharded_linear_large_margin_cross_entropy(logits, torch.eye(9), target, group=group)


def what_meets_a_plain_tensor_is_plain(group: dist.ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    features, target, weight, classifier = torch.randn(7, 9), torch.arange(7), torch.ones(9), torch.eye(9)
    placed, labels, factors, classes = (distribute_tensor(t, mesh, [Replicate()]) for t in (features, target, weight, classifier))
    center, lsoftmax, gmm = heads.CenterLoss(9, 9), heads.LSoftmaxLinear(9, 9), heads.GaussianMixtureHead(9, 9)
    linear, sharded = linear_large_margin_cross_entropy, sharded_linear_large_margin_cross_entropy
    calls: dict[str, list[Callable[[], object]]] = {
        "weight": [
            *(partial(function, features, target, factors) for function in (*FUNCTIONS.values(), large_margin_cross_entropy)),
            lambda: linear(features, classifier, target, weight=factors),
            lambda: sharded_large_margin_cross_entropy(features, target, group=group, weight=factors),
            lambda: sharded(features, classifier, target, group=group, weight=factors),
        ],
        "linear_weight": [lambda: linear(features, classes, target)],
        "linear_weight_shard": [lambda: sharded(features, classes, target, group=group)],
        "input": [lambda: linear(placed, classifier, target)],
        "linear_bias": [lambda: linear(features, classifier, target, linear_bias=factors)],
        "features": [partial(head, placed, target) for head in (center, lsoftmax, gmm, heads.CosineLinear(9, 9))],
        "target": [partial(head, features, labels) for head in (center, lsoftmax, gmm)],
    }
    for name, mixed in calls.items():
        for call in mixed:
            with pytest.raises(TypeError, match=rf"^{name} is a DTensor, but .* is not; pass {name}\.full_tensor\(\)"):
                call()


def heads_equal_whole(
    group: dist.ProcessGroup, names: tuple[str, ...], mesh_shape: tuple[int, ...], of_classes: tuple[str, ...], of_rows: tuple[str, ...]
) -> None:
    """Heads whose classes lie as ``of_classes`` says, for features and targets that lie as ``of_rows`` says."""
    mesh = init_device_mesh("cpu", mesh_shape)
    generator = torch.Generator().manual_seed(0)
    features, target = torch.randn(7, 5, generator=generator, dtype=torch.float64), torch.tensor([0, 8, 3, -100, 3, 4, 7])
    classes, rows = ([PLACES[place] for place in places] for places in (of_classes, of_rows))
    for name_of_head in names:
        torch.manual_seed(0)  # the same head on every rank
        whole = HEADS[name_of_head](5, 10, dtype=torch.float64)
        head = copy.deepcopy(whole)
        for name, parameter in list(head.named_parameters()):
            head.register_parameter(name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, classes)))
        leaf, placed = features.clone().requires_grad_(), distribute_tensor(features, mesh, rows).requires_grad_()
        expected, found = whole(leaf, target), head(placed, distribute_tensor(target, mesh, rows))
        expected.square().sum().backward()
        found.square().sum().backward()
        assert_within(found.full_tensor().detach(), expected.detach(), 1000, 16)
        assert_within(cast(DTensor, placed.grad).full_tensor(), leaf.grad, 10_000, 64)
        for parameter, of_whole in zip(head.parameters(), whole.parameters(), strict=True):
            assert_within(cast(DTensor, parameter.grad).full_tensor(), of_whole.grad, 10_000, 64)


def centers_move_where_they_are_whole(group: dist.ProcessGroup) -> None:
    mesh = DeviceMesh.from_group(group, "cpu")
    torch.manual_seed(0)
    whole, features, target = heads.CenterLoss(5, 10), torch.randn(7, 5), torch.tensor([0, 8, 3, -100, 3, 4, 7])
    for place in (Replicate(), Shard(1), Shard(0)):
        center, expected = copy.deepcopy(whole), copy.deepcopy(whole)
        placed = distribute_tensor(center.centers, mesh, [place])
        center.load_state_dict({"centers": placed}, assign=True)
        rows = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in (features, target)]
        if place == Shard(0):
            with pytest.raises(NotImplementedError, match=r"^centers is a DTensor whose classes are split .*as_parameter=True$"):
                center(*rows)
            center.eval()
            expected.eval()
        for _ in range(3):
            assert_within(cast(DTensor, center(*rows)).full_tensor(), expected(features, target), 1000, 4)
        assert_within(cast(DTensor, center.centers).full_tensor(), expected.centers, 10, 4)


def penalty_equals_whole(group: dist.ProcessGroup) -> None:
    weight = torch.randn(9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    placed = distribute_tensor(weight.detach(), init_device_mesh("cpu", (dist.get_world_size(group),)), [Shard(0)]).requires_grad_()
    penalty, whole = super_symmetry_penalty(placed), super_symmetry_penalty(weight)
    assert same_bits(penalty.detach(), whole.detach())
    penalty.backward()
    whole.backward()
    assert_within(cast(DTensor, placed.grad).full_tensor(), weight.grad, 1, 4)
