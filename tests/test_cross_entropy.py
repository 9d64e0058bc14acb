"""At lam = 0 and hard_bias = 0 the loss is torch.nn.functional.cross_entropy, in value and gradient; and the whole list of exceptions."""

import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from combinations import covering, every
from largemargin import large_margin_cross_entropy
from measure import INF, assert_within, compiles

SHAPES = {
    f"{rows}{'' if kind == 'C' else ','}C={classes},{extra}": (*((rows,) if kind != "C" else ()), classes, *extra)
    for kind, rows, extra in [("C", "", ()), ("NC", 6, ()), ("NC", 3, (4,)), ("NC", 2, (2, 3)), ("NC", 0, ()), ("NC", 0, (2,))]
    for classes in (1, 2, 5)
} | {"no rows, no classes": (0, 0), "no positions": (2, 3, 0)}
REDUCTIONS = ("none", "sum", "mean")


def plain(input: Tensor, target: Tensor, weight: Tensor | None = None, **options) -> Tensor:
    return large_margin_cross_entropy(input, target, weight, lam=0, hard_bias=0, **options)


def num_classes(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[1]


def index_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return () if len(shape) == 1 else (shape[0], *shape[2:])


def upstreams(loss: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    """Gradients that reach a loss in practice: of either sign, zero, and expanded, with stride 0."""
    drawn = torch.randn(loss.shape, generator=rng, dtype=torch.float64).to(loss)
    return {
        "random": drawn,
        "negative": -drawn.abs() - 1,
        "zero": torch.zeros_like(loss),
        "expanded": torch.tensor(0.7, dtype=loss.dtype, device=loss.device).expand(loss.shape),
    }


def assert_equals_cross_entropy(input: Tensor, target: Tensor, weight: Tensor | None, rng: torch.Generator, **options) -> None:
    """Value and gradients within two roundings of torch's float64 result, in units of the rows' reach."""
    leaf, leaf64 = input.clone().requires_grad_(), input.double().requires_grad_()
    weight64 = None if weight is None else weight.double()
    target64 = target.double() if target.is_floating_point() else target
    loss, truth = plain(leaf, target, weight, **options), F.cross_entropy(leaf64, target64, weight64, **options)
    assert loss.shape == truth.shape
    assert loss.dtype == input.dtype
    eps, eps64 = torch.finfo(input.dtype).eps, torch.finfo(torch.float64).eps
    rows = max(1, input.numel() // max(1, num_classes(input.shape)))
    heaviest = 1.0 if weight is None or not len(weight) else weight.max().item()
    share = {"none": heaviest, "sum": heaviest * rows, "mean": heaviest / (1.0 if weight is None else 0.5)}[options["reduction"]]
    reach = 1 + (2 * input.abs().max().item() + math.log(num_classes(input.shape)) if input.numel() else 0)
    # a sum of non-negative terms is as accurate as its terms; torch's own rounding is absolute
    assert_within(loss, truth.detach(), reach * (truth.detach().abs() + share * eps64 / eps), 2)
    for kind, upstream in upstreams(loss, rng).items():
        (gradient,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=True)
        (expected,) = torch.autograd.grad(truth, leaf64, upstream.double(), retain_graph=True)
        assert gradient.shape == input.shape and gradient.dtype == input.dtype
        size = upstream.abs().max().item() if upstream.numel() else 0.0
        assert_within(gradient, expected, reach * size * max(share / rows, heaviest) + (size == 0), 2)
        if kind == "zero" and not expected.isnan().any():
            assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every("shape", SHAPES.values())
def test_class_indices(shape, dtype, rng, device):
    classes = num_classes(shape)
    input = torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype) * 3
    weights = (None, torch.rand(classes, generator=rng, dtype=torch.float64).to(device, dtype) + 0.5)
    cases = covering(3, ignore_index=(-100, 0, 1, 255), weight=weights, smoothing=(0.0, 0.1, 1.0), reduction=REDUCTIONS)
    for ignore_index, weight, smoothing, reduction in cases:
        target = torch.randint(max(classes, 1), index_shape(shape), generator=rng).to(device)
        target.view(-1)[:1] = ignore_index
        target.view(-1)[1:2] = int(ignore_index == 0)  # a row that is kept
        ignored = target == ignore_index
        if target.numel() and (ignored.all() or (target >= classes)[~ignored].any()):
            continue  # all ignored: test_everything_ignored; a single class that is ignored leaves no label for a kept row
        if classes == 0 and smoothing > 0:
            continue  # torch's eps / C is NaN: test_everything_ignored
        options = {"ignore_index": ignore_index, "label_smoothing": smoothing, "reduction": reduction}
        assert_equals_cross_entropy(input, target, weight, rng, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every("shape", SHAPES.values())
def test_class_probabilities(shape, dtype, rng, device):
    classes = num_classes(shape)
    input = torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype) * 3
    target = torch.rand(shape, generator=rng, dtype=torch.float64).to(device, dtype)  # not normalised: torch does not ask for it
    target[target < 0.2] = 0
    weights = (None, torch.rand(classes, generator=rng, dtype=torch.float64).to(device, dtype) + 0.5)
    for weight, smoothing, reduction in itertools.product(weights, (0.0, 0.1, 1.0), REDUCTIONS):
        # unnormalised shares count up to C times a row
        size = max(1, classes)
        options = {"label_smoothing": smoothing, "reduction": reduction}
        assert_equals_cross_entropy(input, target / size, weight, rng, **options)


def test_gradient_of_class_probabilities(rng, device):
    input = torch.randn(4, 5, generator=rng, dtype=torch.float64).to(device)
    target = torch.rand(4, 5, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    weight = torch.rand(5, generator=rng, dtype=torch.float64).to(device)
    options = {"weight": weight, "label_smoothing": 0.1}
    (got,) = torch.autograd.grad(plain(input, target, **options), target)
    (truth,) = torch.autograd.grad(F.cross_entropy(input, target, **options), target)
    assert_within(got, truth, 8.0, 2)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, 255])
def test_ignore_index_255_with_256_classes(ignore_index, rng, device):
    # 255 is both a class and the usual "void" label of uint8 maps
    input, target = torch.randn(256, 256, generator=rng, dtype=torch.float64).to(device), torch.arange(256, device=device)
    for labels in (target, target.to(torch.uint8)):
        got, truth = (f(input, labels, ignore_index=ignore_index, reduction="none") for f in (plain, F.cross_entropy))
        assert (got == 0).nonzero().flatten().tolist() == [ignore_index] * (ignore_index >= 0)
        assert_within(got, truth, 16.0, 2)


@every("reduction", REDUCTIONS)
@every("label", [2, -100])
def test_one_label_in_a_vector_for_one_row_without_a_batch(label, reduction, rng, device):
    input, target = torch.randn(3, generator=rng).to(device), torch.tensor([label], device=device)
    got, truth = plain(input, target, reduction=reduction), F.cross_entropy(input, target, reduction=reduction)
    assert got.shape == truth.shape
    assert_within(got, truth, 4.0, 2)


@every("smoothing", [0.0, 0.1])
@every("weighted", [False, True])
@every("shape", [(3, 4), (3, 4, 2), (4,), (3, 0)])
def test_everything_ignored(shape, weighted, smoothing, rng, device):
    input = torch.randn(shape, generator=rng).to(device).requires_grad_()
    target = torch.full(index_shape(shape), -100, device=device)
    weight = torch.rand(num_classes(shape), generator=rng).to(device) if weighted else None
    for reduction in REDUCTIONS:
        options = {"label_smoothing": smoothing, "reduction": reduction}
        loss = plain(input, target, weight, **options)
        if num_classes(shape):  # without classes torch's own eps / C is NaN
            assert_within(loss, F.cross_entropy(input, target, weight, **options).detach(), 0.0, 0)
        assert loss.isnan() if reduction == "mean" else not loss.any()
        (gradient,) = torch.autograd.grad(loss.sum(), input)
        assert not gradient.any()


@every("reduction", REDUCTIONS)
@every("smoothing", [0.0, 0.1])
def test_a_class_of_weight_zero_is_not_an_ignored_row(smoothing, reduction, rng, device):
    # its row counts 0 in the denominator, but keeps its smoothing term
    input = torch.randn(3, 4, generator=rng).to(device)
    target = torch.tensor([0, 1, 1], device=device)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], device=device)
    assert_equals_cross_entropy(input, target, weight, rng, label_smoothing=smoothing, reduction=reduction)


