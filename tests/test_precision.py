"""Half precision is the rounding of the logits and of the gradient, and nothing else; autocast does not change that."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import oracle
from combinations import every
from largemargin import large_margin_cross_entropy
from measure import assert_within, loss_scale, same_bits
from problems import loss_and_gradient, value_and_gradient
from registry import DIVERGENCES, HALVES


def eager(input: Tensor, target: Tensor, lam: float) -> Tensor:
    """Equation (11) of each row as one would first write it in plain torch."""
    others = input.masked_fill(F.one_hot(target, input.shape[1]).bool(), -1e6).log_softmax(1)
    q = others.exp()
    mask = 1 - F.one_hot(target, input.shape[1]).to(input.dtype)
    symmetric = ((q - 1 / (input.shape[1] - 1)) * others * mask).sum(1) / 2
    return F.cross_entropy(input, target, reduction="none") + lam * symmetric


@every("scale", [1e-2, 1.0, 5.0, 50.0, 2e4])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_no_worse_than_eager_float32(dtype, scale, rng, device):
    input = (torch.randn(32, 100, generator=rng).to(device) * scale).clamp(-6e4, 6e4).to(dtype)
    target = torch.randint(100, (32,), generator=rng).to(device)
    truth, gradient_truth = value_and_gradient(eager, input.double(), target, lam=0.3)
    theirs, _ = value_and_gradient(eager, input.float(), target, lam=0.3)
    loss, gradient = loss_and_gradient(input, target, reduction="none")
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    natural = torch.tensor([loss_scale(f, y) for f, y in zip(input.tolist(), target.tolist(), strict=True)], device=device)
    error, their_error = (loss - truth).abs().max(), (theirs - truth).abs().max()
    assert error <= their_error + torch.finfo(torch.float32).eps * natural.max()
    assert_within(loss, truth, natural, 2)
    # the gradient is rounded once, at the end: half a unit in the last place, or in the spacing of subnormals
    info = torch.finfo(dtype)
    half_a_unit = gradient_truth.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2
    assert ((gradient.double() - gradient_truth).abs() <= 1.01 * half_a_unit + 3e-7).all()


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_is_float32_of_the_rounded_logits(dtype, kind, rng, device):
    input = (torch.randn(8, 20, generator=rng).to(device) * 10).to(dtype)
    target = torch.randint(20, (8,), generator=rng).to(device) if kind == "indices" else torch.rand(8, 20, generator=rng).to(device)
    weight = torch.rand(20, generator=rng).to(device) + 0.5
    options = {"weight": weight, "label_smoothing": 0.1, "hard_bias": 1.0, "backend": "reference"}
    loss, gradient = loss_and_gradient(input, target, **options)
    full, full_gradient = loss_and_gradient(input.float(), target, **options)
    assert same_bits(loss, full)
    assert same_bits(gradient, full_gradient.to(dtype))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_float16_logits(sign, device):
    # where a mask of 1e6 overflows, and exp of anything does
    input = torch.tensor([[sign * 6e4, -sign * 6e4, 0.0, 100.0]], dtype=torch.float16, device=device)
    loss, gradient = loss_and_gradient(input, torch.tensor([0], device=device), reduction="sum")
    assert_within(loss, float(oracle.ours(input[0].tolist(), 0, 0.3)), loss_scale(input[0].tolist(), 0), 1)
    truth = [float(value) for value in oracle.ours_gradient(input[0].tolist(), 0, 0.3)]
    assert_within(gradient[0], truth, 1.0, 1)


@every("confidence", [0.9, 0.99, 0.999, 0.99999])
@every("dtype", HALVES)
def test_the_target_gradient_of_a_confident_row_keeps_its_digits(dtype, confidence, rng, device):
    others = torch.randn(50, generator=rng).to(device).double()
    lead = math.log(confidence / (1 - confidence)) + others.logsumexp(0)
    input = torch.cat([lead[None], others]).to(dtype)
    _, gradient = loss_and_gradient(input, torch.tensor(0, device=device))
    truth = float(oracle.ours_gradient(input.tolist(), 0, 0.3)[0])
    assert_within(gradient[0], truth, abs(truth), 0.51)  # p_y - 1 in the low precision would leave it no digits at all


@every("kind", ["indices", "probabilities"])
@every("input_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_cpu_autocast_changes_nothing(input_dtype, kind, rng, device):
    input = (torch.randn(8, 20, generator=rng).to(device) * 5).to(input_dtype)
    target = torch.randint(20, (8,), generator=rng).to(device) if kind == "indices" else torch.rand(8, 20, generator=rng).to(device)
    weight = torch.rand(20, generator=rng).to(device) + 0.5
    for options in ({}, {"weight": weight, "label_smoothing": 0.1, "hard_bias": 1.0}, {"label_smoothing": 0.1, "divergence": "kl_qu"}):
        expected, expected_gradient = loss_and_gradient(input, target, **options)
        leaf = input.clone().requires_grad_()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = large_margin_cross_entropy(leaf, target, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.dtype == (torch.float64 if input_dtype == torch.float64 else torch.float32)
        assert same_bits(loss.detach(), expected) and same_bits(gradient, expected_gradient)


def test_logits_of_a_layer_under_autocast(rng, device):
    layer = torch.nn.Linear(16, 20).to(device)
    features = torch.randn(8, 16, generator=rng).to(device)
    target = torch.randint(20, (8,), generator=rng).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = layer(features)
        loss = large_margin_cross_entropy(logits, target)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert same_bits(loss.detach(), large_margin_cross_entropy(logits.detach().float(), target))
    loss.backward()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.dtype == torch.float32


@every("kind", ["indices", "probabilities"])
@every("divergence", DIVERGENCES)
def test_a_loss_scaler_does_not_meet_a_mask_of_the_lowest_number(divergence, kind, device):
    # masking by finfo.min is common, and 65536 the first factor of a loss scaler: q_c is 0 there, and 0 * overflow is NaN
    lowest = torch.finfo(torch.float32).min
    input, target = torch.tensor([[1.0, 2.0, lowest, 0.0]], device=device), torch.tensor([0], device=device)
    if kind == "probabilities":
        target = torch.tensor([[0.5, 0.25, 0.0, 0.25]], device=device)

    def scaled(x: Tensor, y: Tensor) -> Tensor:
        return large_margin_cross_entropy(x, y, divergence=divergence) * 65536.0

    _, gradient = value_and_gradient(scaled, input, target)
    _, truth = value_and_gradient(scaled, input.double(), target if kind == "indices" else target.double())
    assert truth.isfinite().all()
    assert_within(gradient, truth, 65536.0 * 4, 1)
