"""Every public loss, head and metric where a tensor has no data: on the meta device, and under fake tensors."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import largemargin
from largemargin import heads, metrics, schedules
from row_losses import ROW_LOSSES

Maker = Callable[[torch.device], tuple[Callable[..., Any], tuple[Any, ...]]]
N, D, C = 4, 8, 5


def features(device: torch.device) -> Tensor:
    return torch.randn(N, D, device=device, requires_grad=True)


def logits(device: torch.device) -> Tensor:
    return torch.randn(N, C, device=device, requires_grad=True)


def classes(device: torch.device) -> Tensor:
    return torch.randn(C, D, device=device, requires_grad=True)


def target(device: torch.device) -> Tensor:
    return torch.zeros(N, dtype=torch.int64, device=device)


def of_logits(function: Callable[..., Any], **options: Any) -> Maker:
    return lambda device: (lambda *given: function(*given, **options), (logits(device), target(device)))


def of_weight(function: Callable[..., Any]) -> Maker:
    return lambda device: (function, (classes(device),))


def head(cls: type, likelihood: bool = False, **options: Any) -> Maker:
    def make(device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        made = {name: value() if callable(value) else value for name, value in options.items()}  # each head has a schedule of its own
        module = cls(D, C, device=device, **made)
        return module.likelihood if likelihood else module, (features(device), target(device))

    return make


def schedule(make: Callable[[], schedules.Schedule]) -> Maker:
    return lambda device: (make().to(device), ())


def fused(device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return largemargin.LinearLargeMarginCrossEntropyLoss(D, C, device=device), (features(device), target(device))


def divergence(device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return lambda *given: largemargin.divergence(largemargin.row_stats(*given)), (logits(device), target(device))


def row_losses(device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def functions_and_modules(*given: Tensor) -> list[Tensor]:
        modules = (case.module(**case.of_classes(C)).to(device) for case in ROW_LOSSES)
        return [*(case.loss(*given) for case in ROW_LOSSES), *(module(*given) for module in modules)]

    return functions_and_modules, (logits(device), target(device))


def margin_metrics(device: torch.device) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    measured = metrics.MarginMetrics(device=device)

    def count(*batch: Tensor) -> Tensor:
        measured.update(*batch)
        return measured._totals

    return count, (logits(device), target(device))


MAKERS: dict[str, Maker] = {
    "row_stats": of_logits(largemargin.row_stats),
    "divergence": divergence,
    "large_margin_cross_entropy": of_logits(largemargin.large_margin_cross_entropy),
    "soft targets": lambda device: (largemargin.large_margin_cross_entropy, (logits(device), torch.rand(N, C, device=device))),
    "row losses": row_losses,
    "two_way_multilabel": lambda device: (largemargin.two_way_multilabel, (logits(device), torch.ones(N, C, device=device).tril())),
    "TwoWayMultilabelLoss": lambda device: (largemargin.TwoWayMultilabelLoss(), (logits(device), torch.ones(N, C, device=device).tril())),
    "linear_large_margin_cross_entropy": lambda device: (
        largemargin.linear_large_margin_cross_entropy,
        (features(device), classes(device), target(device)),
    ),
    "sharded_large_margin_cross_entropy": of_logits(largemargin.sharded_large_margin_cross_entropy, group=None),
    "sharded_linear_large_margin_cross_entropy": lambda device: (
        lambda *given: largemargin.sharded_linear_large_margin_cross_entropy(*given, group=None),
        (features(device), classes(device), target(device)),
    ),
    "LargeMarginCrossEntropyLoss": of_logits(largemargin.LargeMarginCrossEntropyLoss(label_smoothing=0.1)),
    "OpaqueLargeMarginLoss": of_logits(largemargin.OpaqueLargeMarginLoss()),
    "LargeMarginInSoftmaxLoss": of_logits(largemargin.LargeMarginInSoftmaxLoss()),
    "LinearLargeMarginCrossEntropyLoss": fused,
    "CenterLoss": head(heads.CenterLoss),
    "CenterLoss as a parameter": head(heads.CenterLoss, as_parameter=True),
    "CosineLinear": head(heads.CosineLinear),
    "CosineLinear arcface": head(heads.CosineLinear, kind="arcface"),
    "CosineLinear insightface": head(heads.CosineLinear, kind="arcface_insightface"),
    "CosineLinear sphereface": head(heads.CosineLinear, kind="sphereface", subcenters=2, schedule=schedules.AnnealedLambda.mnist),
    "TVMFLinear": head(heads.TVMFLinear),
    "GaussianMixtureHead": head(heads.GaussianMixtureHead),
    "GaussianMixtureHead diagonal": head(heads.GaussianMixtureHead, covariance="diagonal", alpha=schedules.SteppedAlpha),
    "GaussianMixtureHead likelihood": head(heads.GaussianMixtureHead, likelihood=True),
    "GaussianMixtureHead diagonal likelihood": head(heads.GaussianMixtureHead, likelihood=True, covariance="diagonal"),
    "LSoftmaxLinear": head(heads.LSoftmaxLinear, schedule=schedules.AnnealedLambda.mnist),
    "NoisySoftmaxLinear": head(heads.NoisySoftmaxLinear, bias=True),
    "SuperSymmetricLinear": head(heads.SuperSymmetricLinear),
    "SuperSymmetricLinear learned": head(heads.SuperSymmetricLinear, frame="learned", learn_scale=True),
    "super_symmetry_penalty": of_weight(heads.super_symmetry_penalty),
    "AnnealedLambda": schedule(lambda: schedules.AnnealedLambda.for_steps(10)),
    "SteppedAlpha": schedule(schedules.SteppedAlpha),
    "GradualWeight": schedule(lambda: schedules.GradualWeight(10)),
    "metrics.margin": of_logits(metrics.margin),
    "metrics.rho_hat": of_logits(metrics.rho_hat),
    "metrics.divergence": of_logits(metrics.divergence),
    "metrics.log_odds": of_logits(metrics.log_odds),
    "metrics.nontarget_entropy": of_logits(metrics.nontarget_entropy),
    "metrics.nll": of_logits(metrics.nll),
    "metrics.accuracy": of_logits(metrics.accuracy),
    "metrics.topk_error": of_logits(metrics.topk_error, k=2),
    "metrics.ece": of_logits(metrics.ece),
    "metrics.adaptive_ece": of_logits(metrics.adaptive_ece),
    "metrics.super_symmetry": of_weight(metrics.super_symmetry),
    "metrics.MarginMetrics": margin_metrics,
}
ELSEWHERE = {
    "RowStats": "a record",
    "ClassParallelLinear": "tests/test_sharded.py, on ranks",
    "gather_rows": "tests/test_sharded.py, on ranks",
    "metrics.as_torchmetric": "counts as MarginMetrics does",
}
each_name = pytest.mark.parametrize("name", MAKERS)


def tensors_of(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def called(name: str, device: torch.device) -> list[Tensor]:
    """The results of a call, after a backward pass where there is one."""
    function, given = MAKERS[name](device)
    result = tensors_of(function(*given))
    if differentiable := [tensor.float().sum() for tensor in result if tensor.requires_grad]:
        torch.autograd.backward(differentiable)
        assert all(tensor.grad is None or tensor.grad.shape == tensor.shape for tensor in tensors_of(given))
    assert result
    return result


def test_the_table_has_every_public_loss_head_and_metric():
    of_rows = {name for case in ROW_LOSSES for name in (case.name, case.module.__name__)}
    ours = {*largemargin.__all__, *heads.__all__, *(cls.__name__ for cls in schedules.Schedule.__subclasses__())}
    ours |= {f"metrics.{name}" for name, value in vars(metrics).items() if inspect.getmodule(value) is metrics and name[0] != "_"}
    assert ours - MAKERS.keys() - of_rows == ELSEWHERE.keys()


@each_name
def test_it_runs_on_meta_tensors(name):
    shapes = [tensor.shape for tensor in called(name, torch.device("cpu"))]
    result = called(name, torch.device("meta"))
    assert [tensor.shape for tensor in result] == shapes and all(tensor.is_meta for tensor in result)


@each_name
def test_it_runs_under_fake_tensors(name):
    expected = called(name, torch.device("cpu"))
    with FakeTensorMode():
        result = called(name, torch.device("cpu"))
    assert all(isinstance(tensor, FakeTensor) for tensor in result)
    assert [(tensor.shape, tensor.dtype) for tensor in result] == [(tensor.shape, tensor.dtype) for tensor in expected]


@each_name
def test_it_runs_on_meta_tensors_in_half_precision(name):
    function, given = MAKERS[name](torch.device("meta"))
    halved = [tensor.bfloat16() if isinstance(tensor, Tensor) and tensor.is_floating_point() else tensor for tensor in given]
    if isinstance(function, torch.nn.Module):
        function.bfloat16()
    assert all(tensor.is_meta for tensor in tensors_of(function(*halved)))


def test_what_runs_under_fake_tensors_leaves_nothing_behind_for_real_ones():
    options = {"num_bins": 7}  # the constants of as many bins have not been made yet
    with FakeTensorMode():
        metrics.ece(torch.randn(4, 5), torch.zeros(4, dtype=torch.long), **options)
    assert metrics.ece(torch.zeros(4, 5), torch.zeros(4, dtype=torch.long), **options) == pytest.approx(0.8)
