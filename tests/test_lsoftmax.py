"""L-Softmax against its definition, which takes the angle itself."""

import copy
import math
import warnings

import mpmath
import pytest
import torch
import torch.nn.functional as F

from combinations import every
from largemargin import LargeMarginCrossEntropyLoss, MulticlassHingeLoss
from largemargin.heads.lsoftmax import LSoftmaxLinear, psi
from largemargin.schedules import AnnealedLambda
from measure import assert_within, compiles, same_bits

MULTIPLIERS = (1, 2, 3, 4, 5)
each_m = pytest.mark.parametrize("m", MULTIPLIERS)


def psi_by_angle(cos: float, m: int) -> mpmath.mpf:
    """The definition, at 50 digits."""
    with mpmath.workdps(50):
        angle = mpmath.acos(mpmath.mpf(cos))
        k = min(int(mpmath.floor(angle * m / mpmath.pi)), m - 1)
        return (-1) ** k * mpmath.cos(m * angle) - 2 * k


def oracle_logits(x: torch.Tensor, w: torch.Tensor, target: torch.Tensor, m: int, lam: float = 0.0) -> torch.Tensor:
    """Row by row, from angles, in float64."""
    x, w = x.double(), w.double()
    logits = x @ w.t()
    for n, y in enumerate(target.tolist()):
        if y >= 0:
            norms = float(x[n].norm() * w[y].norm())
            cos = max(-1.0, min(1.0, float(logits[n, y]) / norms))
            logits[n, y] = (lam * logits[n, y] + norms * float(psi_by_angle(cos, m))) / (1 + lam)
    return logits


def head_of(weight: torch.Tensor, m: int, **options) -> LSoftmaxLinear:
    head = LSoftmaxLinear(weight.shape[1], len(weight), m, device=weight.device, dtype=weight.dtype, **options)
    with torch.no_grad():
        head.weight.copy_(weight)
    return head


def layer_problem(rng, device: torch.device, dtype=torch.float64, rows=16, classes=7, width=5):
    x, w = (torch.randn(size, width, generator=rng, dtype=torch.float64).to(device, dtype) for size in (rows, classes))
    return x, w, torch.randint(classes, (rows,), generator=rng).to(device)


# psi


@each_m
def test_psi_is_its_definition(m, device):
    cos = torch.cat(
        [
            torch.linspace(-1, 1, 2001, dtype=torch.float64, device=device),
            torch.cos(torch.arange(m + 1, device=device).double() * math.pi / m),
        ]
    )
    truth = [float(psi_by_angle(c, m)) for c in cos.clamp(-1, 1).tolist()]
    assert_within(psi(cos, m), truth, 2.0 * m**2, 4)  # m^2 is the slope at c = +-1


@each_m
def test_psi_falls_from_1_to_1_minus_2m_and_is_never_above_the_cosine(m, device):
    angle = torch.linspace(0, math.pi, 10_001, dtype=torch.float64, device=device)
    values = psi(torch.cos(angle), m)
    assert (values.diff() <= 1e-14).all()
    assert values[0] == 1 and values[-1] == 1 - 2 * m
    assert (values <= torch.cos(angle) + 1e-14).all()


@each_m
def test_psi_is_continuous_at_the_borders_of_its_pieces(m, device):
    borders = torch.cos(torch.arange(1, m, device=device).double() * math.pi / m)
    assert_within(psi(borders - 1e-9, m), psi(borders + 1e-9, m), 1.0, 1e-6 / torch.finfo(torch.float64).eps)
    expected = [1.0 - 2 * j for j in range(1, m)]  # (-1)^k cos(j pi) - 2k with k = j
    assert_within(psi(borders, m), torch.tensor(expected, dtype=torch.float64), 2.0 * m**2, 8)


# the logits


@every("dtype", [torch.float32, torch.float64])
@each_m
def test_logits_are_the_definition(m, dtype, rng, device):
    x, w, target = layer_problem(rng, device, dtype, rows=64)
    scale = x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=1) * m**2
    assert_within(head_of(w, m)(x, target).detach(), oracle_logits(x, w, target, m), scale, 4)


def test_a_multiplier_of_1_is_the_plain_layer(rng, device):
    x, w, target = layer_problem(rng, device, torch.float32)
    assert same_bits(head_of(w, 1)(x, target), F.linear(x, w))


@each_m
def test_no_target_and_eval_mode_give_the_plain_layer(m, rng, device):
    x, w, target = layer_problem(rng, device, torch.float32)
    head, plain = head_of(w, m, schedule=AnnealedLambda.for_steps(9)), F.linear(x, w)
    assert same_bits(head(x), plain)
    assert same_bits(head.eval()(x, target), plain) and same_bits(head(x), plain)
    assert head.schedule.step == 0


def test_rows_without_a_class_are_plain(rng, device):
    x, w, target = layer_problem(rng, device, torch.float32)
    target[::3], target[1] = -100, -1
    got = head_of(w, 4)(x, target)
    assert same_bits(got[target < 0], F.linear(x, w)[target < 0])
    assert_within(got.detach(), oracle_logits(x, w, target, 4), 16.0 * x.norm(dim=1, keepdim=True) * w.norm(dim=1), 4)
    assert same_bits(head_of(w, 4)(x, torch.full_like(target, -100)), F.linear(x, w))