# the exceptions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_half_inputs_give_a_float32_loss(kind, dtype, rng, device):
    input = torch.randn(3, 4, generator=rng).to(device, dtype).requires_grad_()
    target = torch.tensor([0, 1, 2], device=device) if kind == "indices" else torch.rand(3, 4, generator=rng).to(device, dtype)
    loss = plain(input, target)
    assert loss.dtype == torch.float32
    assert F.cross_entropy(input, target).dtype == dtype
    assert torch.autograd.grad(loss, input)[0].dtype == dtype


def test_tails_are_accurate(device):
    input, target = torch.tensor([[20.0, 0.0, 0.0]], requires_grad=True, device=device), torch.tensor([0], device=device)
    torchs = F.cross_entropy(input, target)
    assert torchs.item() == 0  # what is avoided
    assert torch.autograd.grad(torchs, input)[0][0, 0] == 0
    loss = plain(input, target)
    assert loss.item() == pytest.approx(2 * math.exp(-20), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, input)
    assert gradient[0, 0].item() == pytest.approx(-2 * math.exp(-20), rel=1e-5)


@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 3.0, 0.5]])
def test_a_masked_class_with_smoothing_gives_the_loss_of_the_row_without_it(weight, device):
    input, target = torch.tensor([[1.0, -INF, 0.5, 2.0]], requires_grad=True, device=device), torch.tensor([0], device=device)
    weight = None if weight is None else torch.tensor(weight, device=device)
    deleted = torch.tensor([[1.0, 0.5, 2.0]], dtype=torch.float64, requires_grad=True, device=device)
    truth = F.cross_entropy(deleted, target, None if weight is None else weight[[0, 2, 3]].double(), label_smoothing=0.1)
    assert F.cross_entropy(input, target, weight, label_smoothing=0.1).isinf()
    loss = plain(input, target, weight, label_smoothing=0.1)
    assert_within(loss, truth.detach(), 4.0, 2)
    (gradient,), (expected,) = torch.autograd.grad(loss, input), torch.autograd.grad(truth, deleted)
    assert gradient[0, 1] == 0
    assert_within(gradient[:, [0, 2, 3]], expected, 2.0, 2)


