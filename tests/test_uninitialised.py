"""Kernels and tile code write every number that they return or read: with memory that starts as NaN the results are the same."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.deterministic
from torch import Tensor

from combinations import covering, every
from devices import device_of
from largemargin import (
    large_margin_cross_entropy,
    linear_large_margin_cross_entropy,
    row_stats,
    sharded_linear_large_margin_cross_entropy,
)
from largemargin.backends import ladder
from largemargin.rows import tiles
from measure import same_bits
from registry import HALVES, KERNELS

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore:overflow:RuntimeWarning", "ignore:.*does not have a deterministic implementation:UserWarning"
)
REDUCTIONS = ("none", "sum", "mean")


@contextlib.contextmanager
def memory_of_nan() -> Iterator[None]:
    """What torch allocates without a value is NaN meanwhile, or the largest integer."""
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = filled


def assert_memory_does_not_matter(results: Callable[[], list[Tensor]]) -> None:
    expected = results()
    with memory_of_nan():
        found = results()
    for index, (got, right) in enumerate(zip(found, expected, strict=True)):
        assert same_bits(got.detach(), right.detach()), f"result {index}"
        assert not right.isnan().any(), f"result {index} is no number in itself"


@pytest.fixture(params=("reference", *KERNELS))
def backend(request) -> str:
    if request.param != "reference" and isinstance(reason := ladder.load(request.param), str):
        pytest.skip(reason)
    return request.param


def rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits with a masked class, and labels of which one is ignored."""
    input = torch.randn(shape, generator=rng) * 3
    target = torch.randint(1, shape[1], (shape[0], *shape[2:]), generator=rng)
    input[0, 0], target[-1] = -torch.inf, -100
    return input.to(device, dtype).requires_grad_(), target.to(device)


SHAPES = ((4, 17), (2, 1100), (2, 5, 3))


@every("dtype", (torch.float32, *HALVES))
@every("shape", SHAPES)
def test_statistics_and_their_gradient(backend, shape, dtype, rng):
    input, target = rows(shape, dtype, device_of(backend), rng)

    def results() -> list[Tensor]:
        stats = row_stats(input, target.clamp(min=0), backend=backend)
        return [*stats, *torch.autograd.grad(sum(value.sum() for value in stats[:5]), input)]

    assert_memory_does_not_matter(results)


LOSSES = covering(
    strength=2,
    shape=SHAPES,
    dtype=(torch.float32, *HALVES),
    reduction=REDUCTIONS,
    kind=("indices", "probabilities", "probabilities with a gradient"),
    settings=({}, {"label_smoothing": 0.1, "hard_bias": 1.0, "divergence": "kl_qu"}),
)


@every("shape, dtype, reduction, kind, settings", LOSSES)
def test_the_loss_and_its_gradients(backend, shape, dtype, reduction, kind, settings, rng):
    input, target = rows(shape, dtype, device_of(backend), rng)
    if kind != "indices":
        target = F.one_hot(target.clamp(min=0), shape[1]).movedim(-1, 1).to(dtype).mul(0.75).contiguous()
        target.requires_grad_(kind != "probabilities")
    leaves = [leaf for leaf in (input, target) if leaf.requires_grad]

    def results() -> list[Tensor]:
        loss = large_margin_cross_entropy(input, target, reduction=reduction, backend=backend, **settings)
        gradients = torch.autograd.grad(loss.sum() * 0.5, leaves)
        return [loss, gradients[0], *(gradient.nan_to_num(posinf=0.0) for gradient in gradients[1:])]  # of a masked class: infinite

    assert_memory_does_not_matter(results)


@pytest.mark.parametrize("tile", [2**20, 40, 1])
@every("function", [linear_large_margin_cross_entropy, sharded_linear_large_margin_cross_entropy])
@every("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every("reduction", REDUCTIONS)
@every("soft", [False, True])
@every("wanted", [(True, True), (True, False), (False, True)])
def test_the_fused_loss_and_its_gradients(function, tile, dtype, reduction, soft, wanted, monkeypatch, rng):
    monkeypatch.setattr(tiles, "TILE", tile)
    input, linear_weight, linear_bias = (torch.randn(shape, generator=rng).to(dtype) for shape in ((7, 5), (13, 5), (13,)))
    target: Tensor = torch.rand(7, 13, generator=rng).to(dtype) if soft else torch.tensor([0, 1, 12, -100, 4, 5, 6])
    is_sharded = function is sharded_linear_large_margin_cross_entropy
    options: dict[str, Any] = {"group": None} if is_sharded else {"linear_bias": linear_bias}
    classifier = [linear_weight] if is_sharded else [linear_weight, linear_bias]
    leaves = [tensor.requires_grad_() for tensor in [input] * wanted[0] + classifier * wanted[1]]

    def results() -> list[Tensor]:
        loss = function(input, linear_weight, target, reduction=reduction, label_smoothing=0.1, **options)
        return [loss, *torch.autograd.grad(loss.sum() * 0.5, leaves)]

    assert_memory_does_not_matter(results)
