"""Linear layer and loss in one: equal to the loss of the logits, whatever the chunks, and without ever holding them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from combinations import every
from devices import CPU, device_of
from largemargin import LinearLargeMarginCrossEntropyLoss, large_margin_cross_entropy, linear_large_margin_cross_entropy
from largemargin.backends import ladder, reference
from largemargin.rows import tiles
from measure import assert_within, compiles, peak_bytes, same_bits

# one chunk, a few of several rows, one row a chunk; with few rows and many classes the logits stand in the gradient of the classifier
TILES = (2**20, 100, 1)
SHAPES = ((7, 5, 13), (5, 9, 40), (33, 3, 50), (1, 4, 2), (6, 2, 1))  # rows, width, classes


@pytest.fixture(params=TILES)
def tile(request, monkeypatch) -> int:
    monkeypatch.setattr(tiles, "TILE", request.param)
    monkeypatch.setattr(tiles, "TILE_OF_GPU", request.param)
    return request.param


class Problem:
    def __init__(self, shape: tuple[int, int, int], rng: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        rows, width, classes = shape
        self.input = torch.randn(rows, width, generator=rng).to(device, dtype)
        self.linear_weight = torch.randn(classes, width, generator=rng).to(device, dtype)
        self.linear_bias = torch.randn(classes, generator=rng).to(device, dtype)
        self.target = torch.randint(classes, (rows,), generator=rng).to(device)
        if rows > 3:
            self.target[1] = -100

    def leaves(self) -> list[Tensor]:
        return [tensor.detach().clone().requires_grad_() for tensor in (self.input, self.linear_weight, self.linear_bias)]


def fused(leaves: list[Tensor], target: Tensor, **options: Any) -> Tensor:
    return linear_large_margin_cross_entropy(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)


def plain(leaves: list[Tensor], target: Tensor, **options: Any) -> Tensor:
    return large_margin_cross_entropy(F.linear(*leaves), target, **options, backend="reference")


@every("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_linear_and_loss(shape, reduction, tile, rng, device):
    problem = Problem(shape, rng, device)
    weight = torch.rand(shape[2], generator=rng, dtype=torch.float64).to(device)
    for options in (
        {},
        {"weight": weight, "label_smoothing": 0.1, "hard_bias": 1.0},
        {"divergence": "kl_qu", "lam": 2.0, "label_smoothing": 0.1},
    ):
        results = []
        for function in (fused, plain):
            leaves = problem.leaves()
            loss = function(leaves, problem.target, reduction=reduction, **options)
            upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=loss.dtype)  # zero, negative, any
            upstream = upstream.to(device)
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves, upstream)])
        for got, expected in zip(*results, strict=True):
            assert got.dtype == expected.dtype
            assert_within(got, expected, 64 + expected.abs(), 2)


@every("reduction", ["none", "sum", "mean"])
@every("shape", SHAPES[:3])
def test_float32_by_the_kernels_is_within_roundings_of_float64(shape, reduction, tile, rng, device):
    problem = Problem(shape, rng, device, torch.float32)
    got, exact = problem.leaves(), [leaf.detach().double().requires_grad_() for leaf in problem.leaves()]
    loss, truth = fused(got, problem.target, reduction=reduction), plain(exact, problem.target, reduction=reduction)
    assert loss.dtype == torch.float32
    assert_within(loss, truth.detach(), 64 + truth.detach().abs(), 4)
    for found, expected in zip(torch.autograd.grad(loss.sum(), got), torch.autograd.grad(truth.sum(), exact), strict=True):
        assert_within(found, expected, 16 + expected.abs(), 4)


@every("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)])
def test_half_precision_is_multiplied_and_accumulated_in_float32(dtypes, tile, rng):
    # on the CPU: a GPU multiplies in half precision, which has tests of its own below
    problem = Problem((33, 3, 50), rng, CPU, torch.float32)
    input, linear_weight = problem.input.to(dtypes[0]).requires_grad_(), problem.linear_weight.to(dtypes[1]).requires_grad_()
    exact = [input.detach().double().requires_grad_(), linear_weight.detach().double().requires_grad_()]
    loss = linear_large_margin_cross_entropy(input, linear_weight, problem.target)
    truth = large_margin_cross_entropy(exact[0] @ exact[1].t(), problem.target)
    assert loss.dtype == torch.float32
    assert_within(loss, truth.detach(), 16.0, 2)  # F.linear in half would have lost five digits
    for leaf, got, expected in zip(
        (input, linear_weight), torch.autograd.grad(loss, (input, linear_weight)), torch.autograd.grad(truth, exact), strict=True
    ):
        assert got.dtype == leaf.dtype
        info = torch.finfo(leaf.dtype)
        once = 0 if leaf.dtype == torch.float32 else 0.51
        allowed = once * info.eps * expected.abs() + 1e-6 + info.smallest_normal * info.eps
        assert ((got.double() - expected).abs() <= allowed).all()


def test_autocast_changes_nothing(tile, rng, device):
    problem = Problem((33, 3, 50), rng, device, torch.float32)
    features = problem.input.bfloat16()
    expected = linear_large_margin_cross_entropy(features, problem.linear_weight, problem.target)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert same_bits(linear_large_margin_cross_entropy(features, problem.linear_weight, problem.target), expected)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_pass_is_the_gradient_of_its_own_upstream(reduction, tile, rng, device):
    problem = Problem((7, 9, 40), rng, device)
    leaves = problem.leaves()
    loss = fused(leaves, problem.target, reduction=reduction).sum()
    held = [(factor, torch.autograd.grad(loss * factor, leaves, retain_graph=True)) for factor in (1.0, 3.0, 2.0, 0.0)]
    unit = torch.autograd.grad(plain(leaves, problem.target, reduction=reduction).sum(), leaves)
    for factor, gradients in held:
        for got, expected in zip(gradients, unit, strict=True):
            assert_within(got, factor * expected, 16.0, 2)


def test_ignored_rows_leak_nothing(tile, rng):
    # on the CPU: on a GPU it would cost a wait to see whether the upstream gradient is finite
    problem = Problem((7, 5, 13), rng, CPU, torch.float32)
    problem.input[1] = torch.nan
    for upstream in (1.0, float("inf"), float("nan")):
        leaves = problem.leaves()
        loss = fused(leaves, problem.target)
        (gradient,) = torch.autograd.grad(loss, leaves[0], torch.tensor(upstream))
        assert loss.isfinite() and (gradient[1] == 0).all()


def test_gradient_accumulation_adds_up(tile, rng, device):
    problem = Problem((12, 5, 30), rng, device)
    leaves = problem.leaves()
    for part in (slice(0, 5), slice(5, 12)):
        loss = linear_large_margin_cross_entropy(leaves[0][part], leaves[1], problem.target[part], linear_bias=leaves[2], reduction="sum")
        loss.backward()
    expected = torch.autograd.grad(plain(leaves, problem.target, reduction="sum"), leaves)
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert_within(leaf.grad, gradient, 16.0, 2)


def test_higher_derivatives_and_batched_gradients(tile, rng, device):
    problem = Problem((4, 3, 6), rng, device)
    leaves = problem.leaves()
    assert torch.autograd.gradgradcheck(lambda *p: fused(list(p), problem.target), leaves)
    loss = fused(leaves, problem.target, reduction="none")
    (batched,) = torch.autograd.grad(loss, leaves[1], torch.eye(4, dtype=torch.float64, device=device), is_grads_batched=True)
    assert_within(
        batched, torch.func.jacrev(lambda w: fused([leaves[0], w, leaves[2]], problem.target, reduction="none"))(leaves[1]), 8.0, 2
    )


def test_under_hooks_on_saved_tensors_the_loss_keeps_nothing_else(rng, device):
    problem = Problem((7, 5, 13), rng, device)
    leaves = problem.leaves()
    with torch.autograd.graph.save_on_cpu():
        loss = fused(leaves, problem.target)
    kept = [value for value in vars(loss.grad_fn).values() if isinstance(value, tuple)]
    assert not any(isinstance(entry, Tensor) for value in kept for entry in value)
    for got, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain(leaves, problem.target), leaves), strict=True):
        assert_within(got, expected, 16.0, 2)


def test_hooks_run_once(tile, rng, device):
    problem = Problem((7, 5, 13), rng, device)
    for create_graph in (False, True):
        leaves = problem.leaves()
        features = leaves[0] * 1
        features.register_hook(lambda gradient: gradient * 10)
        (got,) = torch.autograd.grad(fused([features, *leaves[1:]], problem.target), leaves[0], create_graph=create_graph)
        (expected,) = torch.autograd.grad(plain(leaves, problem.target), leaves[0])
        assert_within(got, 10 * expected, 16.0, 2)


# shapes and odd classifiers


@every("shape", [(2, 3, 5), (2, 2, 2, 5), (5,)])
def test_leading_dimensions_are_those_of_the_target(shape, tile, rng, device):
    input, linear_weight = torch.randn(shape, generator=rng).to(device), torch.randn(9, 5, generator=rng).to(device)
    target = torch.randint(9, shape[:-1], generator=rng).to(device)
    losses = linear_large_margin_cross_entropy(input, linear_weight, target, reduction="none")
    flat = large_margin_cross_entropy((input @ linear_weight.t()).reshape(-1, 9), target.reshape(-1), reduction="none")
    assert losses.shape == target.shape
    assert_within(losses.flatten(), flat.double(), 16.0, 2)


# the target, and the positions (d1, ...) of a classifier (C, d1, ..., D)
KINDS = {"probabilities": (True, ()), "positions": (False, (2,)), "probabilities of positions": (True, (2, 3))}


def of_kind(kind: str, shape: tuple[int, int, int], rng: torch.Generator) -> tuple[list[Tensor], Tensor]:
    """Features, classifier and bias in float64, and the target."""
    (rows, width, classes), (soft, positions) = shape, KINDS[kind]
    leaves = [torch.randn(size, generator=rng, dtype=torch.float64) for size in ((rows, width), (classes, *positions, width))]
    leaves.append(torch.randn(classes, *positions, generator=rng, dtype=torch.float64))
    if soft:
        return leaves, torch.rand(rows, classes, *positions, generator=rng, dtype=torch.float64)
    target = torch.randint(classes, (rows, *positions), generator=rng)
    target[-1] = -100
    return leaves, target


def with_logits(leaves: list[Tensor], target: Tensor, **options: Any) -> Tensor:
    logits = torch.einsum("nd,c...d->nc...", leaves[0], leaves[1]) + leaves[2]
    return large_margin_cross_entropy(logits, target, **options)


@every("dtype", [torch.float32, torch.float64])
@every("shape", [(7, 5, 13), (5, 9, 40)])
@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_and_positions_equal_the_loss_of_the_logits(kind, shape, dtype, tile, rng, device):
    leaves, target = of_kind(kind, shape, rng)
    exact = [leaf.to(dtype).double().requires_grad_() for leaf in leaves]
    target = target.to(dtype) if target.is_floating_point() else target
    weight = torch.rand(shape[2], generator=rng)
    mine = [leaf.detach().to(device, dtype).requires_grad_() for leaf in exact]
    for reduction, options in (
        ("mean", {}),
        ("none", {"weight": weight, "label_smoothing": 0.1, "hard_bias": 1.0}),
        ("sum", {"divergence": "kl_qu", "label_smoothing": 0.1}),
        ("mean", {"lam": 0.0}),
    ):
        on_device = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
        loss = fused(mine, target.to(device), reduction=reduction, **on_device)
        truth = with_logits(exact, target.double() if target.is_floating_point() else target, reduction=reduction, **options)
        assert loss.shape == truth.shape and loss.dtype == dtype
        assert_within(loss, truth.detach(), 64 + truth.detach().abs(), 4)
        upstream = torch.randn(truth.shape, generator=rng).double()
        for factor in (1.0, -2.0):  # the second pass computes the logits again
            gradients = torch.autograd.grad(loss, mine, factor * upstream.to(device, dtype), retain_graph=True)
            for got, expected in zip(gradients, torch.autograd.grad(truth, exact, factor * upstream, retain_graph=True), strict=True):
                assert_within(got, expected, 64 + expected.abs(), 4)


@pytest.mark.parametrize("kind", KINDS)
def test_higher_derivatives_and_gradients_of_probabilities(kind, rng, device):
    leaves, target = of_kind(kind, (3, 2, 4), rng)
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    if target.is_floating_point():
        leaves.append(target.to(device).requires_grad_())
    loss = lambda *p: fused([*p[:3]], p[3] if len(p) > 3 else target.to(device))  # noqa: E731
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_probabilities_have_leading_dimensions_and_a_padded_vocabulary(rng, device):
    input, linear_weight = torch.randn(2, 3, 5, generator=rng).to(device), torch.randn(9, 5, generator=rng).to(device)
    target = torch.rand(2, 3, 7, generator=rng).to(device)
    losses = linear_large_margin_cross_entropy(input, linear_weight, target, reduction="none", num_classes=7)
    flat = large_margin_cross_entropy((input @ linear_weight[:7].t()).reshape(-1, 7), target.reshape(-1, 7), reduction="none")
    assert losses.shape == (2, 3)
    assert_within(losses.flatten(), flat.double(), 64.0, 2)
    assert linear_large_margin_cross_entropy(input[:0], linear_weight[:7], target[:0]).isnan()


def test_probabilities_for_as_many_classes_as_features(rng, device):
    input, linear_weight = torch.randn(4, 5, generator=rng).to(device), torch.randn(5, 5, generator=rng).to(device)
    target = torch.rand(4, 5, generator=rng).softmax(-1).to(device)
    loss = linear_large_margin_cross_entropy(input, linear_weight, target)
    assert_within(loss, large_margin_cross_entropy((input @ linear_weight.t()).double(), target), 64.0, 2)


def test_inputs_that_are_not_contiguous(tile, rng, device):
    wide, classifier = torch.randn(5, 14, generator=rng).to(device), torch.randn(7, 30, generator=rng).to(device)
    target = torch.randint(30, (7,), generator=rng).to(device)
    leaves = [wide.t()[::2].requires_grad_(), classifier.t()[:, :5].requires_grad_()]
    got = linear_large_margin_cross_entropy(leaves[0], leaves[1], target)
    expected = large_margin_cross_entropy(leaves[0] @ leaves[1].t(), target)
    for a, b in zip((got, *torch.autograd.grad(got, leaves)), (expected, *torch.autograd.grad(expected, leaves)), strict=True):
        assert_within(a.detach(), b.detach().double(), 16.0, 2)


def test_a_padded_vocabulary(tile, rng, device):
    problem = Problem((7, 5, 13), rng, device)
    leaves = problem.leaves()
    loss = fused(leaves, problem.target % 10, num_classes=10)
    short = [leaves[0], leaves[1][:10], leaves[2][:10]]
    assert_within(loss, plain(short, problem.target % 10).detach(), 8.0, 2)
    gradients = torch.autograd.grad(loss, leaves)
    assert (gradients[1][10:] == 0).all() and (gradients[2][10:] == 0).all()
    for got, expected in zip(gradients, torch.autograd.grad(plain(short, problem.target % 10), leaves), strict=True):
        assert_within(got, expected, 8.0, 2)


def test_a_class_with_a_bias_of_minus_infinity_is_not_in_the_row(tile, rng, device):
    problem = Problem((7, 5, 13), rng, device)
    problem.linear_bias[12] = -torch.inf
    target = problem.target % 12
    leaves = problem.leaves()
    loss = fused(leaves, target)
    gradients = torch.autograd.grad(loss, leaves)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients) and (gradients[1][12] == 0).all()
    assert_within(loss, plain([leaves[0], leaves[1][:12], leaves[2][:12]], target).detach(), 8.0, 2)


@every("reduction", ["none", "sum", "mean"])
@every("rows", [0, 4])
def test_no_rows_or_all_ignored(rows, reduction, tile, device):
    leaves = [torch.ones(shape, requires_grad=True, device=device) for shape in ((rows, 3), (5, 3), (5,))]
    loss = fused(leaves, torch.full((rows,), -100, device=device), reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss.sum(), leaves))


# what is frozen costs nothing; on the CPU, as the products of a GPU take a workspace besides


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_memory_is_that_of_the_gradients_that_are_wanted_and_a_tile(needed, monkeypatch, rng):
    monkeypatch.setattr(tiles, "TILE", 20_000)
    input, linear_weight = torch.randn(400, 16, generator=rng), torch.randn(4000, 16, generator=rng)
    target = torch.randint(4000, (400,), generator=rng)
    leaves = [leaf for leaf, wanted in zip((input, linear_weight), needed, strict=True) if wanted]
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> None:
        loss = linear_large_margin_cross_entropy(input, linear_weight, target)
        if leaves:
            torch.autograd.grad(loss, leaves)

    gradients = sum(leaf.nbytes for leaf in leaves)
    assert peak_bytes(step) < gradients + 4 * 20_000 + 100_000  # the logits would take 6,400,000
    frozen = [leaf for leaf, wanted in zip((input, linear_weight), needed, strict=True) if not wanted]
    assert all(leaf.grad is None for leaf in frozen)


def test_the_logits_of_probabilities_are_not_held(monkeypatch, rng):
    monkeypatch.setattr(tiles, "TILE", 20_000)
    input, linear_weight = torch.randn(100, 16, generator=rng, requires_grad=True), torch.randn(4000, 16, generator=rng, requires_grad=True)
    target = torch.rand(100, 4000, generator=rng)
    step = lambda: torch.autograd.grad(linear_large_margin_cross_entropy(input, linear_weight, target), (input, linear_weight))  # noqa: E731
    assert peak_bytes(step) < input.nbytes + linear_weight.nbytes + 25 * 4 * 4000 + 100_000  # a row at a time; the logits take 1,600,000


def test_few_rows_of_many_classes_need_no_tile(monkeypatch, rng):
    monkeypatch.setattr(tiles, "TILE", 2000)
    input, linear_weight = torch.randn(16, 32, generator=rng, requires_grad=True), torch.randn(5000, 32, generator=rng, requires_grad=True)
    target = torch.randint(5000, (16,), generator=rng)
    loss = linear_large_margin_cross_entropy(input, linear_weight, target)
    gradients = torch.autograd.grad(loss, (input, linear_weight))
    expected = torch.autograd.grad(large_margin_cross_entropy(input @ linear_weight.t(), target), (input, linear_weight))
    for got, truth in zip(gradients, expected, strict=True):
        assert_within(got, truth.double(), 4.0, 2)
    step = lambda: torch.autograd.grad(linear_large_margin_cross_entropy(input, linear_weight, target), (input, linear_weight))  # noqa: E731
    assert peak_bytes(step) < linear_weight.nbytes + 100_000


# errors; on the CPU, as labels on a GPU are not looked at


def test_errors_name_the_argument(rng):
    input, linear_weight, target = torch.randn(4, 3), torch.randn(5, 3), torch.arange(4)
    for arguments, error, words in (
        (
            (input, torch.empty(0), target),
            ValueError,
            "linear_weight is empty, float32 of shape \\(0,\\); gather a sharded parameter",
        ),
        ((input, torch.randn(5, 4), target), ValueError, "linear_weight must have shape \\(C, D\\)"),
        ((input, linear_weight, target[:3]), ValueError, "target must be int64 class indices of shape \\(4,\\)"),
        ((input, linear_weight, torch.rand(4, 6)), ValueError, "class probabilities have the shape \\(4, 5\\)"),
        ((input, linear_weight, torch.ones(4, 5).long()), RuntimeError, "class probabilities in a floating dtype"),
        ((input, torch.randn(5, 2, 3), target), ValueError, "class indices of shape \\(4, 2\\)"),
        ((input[0], torch.randn(5, 2, 3), target), ValueError, "\\(C, d1, ..., dk, D\\) for input \\(N, D\\)"),
        ((input, linear_weight, target + 2), IndexError, "holds 5 \\(1 of 4 labels are out of range\\)"),
        ((input, linear_weight, target.int()), RuntimeError, "target.long\\(\\)"),
    ):
        with pytest.raises(error, match=words):
            linear_large_margin_cross_entropy(*arguments)
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"linear_bias": torch.randn(4)}, ValueError, r"linear_bias must be floating of shape \(C,\), with C = 5"),
        ({"num_classes": 6}, ValueError, "num_classes must be between 1 and the 5 rows"),
        ({"weight": torch.rand(4)}, RuntimeError, "weight must have one entry for each of the 5 classes"),
        ({"lam": -1.0}, ValueError, "lam"),
        ({"reduction": "avg"}, ValueError, "reduction"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index"),
        ({"options": {"lam": 0.3}}, TypeError, "options must be None or a torch.nn.LinearCrossEntropyOptions.* by name: lam=0.3"),
    ]
    for options, kind, words in bad:
        with pytest.raises(kind, match=words):
            linear_large_margin_cross_entropy(input, linear_weight, target, **options)
    with pytest.raises(RuntimeError, match="ignore_index=0 needs class indices"):
        linear_large_margin_cross_entropy(input, linear_weight, torch.rand(4, 5), ignore_index=0)
    with pytest.raises(ValueError, match=r"linear_bias must be floating of shape \(C, d1, \.\.\., dk\)"):
        linear_large_margin_cross_entropy(input, torch.randn(5, 2, 3), torch.zeros(4, 2).long(), linear_bias=torch.zeros(10))
    for sizes in ("3", 3, (3, 0), (3.0,)):
        with pytest.raises((TypeError, ValueError), match="out_features"):
            LinearLargeMarginCrossEntropyLoss(3, 5, out_features=sizes)


# the module, and compiled code


def test_the_module_is_the_function_and_trains(rng, device):
    torch.manual_seed(0)
    criterion = LinearLargeMarginCrossEntropyLoss(6, 11, weight=torch.rand(11), lam=0.5, label_smoothing=0.1, reduction="sum")
    criterion.to(device)
    features, target = torch.randn(8, 6, generator=rng).to(device), torch.randint(11, (8,), generator=rng).to(device)
    expected = large_margin_cross_entropy(
        criterion.linear(features), target, criterion.weight, lam=0.5, label_smoothing=0.1, reduction="sum"
    )
    assert_within(criterion(features, target).detach(), expected.detach().double(), 64.0, 2)
    assert {name for name, _ in criterion.named_parameters()} == {"linear.weight", "linear.bias"}
    optimiser, first = torch.optim.SGD(criterion.parameters(), 0.05), float(criterion(features, target).detach())
    for _ in range(20):
        optimiser.zero_grad()
        criterion(features, target).backward()
        optimiser.step()
    assert float(criterion(features, target).detach()) < first
    with pytest.raises(ValueError, match="lam"):
        LinearLargeMarginCrossEntropyLoss(6, 11, lam=-1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_module_takes_probabilities_and_positions_fused_or_not(kind, rng):
    leaves, target = of_kind(kind, (4, 5, 3), rng)
    criterion = LinearLargeMarginCrossEntropyLoss(5, 3, out_features=KINDS[kind][1], dtype=torch.float64, reduction="none")
    criterion.linear.load_state_dict({"weight": leaves[1].flatten(0, -2), "bias": leaves[2].flatten()})
    expected = with_logits(leaves, target, reduction="none")
    assert_within(criterion(leaves[0], target), expected, 64.0, 2)
    criterion.linear.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="hook"):
        assert_within(criterion(leaves[0], target), expected, 64.0, 2)
    if criterion.out_features:
        with pytest.raises(ValueError, match="input must have shape"):
            criterion(leaves[0][None], target)


@compiles
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_compiled_code_computes_the_same(rng, device):
    torch._dynamo.reset()
    problem = Problem((7, 5, 13), rng, device, torch.float32)
    leaves = problem.leaves()
    compiled = torch.compile(lambda *p: fused(list(p), problem.target), backend="aot_eager", fullgraph=True)
    got, expected = compiled(*leaves), fused(leaves, problem.target)
    assert_within(got, expected.detach().double(), 16.0, 2)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert_within(a, b.double(), 4.0, 2)


# products of half precision, as on a GPU; here they are made by the CPU, in float32 of the rounded numbers


@pytest.fixture
def half_products(monkeypatch):
    monkeypatch.setattr(tiles.Layer, "is_half", property(lambda self: self.input.dtype == self.weight.dtype != torch.float32))
    monkeypatch.setattr(ladder, "pick_for_loss", lambda *_: reference)


def assert_half_products(dtype, backend, reduction, rng, device) -> None:
    problem = Problem((33, 3, 50), rng, CPU, torch.float32)
    problem.linear_bias[7] = -torch.inf
    problem.target[problem.target == 7] = 8
    leaves = [leaf.detach().to(device, dtype).requires_grad_() for leaf in problem.leaves()]
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]  # and the truth, on the CPU
    weight = torch.rand(50, generator=rng)
    for options in ({}, {"weight": weight, "label_smoothing": 0.1}, {"divergence": "kl_uq", "lam": 2.0}):
        on_device = {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}
        loss = linear_large_margin_cross_entropy(
            leaves[0], leaves[1], problem.target.to(device), linear_bias=leaves[2], reduction=reduction, backend=backend, **on_device
        )
        logits = F.linear(*exact)
        truth = large_margin_cross_entropy(logits, problem.target, reduction=reduction, **options)
        assert_within(loss, truth.detach(), 64 + truth.detach().abs(), 4)
        upstream = torch.randn(truth.shape, generator=rng, dtype=torch.float64) / 1024
        got = torch.autograd.grad(loss, leaves, upstream.float().to(device))
        of_logits, *expected = torch.autograd.grad(truth, [logits, *exact], upstream)
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        # a factor and, with class weights, a sum; they are rounded before they are multiplied by the upstream gradient
        rounded = 2.2 * torch.finfo(dtype).eps * of_logits.abs() + smallest * upstream.abs().max()
        bounds = (rounded @ exact[1].detach().abs(), rounded.t() @ exact[0].detach().abs(), rounded.sum(0))
        for found, true, bound in zip(got, expected, bounds, strict=True):
            assert ((found.cpu().double() - true).abs() <= bound + 0.51 * torch.finfo(dtype).eps * true.abs() + smallest).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore:overflow:RuntimeWarning")
@every("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(("backend", "tile"), [(None, 100), ("triton", 2**20), ("reference", 100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_products_cost_the_rounding_of_their_factors(dtype, backend, tile, reduction, half_products, monkeypatch, rng):
    monkeypatch.setattr(tiles, "TILE", tile)
    assert_half_products(dtype, backend, reduction, rng, device_of("triton") if backend == "triton" else CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@every("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("tile", [2**20, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_products_of_a_gpu(dtype, tile, reduction, monkeypatch, rng):
    monkeypatch.setattr(tiles, "TILE_OF_GPU", tile)
    assert_half_products(dtype, None, reduction, rng, "cuda")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_products_of_probabilities_and_positions(kind, dtype, half_products, monkeypatch, rng):
    monkeypatch.setattr(tiles, "TILE", 200)
    leaves, target = of_kind(kind, (33, 3, 11), rng)
    mine = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in mine]
    for reduction in ("mean", "none"):
        loss = fused(mine, target.float() if target.is_floating_point() else target, reduction=reduction)
        truth = with_logits(exact, target, reduction=reduction)
        assert_within(loss, truth.detach(), 64 + truth.detach().abs(), 8, torch.float32)
        upstream = torch.randn(truth.shape, generator=rng)
        for got, expected in zip(
            torch.autograd.grad(loss, mine, upstream), torch.autograd.grad(truth, exact, upstream.double()), strict=True
        ):
            assert (got.double() - expected).norm() < torch.finfo(dtype).eps * expected.norm()


def test_what_all_classes_share_survives_float16(half_products, rng, device):
    """The divergence moves each of 20,000 classes by 4e-8 in every row: less than the least float16."""
    input, linear_weight = (torch.randn(n, 4, generator=rng).to(device).half().requires_grad_() for n in (400, 20_000))
    target = torch.randint(100, (400,), generator=rng).to(device)
    loss = linear_large_margin_cross_entropy(input, linear_weight, target, divergence="kl_uq")
    exact = [leaf.detach().double().requires_grad_() for leaf in (input, linear_weight)]
    truth = torch.autograd.grad(large_margin_cross_entropy(exact[0] @ exact[1].t(), target, divergence="kl_uq"), exact)
    for found, true in zip(torch.autograd.grad(loss * 65536, (input, linear_weight)), truth, strict=True):
        assert (found.double() / 65536 - true).norm() < 5e-4 * true.norm()


@every("reduction", ["none", "sum", "mean"])
@every("rows", [0, 4])
def test_half_products_of_no_rows_or_ignored_ones_give_zero(rows, reduction, half_products, device):
    leaves = [torch.ones(n, 3, device=device).bfloat16().requires_grad_() for n in (rows, 5)]
    target = torch.full((rows,), -100, device=device)
    loss = linear_large_margin_cross_entropy(leaves[0], leaves[1], target, reduction=reduction)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_loss_scale_saves_the_gradient_of_float16_features(reduction, tile, rng, device):
    """The rows are sure: without the scale their gradients, over 1024, are nothing in float16."""
    linear_weight, target = 8 * torch.randn(20, 64, generator=rng).to(device), torch.randint(20, (1024,), generator=rng).to(device)
    input = (linear_weight[target] / 64 + 0.1 * torch.randn(1024, 64, generator=rng).to(device)).half().requires_grad_()
    exact = input.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(large_margin_cross_entropy(exact @ linear_weight.double().t(), target, lam=0.0), exact)
    loss = linear_large_margin_cross_entropy(input, linear_weight, target, lam=0.0, reduction=reduction)
    (got,) = torch.autograd.grad(loss.mean() * 65536, input)
    assert expected.norm(dim=1).median() * 1024 < 2e-4
    assert (got.double() / 65536 - expected).norm() < 1e-3 * expected.norm()
