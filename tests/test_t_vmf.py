"""The t-vMF similarity, against the formula of its paper."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from largemargin import LargeMarginCrossEntropyLoss
from largemargin.heads import CosineLinear, TVMFLinear
from measure import assert_within, compiles, same_bits

each_kappa = pytest.mark.parametrize("kappa", [-0.3, 0.0, 16.0, 64.0])


def make(rng: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float64, **options) -> TVMFLinear:
    head = TVMFLinear(6, 5, dtype=dtype, **options).to(device)
    with torch.no_grad():
        head.weight.copy_(torch.randn(5, 6, generator=rng))
    return head


def of_the_paper(x: list[float], w: list[float], kappa: float) -> float:
    """The similarity as the paper derives it: a student-t kernel of the cosine, scaled to run from 1 to -1."""
    cos = sum(a * b for a, b in zip(x, w, strict=True)) / math.hypot(*x) / math.hypot(*w)
    if kappa == 0:
        return cos
    kernel, least = 1 / (1 + kappa * (1 - cos)), 1 / (1 + 2 * kappa)
    return 2 * (kernel - least) / (1 - least) - 1


@each_kappa
def test_logits_are_the_papers(kappa, rng, device):
    head = make(rng, device, kappa=kappa, scale=8.0)
    x, y = torch.randn(7, 6, generator=rng, dtype=torch.float64).to(device), torch.tensor([0, 1, 2, 3, 4, -100, 0], device=device)
    truth = torch.tensor([[8 * of_the_paper(row, w, kappa) for w in head.weight.tolist()] for row in x.tolist()], dtype=torch.float64)
    for logits in (head(x, y), head(x), copy.deepcopy(head).eval()(x, y), head(x.reshape(7, 1, 6)).squeeze(1)):
        assert_within(logits, truth, 8.0 * (1 + abs(kappa)), 4)


def test_the_similarity_without_a_concentration_is_the_cosine(rng, device):
    head, cosine = make(rng, device, kappa=0.0, scale=16.0), CosineLinear(6, 5, scale=16.0, margin=0.0, dtype=torch.float64).to(device)
    cosine.weight = head.weight
    x = torch.randn(7, 6, generator=rng, dtype=torch.float64).to(device)
    assert_within(head(x), cosine(x).detach(), 16.0, 4)


def test_a_learned_scale_is_one_plus_a_softplus(rng, device):
    head, fixed = make(rng, device), make(rng, device, scale=1.0)
    with torch.no_grad():
        fixed.weight.copy_(head.weight)
    x = torch.randn(7, 6, generator=rng, dtype=torch.float64).to(device)
    assert set(head.state_dict()) == {"weight", "raw_scale"} and set(fixed.state_dict()) == {"weight"}
    for raw in (0.0, 3.0):
        with torch.no_grad():
            head.raw_scale.fill_(raw)
        assert_within(head(x), (1 + math.log1p(math.exp(raw))) * fixed(x).detach(), 4.0, 8)
    head(x).square().sum().backward()
    assert head.raw_scale.grad.item() != 0
    head.reset_parameters()
    assert head.raw_scale == 0


@each_kappa
def test_derivatives(kappa, rng, device):
    head = make(rng, device, kappa=kappa)
    x = torch.randn(4, 6, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    weight, scale = head.weight.detach().requires_grad_(), head.raw_scale.detach().requires_grad_()

    def logits(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return torch.func.functional_call(head, {"weight": weight, "raw_scale": scale}, (x,))

    assert torch.autograd.gradcheck(logits, (x, weight, scale)) and torch.autograd.gradgradcheck(logits, (x, weight, scale))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_on_the_axis_and_at_zero_all_is_finite(dtype, rng, device):
    for kappa in (-0.49, 64.0):
        head = make(rng, device, dtype, kappa=kappa, scale=30.0)
        x = torch.cat([head.weight[:1], -head.weight[1:2], torch.zeros(1, 6, dtype=dtype, device=device)]).detach().requires_grad_()
        target = torch.tensor([0, 1, 2], device=device)
        logits = head(x, target)
        assert logits.dtype == dtype and logits.abs().max() <= 30.5
        for gradient in torch.autograd.grad(LargeMarginCrossEntropyLoss()(logits, target), [x, head.weight]):
            assert gradient.isfinite().all()


@compiles
def test_compiled_code_and_autocast_compute_the_same(rng, device):
    torch._dynamo.reset()
    head, x = make(rng, device, torch.float32), torch.randn(7, 6, generator=rng).to(device)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    assert_within(compiled(x), head(x).double().detach(), 32.0, 2)
    with torch.autocast(device.type, torch.bfloat16):
        assert_within(head(x), copy.deepcopy(head).double()(x.double()).detach(), 32.0, 4)
    assert same_bits(copy.deepcopy(head)(x), head(x)) and F.cross_entropy(head(x), torch.arange(7, device=device) % 5).isfinite()


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"kappa": -0.5}, "kappa must be above -1/2, got -0.5; the similarity has a pole there"),
        (TypeError, {"kappa": "16"}, "kappa must be a Python number"),
        (ValueError, {"scale": 0.0}, "scale must be above 0, got 0.0; None learns it"),
        (ValueError, {"num_classes": 0}, "num_classes must be at least 1"),
    ],
)
def test_wrong_options(error, options, words):
    with pytest.raises(error, match=words):
        TVMFLinear(**{"in_features": 6, "num_classes": 5, **options})
