"""The super-symmetric classifier: its Gram matrix, what it does to logits, and the distance of others from it."""

import copy
import math
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from combinations import every
from devices import CPU
from largemargin import LargeMarginCrossEntropyLoss, divergence, linear_large_margin_cross_entropy, metrics, multiclass_hinge, row_stats
from largemargin.heads.super_symmetric import SuperSymmetricLinear, super_symmetry_penalty
from measure import assert_within, compiles, same_bits
from registry import DIVERGENCES

SIZES = ((10, 128), (10, 9), (100, 128), (2, 1), (3, 2))  # classes, width
FRAMES = ("fixed", "learned")
each_frame = pytest.mark.parametrize("frame", FRAMES)


def make(
    device: torch.device, num_classes: int = 5, in_features: int = 6, dtype: torch.dtype = torch.float64, **options
) -> SuperSymmetricLinear:
    torch.manual_seed(3)
    return SuperSymmetricLinear(in_features, num_classes, dtype=dtype, **options).to(device)


def rows(rng: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6, generator=rng, dtype=torch.float64).to(device, dtype), torch.tensor([0, 1, 2, 3, 4, 0, -100, 2], device=device)


def ideal(num_classes: int, v: float) -> Tensor:
    """v on the diagonal and -v / (C - 1) elsewhere, as Sec. 3 writes it."""
    return torch.full((num_classes, num_classes), -v / (num_classes - 1), dtype=torch.float64).fill_diagonal_(v)


@every("v", [1.0, 7.5])
@every("size", SIZES)
@each_frame
def test_gram_matrix_has_the_form_of_the_paper(frame, size, v, device):
    head = make(device, *size, frame=frame, scale=v)
    weight = head.weight.detach()
    assert weight.shape == size
    assert ((weight @ weight.T).cpu() - ideal(size[0], v)).abs().max() < 1e-12 * v
    assert weight.sum(0).abs().max() < 1e-12 * v


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_training_never_leaves_the_form(size, rng, device):
    head = make(device, *size, frame="learned", learn_scale=True)
    start = head.weight.detach().clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, weight_decay=1e-2)
    x, y = torch.randn(32, size[1], generator=rng, dtype=torch.float64).to(device), torch.randint(size[0], (32,), generator=rng).to(device)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(head(x, y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weight, v = head.weight.detach(), head.log_scale.exp().item()
    assert losses[-1] < losses[0] and not torch.allclose(weight, start) and abs(v - 1) > 1e-3
    assert ((weight @ weight.T).cpu() - ideal(size[0], v)).abs().max() < 1e-12 * v


def test_a_small_step_of_the_frame_is_a_small_step_of_the_classes(rng, device):
    # the orthonormal factor of LAPACK changes its signs; the classes must not
    head = make(device, frame="learned")
    with torch.no_grad():
        head.frame.copy_(torch.randn(4, 6, generator=rng, dtype=torch.float64).to(device))
        for _ in range(200):
            before = head.weight.clone()
            head.frame += 1e-5 * torch.randn(4, 6, generator=rng, dtype=torch.float64).to(device)
            assert (head.weight - before).abs().max() < 1e-2
        for sign in (1.0, -1.0):
            head.frame[0, 0] = 1e-9 * sign
            if sign > 0:
                before = head.weight.clone()
        assert (head.weight - before).abs().max() < 1e-6


@each_frame
def test_features_along_a_class_have_uniform_other_logits(frame, device):
    head = make(device, frame=frame, scale=2.0)
    y = torch.arange(5, device=device)
    logits = head(3 * head.weight)
    truth = torch.where(torch.eye(5, dtype=torch.bool, device=device), 6.0, -6.0 / 4)
    assert_within(logits, truth.double(), 6.0, 8)
    for kind in DIVERGENCES:
        assert_within(divergence(row_stats(logits, y), kind), 0.0, 10.0, 8)


@each_frame
def test_there_is_no_margin(frame, rng, device):
    head = make(device, frame=frame)
    x, y = rows(rng, device)
    plain = F.linear(x, head.weight)
    for got in (head(x), head(x, y), copy.deepcopy(head).eval()(x, y)):
        assert same_bits(got, plain)
    assert_within(head(x.reshape(2, 4, 6), y.reshape(2, 4)), plain.detach().reshape(2, 4, 5), 4.0, 2)


def test_the_frame_is_random_and_repeats_with_the_seed(device):
    assert same_bits(make(device).weight, make(device).weight)
    assert not torch.allclose(make(device).weight, SuperSymmetricLinear(6, 5, dtype=torch.float64).to(device).weight)


@pytest.mark.parametrize("learn_scale", [False, True])
@each_frame
def test_what_is_learned(frame, learn_scale, device):
    head = make(device, frame=frame, learn_scale=learn_scale)
    names = {name for name, _ in head.named_parameters()}
    assert names == ({"frame"} if frame == "learned" else set()) | ({"log_scale"} if learn_scale else set())
    assert set(head.state_dict()) == {"frame", "log_scale"}


def test_gradcheck(rng, device):
    head = make(device, frame="learned", learn_scale=True)
    x, y = rows(rng, device)
    frame = torch.randn(4, 6, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    log_scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True, device=device)
    assert torch.autograd.gradcheck(
        lambda x, frame, log_scale: torch.func.functional_call(head, {"frame": frame, "log_scale": log_scale}, (x, y)),
        (x.requires_grad_(), frame, log_scale),
    )


@each_frame
def test_the_fused_loss_takes_the_weight(frame, rng, device):
    head = make(device, frame=frame, learn_scale=True)
    x, y = rows(rng, device)
    results = []
    for loss in (linear_large_margin_cross_entropy(x, head.weight, y), LargeMarginCrossEntropyLoss()(head(x, y), y)):
        results.append([loss.detach(), *torch.autograd.grad(loss, list(head.parameters()))])
    for got, expected in zip(*results, strict=True):
        assert_within(got, expected, 16.0, 4)


@each_frame
def test_any_loss_takes_the_logits(frame, rng, device):
    head = make(device, frame=frame, learn_scale=True)
    x, y = rows(rng, device)
    for loss in (F.cross_entropy, multiclass_hinge, LargeMarginCrossEntropyLoss(label_smoothing=0.1)):
        loss(head(x, y), y).backward()
        assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_frame
def test_half_precision_and_autocast(frame, dtype, rng, device):
    head = make(device, dtype=torch.float32, frame=frame, learn_scale=True)
    x, y = rows(rng, device, torch.float32)
    truth = head(x).detach().double()
    with torch.autocast(device.type, dtype):
        logits = head(x, y)
        loss = LargeMarginCrossEntropyLoss()(logits, y)
    assert logits.dtype == dtype
    assert_within(logits, truth, 4.0, 4)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(head.parameters())))
    half = make(device, dtype=dtype, frame=frame)  # the frame is rounded, the classes are made of it in float32
    assert half.weight.dtype == dtype
    assert_within(half.weight.double() @ half.weight.double().T, ideal(5, 1.0), 1.0, 4, dtype)