def test_only_the_targets_logit_is_edited_and_only_downwards(rng, device):
    x, w, target = layer_problem(rng, device, torch.float32, rows=64)
    lead = F.linear(x, w) - head_of(w, 3)(x, target)
    at_target = F.one_hot(target, len(w)).bool()
    assert not lead[~at_target].any() and (lead[at_target] >= -1e-6).all() and (lead[at_target] > 0.1).any()


@every("shape", [(), (4,), (2, 3), (2, 1, 3), (0,)])
def test_any_leading_dimensions(shape, rng, device):
    w = torch.randn(7, 5, generator=rng).to(device)
    x, target = torch.randn(*shape, 5, generator=rng).to(device), torch.randint(7, shape, generator=rng).to(device)
    got = head_of(w, 2)(x, target)
    assert got.shape == (*shape, 7)
    assert_within(got.reshape(-1, 7).detach(), head_of(w, 2)(x.reshape(-1, 5), target.reshape(-1)).detach().double(), 16.0, 4)


# annealing


@pytest.mark.parametrize("m", [2, 4])
def test_the_schedule_weighs_plain_against_margin(m, rng, device):
    x, w, target = layer_problem(rng, device)
    head = head_of(w, m, schedule=AnnealedLambda(1000, 0.12, 1, 5))
    for step in range(1, 5):
        expected = oracle_logits(x, w, target, m, 1000 / (1 + 0.12 * step))
        head(x)  # without a target nothing is counted
        assert_within(head(x, target).detach(), expected, 100.0, 8)
        assert head.schedule.step == step


def test_a_resumed_head_goes_on_identically(rng, device, tmp_path):
    x, w, target = layer_problem(rng, device, torch.float32)
    head = head_of(w, 3, schedule=AnnealedLambda.for_steps(10))
    for _ in range(4):
        head(x, target)
    torch.save(head.state_dict(), tmp_path / "state")
    resumed = LSoftmaxLinear(5, 7, 3, schedule=AnnealedLambda.for_steps(10)).to(device)
    resumed.load_state_dict(torch.load(tmp_path / "state"))
    duplicate = copy.deepcopy(head)
    for _ in range(6):
        logits = head(x, target)
        assert same_bits(logits, resumed(x, target)) and same_bits(logits, duplicate(x, target))


# gradients


@each_m
def test_gradient(m, rng, device):
    x, w, target = layer_problem(rng, device, rows=8)
    cos = F.cosine_similarity(x, w[target])
    kinks = torch.cos(torch.arange(1, m, device=device).double() * math.pi / m)
    assert m == 1 or (cos[:, None] - kinks).abs().min() > 1e-4
    target[3] = -100
    head = head_of(w, m)

    def logits(x, w):
        return torch.func.functional_call(head, {"weight": w}, (x, target))

    leaves = x.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(logits, leaves)
    assert torch.autograd.gradgradcheck(logits, leaves)


@every("dtype", [torch.float32, torch.float64])
@every("sign", [1, -1])
@each_m
def test_gradient_where_the_angle_is_0_or_pi(m, sign, dtype, rng, device):
    """There psi has the slope m^2 in the cosine, which is stationary: the whole gradient is psi |x| times the other direction."""
    w = torch.randn(7, 5, generator=rng, dtype=torch.float64).to(device, dtype)
    x = (sign * 2 * w).requires_grad_()
    target = torch.arange(7, device=device)
    edited = head_of(w, m)(x, target).gather(1, target[:, None]).sum()
    (gradient,) = torch.autograd.grad(edited, x)
    value = 1 if sign > 0 else 1 - 2 * m
    assert_within(gradient, sign * value * w.double(), (m**2 * w.double().norm(dim=1, keepdim=True)), 8)


@every("dtype", [torch.float32, torch.float64])
@every("size", [0.0, 1e-30, 1e-12, 1e12])
@every("zero", ["features", "weights", "both"])
def test_gradients_are_finite_without_an_angle_and_at_any_length(zero, size, dtype, rng, device):
    x, w, target = layer_problem(rng, device, dtype)
    x, w = (x if zero == "weights" else size * x).requires_grad_(), w if zero == "features" else size * w
    head = head_of(w, 4)
    gradients = torch.autograd.grad(head(x, target).sum(), (x, head.weight))
    assert all(gradient.isfinite().all() for gradient in gradients)


# with the rest of the world