def test_a_masked_class_with_probability_zero_gives_a_finite_number(device):
    input, target = torch.tensor([[1.0, -INF, 0.5]], requires_grad=True, device=device), torch.tensor([[0.5, 0.0, 0.5]], device=device)
    assert F.cross_entropy(input, target).isnan()
    loss = plain(input, target)
    deleted = F.cross_entropy(
        torch.tensor([[1.0, 0.5]], dtype=torch.float64, device=device), torch.tensor([[0.5, 0.5]], dtype=torch.float64, device=device)
    )
    assert_within(loss, deleted, 2.0, 2)
    assert torch.autograd.grad(loss, input)[0][0, 1] == 0


@every("smoothing", [0.0, 0.1])
@every("weighted", [False, True])
@every("garbage", [math.nan, INF, -INF])
def test_ignored_rows_never_leak(garbage, weighted, smoothing, device):
    input = torch.tensor([[1.0, 2.0, 0.0], [garbage] * 3], requires_grad=True, device=device)
    target, weight = torch.tensor([0, -100], device=device), torch.tensor([1.0, 2.0, 3.0], device=device) if weighted else None
    (torchs,) = torch.autograd.grad(F.cross_entropy(input, target, weight, label_smoothing=smoothing), input)
    assert torchs[1].isnan().all()
    loss = plain(input, target, weight, label_smoothing=smoothing)
    alone = plain(input[:1], target[:1], weight, label_smoothing=smoothing)
    assert_within(loss, alone.detach(), 4.0, 1)
    assert torch.autograd.grad(loss, input)[0][1].tolist() == [0, 0, 0]


@every("input_dtype", [torch.float32, torch.float64, torch.bfloat16])
@every("weight_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@every("kind", ["indices", "probabilities"])
def test_weight_may_have_any_floating_dtype(kind, weight_dtype, input_dtype, rng, device):
    input = torch.randn(3, 4, generator=rng).to(device, input_dtype)
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=weight_dtype, device=device)
    target = torch.tensor([0, 1, 2], device=device) if kind == "indices" else torch.rand(3, 4, generator=rng).to(device, input_dtype)
    loss = plain(input, target, weight, label_smoothing=0.1)
    assert loss.dtype == (torch.float64 if input_dtype == torch.float64 else torch.float32)
    truth_target = target if kind == "indices" else target.double()
    truth = F.cross_entropy(input.double(), truth_target, weight.double(), label_smoothing=0.1)
    assert_within(loss, truth, 16.0, 2)


def test_arguments_after_weight_are_keyword_only_and_the_deprecated_ones_are_gone(rng, device):
    input, target = torch.randn(3, 4, generator=rng).to(device), torch.tensor([0, 1, 2], device=device)
    kinds = {name: parameter.kind for name, parameter in inspect.signature(large_margin_cross_entropy).parameters.items()}
    assert [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == ["input", "target", "weight"]
    for name in ("size_average", "reduce"):
        with pytest.raises(TypeError, match=name):
            large_margin_cross_entropy(input, target, **{name: True})


@compiles
def test_compiled_code_gives_nan_for_a_label_out_of_range(rng, device):
    input = torch.randn(3, 4, generator=rng).to(device).requires_grad_()
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    losses = compiled(input, torch.tensor([1, 4, -100], device=device), reduction="none")
    assert losses.isnan().tolist() == [False, True, False]
    (gradient,) = torch.autograd.grad(losses[0], input)
    assert gradient[0].any() and not gradient[1:].any()


def test_numbers_may_come_from_numpy(rng, device):
    numpy = pytest.importorskip("numpy")
    input, target = torch.randn(3, 4, generator=rng).to(device), torch.tensor([0, 3, 1], device=device)
    got = plain(input, target, ignore_index=numpy.int64(3), label_smoothing=numpy.float32(0.5))
    assert torch.equal(got, plain(input, target, ignore_index=3, label_smoothing=0.5))