@compiles
@each_frame
def test_compiled_code_computes_the_same(frame, rng, device):
    torch._dynamo.reset()
    head = make(device, dtype=torch.float32, frame=frame, learn_scale=True)
    x, y = rows(rng, device, torch.float32)
    results = []
    for module in (torch.compile(head, backend="aot_eager", fullgraph=True), head):
        logits = module(x, y)
        results.append([logits.detach(), *torch.autograd.grad(F.cross_entropy(logits, y), list(head.parameters()))])
    for got, expected in zip(*results, strict=True):
        assert_within(got, expected.double(), 4.0, 4)


@each_frame
def test_state_dict_carries_frame_and_scale(frame, device):
    head = make(device, frame=frame, scale=3.0)
    other = SuperSymmetricLinear(6, 5, frame=frame, learn_scale=True, dtype=torch.float64).to(device)
    other.load_state_dict(head.state_dict())
    assert same_bits(other.weight, head.weight) and same_bits(copy.deepcopy(head).weight, head.weight)


# the penalty


def penalty_of_definition(weight: Tensor) -> float:
    """1 - cos between the Gram matrix and the ideal one, in loops."""
    num_classes, width = weight.shape
    mean = [sum(weight[:, d].tolist()) / num_classes for d in range(width)]
    centred = [[value - m for value, m in zip(row, mean, strict=True)] for row in weight.tolist()]
    gram = [[sum(a * b for a, b in zip(r, s, strict=True)) for s in centred] for r in centred]
    form = ideal(num_classes, 1.0).tolist()
    dot = sum(gram[i][j] * form[i][j] for i in range(num_classes) for j in range(num_classes))
    return 1 - dot / math.hypot(*chain(*gram)) / math.hypot(*chain(*form))


@pytest.mark.parametrize("size", [(5, 6), (5, 3), (2, 1), (10, 128)], ids=str)
def test_penalty_is_one_less_the_cosine_of_the_gram_matrices(size, rng, device):
    weight = torch.randn(size, generator=rng, dtype=torch.float64).to(device)
    assert_within(super_symmetry_penalty(weight), penalty_of_definition(weight), 1.0, 16)