@pytest.mark.parametrize("criterion", [torch.nn.CrossEntropyLoss(), LargeMarginCrossEntropyLoss(), MulticlassHingeLoss()])
def test_every_loss_takes_its_logits(criterion, rng, device):
    x, w, target = layer_problem(rng, device, torch.float32)
    target[2] = -100
    head = head_of(w, 2)
    criterion(head(x, target), target).backward()
    assert head.weight.grad.isfinite().all() and head.weight.grad.any()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_computes_the_margin_in_float32(half, rng, device):
    x, w, target = layer_problem(rng, device, torch.float32, rows=32)
    head = head_of(w, 4)
    with torch.autocast(device.type, dtype=half):
        plain, edited = head(x), head(x, target)
    assert edited.dtype == half
    margin = oracle_logits(x, w, target, 4) - x.double() @ w.double().t()
    assert_within(edited.detach(), plain.detach().double() + margin, plain.double().abs() + margin.abs() + 1e-3, 1)
    edited.float().sum().backward()
    assert head.weight.grad.isfinite().all()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_head_of_half_precision(half, rng, device):
    x, w, target = layer_problem(rng, device, half)
    got = head_of(w, 3)(x, target)
    assert got.dtype == half
    scale = x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=1) * 6
    assert_within(got.detach(), oracle_logits(x, w, target, 3), scale, 2)


@compiles
@pytest.mark.parametrize("schedule", [None, AnnealedLambda.for_steps(10)])
def test_compiled_code_computes_the_same(schedule, rng, device):
    torch._dynamo.reset()
    x, w, target = layer_problem(rng, device, torch.float32)
    head = head_of(w, 4, schedule=copy.deepcopy(schedule))
    twin = copy.deepcopy(head)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        got, expected = compiled(x, target), twin(x, target)
        assert_within(got.detach(), expected.detach().double(), 32.0, 2)
        got, expected = (torch.autograd.grad(f.square().sum(), h.weight)[0] for f, h in ((got, head), (expected, twin)))
        assert_within(got, expected.double(), 32.0 * 64, 2)
    assert schedule is None or head.schedule.step == 3


def test_vmap_over_models(rng, device):
    x, w, target = layer_problem(rng, device, torch.float32)
    head, weights = head_of(w, 2), torch.stack([w, 2 * w])
    got = torch.vmap(lambda w: torch.func.functional_call(head, {"weight": w}, (x, target)))(weights)
    assert_within(got[1].detach(), 2 * got[0].detach().double(), 64.0, 2)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_cross_check_with_pytorch_metric_learning(m, rng, device):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, w, target = layer_problem(rng, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of numpy, which scipy's binomials of tensors give
        theirs = losses.LargeMarginSoftmaxLoss(7, 5, margin=m, scale=1).to(device)
    theirs.W.data = w.t().clone()
    expected = theirs.double()(x, target)
    assert_within(F.cross_entropy(head_of(w, m)(x, target), target).detach(), expected.detach(), 1.0, 1e-5 / 2.2e-16)


def test_it_learns(rng, device):
    torch.manual_seed(0)
    centers = torch.randn(4, 8, generator=rng).to(device)
    target = torch.arange(4, device=device).repeat(16)
    x = centers[target] + 0.3 * torch.randn(64, 8, generator=rng).to(device)
    head = LSoftmaxLinear(8, 4, 2, schedule=AnnealedLambda.for_steps(150)).to(device)
    optimiser = torch.optim.SGD(head.parameters(), 0.1, momentum=0.9)
    for _ in range(200):
        optimiser.zero_grad()
        F.cross_entropy(head(x, target), target).backward()
        optimiser.step()
    assert (head.eval()(x).argmax(1) == target).all()


# mistakes


@every(
    "options, error, words",
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int"),
        ({"angular_multiplier": 0}, ValueError, "angular_multiplier must be at least 1, got 0"),
        ({"schedule": 5.0}, TypeError, "schedule must be None, or a Schedule.*; got 5.0"),
    ],
)
def test_mistaken_options_name_the_argument(options, error, words):
    with pytest.raises(error, match=words):
        LSoftmaxLinear(**{"in_features": 5, "num_classes": 7, **options})


@every(
    "features, target, error, words",
    [
        ([1.0], None, TypeError, "features must be a torch.Tensor"),
        (torch.zeros(3, 4), None, ValueError, r"features must be floating of shape \(\.\.\., in_features=5\), got float32 of shape"),
        (torch.zeros(3, 5, dtype=torch.int64), None, ValueError, "features must be floating"),
        (torch.zeros(3, 5), torch.zeros(4, dtype=torch.int64), ValueError, r"target must be int64 class indices of shape \(3,\)"),
        (torch.zeros(3, 5), torch.zeros(3), ValueError, r"convert it with target.long\(\)"),
        (torch.zeros(3, 5), torch.tensor([0, 7, 1]), IndexError, "target must be below num_classes=7.* holds 7"),
    ],
)
def test_mistaken_inputs_name_the_argument(features, target, error, words):
    with pytest.raises(error, match=words):
        LSoftmaxLinear(5, 7)(features, target)


@pytest.mark.parametrize("size", [1e-30, 1e-23, 1e-20])
def test_features_of_next_to_no_length_give_finite_logits(size, device):
    head = LSoftmaxLinear(2, 2, 4).to(device)
    with torch.no_grad():
        head.weight.copy_(torch.eye(2, device=device))
    logits = head(torch.full((1, 2), size, device=device), torch.tensor([0], device=device))
    logits.sum().backward()
    assert logits.isfinite().all() and head.weight.grad.isfinite().all()
