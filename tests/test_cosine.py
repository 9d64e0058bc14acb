"""Cosine logits and the margins of CosFace, ArcFace and SphereFace, against the angles themselves."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from combinations import every
from devices import CPU
from largemargin import (
    LargeMarginCrossEntropyLoss,
    linear_large_margin_cross_entropy,
    multiclass_hinge,
)
from largemargin.heads.cosine import CosineLinear
from largemargin.schedules import AnnealedLambda
from measure import assert_within, compiles, same_bits

MARGINS = {"cosface": 0.35, "arcface": 0.5, "arcface_insightface": 0.5, "sphereface": 4}
KINDS = tuple(MARGINS)
each_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, rng: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float64, **options) -> CosineLinear:
    head = CosineLinear(6, 5, kind=kind, **{"scale": 16.0, "margin": MARGINS[kind], "dtype": dtype, **options}).to(device)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=rng))
    return head


def rows(rng: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 6, generator=rng, dtype=torch.float64).to(device, dtype), torch.tensor([0, 1, 2, 3, 4, 0, -100, 2], device=device)


def angle(x: list[float], w: list[float]) -> float:
    dot = sum(a * b for a, b in zip(x, w, strict=True))
    return math.acos(dot / math.hypot(*x) / math.hypot(*w))


def expected_logit(kind: str, theta: float, is_target: bool, scale: float = 16.0) -> float:
    margin = MARGINS[kind] if is_target else 0.0
    if kind == "sphereface":
        m = MARGINS[kind] if is_target else 1
        k = int(m * theta / math.pi)
        return scale * ((-1) ** k * math.cos(m * theta) - 2 * k)
    if kind == "cosface":
        return scale * (math.cos(theta) - margin)
    if kind == "arcface" and theta > math.pi - margin:
        return scale * (-1 + math.cos(theta) - math.cos(math.pi - margin))
    return scale * math.cos(theta + margin)


@each_kind
def test_logits_are_those_of_the_angles(kind, rng, device):
    head = make(kind, rng, device)
    x, y = rows(rng, device)
    for module, target in ((head, y), (head, None), (copy.deepcopy(head).eval(), y)):
        truth = [
            [
                expected_logit(kind, angle(row, w), module.training and target is not None and c == label)
                for c, w in enumerate(head.weight.tolist())
            ]
            for row, label in zip(x.tolist(), y.tolist(), strict=True)
        ]
        assert_within(module(x, target), torch.tensor(truth, dtype=torch.float64), 16.0, 8)


@each_kind
def test_margin_lowers_the_targets_logit_alone(kind, rng, device):
    head = make(kind, rng, device)
    x, y = rows(rng, device)
    lowered = head(x) - head(x, y)
    is_target = F.one_hot(y.clamp(min=0), 5).bool() & (y >= 0).unsqueeze(-1)
    assert (lowered[is_target] > 0).all() and not lowered[~is_target].any()
    if kind == "cosface":
        assert_within(lowered[is_target], head.hard_bias, 16.0, 4)


@each_kind
def test_lengths_do_not_matter_and_rotations_do_not_either(kind, rng, device):
    head = make(kind, rng, device)
    x, y = rows(rng, device)
    logits = head(x, y)
    scale = 16.0 * (MARGINS[kind] ** 2 if kind == "sphereface" else 1)  # the slope of cos(m theta) by the cosine
    assert_within(head(x * torch.rand(8, 1, generator=rng).to(device), y), logits, scale, 8)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=rng, dtype=torch.float64).to(device)).Q
    with torch.no_grad():
        head.weight.copy_(head.weight @ rotation * 3)
    assert_within(head(x @ rotation, y), logits, scale, 8)


@each_kind
def test_leading_dimensions_are_rows(kind, rng, device):
    head = make(kind, rng, device)
    x, y = rows(rng, device)
    assert_within(head(x.reshape(2, 4, 6), y.reshape(2, 4)), head(x, y).reshape(2, 4, 5), 16.0, 2)
    assert_within(head(x[0], y[0]), head(x, y)[0], 16.0, 2)
    assert head(x[:0], y[:0]).shape == (0, 5)


# the margin is the hard bias


@pytest.mark.parametrize("options", [{}, {"lam": 0.0}, {"lam": 1.0, "divergence": "kl_qu", "reduction": "none"}], ids=str)
def test_cosface_is_the_hard_bias_of_the_fused_loss(options, rng, device):
    head = make("cosface", rng, device)
    x, y = rows(rng, device)
    results = []
    for loss_of in (
        lambda leaf: LargeMarginCrossEntropyLoss(**options)(head(leaf, y), y),
        lambda leaf: linear_large_margin_cross_entropy(head.features(leaf), head.weights(), y, hard_bias=head.hard_bias, **options),
        lambda leaf: linear_large_margin_cross_entropy(
            16 * F.normalize(leaf, dim=-1), F.normalize(head.weight, dim=-1), y, hard_bias=16 * 0.35, **options
        ),
    ):
        leaf = x.clone().requires_grad_()
        loss = loss_of(leaf)
        results.append([loss.detach(), *torch.autograd.grad(loss.sum(), [leaf, head.weight])])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            assert_within(got, expected, 64.0, 4)


# sub-centers


@each_kind
def test_a_class_is_as_near_as_its_nearest_subcenter(kind, rng, device):
    head, single = make(kind, rng, device, subcenters=3), make(kind, rng, device)
    x, y = rows(rng, device)
    centers = head.weight.detach().reshape(5, 3, 6)
    nearest = F.cosine_similarity(x[:, None, None], centers, dim=-1).argmax(-1)  # (rows, classes)
    for i in range(8):
        results = []
        for module, weight in ((head, head.weight), (single, single.weight)):
            with torch.no_grad():
                single.weight.copy_(centers[torch.arange(5, device=device), nearest[i]])
            logits = module(x[i : i + 1], y[i : i + 1])
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y[i : i + 1].clamp(min=0)), weight)
            results.append((logits.detach(), gradient))
        (logits, gradient), (expected, of_nearest) = results
        assert_within(logits, expected, 64.0, 4)
        is_nearest = F.one_hot(nearest[i], 3).bool().flatten()
        assert_within(gradient[is_nearest], of_nearest, 64.0, 4)
        assert not gradient[~is_nearest].any()
    assert head.weight.shape == (15, 6) and "subcenters=3" in repr(head)


def test_the_schedule_of_sphereface_leads_from_the_plain_logit_to_the_margin(rng, device):
    head = make("sphereface", rng, device, schedule=AnnealedLambda(base=1.0, gamma=1.0, power=1.0, lambda_min=0.0)).to(device)
    whole, (x, y) = make("sphereface", rng, device), rows(rng, device)
    with torch.no_grad():
        whole.weight.copy_(head.weight)
    plain, margin = head(x), whole(x, y)
    for step in (1, 2, 3):
        lam = 1 / (1 + step)
        assert_within(head(x, y), ((lam * plain + margin) / (1 + lam)).detach(), 256.0, 4)
    assert int(head.schedule.step) == 3 and "schedule.step" in head.state_dict()
    head.reset_parameters()
    assert int(head.schedule.step) == 0


# gradients


@pytest.mark.parametrize("kind", ["cosface", "arcface", "sphereface"])
def test_gradcheck(kind, rng, device):
    head = make(kind, rng, device)
    x, y = rows(rng, device)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(head, {"weight": w}, (x, y)), (x.requires_grad_(), head.weight.detach().requires_grad_())
    )


def test_insightface_has_the_value_of_arcface_and_the_gradient_of_the_plain_cosine(rng, device):
    head = make("arcface_insightface", rng, device)
    x, y = rows(rng, device)
    upstream = torch.randn(8, 5, generator=rng, dtype=torch.float64).to(device)
    gradients = []
    for target in (y, None):
        leaf = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(head(leaf, target), [leaf, head.weight], upstream))
    for got, plain in zip(*gradients, strict=True):
        assert_within(got, plain, 16.0, 4)


@every("dtype", [torch.float32, torch.float64])
@every("theta", [1e-3, 1e-6, math.pi - 0.5 - 1e-3, math.pi - 0.5 + 1e-3, math.pi - 1e-3])
def test_arcface_is_right_at_small_and_large_angles(theta, dtype, device):
    # one class along the first axis, the feature at an angle: the gradient is along the circle, the derivative by the angle
    head = CosineLinear(2, 1, scale=1.0, margin=0.5, kind="arcface", dtype=torch.float64).to(device)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0]]))
    head.to(dtype)
    x = torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=dtype, requires_grad=True, device=device)
    near = theta < math.pi - 0.5
    logit = head(x, torch.tensor([0], device=device))
    assert_within(logit, math.cos(theta + 0.5) if near else math.cos(theta) + math.cos(0.5) - 1, 1.0, 8)
    slope = -math.sin(theta + 0.5) if near else -math.sin(theta)
    (gradient,) = torch.autograd.grad(logit.sum(), x)
    truth = torch.tensor([[-math.sin(theta) * slope, math.cos(theta) * slope]], dtype=torch.float64, device=device)
    assert_within(gradient, truth, 1.0, 8)


def test_arcface_falls_with_the_angle_without_a_step(device):
    head = CosineLinear(2, 1, scale=1.0, margin=0.5, kind="arcface", dtype=torch.float64).to(device)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0.0]]))
    theta = torch.linspace(0, math.pi, 2001, dtype=torch.float64, device=device)
    steps = head(torch.stack([theta.cos(), theta.sin()], -1), torch.zeros(2001, dtype=torch.long, device=device)).diff(dim=0)
    assert (steps < 0).all() and (steps > -math.pi / 2000 * 1.001).all()


@every("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@each_kind
def test_gradients_are_finite_on_the_axis_and_at_zero(kind, dtype, device):
    head = CosineLinear(3, 4, scale=64.0, margin=2 if kind == "sphereface" else 0.5, kind=kind, dtype=dtype).to(device)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.1, 0.2, 0.3], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 5.0, 0.0]], device=device))
    # along the target, against it, zero features, a zero class
    x = torch.tensor([[0.1, 0.2, 0.3], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]], dtype=dtype, requires_grad=True, device=device)
    y = torch.tensor([0, 1, 3, 2], device=device)
    logits = head(x, y)
    assert logits.dtype == dtype and logits.isfinite().all()
    for gradient in torch.autograd.grad(LargeMarginCrossEntropyLoss()(logits, y), [x, head.weight]):
        assert gradient.isfinite().all() and gradient.abs().max() < 1e3


@each_kind
def test_ignored_rows_are_plain_and_get_no_gradient(kind, rng, device):
    head = make(kind, rng, device)
    x, y = rows(rng, device)
    assert same_bits(head(x, y)[6], head(x)[6])
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(LargeMarginCrossEntropyLoss()(head(leaf, y), y), leaf)
    assert not gradient[6].any() and gradient[:6].any(1).all()


# use


@every("dtype", [torch.float16, torch.bfloat16])
@each_kind
def test_autocast(kind, dtype, rng, device):
    head = make(kind, rng, device, torch.float32, scale=64.0)
    x, y = rows(rng, device, torch.float32)
    leaf = x.clone().requires_grad_()
    with torch.autocast(device.type, dtype):
        logits = head(leaf, y)
        loss = LargeMarginCrossEntropyLoss()(logits, y)
    assert logits.dtype == dtype
    truth = copy.deepcopy(head).double()(x.double(), y)
    assert_within(logits, truth.detach(), 64.0, 4)
    for gradient in torch.autograd.grad(loss, [leaf, head.weight]):
        assert gradient.isfinite().all()


@compiles
@each_kind
def test_compiled_code_computes_the_same(kind, rng, device):
    torch._dynamo.reset()
    head = make(kind, rng, device, torch.float32)
    x, y = rows(rng, device, torch.float32)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    results = []
    for module in (head, compiled):
        leaf = x.clone().requires_grad_()
        logits = module(leaf, y)
        results.append([logits.detach(), *torch.autograd.grad(F.cross_entropy(logits, y), [leaf, head.weight])])
    for expected, got in zip(*results, strict=True):
        assert_within(got, expected.double(), 16.0, 4)
    head.eval()
    assert_within(compiled(x), head(x).detach().double(), 16.0, 2)


@each_kind
def test_state_dict_has_the_classes_alone_and_comes_back(kind, rng, device):
    head, other = make(kind, rng, device), make(kind, rng, device)
    assert list(head.state_dict()) == ["weight"]
    other.load_state_dict(head.state_dict())
    x, y = rows(rng, device)
    assert same_bits(other(x, y), head(x, y)) and same_bits(copy.deepcopy(head)(x, y), head(x, y))


@each_kind
def test_any_loss_takes_the_logits(kind, rng, device):
    head = make(kind, rng, device)
    x, y = rows(rng, device)
    for loss in (F.cross_entropy, multiclass_hinge, LargeMarginCrossEntropyLoss(label_smoothing=0.1)):
        loss(head(x, y), y).backward()
        assert head.weight.grad.isfinite().all()


# a second implementation


@pytest.mark.parametrize("kind", ["cosface", "arcface"])
def test_equals_pytorch_metric_learning(kind, rng, device):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    head = make(kind, rng, device)
    if kind == "cosface":
        theirs = losses.CosFaceLoss(5, 6, margin=0.35, scale=16).to(device)
    else:
        theirs = losses.ArcFaceLoss(5, 6, margin=math.degrees(0.5), scale=16).to(device)
    theirs.W.data = head.weight.detach().t().clone()
    x, y = torch.randn(64, 6, generator=rng, dtype=torch.float64).to(device), torch.randint(5, (64,), generator=rng).to(device)
    near = F.cosine_similarity(x, head.weight[y], dim=-1) > math.cos(math.pi - 0.5)  # beyond, their logit has a step
    assert near.sum() > 50
    x, y = x[near], y[near]
    results = []
    for loss_of in (lambda leaf: F.cross_entropy(head(leaf, y), y), lambda leaf: theirs(leaf, y)):
        leaf = x.clone().requires_grad_()
        loss = loss_of(leaf)
        results.append([loss.detach(), torch.autograd.grad(loss, leaf)[0]])
    for got, expected in zip(*results, strict=True):
        assert_within(got, expected, 16.0, 64)


@every(
    "error, options, words",
    [
        (ValueError, {"scale": 0.0}, "scale must be above 0, got 0.0; the papers use 30 or 64"),
        (ValueError, {"margin": -0.1}, "margin must be finite and at least 0"),
        (ValueError, {"kind": "normface"}, "kind must be one of 'cosface'"),
        (ValueError, {"kind": "sphereface", "margin": 1.5}, "margin of kind='sphereface' must be an integer.* got 1.5; the paper uses 4"),
        (ValueError, {"kind": "sphereface", "margin": 0}, "margin must be finite and at least 1"),
        (ValueError, {"subcenters": 0}, "subcenters must be at least 1"),
        (ValueError, {"schedule": AnnealedLambda.for_steps(10)}, "schedule anneals .*'sphereface', but kind is 'cosface'"),
        (TypeError, {"kind": "sphereface", "schedule": 0.5}, "schedule must be None, or a Schedule"),
        (ValueError, {"kind": "arcface", "margin": 28.6}, "radians"),
        (ValueError, {"num_classes": 0}, "num_classes must be at least 1"),
        (TypeError, {"in_features": 2.5}, "in_features must be an int"),
    ],
)
def test_wrong_options(error, options, words):
    with pytest.raises(error, match=words):
        CosineLinear(**{"in_features": 6, "num_classes": 5, **options})


@each_kind
def test_the_margin_is_that_of_the_paper_unless_it_is_given(kind, device):
    assert CosineLinear(6, 5, kind=kind).margin == MARGINS[kind]
    head = CosineLinear(6, 5, kind=kind, margin=1 if kind == "sphereface" else 0.0).to(device)
    features, target = torch.randn(4, 6).to(device), torch.arange(4, device=device)
    assert same_bits(head(features, target), head(features)) and head.hard_bias == 0


def test_wrong_calls(rng):
    head = make("arcface", rng, CPU)
    x, y = rows(rng, CPU)
    with pytest.raises(ValueError, match="hard_bias is the margin of kind='cosface'"):
        _ = head.hard_bias
    with pytest.raises(ValueError, match=r"weights\(\) needs subcenters=1, got 3"):
        make("arcface", rng, CPU, subcenters=3).weights()
    with pytest.raises(ValueError, match=r"target must be int64 class indices of shape \(8,\)"):
        head(x, y[:4])
    with pytest.raises(ValueError, match=r"target.long\(\)"):
        head(x, y.int())
    with pytest.raises(IndexError, match="holds 5"):
        head(x, y + 1)  # on a GPU labels are not looked at


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e19])
def test_the_cosine_does_not_depend_on_the_length(size, rng, device):
    head = CosineLinear(4, 3, scale=2.0).to(device)
    features = torch.randn(5, 4, generator=rng).to(device)
    assert_within(head(features * size), head(features).double().detach(), 2.0, 8)


def test_a_zero_vector_has_a_cosine_of_zero_and_the_whole_margin(device):
    head = CosineLinear(4, 3, scale=30.0, margin=0.5, kind="arcface").to(device)
    logit = head(torch.zeros(1, 4, device=device), torch.tensor([0], device=device))[0, 0]
    assert_within(logit.detach(), 30 * math.cos(math.pi / 2 + 0.5), 30.0, 2)