@pytest.mark.parametrize("size", [(2, 1), (3, 2), (5, 6), (5, 3), (10, 1), (10, 128)], ids=str)
def test_penalty_and_metric_are_of_one_angle(size, rng, device):
    weight = torch.randn(size, generator=rng, dtype=torch.float64).to(device) + 3
    penalty = super_symmetry_penalty(weight)
    # two classes are the form, and of a penalty of some roundings the root is left
    assert metrics.super_symmetry(weight).item() == pytest.approx((penalty * (2 - penalty)).sqrt().item(), rel=1e-12, abs=1e-7)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_penalty_is_zero_at_the_form_wherever_it_is_and_however_large(size, rng, device):
    weight = make(device, *size).weight
    shift = torch.randn(size[1], generator=rng, dtype=torch.float64).to(device)
    for factor in (1e-3, 1.0, 1e3):
        assert super_symmetry_penalty(factor * (weight + shift)) < 1e-20


def test_penalty_does_not_see_shift_scale_rotation_and_order(rng, device):
    weight = torch.randn(5, 6, generator=rng, dtype=torch.float64).to(device)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64).to(device)).Q
    truth = super_symmetry_penalty(weight)
    assert truth > 0.01
    for same in (weight + torch.randn(6, generator=rng).to(device), -7 * weight, weight @ rotation, weight.flip(0)):
        assert_within(super_symmetry_penalty(same), truth, 1.0, 16)


def test_bounds_of_the_penalty(rng, device):
    line = torch.arange(5.0, dtype=torch.float64, device=device).unsqueeze(-1)
    assert_within(super_symmetry_penalty(line), 1 - 1 / math.sqrt(4), 1.0, 4)
    # the best in too few dimensions: a square in the plane
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64, device=device)
    assert_within(super_symmetry_penalty(square), 1 - math.sqrt(2 / 3), 1.0, 4)
    for _ in range(50):
        weight = torch.randn(5, 6, generator=rng, dtype=torch.float64).to(device) * torch.rand(5, 1, generator=rng).to(device) ** 4
        assert 0 <= super_symmetry_penalty(weight) <= 1 - 1 / math.sqrt(4)


def test_penalty_gradcheck_and_zero(rng, device):
    weight = torch.randn(5, 6, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    assert torch.autograd.gradcheck(super_symmetry_penalty, weight)
    for still in (torch.zeros(5, 6, device=device), torch.ones(5, 6, device=device), make(device, dtype=torch.float32).weight):
        leaf = still.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(super_symmetry_penalty(leaf), leaf)
        assert gradient.abs().max() < 1e-5
    assert_within(super_symmetry_penalty(torch.zeros(5, 6, device=device)), 0.5, 1.0, 4)


def test_descending_the_penalty_ends_at_the_form(rng, device):
    weight = torch.randn(5, 6, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=2.0)
    for _ in range(500):
        optimizer.zero_grad()
        super_symmetry_penalty(weight).backward()
        optimizer.step()
    centred = (weight - weight.mean(0)).detach()
    gram = centred @ centred.T
    assert ((gram / gram[0, 0]).cpu() - ideal(5, 1.0)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_penalty_in_half_precision_and_under_autocast(dtype, rng, device):
    weight = torch.randn(5, 6, generator=rng).to(device)
    truth = super_symmetry_penalty(weight.double())
    with torch.autocast(device.type, dtype):
        penalty = super_symmetry_penalty(weight)
    assert penalty.dtype == torch.float32
    assert_within(penalty, truth, 1.0, 8)
    assert_within(super_symmetry_penalty(weight.to(dtype)), super_symmetry_penalty(weight.to(dtype).double()), 1.0, 8)


@compiles
def test_compiled_penalty_is_the_same(rng, device):
    torch._dynamo.reset()
    weight = torch.randn(5, 6, generator=rng).to(device)
    compiled = torch.compile(super_symmetry_penalty, backend="aot_eager", fullgraph=True)
    assert_within(compiled(weight), super_symmetry_penalty(weight).double(), 1.0, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"in_features": 8}, "in_features must be at least num_classes - 1 = 9, got 8"),
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"frame": "free"}, "frame must be one of 'fixed', 'learned'"),
        ({"scale": 0.0}, "scale must be above 0, got 0.0; it is the squared length"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(ValueError, match=words):
        SuperSymmetricLinear(**{"in_features": 16, "num_classes": 10, **options})


def test_wrong_calls(rng):
    x, y = rows(rng, CPU)
    with pytest.raises(IndexError, match="holds 5"):
        make(CPU)(x, y + 1)  # on a GPU labels are not looked at
    for weight in (torch.zeros(5), torch.zeros(1, 6), torch.zeros(5, 6, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"weight must be floating of shape \(C, D\)"):
            super_symmetry_penalty(weight)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e10, 1e30])
def test_the_penalty_is_free_of_the_scale(size, rng, device):
    weight = torch.randn(5, 8, generator=rng).to(device)
    assert_within(super_symmetry_penalty(weight * size), super_symmetry_penalty(weight.double()), 1.0, 8)
