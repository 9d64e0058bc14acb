"""The losses under what torch does to functions: higher derivatives, functorch transforms, compilation, export, checkpointing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from combinations import covering, every
from largemargin import (
    LargeMarginCrossEntropyLoss,
    crammer_singer_hinge,
    hard_margin_softplus,
    large_margin_cross_entropy,
    multiclass_hinge,
    row_stats,
)
from measure import INF, assert_within, compiles, same_bits
from registry import DIVERGENCES

# torch's own forward-mode formulas and inductor are scripted, which torch deprecates; warnings are errors here
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

KINDS = ("indices", "probabilities")
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
each_kind = pytest.mark.parametrize("kind", KINDS)


class Problem:
    """A small float64 problem with a masked class, an ignored row, weights and smoothing."""

    def __init__(
        self, kind: str, rng: torch.Generator, device: torch.device, divergence: str = "symmetric", rows: int = 4, classes: int = 5
    ) -> None:
        self.input = torch.randn(rows, classes, generator=rng, dtype=torch.float64).to(device) * 2
        self.masked = torch.zeros(rows, classes, dtype=torch.bool, device=device)
        self.masked[1, 2] = True
        if kind == "indices":
            self.target = torch.tensor([0, 3, -100, 1], device=device)[:rows]
        else:
            self.target = torch.rand(rows, classes, generator=rng, dtype=torch.float64).to(device).masked_fill(self.masked, 0.0)
        weight = torch.rand(classes, generator=rng, dtype=torch.float64).to(device) + 0.5
        self.options = {"weight": weight, "label_smoothing": 0.1, "divergence": divergence, "hard_bias": 0.5}

    def losses(self, input: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
        target = self.target if target is None else target
        return large_margin_cross_entropy(input.masked_fill(self.masked, -INF), target, **{**self.options, **options})


# derivatives


@each_divergence
@each_kind
@every("reduction", ["none", "mean"])
def test_first_derivatives(reduction, kind, divergence, rng, device):
    problem = Problem(kind, rng, device, divergence)
    assert gradcheck(
        lambda f: problem.losses(f, reduction=reduction),
        problem.input.requires_grad_(),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@each_divergence
@each_kind
def test_second_derivatives(kind, divergence, rng, device):
    problem = Problem(kind, rng, device, divergence, rows=2)
    for smoothing in (0.0, 0.1):
        assert gradgradcheck(
            lambda f, smoothing=smoothing: problem.losses(f[:2], label_smoothing=smoothing),
            problem.input.requires_grad_(),
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
        )


def test_derivatives_of_the_statistics(rng, device):
    input = torch.randn(3, 5, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    target = torch.tensor([0, -100, 4], device=device)

    def smooth(f: Tensor) -> tuple[Tensor, ...]:
        return row_stats(f, target)[:5]

    assert gradcheck(smooth, input, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert gradgradcheck(smooth, input, check_fwd_over_rev=True)


@each_divergence
@every("bias", [0.0, 1.5])
def test_hessian_vector_product_has_its_closed_form(bias, divergence, rng, device):
    input, target = torch.randn(6, 7, generator=rng, dtype=torch.float64).to(device) * 3, torch.tensor([0, 1, 2, 3, 4, 5], device=device)
    input[0, 0] += 30.0  # where the form with p (v - p.v) has lost the row
    v, lam = torch.randn(6, 7, generator=rng, dtype=torch.float64).to(device), 0.3
    leaf = input.clone().requires_grad_()
    loss = large_margin_cross_entropy(leaf, target, lam=lam, divergence=divergence, hard_bias=bias, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    (got,) = torch.autograd.grad(gradient, leaf, v)

    is_target = torch.nn.functional.one_hot(target, 7).bool()
    others = input.masked_fill(is_target, -INF)
    log_q = others.log_softmax(1).masked_fill(is_target, 0.0)
    q = others.softmax(1)
    e = (q * log_q).sum(1, keepdim=True)
    l = input[is_target] - others.logsumexp(1)
    g_e, g_a = {"symmetric": (lam / 2, -lam / 2), "kl_qu": (lam, 0.0), "kl_uq": (0.0, -lam)}[divergence]
    g_l = -torch.sigmoid(bias - l)[:, None]
    mu = (q * v).sum(1, keepdim=True)
    de = (q * (log_q - e) * v).sum(1, keepdim=True)
    dg_l = (torch.sigmoid(bias - l) * torch.sigmoid(l - bias) * (v[is_target] - mu[:, 0]))[:, None]
    r = g_e * (log_q - e) - g_l - g_a
    truth = torch.where(is_target, dg_l, q * ((v - mu) * (r + g_e) - g_e * de - dg_l))
    assert_within(got, truth, 30.0, 2)
    assert_within(got[0, 0], dg_l[0, 0], 64 * dg_l[0, 0].abs(), 2)  # relative, however small


@each_kind
def test_functorch_agrees_with_autograd(kind, rng, device):
    problem = Problem(kind, rng, device)
    input = problem.input.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.losses(input), input)
    assert_within(torch.func.grad(problem.losses)(problem.input), gradient, 1.0, 2)

    def each(f: Tensor) -> Tensor:
        return problem.losses(f, reduction="none")

    jacobian = torch.autograd.functional.jacobian(each, problem.input)
    assert_within(torch.func.jacrev(each)(problem.input), jacobian, 8.0, 2)
    assert_within(torch.func.jacfwd(each)(problem.input), jacobian, 8.0, 4)
    assert jacobian.any()


@every("outer", [torch.func.jacrev, torch.func.jacfwd])
@every("inner", [torch.func.jacrev, torch.func.jacfwd])
@each_kind
def test_hessians_in_every_order(kind, inner, outer, rng, device):
    problem = Problem(kind, rng, device)
    hessian = torch.autograd.functional.hessian(problem.losses, problem.input)
    assert hessian.any()
    assert_within(outer(inner(problem.losses))(problem.input), hessian, 8.0, 4)


@each_kind
def test_gradients_of_each_row_by_vmap(kind, rng, device):
    problem = Problem(kind, rng, device)

    def one(f: Tensor, y: Tensor) -> Tensor:
        return large_margin_cross_entropy(f, y, reduction="sum", **problem.options)

    input = problem.input.masked_fill(problem.masked, -INF)
    got = torch.func.vmap(torch.func.grad(one))(input, problem.target)
    for n in range(len(input)):
        leaf = input[n].clone().requires_grad_()
        (expected,) = torch.autograd.grad(one(leaf, problem.target[n]), leaf)
        assert_within(got[n], expected, 4.0, 2)
    losses = torch.func.vmap(one)(input, problem.target)
    assert_within(losses, problem.losses(problem.input, reduction="none"), 32.0, 2)


def test_forward_mode_by_hand(rng, device):
    problem, v = Problem("indices", rng, device), torch.randn(4, 5, generator=rng, dtype=torch.float64).to(device)
    leaf = problem.input.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(problem.losses(leaf), leaf)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(problem.losses(forward_ad.make_dual(problem.input, v))).tangent
    assert_within(tangent, (gradient * v).sum(), 8.0, 2)


@pytest.mark.parametrize("hinge", [multiclass_hinge, crammer_singer_hinge, hard_margin_softplus], ids=lambda hinge: hinge.__name__)
def test_hinges_under_transforms(hinge, rng, device):
    input, target = torch.randn(4, 5, generator=rng, dtype=torch.float64).to(device), torch.tensor([0, 3, -100, 1], device=device)

    def each(f: Tensor) -> Tensor:
        return hinge(f, target, reduction="none")

    assert gradcheck(each, input.clone().requires_grad_(), check_forward_ad=True, check_batched_grad=True)
    jacobian = torch.autograd.functional.jacobian(each, input)
    assert_within(torch.func.jacfwd(each)(input), jacobian, 8.0, 2)
    leaf = input.clone().requires_grad_()
    (first,) = torch.autograd.grad(each(leaf).sum(), leaf, create_graph=True)
    if hinge is hard_margin_softplus:  # the others are piecewise linear
        assert gradgradcheck(lambda f: each(f).sum(), input.clone().requires_grad_(), check_fwd_over_rev=True)
        assert torch.autograd.grad(first.square().sum(), leaf)[0].any()


# no gradients


@each_kind
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, kind, rng, device):
    problem = Problem(kind, rng, device)
    expected = problem.losses(problem.input)
    leaf = problem.input.clone().requires_grad_()
    with context():
        loss = problem.losses(leaf)
    assert not loss.requires_grad and loss.grad_fn is None
    assert same_bits(loss, expected)
    assert not problem.losses(problem.input).requires_grad


@each_kind
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, kind, rng, device):
    problem = Problem(kind, rng, device)
    gradients = []
    for run in (problem.losses, lambda f: checkpoint(problem.losses, f, use_reentrant=use_reentrant)):
        leaf = problem.input.clone().requires_grad_()
        gradients.append(torch.autograd.grad(run(leaf * 1), leaf)[0] if not use_reentrant else backward(run(leaf * 1), leaf))
    assert same_bits(*gradients)


def backward(loss: Tensor, leaf: Tensor) -> Tensor:
    loss.backward()  # reentrant checkpointing knows no autograd.grad
    return leaf.grad


# compilation and export


def assert_compiled_equals_eager(run, input: Tensor, *targets: Tensor, backend: str, units: float, **compile_options) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend, **compile_options)
    for target in targets:
        f = input[: len(target)]
        leaves = [f.clone().requires_grad_() for _ in range(2)]
        losses = [function(leaf, target) for function, leaf in zip((run, compiled), leaves, strict=True)]
        gradients = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
        assert_within(losses[1], losses[0].detach(), losses[0].detach().abs() + 8, units)
        assert_within(gradients[1], gradients[0], 1.0, units)
        if not target.is_floating_point():
            assert not gradients[1][target == -100].any()


def module(**options: Any) -> LargeMarginCrossEntropyLoss:
    return LargeMarginCrossEntropyLoss(**options)


def function(**options: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda f, y: large_margin_cross_entropy(f, y, **options)


CHANGING_ROWS = covering(
    2,
    kind=KINDS,
    form=(module, function),
    dynamic=(True, None),
    options=({}, {"label_smoothing": 0.1, "weight": torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0]), "hard_bias": 1.0}),
)


@compiles
@pytest.mark.parametrize(("kind", "form", "dynamic", "options"), CHANGING_ROWS)
def test_compiled_with_a_changing_number_of_rows(kind, form, dynamic, options, rng, device):
    options = {name: value.to(device) if name == "weight" else value for name, value in options.items()}
    input = torch.randn(8, 5, generator=rng).to(device) * 3
    if kind == "indices":
        targets = [torch.tensor([0, 1, -100, 3, 4, 0, -100, 2], device=device), torch.tensor([-100, 1, 2], device=device)]
    else:
        targets = [torch.rand(8, 5, generator=rng).to(device), torch.rand(3, 5, generator=rng).to(device)]
    assert_compiled_equals_eager(form(**options), input, *targets, backend="aot_eager", units=1, dynamic=dynamic)


@compiles
@pytest.mark.parametrize("function", [multiclass_hinge, crammer_singer_hinge, hard_margin_softplus], ids=lambda f: f.__name__)
def test_compiled_hinges(function, rng, device):
    input, target = torch.randn(8, 5, generator=rng).to(device) * 3, torch.tensor([0, 1, -100, 3, 4, 0, -100, 2], device=device)
    assert_compiled_equals_eager(lambda f, y: function(f, y), input, target, backend="aot_eager", units=1)


@compiles
@each_divergence
def test_compiled_k_dimensions_without_gradient(divergence, rng, device):
    torch._dynamo.reset()
    input, target = torch.randn(2, 5, 3, generator=rng).to(device), torch.tensor([[0, 1, -100], [3, 4, 0]], device=device)
    compiled = torch.compile(large_margin_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for reduction in ("none", "mean"):
            options = {"divergence": divergence, "reduction": reduction}
            assert_within(compiled(input, target, **options), large_margin_cross_entropy(input, target, **options).double(), 8.0, 1)


@compiles
def test_compiled_layer_and_loss(rng, device):
    torch._dynamo.reset()
    layer = torch.nn.Linear(4, 5).to(device)
    features = torch.randn(8, 4, generator=rng).to(device)
    target = torch.tensor([0, 1, -100, 3, 4, 0, -100, 2], device=device)

    def step(x: Tensor) -> Tensor:
        return large_margin_cross_entropy(layer(x), target)

    expected = torch.autograd.grad(step(features), layer.weight)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(features), layer.weight)[0]
    assert_within(got, expected, 4.0, 1)


@pytest.mark.slow  # the inductor builds C++ kernels
@compiles
@each_kind
def test_inductor(kind, rng, device):
    input = torch.randn(8, 5, generator=rng).to(device) * 3
    target = torch.tensor([0, 1, -100, 3, 4, 0, -100, 2]) if kind == "indices" else torch.rand(8, 5, generator=rng)
    target = target.to(device)
    assert_compiled_equals_eager(
        lambda f, y: large_margin_cross_entropy(f, y, label_smoothing=0.1), input, target, backend="inductor", units=4
    )


class Criterion(torch.nn.Module):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return large_margin_cross_entropy(input, target, label_smoothing=0.1)


@compiles
@each_kind
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict, kind, rng, device):
    torch._dynamo.reset()
    input = torch.randn(8, 5, generator=rng).to(device)
    target = torch.tensor([0, 1, -100, 3, 4, 0, -100, 2]) if kind == "indices" else torch.rand(8, 5, generator=rng)
    target = target.to(device)
    rows = torch.export.Dim("rows", min=2, max=64)
    shapes = {"input": {0: rows}, "target": {0: rows}}
    exported = torch.export.export(Criterion(), (input, target), dynamic_shapes=shapes, strict=strict).module()
    for count in (8, 3):
        f, y = input[:count], target[:count]
        assert_within(exported(f, y), Criterion()(f, y).double(), 8.0, 1)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_traces_the_loss(mode, rng, device):
    from torch.fx.experimental.proxy_tensor import make_fx

    input, target = torch.randn(4, 5, generator=rng).to(device), torch.tensor([0, 1, -100, 3], device=device)
    traced = make_fx(lambda input, target: large_margin_cross_entropy(input, target), tracing_mode=mode)(input, target)
    assert torch.equal(traced(input, target), large_margin_cross_entropy(input, target, backend="reference"))


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_forward_mode_outside_vmap(kind, rng, device):
    x = torch.randn(3, 4, 5, generator=rng, dtype=torch.float64).to(device)
    target = torch.randint(5, (3, 4), generator=rng) if kind == "indices" else torch.rand(3, 4, 5, generator=rng, dtype=torch.float64)
    target = target.to(device)
    v = torch.randn(3, 4, 5, generator=rng, dtype=torch.float64).to(device)

    def losses(x):
        return torch.vmap(lambda x, t: large_margin_cross_entropy(x, t, label_smoothing=0.1))(x, target)

    values, tangents = torch.func.jvp(losses, (x,), (v,))[:2]
    leaf = x.clone().requires_grad_()
    for n in range(3):
        loss = large_margin_cross_entropy(leaf[n], target[n], label_smoothing=0.1)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert_within(values[n], loss.detach(), 8.0, 2)
        assert_within(tangents[n], (gradient * v).sum(), 8.0, 2)
    hessian = torch.func.hessian(lambda x: losses(x).sum())(x)
    expected = torch.autograd.functional.hessian(
        lambda x: sum(large_margin_cross_entropy(x[n], target[n], label_smoothing=0.1) for n in range(3)), x
    )
    assert_within(hessian, expected, 8.0, 4)
