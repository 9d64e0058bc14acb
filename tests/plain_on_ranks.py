"""What the ranks of test_plain_layer do: layers that are sharded, and shards whose module does more than multiply."""

import copy
import functools
import warnings
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from largemargin import ClassParallelLinear, LinearLargeMarginCrossEntropyLoss, large_margin_cross_entropy

D, C = 6, 11


def sharded_linear(group: dist.ProcessGroup, kind: str) -> None:
    """The loss of a criterion whose layer is under FSDP, of either kind, or is tensor parallel."""
    mesh = DeviceMesh.from_group(group, "cpu")
    torch.manual_seed(0)
    criterion = LinearLargeMarginCrossEntropyLoss(D, C).double()
    features, target = torch.randn(8, D, dtype=torch.float64), torch.randint(C, (8,))
    expected = large_margin_cross_entropy(criterion.linear(features), target)
    (right,) = torch.autograd.grad(expected, criterion.linear.weight)
    if kind == "fully_shard":
        fully_shard(criterion.linear, mesh=mesh)
    elif kind == "FullyShardedDataParallel":
        unit = FullyShardedDataParallel(criterion.linear, process_group=group, device_id=torch.device("cpu"))
        criterion.register_module("linear", unit)
    else:

        def shard(name, module, mesh):
            for key, parameter in list(module.named_parameters(recurse=False)):
                module.register_parameter(key, torch.nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))

        def replicated(module, inputs, mesh):
            return tuple(DTensor.from_local(each, mesh, run_check=False) for each in inputs)

        distribute_module(criterion.linear, mesh, shard, replicated)
    with pytest.warns(UserWarning, match={"fully_shard": "FSDP|hook", "FullyShardedDataParallel": "FullyShardedData"}.get(kind, "hook")):
        loss = criterion(features, target)
    loss.backward()
    whole = loss.full_tensor() if isinstance(loss, DTensor) else loss
    torch.testing.assert_close(whole, expected)
    if kind != "FullyShardedDataParallel":  # whose gradients are flat
        torch.testing.assert_close(cast(DTensor, criterion.linear.weight.grad).full_tensor(), right)


def criterion_in_a_unit(group: dist.ProcessGroup, kind: str) -> None:
    """The criterion as a whole under FSDP, of either kind, or DDP: in the forward pass its layer is whole, and fused."""
    torch.manual_seed(0)
    criterion = LinearLargeMarginCrossEntropyLoss(D, C).double()
    features, target = torch.randn(8, D, dtype=torch.float64), torch.randint(C, (8,))
    expected = large_margin_cross_entropy(criterion.linear(features), target)
    (right,) = torch.autograd.grad(expected, criterion.linear.weight)
    outer: torch.nn.Module = criterion
    if kind == "fully_shard":
        fully_shard(criterion, mesh=DeviceMesh.from_group(group, "cpu"))
    elif kind == "FullyShardedDataParallel":
        outer = FullyShardedDataParallel(criterion, process_group=group, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        outer = DistributedDataParallel(criterion, process_group=group)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*cannot be fused.*")
        loss = outer(features, target)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    gradient = criterion.linear.weight.grad
    if kind == "fully_shard":
        torch.testing.assert_close(cast(DTensor, gradient).full_tensor(), right)
    elif kind == "DistributedDataParallel":
        torch.testing.assert_close(gradient, right)


def columns_over_ranks(group: dist.ProcessGroup) -> None:
    """By parallelize_module: logits as DTensors are taken; the logits of one rank's classes alone are refused."""
    mesh = DeviceMesh.from_group(group, "cpu")
    torch.manual_seed(0)
    criterion = LinearLargeMarginCrossEntropyLoss(D, 12).double()
    features, target = torch.randn(8, D, dtype=torch.float64), torch.arange(8) + 4
    expected = large_margin_cross_entropy(criterion.linear(features), target)
    of_a_rank = copy.deepcopy(criterion)
    parallelize_module(criterion.linear, mesh, ColwiseParallel(use_local_output=False))
    with pytest.warns(UserWarning, match="linear has a forward"):
        loss = criterion(features, target)
    torch.testing.assert_close(cast(DTensor, loss).full_tensor(), expected)
    parallelize_module(of_a_rank.linear, mesh, ColwiseParallel())
    with pytest.warns(UserWarning, match="linear has a forward"), pytest.raises(IndexError, match="out of range"):
        of_a_rank(features, target)


def tripled(layer, args, output):
    return 3 * output


class Tripled(ClassParallelLinear):
    def forward(self, input):
        return 3 * super().forward(input)


def replace_forward(layer) -> None:
    layer.forward = functools.partial(lambda original, input: 3 * original(input), layer.forward)


def changed(head: ClassParallelLinear, kind: str) -> ClassParallelLinear:
    if kind == "hook":
        head.register_forward_hook(tripled)
    elif kind == "pre-hook":
        head.register_forward_pre_hook(lambda layer, args: (3 * args[0],))
    elif kind == "forward":
        replace_forward(head)
    elif kind == "pruned":
        prune.random_unstructured(head, "weight", 0.5)
        with torch.no_grad():
            head.get_parameter("weight_orig").mul_(2)
    return head


def changed_head(group: dist.ProcessGroup, kind: str, shape: tuple[int, ...], reduction: str) -> torch.Tensor:
    """The loss, its gradients and the predictions of classes over ranks are those of the logits that the module gives."""
    torch.manual_seed(0)
    make = Tripled if kind == "subclass" else ClassParallelLinear
    head = changed(make(D, C, group=group, dtype=torch.float64), kind)
    torch.manual_seed(1)  # what was drawn before differs between the ranks
    features = torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(C, shape), torch.rand(C, dtype=torch.float64)
    with pytest.warns(UserWarning, match="ClassParallelLinear (has|is)") as said:
        loss = head.loss(features, target, weight=weight, lam=0.5, reduction=reduction)
        head.loss(features, target, weight=weight, lam=0.5, reduction=reduction)
    assert len(said) == 1
    parameter = head.weight_orig if kind == "pruned" else head.weight
    found = torch.autograd.grad(loss.sum(), (features, parameter))
    logits = cast(DTensor, head(features))
    whole = logits.full_tensor().detach().requires_grad_()
    expected = large_margin_cross_entropy(whole.flatten(0, -2), target.flatten(), weight, lam=0.5, reduction=reduction)
    torch.testing.assert_close(loss, expected.view_as(loss))
    (upstream,) = torch.autograd.grad(expected.sum(), whole)
    own = upstream.narrow(-1, head.class_start, head.shard.size)
    for got, right in zip(found, torch.autograd.grad(logits.to_local(), (features, parameter), own), strict=True):
        torch.testing.assert_close(got, right)
    values, classes = head.topk(features, 3)
    torch.testing.assert_close(values, whole.topk(3).values)
    assert torch.equal(classes, whole.topk(3).indices)
    return loss.detach()
