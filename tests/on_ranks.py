"""What the ranks of a test do: each function runs in a process of its own, on every rank of ``group``.

The losses compute on the GPU where there is one, which all ranks share: gloo gathers and reduces tensors of GPUs too. The rest stays on the
CPU: heads and DTensors need more of gloo than it has for GPUs, and labels are looked at on the CPU alone.
"""

import contextlib
import copy
import os
import pickle
import signal
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from devices import CPU, DEVICE
from largemargin import (
    ClassParallelLinear,
    LargeMarginCrossEntropyLoss,
    gather_rows,
    heads,
    large_margin_cross_entropy,
    sharded_large_margin_cross_entropy,
    sharded_linear_large_margin_cross_entropy,
)
from largemargin.metrics import MarginMetrics
from largemargin.rows import collectives, tiles
from largemargin.schedules import AnnealedLambda
from measure import assert_within, flop_of_products, peak_bytes


class Rows:
    """The same rows on every rank: logits (N, C, *inner), some masked, targets over all classes, one row ignored."""

    def __init__(
        self, device: torch.device, num_classes: int, rows: int = 6, inner: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
    ) -> None:
        rng = torch.Generator().manual_seed(num_classes)
        self.logits = (3 * torch.randn(rows, num_classes, *inner, generator=rng, dtype=torch.float64)).to(device, dtype)
        self.target = torch.arange(rows, device=device).reshape(-1, *[1] * len(inner)).expand(rows, *inner) * 5 % num_classes
        self.target = self.target.contiguous()
        self.weight = torch.rand(num_classes, generator=rng, dtype=torch.float64).to(device) + 0.1
        if rows > 1:
            self.target[1] = -100
        if num_classes > 4:
            self.logits[2, num_classes // 2] = -torch.inf
        self.upstream = torch.randn(self.target.shape, generator=rng, dtype=torch.float64).to(device)


def bounds(group: dist.ProcessGroup, sizes: tuple[int, ...]) -> slice:
    rank = dist.get_rank(group)
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def loss_with_upstream(function: Callable[..., Tensor], leaf: Tensor, upstream: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = leaf.detach().clone().requires_grad_()
    loss = function(leaf, **options)
    loss.backward(upstream if loss.dim() else upstream.flatten()[0].to(loss.dtype))
    return loss.detach(), leaf.grad


def equals_whole(group: dist.ProcessGroup, sizes: tuple[int, ...], inner: tuple[int, ...], weighted: bool, options: dict) -> Tensor:
    """The loss and its gradient are those of the whole logits; returns the loss."""
    rows, classes = Rows(DEVICE, sum(sizes), inner=inner), bounds(group, sizes)
    rows.target[rows.target == -100] = options.get("ignore_index", -100)
    options = {**options, "weight": rows.weight if weighted else None}

    def whole(logits: Tensor) -> Tensor:
        return large_margin_cross_entropy(logits, rows.target, **options, backend="reference")

    def split(logits: Tensor) -> Tensor:
        return sharded_large_margin_cross_entropy(logits, rows.target, group=group, **options)

    expected, gradient = loss_with_upstream(whole, rows.logits, rows.upstream)
    loss, mine = loss_with_upstream(split, rows.logits[:, classes], rows.upstream)
    assert_within(loss, expected, 16 + expected.abs(), 4)
    assert mine.shape == rows.logits[:, classes].shape
    assert_within(mine, gradient[:, classes], 16, 4)
    return loss.cpu()


class SoftRows(Rows):
    """The same with class probabilities, of which a masked class has none, and one row has none at all."""

    def __init__(self, device: torch.device, num_classes: int, rows: int = 6, inner: tuple[int, ...] = (), lead: float = 0.0) -> None:
        super().__init__(device, num_classes, rows, inner)
        rng = torch.Generator().manual_seed(num_classes)
        self.target = torch.rand(self.logits.shape, generator=rng, dtype=torch.float64).to(device)
        self.target = torch.where(self.logits == -torch.inf, 0.0, self.target / self.target.sum(1, keepdim=True))
        if rows > 1:
            self.target[1] = 0
            self.logits[0, -1] += lead


def soft_equals_whole(
    group: dist.ProcessGroup, sizes: tuple[int, ...], inner: tuple[int, ...], weighted: bool, lead: float, options: dict
) -> Tensor:
    """The loss of probabilities and its gradient are those of the whole logits; returns the loss."""
    rows, classes = SoftRows(DEVICE, sum(sizes), inner=inner, lead=lead), bounds(group, sizes)
    options = {**options, "weight": rows.weight if weighted else None}

    def whole(logits: Tensor) -> Tensor:
        return large_margin_cross_entropy(logits, rows.target, **options, backend="reference")

    def split(logits: Tensor) -> Tensor:
        return sharded_large_margin_cross_entropy(logits, rows.target[:, classes], group=group, **options)

    expected, gradient = loss_with_upstream(whole, rows.logits, rows.upstream)
    loss, mine = loss_with_upstream(split, rows.logits[:, classes], rows.upstream)
    assert_within(loss, expected, 16 + lead + expected.abs(), 4)
    assert_within(mine, gradient[:, classes], 16 + lead, 4)
    return loss.cpu()


def soft_linear_equals_whole(
    group: dist.ProcessGroup, sizes: tuple[int, ...], shape: tuple[int, int], tile: int, needed: tuple, options: dict
) -> Tensor:
    """As :func:`linear_equals_whole`, for probabilities; two passes."""
    tiles.TILE = tiles.TILE_OF_GPU = tile
    problem, classes = Features(DEVICE, sum(sizes), *shape), bounds(group, sizes)
    target = torch.rand(shape[0], sum(sizes), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    target[:, problem.linear_bias == -torch.inf] = 0
    options = {**options, "weight": problem.weight if options.get("label_smoothing") else None}
    leaves = [t.clone().requires_grad_() for t in (problem.input, problem.linear_weight, problem.linear_bias)]
    expected = large_margin_cross_entropy(F.linear(*leaves), target, **options, backend="reference")
    mine = [problem.input.clone(), problem.linear_weight[classes].clone(), problem.linear_bias[classes].clone()]
    need = needed[dist.get_rank(group) % len(needed)]
    for leaf, wanted in zip(mine, (need[0], need[1], need[1]), strict=True):
        leaf.requires_grad_(wanted)
    loss = sharded_linear_large_margin_cross_entropy(
        mine[0], mine[1], target[:, classes], group=group, linear_bias_shard=mine[2], **options
    )
    assert_within(loss, expected.detach(), 64 + expected.detach().abs(), 4)
    for factor in (1.0, -0.7)[: 2 if len(needed) == 1 else 1]:  # the second pass has the sums already; all ranks run it, or none
        upstream = factor * (problem.upstream if expected.dim() else torch.ones_like(expected))
        truth = torch.autograd.grad(expected, leaves, upstream, retain_graph=True)
        wanted = [leaf for leaf in mine if leaf.requires_grad]
        found = iter(torch.autograd.grad(loss, wanted, upstream, retain_graph=True) if wanted else ())
        for leaf, gradient in zip(mine, (truth[0], truth[1][classes], truth[2][classes]), strict=True):
            if leaf.requires_grad:
                assert_within(next(found), gradient, 64 + gradient.abs(), 4)
    return loss.detach().cpu()


def soft_by_kernels(group: dist.ProcessGroup, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As :func:`by_kernels`, for probabilities."""
    rows, classes = SoftRows(DEVICE, sum(sizes)), bounds(group, sizes)
    exact = rows.logits.to(dtype).double()
    whole = lambda logits: large_margin_cross_entropy(logits, rows.target, backend="reference")  # noqa: E731
    split = lambda logits: sharded_large_margin_cross_entropy(logits, rows.target[:, classes].float(), group=group)  # noqa: E731
    expected, gradient = loss_with_upstream(whole, exact, rows.upstream)
    loss, mine = loss_with_upstream(split, exact[:, classes].to(dtype), rows.upstream.float())
    assert loss.dtype == torch.float32 and mine.dtype == dtype
    assert_within(loss, expected, 16 + expected.abs(), 4)
    once = torch.finfo(dtype).eps if dtype != torch.float32 else 0
    assert ((mine.double() - gradient[:, classes]).abs() <= once * gradient[:, classes].abs() + 64 * torch.finfo(torch.float32).eps).all()
    return loss.cpu()


def soft_in_two_dtypes(group: dist.ProcessGroup) -> None:
    """Probabilities may be wider than the logits, and the loss is as wide as they are."""
    rows, classes = SoftRows(CPU, 9), bounds(group, (4, 5))
    logits, problem = rows.logits[:, classes].float().requires_grad_(), Features(CPU, 9, 6, 3, torch.float32)
    loss = sharded_large_margin_cross_entropy(logits, rows.target[:, classes], group=group)
    expected = large_margin_cross_entropy(rows.logits.float(), rows.target, backend="reference")
    assert loss.dtype == expected.dtype == torch.float64
    assert_within(loss, expected, 16, 2, torch.float32)
    loss.backward()
    assert logits.grad.dtype == torch.float32
    shard, bias = problem.linear_weight[classes].requires_grad_(), problem.linear_bias[classes]
    loss = sharded_linear_large_margin_cross_entropy(problem.input, shard, rows.target[:, classes], group=group, linear_bias_shard=bias)
    assert loss.dtype == torch.float64
    loss.backward()
    assert shard.grad.dtype == torch.float32


def soft_of_odd_rows(group: dist.ProcessGroup) -> None:
    """A row with an infinite or undefined logit is NaN on every rank; a masked class with a share is infinite."""
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor([[inf, 1, 0, 2], [0, 1, 2, inf], [0, nan, 2, 1], [0, 1, 2, nan], [-inf, -inf, -inf, -inf], [-inf, 1, 2, 0]])
    target = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).expand(6, 4)
    mine = bounds(group, (3, 1))
    for lam in (0.0, 0.3):
        losses = sharded_large_margin_cross_entropy(logits[:, mine], target[:, mine], group=group, lam=lam, reduction="none")
        assert losses.isnan().tolist() == [True] * 5 + [False] and losses[5] == inf
        one_hot = torch.eye(4, dtype=torch.float64)[[2, 2, 2, 2, 2, 1]]
        alone = torch.where(one_hot == 1, 0.0, -inf)
        loss = sharded_large_margin_cross_entropy(alone[:, mine], one_hot[:, mine], group=group, lam=lam, label_smoothing=0.1)
        assert loss == 0


def by_kernels(group: dist.ProcessGroup, sizes: tuple[int, ...], inner: tuple[int, ...], dtype: torch.dtype, options: dict) -> Tensor:
    """In lower precision, within roundings of float64; returns the loss."""
    rows, classes = Rows(DEVICE, sum(sizes), 8, inner, dtype), bounds(group, sizes)

    def whole(logits: Tensor) -> Tensor:
        return large_margin_cross_entropy(logits, rows.target, **options, backend="reference")

    def split(logits: Tensor) -> Tensor:
        return sharded_large_margin_cross_entropy(logits, rows.target, group=group, **options)

    expected, gradient = loss_with_upstream(whole, rows.logits.double(), rows.upstream)
    loss, mine = loss_with_upstream(split, rows.logits[:, classes], rows.upstream.float())
    assert loss.dtype == torch.float32 and mine.dtype == dtype
    assert_within(loss, expected, 16 + expected.abs(), 4)
    assert_within(
        mine,
        gradient[:, classes],
        16 if dtype == torch.float32 else gradient[:, classes].abs() + torch.finfo(torch.float32).eps * 16 / torch.finfo(dtype).eps,
        4,
    )
    return loss.cpu()


def equals_whole_as_dtensor(
    group: dist.ProcessGroup, mesh_shape: tuple[int, ...], places: tuple[str, ...], dtype: torch.dtype, options: dict
) -> Tensor:
    """The loss of a DTensor is that of its full tensor, whichever way it is sharded: over "rows", "classes", "inner", or not."""
    mesh = init_device_mesh("cpu", mesh_shape)
    rows = Rows(CPU, 10, 5, (3,))
    rows.target = rows.target.masked_fill(rows.target == -100, options.get("ignore_index", -100)).to(dtype)
    of = {"rows": Shard(0), "classes": Shard(1), "inner": Shard(-1), "": Replicate(), "sum": Replicate()}
    logits = distribute_tensor(rows.logits, mesh, [of[place] for place in places]).requires_grad_()
    computed: Any = logits * 1  # a DTensor, as its gradient
    if "sum" in places:
        parts = [Partial() if place == "sum" else of[place] for place in places]
        halves = computed.to_local(grad_placements=parts) / mesh.size(places.index("sum"))
        computed = DTensor.from_local(halves, mesh, parts)
    weight = rows.weight if options.pop("weighted", False) else None

    def whole(logits: Tensor) -> Tensor:
        return large_margin_cross_entropy(logits, rows.target, weight, **options, backend="reference")

    loss = large_margin_cross_entropy(computed, rows.target, weight, **options)
    assert isinstance(loss, DTensor)
    (loss * distribute_tensor(rows.upstream, mesh, loss.placements) if loss.dim() else loss * rows.upstream.flatten()[0]).sum().backward()
    expected, gradient = loss_with_upstream(whole, rows.logits, rows.upstream)
    assert_within(loss.full_tensor(), expected, 16 + expected.abs(), 4)
    gradients: Any = logits.grad
    assert_within(gradients.full_tensor(), gradient, 16, 4)
    return loss.full_tensor().detach()


def under_tensor_parallelism(group: dist.ProcessGroup) -> None:
    """A classifier whose columns torch has spread: the loss module takes its logits as they come."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 11)).double()
    input, target = torch.randn(7, 5, dtype=torch.float64), torch.arange(7)
    criterion = LargeMarginCrossEntropyLoss(label_smoothing=0.1)
    criterion(model(input), target).backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    mesh = init_device_mesh("cpu", (dist.get_world_size(group),))
    parallelize_module(model[2], mesh, ColwiseParallel(use_local_output=False))
    criterion(model(input), target).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        found = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
        assert_within(found, gradient, 4, 4)


class Features:
    """A linear problem, the same on every rank: features (N, D), a classifier (C, D) with bias, targets, one row ignored."""

    def __init__(self, device: torch.device, num_classes: int, rows: int, width: int, dtype: torch.dtype = torch.float64) -> None:
        rng = torch.Generator().manual_seed(num_classes)
        self.input = torch.randn(rows, width, generator=rng, dtype=torch.float64).to(device, dtype)
        self.linear_weight = torch.randn(num_classes, width, generator=rng, dtype=torch.float64).to(device, dtype)
        self.linear_bias = torch.randn(num_classes, generator=rng, dtype=torch.float64).to(device, dtype)
        self.target = torch.arange(rows, device=device) * 5 % num_classes
        self.weight = torch.rand(num_classes, generator=rng, dtype=torch.float64).to(device) + 0.1
        if rows > 1:
            self.target[1] = -100
        if num_classes > 4:
            self.linear_bias[num_classes // 2] = -torch.inf
        self.upstream = torch.randn(rows, generator=rng, dtype=torch.float64).to(device)


def linear_equals_whole(
    group: dist.ProcessGroup, sizes: tuple[int, ...], shape: tuple[int, int], tile: int, weighted: bool, needed: tuple, options: dict
) -> Tensor:
    """Loss and gradients are those of the whole classifier; ``needed``: by rank, which of features and classifier are not frozen."""
    tiles.TILE = tiles.TILE_OF_GPU = tile
    problem, classes = Features(DEVICE, sum(sizes), *shape), bounds(group, sizes)
    options = {**options, "weight": problem.weight if weighted else None}
    leaves = [t.clone().requires_grad_() for t in (problem.input, problem.linear_weight, problem.linear_bias)]
    expected = large_margin_cross_entropy(torch.nn.functional.linear(*leaves), problem.target, **options, backend="reference")
    upstream = problem.upstream if expected.dim() else torch.tensor(-0.7, dtype=torch.float64, device=DEVICE)
    truth = torch.autograd.grad(expected, leaves, upstream)

    mine = [problem.input.clone(), problem.linear_weight[classes].clone(), problem.linear_bias[classes].clone()]
    need = needed[dist.get_rank(group) % len(needed)]
    for leaf, wanted in zip(mine, (need[0], need[1], need[1]), strict=True):
        leaf.requires_grad_(wanted)
    loss = sharded_linear_large_margin_cross_entropy(mine[0], mine[1], problem.target, group=group, linear_bias_shard=mine[2], **options)
    assert_within(loss, expected.detach(), 64 + expected.detach().abs(), 4)
    if any(need):
        loss.backward(upstream)
    for leaf, gradient in zip(mine, (truth[0], truth[1][classes], truth[2][classes]), strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.grad is not None:
            assert_within(leaf.grad, gradient, 64 + gradient.abs(), 4)
    return loss.detach().cpu()


def linear_by_kernels(group: dist.ProcessGroup, sizes: tuple[int, ...], tile: int, dtype: torch.dtype, reduction: str) -> Tensor:
    tiles.TILE = tiles.TILE_OF_GPU = tile
    device = DEVICE if dtype == torch.float32 else CPU  # a GPU multiplies in half precision, and rounds more than once
    problem, classes = Features(device, sum(sizes), 9, 4, dtype), bounds(group, sizes)
    exact = [t.double().requires_grad_() for t in (problem.input, problem.linear_weight, problem.linear_bias)]
    truth = large_margin_cross_entropy(torch.nn.functional.linear(*exact), problem.target, reduction=reduction, backend="reference")
    expected = torch.autograd.grad(truth.sum(), exact)
    mine = [t.clone().requires_grad_() for t in (problem.input, problem.linear_weight[classes], problem.linear_bias[classes])]
    loss = sharded_linear_large_margin_cross_entropy(
        mine[0], mine[1], problem.target, group=group, linear_bias_shard=mine[2], reduction=reduction
    )
    assert loss.dtype == torch.float32
    assert_within(loss, truth.detach(), 32 + truth.detach().abs(), 4)
    loss.sum().backward()
    for leaf, gradient in zip(mine, (expected[0], expected[1][classes], expected[2][classes]), strict=True):
        assert leaf.grad.dtype == dtype
        single = torch.finfo(torch.float32).eps / torch.finfo(dtype).eps  # computed in float32, and rounded once
        assert_within(leaf.grad, gradient, 16 * single + gradient.abs(), 4 if dtype == torch.float32 else 1)
    return loss.detach().cpu()


def every_pass_is_its_own(group: dist.ProcessGroup, reduction: str) -> None:
    """Two passes with different upstream gradients, the first result unchanged; under checkpointing too; not twice differentiable."""
    problem, classes = Features(DEVICE, 10, 6, 3), bounds(group, (4, 6))
    for function in ("linear", "logits"):
        leaf = (problem.input if function == "linear" else problem.input @ problem.linear_weight.t()[:, classes]).requires_grad_()

        def loss_of(leaf: Tensor, function: str = function) -> Tensor:
            if function == "logits":
                return sharded_large_margin_cross_entropy(leaf, problem.target, group=group, reduction=reduction).sum()
            shard = problem.linear_weight[classes]
            return sharded_linear_large_margin_cross_entropy(leaf, shard, problem.target, group=group, reduction=reduction).sum()

        loss = loss_of(leaf)
        (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        kept = once.clone()
        (thrice,) = torch.autograd.grad(loss * 3, leaf, retain_graph=True)
        assert torch.equal(once, kept)
        assert_within(thrice, 3 * once, 16, 2)
        (again,) = torch.autograd.grad(checkpoint(loss_of, leaf, use_reentrant=False), leaf)
        assert_within(again, once, 16, 2)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, leaf, create_graph=True)


def refuses(group: dist.ProcessGroup) -> None:
    """What is wrong on one rank alone is refused on all, so that none waits."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    logits, target = torch.randn(4, 3), torch.arange(4)

    def assert_refused(error: type[Exception], words: str, logits: Tensor = logits, target: Tensor = target, **options: Any) -> None:
        with pytest.raises(error, match=words):
            sharded_large_margin_cross_entropy(logits, target, group=group, **options)

    assert_refused(
        ValueError, f"class_start is .* but shards of \\[{', '.join(['3'] * world)}\\] classes start at", class_start=7 if rank else None
    )
    assert_refused(ValueError, "num_classes is .* but their shards have", num_classes=11 if rank else None)
    assert_refused(ValueError, "class_start is \\[0, 0\\].*start at \\[0, 3\\]", class_start=0, num_classes=6)
    assert_refused(ValueError, "target must be the same on all ranks", target=target + rank)
    assert_refused(IndexError, "\\[0, 6\\)", target=target + 5)
    assert_refused(RuntimeError, "one entry for each of the 6 classes", weight=torch.ones(3))
    assert_refused(ValueError, "weight.detach", weight=torch.ones(6, requires_grad=True), label_smoothing=0.1)
    assert_refused(ValueError, "target.detach", target=torch.rand(4, 3, requires_grad=True))
    assert_refused(ValueError, "weight.detach", target=torch.rand(4, 3), weight=torch.ones(6, requires_grad=True))
    assert_refused(ValueError, "target must be the same on all ranks", target=torch.rand(4, 3) if rank else target)
    assert_refused(ValueError, "the same rows on all ranks", logits=logits[rank:], target=torch.rand(4, 3)[rank:])
    assert_refused(RuntimeError, "ignore_index=0 needs class indices", target=torch.rand(4, 3), ignore_index=0)
    assert_refused(ValueError, "the same rows on all ranks of the group, got \\[4, 3\\]", logits=logits[rank:], target=target[rank:])
    assert_refused(ValueError, "lam", lam=-1.0)
    features, classifier = torch.randn(4, 2, requires_grad=rank == 0), torch.randn(3, 2)
    with pytest.raises(ValueError, match="either all ranks of the group must need it"):
        sharded_linear_large_margin_cross_entropy(features, classifier, target, group=group, reduction="none")
    assert sharded_large_margin_cross_entropy(logits, target, group=group).isfinite()  # and all go on


class Network(torch.nn.Module):
    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh()).double()
        self.head: Any = head

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if isinstance(self.head, ClassParallelLinear):
            return self.head.loss(self.body(input), target)
        return large_margin_cross_entropy(self.head(self.body(input)), target)


def trained(
    network: torch.nn.Module, batches: range, rows: slice | Tensor = slice(None), optimizer: torch.optim.Optimizer | None = None
) -> None:
    optimizer = optimizer or torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for batch in batches:
        rng = torch.Generator().manual_seed(batch)
        input, target = torch.randn(8, 5, generator=rng, dtype=torch.float64), torch.randint(11, (8,), generator=rng)
        optimizer.zero_grad()
        network(input[rows], target[rows]).backward()
        optimizer.step()


def whole_linear(head: ClassParallelLinear) -> torch.nn.Linear:
    """The classifier of all ranks on each."""
    state = {name: value.full_tensor() for name, value in head.state_dict().items()}
    found = torch.nn.Linear(head.in_features, head.num_classes).to(state["weight"].dtype)
    found.load_state_dict(state)
    return found


def head_equals_linear(group: dist.ProcessGroup) -> Tensor:
    """Trained with features that need a gradient; its predictions; returns the initial classifier."""
    torch.manual_seed(dist.get_rank(group))
    head = ClassParallelLinear(6, 11, group=group, dtype=torch.float64)
    linear = whole_linear(head)
    initial = linear.weight.detach().clone()
    split, one = Network(head), Network(linear)
    trained(split, range(5))
    trained(one, range(5))
    for mine, truth in zip(split.body.parameters(), one.body.parameters(), strict=True):
        assert_within(mine, truth.detach(), 1, 16)
    input = torch.randn(7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for found, best in zip(head.topk(input, 4), linear(input).topk(4), strict=True):
        assert_within(found.double(), best.double().detach(), 1, 64)
    # its logits, and the loss of them
    leaf, whole = input.clone().requires_grad_(), input.clone().requires_grad_()
    split_loss: Any = large_margin_cross_entropy(head(leaf), torch.arange(7))  # a DTensor
    loss = split_loss.to_local()
    expected = large_margin_cross_entropy(linear(whole), torch.arange(7))
    loss.backward()
    expected.backward()
    assert_within(leaf.grad, whole.grad, 1, 16)
    # copies share the group; whole tensors can be loaded
    other = copy.deepcopy(head)
    assert other.group is head.group and other.weight is not head.weight
    other.load_state_dict({"weight": initial, "bias": linear.bias.detach()})
    assert torch.equal(whole_linear(other).weight.detach(), initial)
    return initial


def on_a_mesh(group: dist.ProcessGroup) -> None:
    """Two ranks share the rows and split the classes, two such pairs split the batch: the network trains as on one device."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    torch.manual_seed(0)
    head = ClassParallelLinear(6, 11, group=mesh["classes"].get_group(), dtype=torch.float64)
    one = Network(whole_linear(head))
    split = DistributedDataParallel(Network(head), process_group=mesh["data"].get_group())
    data = mesh["data"].get_local_rank()
    trained(split, range(4), slice(4 * data, 4 * data + 4))
    trained(one, range(4))
    for mine, truth in zip(split.module.body.parameters(), one.body.parameters(), strict=True):
        assert_within(mine, truth.detach(), 1, 16)
    assert_within(whole_linear(head).weight, one.head.weight.detach(), 1, 16)


def on_own_rows(group: dist.ProcessGroup) -> None:
    """Every rank has rows of its own, gathers the features of all, and has some classes: the network trains as on one device."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    head = ClassParallelLinear(6, 11, group=group, dtype=torch.float64)
    one, body = Network(whole_linear(head)), DistributedDataParallel(Network(head).body, process_group=group)

    class Gathering(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return head.loss(*gather_rows(body(input), target, group=group))

    own = torch.arange(8).chunk(world)[rank]  # shares of different size, where 8 is no multiple
    trained(Gathering(), range(4), own)
    trained(one, range(4))
    for mine, truth in zip(body.module.parameters(), one.body.parameters(), strict=True):
        assert_within(mine, truth.detach(), 1, 16)
    assert_within(whole_linear(head).weight, one.head.weight.detach(), 1, 16)


def save(group: dist.ProcessGroup, folder: str) -> Tensor:
    """Train, save, train on; returns the classifier."""
    torch.manual_seed(0)
    network = Network(ClassParallelLinear(6, 11, group=group, dtype=torch.float64))
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    network.head.register_optimizer(optimizer)
    trained(network, range(3), optimizer=optimizer)
    model, state = get_state_dict(network, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder, process_group=group)
    trained(network, range(3, 6), optimizer=optimizer)
    return whole_linear(network.head).weight.detach()


def load(group: dist.ProcessGroup, folder: str) -> Tensor:
    """Load what another number of ranks saved, and train on; returns the classifier."""
    torch.manual_seed(1)
    network = Network(ClassParallelLinear(6, 11, group=group, dtype=torch.float64))
    optimizer = torch.optim.AdamW(network.parameters(), 0.1)
    network.head.register_optimizer(optimizer)
    model, state = get_state_dict(network, optimizer)
    dcp.load({"model": model, "optimizer": state}, checkpoint_id=folder, process_group=group)
    set_state_dict(network, optimizer, model_state_dict=model, optim_state_dict=state)
    trained(network, range(3, 6), optimizer=optimizer)
    return whole_linear(network.head).weight.detach()


def traffic(group: dist.ProcessGroup, weighted: bool) -> None:
    """One all-gather of six numbers a row (eight with weights and smoothing), and one all-reduce of the gradient of the features."""
    calls: list[tuple[str, int]] = []
    problem, classes, rank = Features(CPU, 10, 6, 3, torch.float32), bounds(group, (4, 6)), dist.get_rank(group)
    options = {"weight": problem.weight, "label_smoothing": 0.1} if weighted else {}
    given = {"group": group, "class_start": 4 * rank, "num_classes": 10, **options}
    of_rows = ("all_gather", 6 * (8 if weighted else 6))

    def counted(name: str) -> object:
        original = getattr(collectives, name)

        def call(values: Tensor, group: dist.ProcessGroup) -> Tensor:
            calls.append((name, values.numel()))
            return original(values, group)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_gather", "all_reduce"):
            patch.setattr(collectives, name, counted(name))
        logits = (problem.input @ problem.linear_weight[classes].t()).requires_grad_()
        sharded_large_margin_cross_entropy(logits, problem.target, **given).backward()
        assert calls == [("all_gather", 5), of_rows]  # the first on the CPU alone, where it costs no wait
        calls.clear()
        for frozen in (False, True):
            leaf, shard = problem.input.clone().requires_grad_(not frozen), problem.linear_weight[classes].clone().requires_grad_()
            sharded_linear_large_margin_cross_entropy(leaf, shard, problem.target, **given).backward()
            assert calls == [("all_gather", 7), of_rows, *([] if frozen else [("all_reduce", 6 * 3)])]
            calls.clear()


def exchanged(
    group: dist.ProcessGroup, mesh_shape: tuple[int, int], shape: tuple[int, int, int], fused: bool, dtype: torch.dtype
) -> list[tuple[str, str, int]]:
    """The collectives of a step on a mesh of data and classes: kind, ranks, and the bytes that this rank gives.

    ``shape`` is rows of a group, width and classes; every rank starts with its share of the rows.
    """
    rows, width, num_classes = shape
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("data", "classes"))
    of_classes = mesh["classes"].get_group()
    head = ClassParallelLinear(width, num_classes, bias=False, group=of_classes, dtype=dtype)
    calls: list[tuple[str, str, int]] = []

    class Gathering(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = head

        def forward(self, own: Tensor, labels: Tensor) -> Tensor:
            features, target = gather_rows(own, labels, group=of_classes)
            loss: Any = head.loss(features, target) if fused else large_margin_cross_entropy(head(features), target)
            return loss if fused else loss.to_local()

    def counted(original: Callable[..., object], kind: str, sent: int) -> Callable[..., object]:
        def call(*tensors: Tensor, group: dist.ProcessGroup, **options: bool) -> object:
            over = "classes" if group is of_classes else "data"
            calls.append((kind, over, tensors[sent].nbytes))
            return original(*tensors, group=group, **options)

        return call

    model: torch.nn.Module = Gathering()
    if mesh_shape[0] > 1:
        wrapped = DistributedDataParallel(model, process_group=mesh["data"].get_group())
        wrapped.register_comm_hook(mesh["data"].get_group(), allreduce_hook)  # as DDP does without a hook, but through torch.distributed
        model = wrapped
    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    own = torch.ones(rows // mesh_shape[1], width, dtype=dtype, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, gather, counted(getattr(dist, gather), "all_gather", 1))
        patch.setattr(dist, "all_reduce", counted(dist.all_reduce, "all_reduce", 0))
        model(own, torch.arange(len(own))).backward()
    return calls


def flop(group: dist.ProcessGroup, shape: tuple[int, int, int], tile: int) -> int:
    """FLOP of the products of a step, as the profiler counts them."""
    rows, width, num_classes = shape
    tiles.TILE = tile
    leaves = torch.randn(rows, width, requires_grad=True), torch.randn(num_classes // dist.get_world_size(group), width, requires_grad=True)
    with torch.profiler.profile(with_flops=True) as profiler:
        sharded_linear_large_margin_cross_entropy(*leaves, torch.arange(rows), group=group).backward()
    return flop_of_products(profiler)


def head_takes_probabilities(group: dist.ProcessGroup) -> None:
    """Of its classes, fused or, under a hook, by its logits."""
    torch.manual_seed(0)
    head = ClassParallelLinear(6, 5, group=group, dtype=torch.float64)
    linear, own = whole_linear(head), slice(head.class_start, head.class_start + head.shard.size)
    input, target = torch.randn(2, 4, 6, dtype=torch.float64), torch.rand(2, 4, 5, dtype=torch.float64)
    for reduction in ("none", "mean"):
        expected = large_margin_cross_entropy(linear(input).flatten(0, 1), target.flatten(0, 1), reduction=reduction).detach()
        expected = expected.reshape(2, 4) if reduction == "none" else expected
        assert_within(head.loss(input, target[..., own], reduction=reduction), expected, 64, 2)
        hook = head.register_forward_hook(lambda *_: None)
        with pytest.warns(UserWarning, match="hook") if reduction == "none" else contextlib.nullcontext():
            assert_within(head.loss(input, target[..., own], reduction=reduction), expected, 64, 2)
        hook.remove()


def traffic_of_probabilities(group: dist.ProcessGroup) -> None:
    """Two all-gathers, of six and eight numbers a row, and one all-reduce of the gradient of the features."""
    calls: list[tuple[str, int]] = []
    problem, classes = Features(CPU, 10, 6, 3, torch.float32), bounds(group, (4, 6))
    target = torch.full((6, classes.stop - classes.start), 0.1)
    gather, reduce = collectives.all_gather, collectives.all_reduce

    def counted(kind: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(values: Tensor, group: dist.ProcessGroup) -> Tensor:
            calls.append((kind, values.numel()))
            return original(values, group)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "all_gather", counted("gather", gather))
        patch.setattr(collectives, "all_reduce", counted("reduce", reduce))
        logits = (problem.input @ problem.linear_weight[classes].t()).requires_grad_()
        sharded_large_margin_cross_entropy(logits, target, group=group, weight=problem.weight, label_smoothing=0.1).backward()
        assert calls == [("gather", 5), ("gather", 6 * 6), ("gather", 8 * 6)]
        for tile in (2**20, 8):
            tiles.TILE = tile
            calls.clear()
            leaves = [leaf.clone().requires_grad_() for leaf in (problem.input, problem.linear_weight[classes])]
            sharded_linear_large_margin_cross_entropy(*leaves, target, group=group).backward()
            assert calls == [("gather", 7), ("gather", 6 * 6), ("gather", 8 * 6), ("reduce", 6 * 3)]


def memory_of_probabilities(group: dist.ProcessGroup) -> None:
    """Beside gradients and target a rank holds a few times a tile of a sixteenth of the size, not the logits of its classes."""
    tiles.TILE = 16 * 4000
    rng = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=rng, requires_grad=True) for shape in ((200, 8), (4000, 8))]
    target = torch.rand(200, 4000, generator=rng)
    step = lambda: sharded_linear_large_margin_cross_entropy(*leaves, target, group=group).backward()  # noqa: E731
    assert peak_bytes(step) < sum(leaf.nbytes for leaf in leaves) + 50 * 4 * 4000 + 200_000  # the logits would take 3,200,000


def memory(group: dist.ProcessGroup) -> None:
    """A rank holds its gradients and a tile; not the logits of its classes."""
    tiles.TILE = 20_000
    rng = torch.Generator().manual_seed(0)
    input, target = torch.randn(100, 8, generator=rng), torch.randint(8000, (100,), generator=rng)
    shard = torch.randn(4000, 8, generator=rng)
    for needed in ((True, True), (False, True), (False, False)):
        leaves = [leaf.detach().clone().requires_grad_(need) for leaf, need in zip((input, shard), needed, strict=True)]

        def step(leaves: list[Tensor] = leaves, needed: tuple[bool, bool] = needed) -> None:
            loss = sharded_linear_large_margin_cross_entropy(*leaves, target, group=group)
            if any(needed):
                loss.backward()

        gradients = sum(leaf.nbytes for leaf in leaves if leaf.requires_grad)
        assert peak_bytes(step) < gradients + 4 * 20_000 + 200_000  # the logits would take 1,600,000


def fails_on_the_second(group: dist.ProcessGroup) -> None:
    assert dist.get_rank(group) != 1, "as it should"


def loses_a_rank(group: dist.ProcessGroup) -> str:
    """What a survivor says when another rank dies in the middle of its work."""
    problem, classes = Features(CPU, 10, 6, 3), bounds(group, (4, 3, 3))
    for step in range(10**6):
        if step == 5 and dist.get_rank(group) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            sharded_linear_large_margin_cross_entropy(problem.input, problem.linear_weight[classes], problem.target, group=group)
        except RuntimeError as error:
            return str(error)
    return "nothing happened"


def asks_too_much(group: dist.ProcessGroup) -> tuple[type[Exception], str]:
    """What a rank says when its backend cannot add such numbers."""
    with pytest.raises(RuntimeError) as raised:
        collectives.all_reduce(torch.ones(3).to(torch.float8_e5m2), group)
    return raised.type, str(raised.value)


def compiled(group: dist.ProcessGroup) -> None:
    """A compiled step breaks at the losses, and has their gradients."""
    problem, classes = Features(CPU, 10, 6, 3, torch.float32), bounds(group, (4, 6))

    def step(input: Tensor, shard: Tensor) -> tuple[Tensor, Tensor]:
        given = {"group": group, "class_start": classes.start, "num_classes": 10}
        linear = sharded_linear_large_margin_cross_entropy(input * 2, shard, problem.target, **given)
        return linear, sharded_large_margin_cross_entropy(input @ shard.t(), problem.target, **given)

    results = []
    for function in (step, *(torch.compile(step, backend=backend) for backend in ("eager", "aot_eager"))):
        leaves = [problem.input.clone().requires_grad_(), problem.linear_weight[classes].clone().requires_grad_()]
        linear, logits = function(*leaves)
        (linear + logits).backward()
        results.append([linear.detach(), logits.detach(), *(leaf.grad for leaf in leaves)])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_within(got, expected.double(), 16, 4)


def odd_passes(group: dist.ProcessGroup) -> None:
    """Infinite upstream gradients, hooks that change dtypes, transforms."""
    problem, classes = Features(CPU, 10, 6, 3, torch.float32), bounds(group, (4, 6))

    of_these = problem.input @ problem.linear_weight[classes].t()

    def linear(input: Tensor) -> Tensor:
        return sharded_linear_large_margin_cross_entropy(input, problem.linear_weight[classes], problem.target, group=group)

    def logits(input: Tensor) -> Tensor:
        return sharded_large_margin_cross_entropy(input, problem.target, group=group)

    for function, value in ((linear, problem.input), (logits, of_these)):
        leaf = value.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf), leaf, torch.tensor(torch.inf))
        assert (gradient[1] == 0).all()  # the ignored row
        (expected,) = torch.autograd.grad(function(leaf), leaf)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16() if t.is_floating_point() else t, lambda t: t):
            loss = function(leaf * 1)
        (rough,) = torch.autograd.grad(loss, leaf)
        assert (rough - expected).abs().max() < 0.05 * expected.abs().max()
        with pytest.raises(NotImplementedError, match="functorch"):
            torch.func.grad(function)(value)


def misused_head(group: dist.ProcessGroup) -> None:
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    torch.manual_seed(0)
    head = ClassParallelLinear(6, 12, group=group)
    wrapped = DistributedDataParallel(Network(head), process_group=group)
    if rank:  # the first rank has its own
        with pytest.raises(RuntimeError, match="another rank's classes have overwritten"):
            wrapped.module.head.loss(torch.randn(3, 6), torch.arange(3))
    with pytest.raises(ValueError, match="must be the same on all ranks, got"):
        ClassParallelLinear(6, 12 + rank, group=group)
    head = ClassParallelLinear(6, 11, group=group)
    for state in (ClassParallelLinear(6, 12, group=group).state_dict(), torch.nn.Linear(6, 6).state_dict()):
        with pytest.raises(ValueError, match="all 11 classes"):
            head.load_state_dict(state)
    head.load_state_dict({name: value.redistribute(placements=[Replicate()]) for name, value in head.state_dict().items()})
    with pytest.raises(TypeError, match=r"torch.distributed.checkpoint"):
        pickle.dumps(head)
    with pytest.raises(ValueError, match="k must be between 1 and the 11 classes"):
        head.topk(torch.randn(2, 6), 12)
    with pytest.raises(ValueError, match="the same rows on all ranks"):
        head.topk(torch.randn(2 + rank, 6), 2)
    with pytest.raises(ValueError, match="the same dtypes and shapes"):
        gather_rows(torch.zeros(3, 2 + rank), group=group)
    with pytest.raises(ValueError, match="the same number of rows"):
        gather_rows(torch.zeros(3), torch.zeros(4), group=group)
    optimizer = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    head.register_optimizer(optimizer)
    head.loss(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)), torch.arange(3)).backward()
    optimizer.step()
    optimizer.state[head.weight]["row_var"] = torch.zeros(len(head.weight), 1)
    with pytest.raises(ValueError, match="a factored state cannot be split"):
        optimizer.state_dict()
    assert world > 1


def top_of_masked_classes(group: dist.ProcessGroup, num_classes: int) -> None:
    head = ClassParallelLinear(6, num_classes, group=group)
    with torch.no_grad():
        head.bias[::2] = -torch.inf
    linear, input = whole_linear(head), torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    for k in range(1, num_classes + 1):
        values, classes = head.topk(input, k)
        assert_within(values, linear(input).topk(k)[0].double().detach(), 1, 8)
        assert all(len(set(row)) == k and set(row) <= set(range(num_classes)) for row in classes.tolist())


def clipped(group: dist.ProcessGroup) -> None:
    torch.manual_seed(0)
    head = ClassParallelLinear(6, 11, group=group, dtype=torch.float64)
    one, split = Network(whole_linear(head)), Network(head)
    for network in (one, split):
        rng = torch.Generator().manual_seed(0)
        network(torch.randn(8, 5, generator=rng, dtype=torch.float64), torch.arange(8)).backward()
    expected = torch.nn.utils.clip_grad_norm_(one.parameters(), 0.05)
    assert_within(head.clip_grad_norm_(split.body.parameters(), 0.05), expected, 1, 4, torch.float32)
    for mine, truth in zip(split.body.parameters(), one.body.parameters(), strict=True):
        assert_within(mine.grad, truth.grad, 1, 4, torch.float32)
    gradient: Any = head._as_dtensor(head.weight.grad)
    assert_within(gradient.full_tensor(), one.head.weight.grad, 1, 4, torch.float32)


def from_one_device(group: dist.ProcessGroup) -> None:
    """A network and its optimiser go on where those of one device stopped."""
    torch.manual_seed(0)
    one = Network(torch.nn.Linear(6, 11).double())
    optimizer = torch.optim.AdamW(one.parameters(), 0.1)
    trained(one, range(3), optimizer=optimizer)
    split = Network(ClassParallelLinear(6, 11, group=group, dtype=torch.float64))
    split.load_state_dict(one.state_dict())
    other = torch.optim.AdamW(split.parameters(), 0.1)
    split.head.register_optimizer(other)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(one, range(3, 6), optimizer=optimizer)
    trained(split, range(3, 6), optimizer=other)
    assert_within(whole_linear(split.head).weight, one.head.weight.detach(), 1, 64)


def on_meta(group: dist.ProcessGroup) -> None:
    with torch.device("meta"):
        head = ClassParallelLinear(6, 11, group=group)
    logits, target = torch.empty(3, head.shard.size, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    given = {"group": group, "class_start": head.class_start, "num_classes": 11}
    assert sharded_large_margin_cross_entropy(logits, target, **given).is_meta
    head.to_empty(device="cpu")
    torch.manual_seed(0)
    head.reset_parameters()
    torch.manual_seed(0)
    assert torch.equal(head.weight, ClassParallelLinear(6, 11, group=group).weight)


def built_on_the_cpu(backend: str, device: str, folder: str) -> set[str]:
    """A head of a group whose backend carries no tensors of the CPU: built there, moved to ``device``, used. Its devices at the end."""
    store = FakeStore() if "fake" in backend else dist.FileStore(f"{folder}/store", 1)
    dist.init_process_group(backend, rank=0, world_size=1, store=store)
    head = ClassParallelLinear(6, 11, group=dist.group.WORLD)
    before = head.weight.detach().clone()
    assert head.weight.is_cpu and len(before.unique()) == before.numel()
    head.to(device)
    assert torch.equal(head.weight.cpu(), before)
    assert {tensor.device.type for tensor in (head.weight, head.bias, head._own_start)} == {device}

    input, target = torch.randn(8, 6, device=device, requires_grad=True), torch.arange(8, device=device)
    head.loss(input, target).backward()
    assert head.weight.grad.device.type == input.grad.device.type == device
    assert head.clip_grad_norm_([input], 1e-3) > 1e-3
    values, classes = head.topk(input, 3)
    assert torch.equal(values, F.linear(input, head.weight, head.bias).topk(3)[0]) and classes.device.type == device
    cast(DTensor, large_margin_cross_entropy(head(input), target)).to_local().backward()
    rows = gather_rows(input.detach(), target, group=head.group)
    assert torch.equal(rows[0], input.detach()) and torch.equal(rows[1], target)

    state = {name: value.clone() for name, value in head.state_dict().items()}
    assert state["weight"].device.type == device
    head.reset_parameters()
    assert not torch.equal(head.weight.cpu(), before)
    head.load_state_dict(state)
    assert torch.equal(head.weight.cpu(), before)
    with torch.device("meta"):
        empty = ClassParallelLinear(6, 11, group=dist.group.WORLD)
    empty.to_empty(device=device).reset_parameters()
    assert empty.weight.isfinite().all() and int(empty._own_start) == 0

    metrics = MarginMetrics()  # on the CPU
    metrics.update(values.detach().cpu(), torch.zeros(8, dtype=torch.int64))
    assert metrics.reduce().compute() == metrics.compute()
    dist.destroy_process_group()
    return {tensor.device.type for tensor in (head.weight, head.bias, head._own_start)}


def carried_elsewhere(group: dist.ProcessGroup) -> None:
    """Of a group that carries no tensors of the CPU, all that goes around goes on the device of its backend, and comes back unchanged.

    Torch's lazy device, which computes on the CPU, plays the accelerator.
    """
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()
    devices: set[str] = set()
    gather_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, reduce = getattr(dist, gather_name), dist.all_reduce

    def lazy_gather(gathered: Tensor, values: Tensor, group: dist.ProcessGroup) -> None:
        devices.update((gathered.device.type, values.device.type))
        on_the_cpu = torch.empty(gathered.shape, dtype=gathered.dtype)
        gather(on_the_cpu, values.cpu(), group=group)
        gathered.copy_(on_the_cpu)

    def lazy_reduce(values: Tensor, group: dist.ProcessGroup) -> None:
        devices.add(values.device.type)
        on_the_cpu = values.cpu()
        reduce(on_the_cpu, group=group)
        values.copy_(on_the_cpu)

    expected = everything_exchanged(group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, gather_name, lazy_gather)
        patch.setattr(dist, "all_reduce", lazy_reduce)
        patch.setattr(dist, "get_backend_config", lambda group: "lazy:gloo")
        found = everything_exchanged(group)
    assert devices == {"lazy"}
    for name, tensor in expected.items():
        assert found[name].is_cpu and torch.equal(found[name], tensor), name


def everything_exchanged(group: dist.ProcessGroup) -> dict[str, Tensor]:
    """What comes of each function that talks to the other ranks."""
    torch.manual_seed(0)
    rank, rng = dist.get_rank(group), torch.Generator().manual_seed(0)
    head = ClassParallelLinear(6, 11, group=group)
    initial = head.weight.detach().clone()
    input, target = torch.randn(8, 6, generator=rng, requires_grad=True), torch.arange(8)
    loss = head.loss(input, target)
    loss.backward()
    of_logits = sharded_large_margin_cross_entropy(cast(DTensor, head(input)).to_local(), target, group=group)
    norm = head.clip_grad_norm_([input], 1e-3)
    values, classes = head.topk(input, 3)
    rows, labels = gather_rows(input.detach()[rank:], target[rank:], group=group)
    metrics = MarginMetrics()
    metrics.update(values, torch.zeros(8, dtype=torch.int64))
    together = metrics.reduce(group)
    return {
        "initial": initial,
        "loss": loss.detach(),
        "of_logits": of_logits.detach(),
        "input.grad": input.grad,
        "weight.grad": head.weight.grad,
        "norm": norm,
        "values": values,
        "classes": classes,
        "rows": rows,
        "labels": labels,
        "metrics": together._totals,
    }


def carried_in_place(group: dist.ProcessGroup) -> None:
    """Of a group that carries tensors of the CPU, its collectives get the tensors themselves, and not copies."""
    given: list[Tensor] = []
    gather_name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather, reduce = getattr(dist, gather_name), dist.all_reduce

    def watched_gather(gathered: Tensor, values: Tensor, group: dist.ProcessGroup) -> None:
        given.extend((gathered, values))
        gather(gathered, values, group=group)

    def watched_reduce(values: Tensor, group: dist.ProcessGroup) -> None:
        given.append(values)
        reduce(values, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, gather_name, watched_gather)
        patch.setattr(dist, "all_reduce", watched_reduce)
        values = torch.ones(3)
        together = collectives.all_gather(values, group)
        summed = collectives.all_reduce(values, group)
    assert summed is values
    assert [tensor.data_ptr() for tensor in given] == [together.data_ptr(), values.data_ptr(), values.data_ptr()]


def head_under_ddp(group: dist.ProcessGroup, make: Callable[[], torch.nn.Module]) -> None:
    """Half of the rows on each rank: the gradients of the network and of the head are those of all rows."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = torch.nn.Linear(5, 6).double(), make()

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            found = self.head(self.body(input), target)
            return large_margin_cross_entropy(found, target) if found.dim() else found

    rng = torch.Generator().manual_seed(0)
    input, target = torch.randn(8, 5, generator=rng, dtype=torch.float64), torch.arange(8) % 4
    one, split = Model(), DistributedDataParallel(Model(), process_group=group)
    own = slice(4 * dist.get_rank(group), 4 * dist.get_rank(group) + 4)
    one(input, target).backward()
    split(input[own], target[own]).backward()
    for mine, truth in zip(split.module.parameters(), one.parameters(), strict=True):
        assert_within(mine.grad, truth.grad, 4, 16)


def lsoftmax() -> torch.nn.Module:
    return heads.LSoftmaxLinear(6, 4, 2, schedule=AnnealedLambda.for_steps(10), dtype=torch.float64)


def gaussian_mixture() -> torch.nn.Module:
    return heads.GaussianMixtureHead(6, 4, covariance="diagonal", dtype=torch.float64)


def super_symmetric() -> torch.nn.Module:
    return heads.SuperSymmetricLinear(6, 4, frame="learned", learn_scale=True, dtype=torch.float64)


def cosface() -> heads.CosineLinear:
    return heads.CosineLinear(6, 4, margin=0.3, dtype=torch.float64)


def arcface() -> torch.nn.Module:
    return heads.CosineLinear(6, 4, margin=0.3, kind="arcface", dtype=torch.float64)


def sphereface() -> torch.nn.Module:
    schedule = AnnealedLambda.for_steps(10)
    return heads.CosineLinear(6, 4, kind="sphereface", margin=2, subcenters=2, schedule=schedule, dtype=torch.float64)


def t_vmf() -> torch.nn.Module:
    return heads.TVMFLinear(6, 4, kappa=4.0, dtype=torch.float64)


def center() -> torch.nn.Module:
    return heads.CenterLoss(6, 4, as_parameter=True, dtype=torch.float64)


def cosface_in_the_sharded_loss(group: dist.ProcessGroup) -> None:
    """The margin of CosFace is a hard bias, and the classes of a cosine head can be split."""
    torch.manual_seed(0)
    head, rng = cosface(), torch.Generator().manual_seed(0)
    input, target = torch.randn(8, 6, generator=rng, dtype=torch.float64), torch.arange(8) % 4
    classes, bias = bounds(group, (1, 3)), head.hard_bias
    expected = large_margin_cross_entropy(head(input, target), target)
    loss = sharded_linear_large_margin_cross_entropy(head.features(input), head.weights()[classes], target, group=group, hard_bias=bias)
    assert_within(loss, expected.detach(), 64, 4)
    for mine, truth in zip(torch.autograd.grad(loss, head.weight), torch.autograd.grad(expected, head.weight), strict=True):
        assert_within(mine[classes], truth[classes], 64, 4)
