"""Noisy softmax: the law of its noise, and an nn.Linear wherever there is none."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from devices import CPU
from largemargin import LargeMarginCrossEntropyLoss, multiclass_hinge
from largemargin.heads.noisy import NoisySoftmaxLinear
from measure import assert_within, compiles, same_bits


def make(device: torch.device, dtype: torch.dtype = torch.float64, **options) -> NoisySoftmaxLinear:
    torch.manual_seed(3)
    return NoisySoftmaxLinear(6, 5, **{"bias": True, "dtype": dtype, **options}).to(device)


def rows(rng: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6, generator=rng, dtype=torch.float64).to(device, dtype), torch.tensor([0, 1, 2, 3, 4, 0, -100, 2], device=device)


def repeated(head: torch.nn.Module, x: Tensor, y: Tensor, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return head(x, y)


def distance(head: NoisySoftmaxLinear, x: Tensor, y: Tensor) -> Tensor:
    """|w||x|(1 - cos) by the angle."""
    w = head.weight.detach()[y]
    cos = F.cosine_similarity(x, w, dim=-1)
    return w.square().sum(-1).sqrt() * x.square().sum(-1).sqrt() * (1 - cos)


def test_noise_has_the_law_of_the_paper(rng, device):
    head = make(device, alpha_squared=0.25)
    x, y = rows(rng, device)
    many_x, many_y = x.repeat(20000, 1), y.repeat(20000)
    plain = F.linear(many_x, head.weight, head.bias)
    lowered = (plain - repeated(head, many_x, many_y)).detach().reshape(20000, 8, 5)
    for row, label in enumerate(y.tolist()):
        if label < 0:
            assert not lowered[:, row].any()
            continue
        noise = lowered[:, row, label] / (0.5 * distance(head, x[row : row + 1], y[row : row + 1]))
        assert (noise >= 0).all()
        # |N(0, 1)|: mean sqrt(2 / pi), mean square 1; 5 standard errors
        assert abs(noise.mean() - math.sqrt(2 / math.pi)) < 5 * 0.603 / math.sqrt(20000)
        assert abs(noise.square().mean() - 1) < 5 * math.sqrt(2 / 20000)
    assert (lowered != 0).sum() == 7 * 20000  # the target's alone


def test_the_same_seed_draws_the_same_noise_and_rows_differ(rng, device):
    head = make(device, bias=False)
    x, y = rows(rng, device)
    assert same_bits(repeated(head, x, y), repeated(head, x, y))
    assert not torch.equal(repeated(head, x, y), repeated(head, x, y, seed=2))
    logits = repeated(head, x[:1].expand(50, -1), y[:1].expand(50))
    assert len(logits[:, 0].unique()) == 50 and len(logits[:, 1].unique()) == 1


def test_plain_in_eval_without_a_target_and_without_alpha(rng, device):
    head = make(device)
    x, y = rows(rng, device)
    plain = F.linear(x, head.weight, head.bias)
    assert same_bits(head(x), plain)
    assert same_bits(copy.deepcopy(head).eval()(x, y), plain)
    assert same_bits(make(device, alpha_squared=0.0)(x, y), plain)
    assert same_bits(head(x, y)[6], plain[6])


def test_features_along_their_class_have_no_noise(device):
    head = make(device, bias=False)
    y = torch.arange(5, device=device)
    x = 3 * head.weight.detach()
    assert_within(head(x, y), F.linear(x, head.weight).detach(), 4.0, 4)


def test_noise_is_invariant_to_rotations(rng, device):
    head = make(device, bias=False)
    x, y = rows(rng, device)
    logits = repeated(head, x, y)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64).to(device)).Q
    with torch.no_grad():
        head.weight.copy_(head.weight @ rotation)
    assert_within(repeated(head, x @ rotation, y), logits.detach(), 4.0, 4)


def test_leading_dimensions_are_rows(rng, device):
    head = make(device)
    x, y = rows(rng, device)
    assert_within(repeated(head, x.reshape(2, 4, 6), y.reshape(2, 4)), repeated(head, x, y).detach().reshape(2, 4, 5), 4.0, 2)
    assert head(x[0], y[0]).shape == (5,) and head(x[:0], y[:0]).shape == (0, 5)


def test_gradcheck(rng, device):
    head = make(device, alpha_squared=1.0)
    x, y = rows(rng, device)

    def logits(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(head, {"weight": w, "bias": b}, (x, y))

    assert torch.autograd.gradcheck(logits, (x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in head.parameters())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_are_finite_on_the_axis_and_at_zero(dtype, device):
    head = make(device, dtype)
    with torch.no_grad():
        head.weight[2] = 0
    x = torch.stack(
        [
            head.weight[0].detach(),
            -head.weight[1].detach(),
            torch.ones(6, dtype=dtype, device=device),
            torch.zeros(6, dtype=dtype, device=device),
        ]
    )
    y = torch.tensor([0, 1, 2, 3], device=device)
    logits = head(x.requires_grad_(), y)
    assert logits.dtype == dtype
    for gradient in torch.autograd.grad(LargeMarginCrossEntropyLoss()(logits, y), [x, *head.parameters()]):
        assert gradient.isfinite().all() and gradient.abs().max() < 10


def test_ignored_rows_get_no_gradient(rng, device):
    head = make(device)
    x, y = rows(rng, device)
    (gradient,) = torch.autograd.grad(LargeMarginCrossEntropyLoss()(head(x.requires_grad_(), y), y), x)
    assert not gradient[6].any() and gradient[:6].any(1).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, rng, device):
    head = make(device, torch.float32)
    x, y = rows(rng, device, torch.float32)
    with torch.autocast(device.type, dtype):
        logits = repeated(head, x.requires_grad_(), y)
        loss = LargeMarginCrossEntropyLoss()(logits, y)
    assert logits.dtype == dtype
    assert_within(logits, repeated(head, x, y).detach().double(), 4.0, 4)
    for gradient in torch.autograd.grad(loss, [x, *head.parameters()]):
        assert gradient.isfinite().all()


@compiles
def test_compiled_code_computes_the_same_where_noise_is_away_and_draws_it_elsewhere(rng, device):
    torch._dynamo.reset()
    head = make(device, torch.float32)
    x, y = rows(rng, device, torch.float32)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    logits = repeated(compiled, x, y)
    assert_within(logits, repeated(head, x, y).detach().double(), 4.0, 4)
    F.cross_entropy(logits, y).backward()
    assert head.weight.grad.isfinite().all()
    head.eval()
    assert_within(compiled(x, y), head(x).detach().double(), 4.0, 2)


def test_state_dict_is_that_of_a_linear_layer(rng, device):
    head, linear = make(device), torch.nn.Linear(6, 5, dtype=torch.float64).to(device)
    linear.load_state_dict(head.state_dict())
    head.load_state_dict(linear.state_dict())
    x, _ = rows(rng, device)
    assert same_bits(head(x), linear(x))


def test_any_loss_takes_the_logits(rng, device):
    head = make(device)
    x, y = rows(rng, device)
    for loss in (F.cross_entropy, multiclass_hinge, LargeMarginCrossEntropyLoss(label_smoothing=0.1)):
        loss(head(x, y), y).backward()
        assert head.weight.grad.isfinite().all()


def test_errors(rng):
    with pytest.raises(ValueError, match="alpha_squared must be finite and at least 0"):
        NoisySoftmaxLinear(6, 5, alpha_squared=-0.1)
    with pytest.raises(ValueError, match="in_features must be at least 1"):
        NoisySoftmaxLinear(0, 5)
    with pytest.raises(IndexError, match="holds 5"):
        make(CPU)(rows(rng, CPU)[0], rows(rng, CPU)[1] + 1)  # on a GPU labels are not looked at
