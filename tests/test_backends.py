"""One file for every backend: each computes the statistics, the losses and their gradients as the reference does in float64.

Those that this machine cannot have are skipped, and say why. Triton kernels run interpreted on the CPU, or on a GPU where there is one.
"""

import copy
import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from combinations import covering, every
from devices import HAS_KERNELS, device_of
from largemargin import (
    LargeMarginCrossEntropyLoss,
    crammer_singer_hinge,
    focal_cross_entropy,
    hard_margin_softplus,
    large_margin_cross_entropy,
    row_stats,
)
from largemargin.backends import cpu, ladder
from largemargin.loss import HingeOptions
from largemargin.metrics import MarginMetrics
from largemargin.rows import whole
from largemargin.rowstats import IGNORED, Cotangents
from measure import INF, assert_within, compiles, roundings, same_bits, waiting_refused
from problems import loss_and_gradient, vjp_scale
from registry import DIVERGENCES, HALVES, KERNELS
from strategies import LEADS

# the interpreter computes with numpy, which warns of infinities that are meant
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore:overflow:RuntimeWarning", "ignore:.torch.jit.script:DeprecationWarning"
)

DTYPES = (torch.float32, *HALVES)
ALL_DTYPES = (*DTYPES, torch.float64)


def skip_unless_available(backend: str, dtype: torch.dtype | None = None) -> None:
    if backend == "reference":
        return
    module = ladder.load(backend)
    if isinstance(module, str):
        pytest.skip(module)
    if dtype is not None and dtype not in module.DTYPES:
        pytest.skip(f"{backend} does not take {dtype}")


@pytest.fixture(scope="module", autouse=True)
def language_patched_once() -> Iterator[None]:
    """Triton's interpreter patches its language for each kernel, and again for each function that the kernel calls: most of its time."""
    if HAS_KERNELS or isinstance(ladder.load("triton"), str):
        yield
        return
    from triton import language
    from triton.runtime import interpreter

    whole = SimpleNamespace(__globals__={"tl": language, "core": language.core})  # of a function that sees all of the language
    scope = interpreter._patch_lang(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda function: type(scope)())
        yield
    if scope is not None:  # as in older versions of Triton, which leave their language patched
        scope.restore()


@pytest.fixture(params=("reference", *KERNELS))
def backend(request) -> str:
    skip_unless_available(request.param)
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request) -> str:
    skip_unless_available(request.param)
    return request.param


@pytest.fixture
def kernel_device() -> torch.device:
    """A device on which backend=None finds a kernel."""
    default = "triton" if HAS_KERNELS else "cpu"
    skip_unless_available(default)
    return device_of(default)


def combined(**factors: Any) -> Callable[[dict[str, Any]], list[tuple[Any, ...]]]:
    """Any three values meet in some case; in the interpreter of Triton, where a case takes a second, any two."""

    def cases(fixtures: dict[str, Any]) -> list[tuple[Any, ...]]:
        strength = 2 if is_interpreted(fixtures.get("backend") or fixtures["kernel"]) else 3
        return covering(strength=strength, **factors)

    return cases


def is_interpreted(backend: str) -> bool:
    return backend == "triton" and not HAS_KERNELS


class Problem:
    """Logits with masked classes, ignored rows and confident ones, and the same in float64."""

    def __init__(self, input: Tensor, rng: torch.Generator, backend: str) -> None:
        skip_unless_available(backend, input.dtype)
        self.backend = backend
        self.input = input.to(device_of(backend))
        num_classes = input.shape[1]
        self.target = torch.randint(num_classes, (input.shape[0], *input.shape[2:]), generator=rng).to(self.input.device)
        flat = self.target.view(-1)
        if flat.numel() > 2:
            flat[1] = -100

    def with_(self, **changes: Any) -> "Problem":
        other = copy.copy(self)
        other.__dict__.update(changes)
        return other

    def leaf(self) -> Tensor:
        return self.input.detach().requires_grad_()  # keeps the strides


def logits(shape: tuple[int, ...], rng: torch.Generator, dtype: torch.dtype = torch.float32, scale: float = 5.0) -> Tensor:
    input = torch.randn(shape, generator=rng) * scale
    if shape[1] > 3:
        input[..., :1][input[..., :1] > 1.5 * scale] = -INF  # some classes are masked
    return input.to(dtype)


def assert_rounded(got: Tensor, truth: Tensor, scale: Tensor, units: float, backend: str | None = None) -> None:
    """Computed in float32 within ``units`` roundings of ``scale``, then rounded once to the dtype of ``got``."""
    info = torch.finfo(got.dtype)
    truncated = backend == "triton" and got.device.type == "cpu"  # Triton's interpreter truncates to bfloat16; GPUs round
    once = 0.0 if got.dtype == torch.float32 else (1.01 if truncated else 0.51) * info.eps
    spacing = info.smallest_normal * info.eps
    allowed = once * truth.abs() + units * torch.finfo(torch.float32).eps * scale + spacing + 1e-37
    error = (got.detach().double() - truth).abs()
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times what is allowed"


def compare_statistics(problem: Problem, rng: torch.Generator) -> None:
    """Fields and gradient are within a few roundings of float64, and no worse than the reference path in the same dtype."""
    leaf, exact = problem.leaf(), problem.leaf().double().detach().requires_grad_()
    upstream = [torch.randn(problem.target.shape, generator=rng).to(leaf.device) for _ in range(5)]
    stats = row_stats(leaf, problem.target, backend=problem.backend)
    theirs = row_stats(leaf, problem.target, backend="reference")
    truth = row_stats(exact, problem.target, backend="reference")
    finite = [u.masked_fill(~t.isfinite(), 0.0) for u, t in zip(upstream, truth, strict=False)]
    (gradient,) = torch.autograd.grad(stats[:5], leaf, finite)
    (gradient_truth,) = torch.autograd.grad(truth[:5], exact, [u.double() for u in finite])
    for name, got, their, true in zip(stats._fields, stats, theirs, truth, strict=True):
        assert got.dtype == torch.float32 and got.shape == problem.target.shape, name
        scale = 8 + true.detach().abs().nan_to_num(posinf=1.0)
        reference_error = roundings(their, true.detach(), scale, torch.float32).max() if got.numel() else 0
        assert_within(got, true.detach(), scale, max(float(reference_error), 2.0), torch.float32)
    assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape
    assert_rounded(gradient, gradient_truth, vjp_scale(leaf, problem.target, finite), 4, problem.backend)


SHAPES = [
    (1, 1),
    (3, 1),
    (5, 2),
    (4, 3),
    (40, 17),
    (70, 65),
    (33, 100),
    (9, 1000),
    (3, 1025),
    (2, 65537),
    (3, 7, 5),
    (2, 19, 9, 8),
    (2, 5, 150),
    (2, 70, 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every("dtype", DTYPES)
def test_statistics_of_awkward_shapes(backend, shape, dtype, rng):
    compare_statistics(Problem(logits(shape, rng, dtype), rng, backend), rng)


def strided(name: str, rng: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits whose rows do not lie as in a fresh tensor; a view that is moved to a device becomes one."""
    wide = torch.randn(12, 40, generator=rng).to(device, dtype)
    image = torch.randn(2, 19, 6, 8, generator=rng).to(device, dtype)
    return {
        "rows apart": lambda: wide[::2],
        "part of each row": lambda: wide[:, 3:36],
        "last dimension with stride 2": lambda: wide[:, ::2],
        "transposed": lambda: wide.t(),
        "expanded": lambda: wide[:1].expand(5, 40),
        "one class repeated": lambda: wide[:, :1].expand(12, 7),
        "classes last": lambda: wide.view(3, 4, 40).transpose(1, 2),
        "channels last": lambda: image.contiguous(memory_format=torch.channels_last),
        "crop": lambda: image[:, :, 1:5, 2:7],
        "crop of channels last": lambda: image.contiguous(memory_format=torch.channels_last)[:, :, 1:5, 2:7],
        "rows and columns swapped": lambda: image.transpose(2, 3),
        "batch sliced": lambda: image[1:],
    }[name]()


STRIDES = (
    "rows apart", "part of each row", "last dimension with stride 2", "transposed", "expanded", "one class repeated", "classes last",
    "channels last", "crop", "crop of channels last", "rows and columns swapped", "batch sliced",
)  # fmt: skip


def dtypes_of_strides(fixtures: dict[str, Any]) -> tuple[torch.dtype, ...]:
    """All; in Triton's interpreter they take turns, because there a dtype only changes how a number is loaded and stored."""
    return (DTYPES[STRIDES.index(fixtures["name"]) % len(DTYPES)],) if is_interpreted(fixtures["backend"]) else DTYPES


@pytest.mark.parametrize("name", STRIDES)
@every("dtype", dtypes_of_strides)
def test_rows_may_lie_anywhere(backend, name, dtype, rng):
    problem = Problem(strided(name, rng, dtype, device_of(backend)), rng, backend)
    compare_statistics(problem, rng)
    plain = problem.with_(input=problem.input.contiguous().float(), backend="reference")
    for reduction in ("none", "mean"):
        loss, gradient = outcome(problem, reduction=reduction, label_smoothing=0.1)
        expected, expected_gradient = outcome(plain, reduction=reduction, label_smoothing=0.1)
        assert_within(loss, expected.double(), 32.0, 2)
        largest = expected_gradient.double().abs().max()
        assert_rounded(gradient, expected_gradient.double(), largest.expand(gradient.shape), 4, backend)


# torch counts an empty tensor as contiguous, whatever its strides
@every("dtype", DTYPES)
def test_a_crop_without_images_has_no_loss(backend, dtype):
    images = torch.ones(0, 19, 6, 8, device=device_of(backend), dtype=dtype)
    input, target = images[:, :, 1:5, 2:7].requires_grad_(), torch.ones(0, 4, 5, device=images.device, dtype=torch.int64)
    loss = large_margin_cross_entropy(input, target, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0 and input.grad.shape == input.shape


# The memory is asked for and never touched, but for the two rows.
def test_a_stride_beyond_31_bits(backend, rng):
    if device_of(backend).type == "cuda" and torch.cuda.mem_get_info()[0] < 6 << 30:
        pytest.skip("needs 5 GB on the device")
    stride = 2**31 + 1
    storage = torch.empty(stride + 10, dtype=torch.bfloat16, device=device_of(backend))
    input = storage.as_strided((2, 10), (stride, 1))
    input.copy_(torch.randn(2, 10, generator=rng))
    target = torch.tensor([3, 9], device=input.device)
    leaf, near = input.requires_grad_(), input.detach().contiguous().requires_grad_()
    loss, expected = (large_margin_cross_entropy(f, target, backend=backend) for f in (leaf, near))
    assert same_bits(loss, expected)
    assert same_bits(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected, near)[0])
    rows_apart = storage.as_strided((2, 3, 2), (4, stride // 2, 1))  # and of a class
    rows_apart.copy_(torch.randn(2, 3, 2, generator=rng))
    target = torch.tensor([[0, 1], [2, 2]], device=input.device)
    stats, expected_stats = (row_stats(f, target, backend=backend) for f in (rows_apart, rows_apart.contiguous()))
    assert all(same_bits(a, b) for a, b in zip(stats, expected_stats, strict=True))


# the loss and its gradient


def outcome(problem: Problem, factor: float = 1.0, **options: Any) -> tuple[Tensor, Tensor]:
    return loss_and_gradient(problem.input, problem.target, backend=problem.backend, factor=factor, **options)


EVERY_OPTION = combined(
    dtype=DTYPES,
    shape=[(40, 17), (6, 1500), (2, 19, 5, 4), (1, 1100, 7)],
    divergence=DIVERGENCES,
    terms=[(0.3, 0.0, 1.0), (0.0, 1.0, 1.0), (9.0, -3.0, 0.7)],  # lam, hard_bias, and the factor of the loss
    smoothing=[0.0, 0.1, 1.0],
    weighted=[False, True],
    reduction=["none", "sum", "mean"],
)


@pytest.mark.parametrize("shape", [(5, 1), (40, 17), (9, 1000), (3, 19, 9, 8), (3, 700, 2)], ids=str)
@every("dtype", ALL_DTYPES)
def test_predictions_are_the_first_of_the_largest_logits(shape, dtype, rng):
    kernels = ladder.load("cpu")
    skip_unless_available("cpu", dtype)
    input = logits(shape, rng, dtype, scale=3.0).round()  # many are equal
    input[1, :1], input[2, :1] = -INF, INF
    rows = input.movedim(1, -1)
    target = torch.randint(shape[1], rows.shape[:-1], generator=rng)
    target[0], target[1] = -100, 0  # ignored; masked
    stats, log_odds, ahead = kernels.predictions(rows, target, -100)  # type: ignore[union-attr]
    assert (ahead[0] == -1).all() and (log_odds[0] == 0).all()
    of_prediction = row_stats(input, rows.argmax(-1), backend="cpu").log_odds
    for got, same in zip((*stats, log_odds[1:]), (*row_stats(input, target, backend="cpu"), of_prediction[1:]), strict=True):
        assert_within(got, same, 8 + same.abs().nan_to_num(), 2)
    order = rows.double().sort(dim=-1, descending=True, stable=True).indices
    place = (order == target.unsqueeze(-1)).float().argmax(-1)
    masked = rows.gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1) == -INF
    assert torch.equal(ahead[1:], place.masked_fill(masked, torch.iinfo(torch.int64).max)[1:])
    for label in (-2, -1, shape[1]):
        with pytest.raises(IndexError, match=f"holds {label} .* labels are out of range"):
            kernels.predictions(rows, torch.full_like(target, label), -100)  # type: ignore[union-attr]


@every("dtype, shape, divergence, terms, smoothing, weighted, reduction", EVERY_OPTION)
def test_every_option_of_the_loss(dtype, backend, shape, divergence, terms, smoothing, weighted, reduction, rng):
    problem = Problem(logits(shape, rng, dtype), rng, backend)
    weight = torch.rand(shape[1], generator=rng).to(problem.input.device) if weighted else None
    exact = problem.with_(input=problem.input.double(), backend="reference")
    reference = problem.with_(backend="reference")
    lam, hard_bias, factor = terms
    options = {"lam": lam, "hard_bias": hard_bias, "label_smoothing": smoothing, "divergence": divergence, "reduction": reduction}
    loss, gradient = outcome(problem, factor, weight=weight, **options)
    theirs, their_gradient = outcome(reference, factor, weight=weight, **options)
    truth, gradient_truth = outcome(exact, factor, weight=weight, **options)
    assert loss.dtype == torch.float32
    scale = 8 * (1 + lam) + truth.abs()
    assert_within(loss, truth, scale, max(2.0, float(roundings(theirs, truth, scale, torch.float32).max())))
    size = 4 * gradient_truth.abs().max().expand(gradient.shape) + 1e-3  # q_c = e^z / S has a relative error of |z| roundings
    assert_rounded(gradient, gradient_truth, size, 2, backend)
    assert_rounded(their_gradient, gradient_truth, size, 2)


def long_rows(fixtures: dict[str, Any]) -> list[tuple[Any, ...]]:
    shapes = [(2, 17000), (1, 100, 3)] if is_interpreted(fixtures["kernel"]) else [(2, 20000), (1, 2000, 3)]
    changes = [{}, {"label_smoothing": 0.1, "hard_bias": 1.0, "divergence": "kl_qu"}]
    return combined(shape=shapes, changes=changes, dtype=DTYPES)(fixtures)


@every("shape, changes, dtype", long_rows)
def test_rows_longer_than_a_tile(kernel, shape, changes, dtype, rng):
    problem = Problem(logits(shape, rng, dtype, scale=1.0), rng, kernel)
    exact = problem.with_(input=problem.input.double(), backend="reference")
    (loss, gradient), (truth, gradient_truth) = (outcome(each, reduction="sum", **changes) for each in (problem, exact))
    assert_within(loss, truth, truth, 2)
    assert_rounded(gradient, gradient_truth, gradient_truth.abs().max().expand(gradient.shape), 2, kernel)


@every("value", [float("nan"), INF, -INF, 3e38])
def test_ignored_rows_leak_nothing(backend, value, rng):
    problem = Problem(logits((6, 20), rng), rng, backend)
    problem.input[1] = value
    for reduction in ("none", "sum", "mean"):
        for factor in (1.0, 0.3, float("inf")):
            loss, gradient = outcome(problem, factor, reduction=reduction, label_smoothing=0.1)
            assert loss.isfinite().all() and (gradient[1] == 0).all()


@every("shape", [(4, 6), (2, 6, 3)])
@every("where", ["target", "other"])
@every("value", [float("nan"), INF])
def test_nan_and_infinity_in_a_kept_row_give_nan(backend, value, where, shape, rng):
    problem = Problem(logits(shape, rng, scale=1.0), rng, backend)
    first = problem.target[0] if len(shape) == 2 else problem.target[0, 0]
    row = problem.input[0] if len(shape) == 2 else problem.input[0, :, 0]
    row[first if where == "target" else (first + 1) % 6] = value
    for lam in (0.0, 0.3):
        for reduction in ("none", "mean"):
            loss, gradient = outcome(problem, reduction=reduction, lam=lam)
            assert loss.flatten()[0].isnan()
            assert gradient.isnan().any()


HARDLY_ANY = combined(
    row=[[1.0], [1.0, -INF], [-INF, 2.0], [-INF, -INF], [5.0, 5.0], [0.0, -1e38, 1e38], [1.0, -INF, -INF], [-3e38, -INF]],
    divergence=DIVERGENCES,
    smoothing=[0.0, 0.1, 1.0],
)


@every("row, divergence, smoothing", HARDLY_ANY)
def test_rows_with_hardly_any_class(backend, row, divergence, smoothing):
    input = torch.tensor([row] * len(row), device=device_of(backend))  # once for each target
    target = torch.arange(len(row), device=input.device)
    found = []
    for name, cast in ((backend, torch.float32), ("reference", torch.float64)):
        leaf = input.to(cast, copy=True).requires_grad_()
        losses = large_margin_cross_entropy(leaf, target, label_smoothing=smoothing, divergence=divergence, reduction="none", backend=name)
        found.append((losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0]))
    (got, gradient), (expected, true_gradient) = found
    assert_within(got, expected, 1 + expected.abs().nan_to_num(posinf=1.0), 2)
    if max(row) == -INF:  # a row without any class has no gradient to speak of
        assert gradient.diagonal().isnan().all()
    else:
        assert_within(gradient, true_gradient, 1.0, 2)


@every("lead", LEADS)
def test_the_loss_of_a_confident_row_keeps_its_digits(backend, lead):
    others = torch.linspace(-2, 1, 30)
    input = torch.cat([others.logsumexp(0, keepdim=True) + lead, others])[None].to(device_of(backend)).requires_grad_()
    loss = large_margin_cross_entropy(input, torch.tensor([0], device=input.device), lam=0.0, backend=backend)
    (gradient,) = torch.autograd.grad(loss, input)
    exact = input.detach().double()
    x = exact[0, 1:].logsumexp(0) - exact[0, 0]
    assert_within(loss, torch.nn.functional.softplus(x, threshold=200), loss.detach().double() * lead, 2)
    assert_within(gradient[0, 0], -x.sigmoid(), x.sigmoid() * lead, 2)


@every("offset", [0.0, 1e2, 1e4, 1e5])
def test_a_common_offset_costs_no_digits(backend, offset, rng):
    problem = Problem(torch.randint(-64, 64, (5, 40), generator=rng) / 16 + offset, rng, backend)  # held exactly at every offset
    level = problem.with_(input=problem.input - offset)
    assert all(same_bits(a, b) for a, b in zip(outcome(problem), outcome(level), strict=True))


def test_a_million_rows_of_two_classes_and_two_rows_of_a_million(rng):
    skip_unless_available("cpu")
    for shape in ((1_000_000, 2), (2, 1_000_000)):
        compare_statistics(Problem(logits(shape, rng, scale=1.0), rng, "cpu"), rng)


def shapes_with_several_tiles(fixtures: dict[str, Any]) -> list[tuple[int, ...]]:
    """Rows in one tile and in several, apart and side by side; the tiles of Triton's interpreter are the smallest of all kernels'."""
    longer = [(2, 100, 2), (1, 17000)] if is_interpreted(fixtures["backend"]) else [(2, 3000, 2), (1, 40000)]
    return [(6, 5), (3, 5, 2), (2, 3000), *longer]


@every("shape", shapes_with_several_tiles)
def test_the_first_of_equal_maxima_takes_the_gradient_of_rho(backend, shape, rng):
    num_classes = shape[1]
    input = torch.zeros(shape)
    places = sorted({0, 1, num_classes // 2, num_classes - 1})
    input[:, places] = 2.0  # the maximum, several times, in one block and in several
    problem = Problem(input, rng, backend)
    problem.target[...] = 0
    for first in places[1:]:
        leaf = problem.leaf()
        stats = row_stats(leaf, problem.target, backend=backend)
        (gradient,) = torch.autograd.grad((stats.log_odds + stats.rho).sum(), leaf)  # f_y - f_c*: nothing but these two
        expected = torch.zeros_like(problem.input)
        expected[:, 0], expected[:, first] = 1.0, -1.0
        assert_within(gradient, expected.double(), 1.0, 2)
        problem.input[:, first] = 0.0


def test_kl_qu_is_finite_beside_a_mask_of_the_lowest_number(backend):
    input = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    input[:, 4:] = torch.finfo(torch.float32).min
    target = torch.arange(4)
    truth = large_margin_cross_entropy(input.double(), target, divergence="kl_qu", backend="reference")
    got = large_margin_cross_entropy(input.to(device_of(backend)), target.to(device_of(backend)), divergence="kl_qu", backend=backend)
    assert_within(got, truth, 8.0, 2)


@every("default", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_of_torch_changes_nothing(backend, default, rng):
    problem = Problem(logits((6, 7), rng, scale=1.0), rng, backend)

    def results() -> list[Tensor]:
        leaf = problem.leaf()
        stats = row_stats(leaf, problem.target, backend=backend)
        hinge = hard_margin_softplus(leaf, problem.target)
        gradient = torch.autograd.grad(stats.log_odds.sum() + hinge, leaf)
        return [*stats, hinge.detach(), *gradient, *outcome(problem), *outcome(problem, reduction="none")]

    expected = results()
    torch.set_default_dtype(default)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(same_bits(a.detach(), b.detach()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("hinge", [crammer_singer_hinge, hard_margin_softplus])
def test_hinges_use_the_kernels_and_agree(hinge, kernel_device, rng):
    input, target = torch.randn(50, 12, generator=rng).mul_(2).round_(), torch.randint(12, (50,), generator=rng)  # with ties
    input, target = input.to(kernel_device), target.to(kernel_device)
    leaf, exact = input.clone().requires_grad_(), input.double().requires_grad_()
    got, truth = (torch.autograd.grad(hinge(f, target, reduction="sum"), f)[0] for f in (leaf, exact))
    assert_within(got, truth, 4.0, 2)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("soft", [True, False], ids=["hard margin", "hinge"])
@pytest.mark.parametrize("shape", [(6, 1), (40, 17), (9, 1000), (6, 19, 5, 4), (6, 700, 2)], ids=str)
@every("dtype", ALL_DTYPES)
def test_the_kernel_of_hinges_agrees(shape, soft, reduction, dtype, rng):
    skip_unless_available("cpu", dtype)
    input, weight = logits(shape, rng, dtype), torch.rand(shape[1], generator=rng)
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=rng)
    target[0], target[1] = -100, 0
    input[1, :1], input[2, :1], input[3, -1:], input[4] = -INF, INF, float("nan"), -INF
    upstream = torch.rand(target.shape if reduction == "none" else (), generator=rng)
    for rows in (slice(None), slice(5, None)) if reduction == "none" else (slice(5, None),):
        found = []
        for backend, cast in ((None, dtype), ("reference", torch.float64)):
            leaf = input[rows].to(cast).requires_grad_()
            loss = whole.loss(leaf, target[rows], weight, HingeOptions(1.0, soft, reduction=reduction, backend=backend))
            found.append((loss.detach(), *torch.autograd.grad(loss, leaf, upstream.to(loss.dtype)[rows] if loss.dim() else upstream)))
        (got, gradient), (truth, true_gradient) = found
        assert_within(got, truth, 8 + truth.abs().nan_to_num(), 2)
        known = ~truth.isnan().expand(target[rows].shape)  # a row with NaN has no gradient
        assert_rounded(gradient.movedim(1, -1)[known], true_gradient.movedim(1, -1)[known], torch.tensor(1.0), 4)


# upstream gradients, second passes, inputs


@every("dtype", DTYPES)
def test_every_pass_is_the_gradient_of_its_own_upstream(kernel, dtype, rng):
    problem = Problem(logits((20, 33), rng, dtype, scale=1.0), rng, kernel)
    _, unit = outcome(problem)
    for reduction in ("mean", "none"):
        leaf = problem.leaf()
        loss = large_margin_cross_entropy(leaf, problem.target, backend=kernel, reduction=reduction)
        total = loss if reduction == "mean" else loss.sum() / (problem.target >= 0).sum()
        held = []
        for factor in (1.0, 3.0, 2.0, 65536.0, 0.0, -0.1):
            (gradient,) = torch.autograd.grad(total * factor, leaf, retain_graph=True)
            held.append((factor, gradient))
        for factor, gradient in held:  # none was changed by a later pass
            assert_within(gradient, unit.double() * factor, abs(factor) * unit.abs().double().max() + 1e-30, 2, dtype)


@every("dtype", DTYPES)
@every("shape", [(20, 33), (20, 100), (6, 1000), (4, 5, 3), (3, 1)])
def test_every_pass_through_the_statistics_has_the_same_gradient(kernel, shape, dtype, rng):
    input = logits(shape, rng, dtype)
    input[0, 0] = -torch.inf
    problem = Problem(input, rng, kernel)
    leaf = problem.leaf()
    upstream = [torch.randn(problem.target.shape, generator=rng).to(leaf.device) for _ in range(5)]
    stats = row_stats(leaf, problem.target, backend=kernel)
    first = torch.autograd.grad(stats[:5], leaf, upstream, retain_graph=True)[0]
    held = first.clone()
    (second,) = torch.autograd.grad(stats[:5], leaf, upstream)
    assert same_bits(first, held) and same_bits(second, first)


@every("donate", [False, True])
@every("soft", [False, True])
def test_a_scaled_loss_keeps_the_small_gradients_of_float16(kernel, soft, donate, rng):
    skip_unless_available(kernel, torch.float16)
    leaf = (5 * torch.randn(20, 33, generator=rng)).to(device_of(kernel), torch.float16).requires_grad_()
    target = torch.randint(33, (20,), generator=rng).to(leaf.device)
    if soft:
        target = F.one_hot(target, 33).half()
    exact = leaf.detach().double().requires_grad_()
    loss = large_margin_cross_entropy(leaf * 1, target, lam=0, donate=donate, backend=kernel)
    (got,) = torch.autograd.grad(65536 * loss, leaf)
    (expected,) = torch.autograd.grad(65536 * F.cross_entropy(exact, target.double() if soft else target), exact)
    info = torch.finfo(torch.float16)
    assert (expected.abs() < 65536 * info.smallest_normal).sum() > 100  # too small for float16 before the scaling
    assert ((got - expected).abs() <= info.eps * expected.abs() + info.smallest_normal * info.eps).all()


def test_an_expanded_upstream_gradient(kernel, rng):
    problem = Problem(logits((6, 9), rng), rng, kernel)
    leaf = problem.leaf()
    losses = large_margin_cross_entropy(leaf, problem.target, backend=kernel, reduction="none")
    upstream = torch.tensor(2.0, device=leaf.device).expand(6)
    (got,) = torch.autograd.grad(losses, leaf, upstream, retain_graph=True)
    (expected,) = torch.autograd.grad(losses, leaf, upstream.clone())
    assert same_bits(got, expected)


@every("reduction", ["none", "sum", "mean"])
def test_inputs_are_left_as_they_were(backend, reduction, rng):
    problem = Problem(logits((20, 33), rng), rng, backend)
    weight = torch.rand(33, generator=rng).to(problem.input.device)
    before = [(t, t.clone(), t._version) for t in (problem.input, problem.target, weight)]
    outcome(problem, 0.5, weight=weight, reduction=reduction, label_smoothing=0.1)
    for tensor, clone, version in before:
        assert torch.equal(tensor, clone) and tensor._version == version


def test_labels_out_of_range(backend, rng):
    input = torch.randn(4, 5, generator=rng).to(device_of(backend)).requires_grad_()
    target = torch.tensor([0, 1, 5, -3], device=input.device)
    if input.device.type == "cpu":
        for reduction in ("none", "mean"):
            with pytest.raises(IndexError, match=r"holds 5 \(2 of 4 labels are out of range\)"):
                large_margin_cross_entropy(input, target, backend=backend, reduction=reduction)
        with pytest.raises(IndexError, match="holds 5"):
            row_stats(input, target, backend=backend)
    else:
        assert large_margin_cross_entropy(input, target, backend=backend, reduction="none").isnan().tolist() == [False, False, True, True]


def test_no_label_is_in_range_without_classes(backend):
    skip_unless_available(backend)
    if device_of(backend).type != "cpu":
        pytest.skip("a GPU's labels are not read")
    input, target = torch.zeros(2, 0), torch.tensor([-100, 0])
    with pytest.raises(IndexError, match=r"\[0, 0\) .* holds 0 \(1 of 2 "):
        row_stats(input, target, backend=backend)
    with pytest.raises(IndexError, match=r"\[0, 0\) .* holds 0 \(1 of 2 "):
        MarginMetrics().update(input, target)
    assert not any(field.any() for field in row_stats(input, torch.full_like(target, -100), backend=backend))


@pytest.mark.parametrize("label", [-1, -2])
def test_no_label_of_a_user_is_taken_for_one_of_the_librarys_own(label, backend):
    skip_unless_available(backend)
    input = torch.zeros(2, 3, device=device_of(backend))
    if input.device.type == "cpu":
        with pytest.raises(IndexError, match=f"holds {label} "):
            row_stats(input, torch.tensor([0, label]), backend=backend)
    else:
        assert row_stats(input, torch.tensor([0, label], device=input.device), backend=backend).rho.isnan().tolist() == [False, True]


@pytest.mark.parametrize("ignore_index", [-1, -2, -100, 255, 4])
def test_statistics_leave_out_the_ignored_label_whatever_its_number(ignore_index, backend, rng):
    problem = Problem(logits((6, 7), rng, scale=1.0), rng, backend)
    target = problem.target.clamp(0, 3)
    kept, ignored = problem.leaf(), problem.leaf()
    expected = row_stats(kept, target, backend=backend)
    marked = torch.cat([target[:4], torch.full_like(target[4:], ignore_index)])
    stats = row_stats(ignored, marked, ignore_index=ignore_index, backend=backend)
    for got, field in zip(stats, expected, strict=True):
        assert same_bits(got, torch.cat([field[:4], torch.zeros_like(field[4:])]))
    first = torch.autograd.grad(expected.spread[:4].square().sum() + expected.log_odds[:4].sum(), kept)[0]
    gradient, of_penalty = gradient_and_that_of_its_square(stats.spread.square().sum() + stats.log_odds.sum(), ignored)
    assert same_bits(gradient, first)
    assert of_penalty[:4].any() and not of_penalty[4:].any()


def test_each_backend_leaves_out_the_rows_of_ignore_index(backend, rng):
    problem = Problem(logits((6, 7), rng, scale=1.0), rng, backend)
    kernels: Any = ladder.load(backend)
    ignored = problem.target.clamp(0, 5).index_fill(0, torch.tensor([1, 4], device=problem.target.device), IGNORED)
    problem.input[1] = float("nan")
    results = []
    for index in (IGNORED, 255, 6):
        target = ignored.where(ignored != IGNORED, index)
        stats, softmax = kernels.row_stats(problem.input, target, index)
        upstream = Cotangents(torch.linspace(1, 2, 6, device=target.device).masked_fill(ignored == IGNORED, INF))
        gradient = kernels.row_stats_backward(problem.input, target, softmax, upstream, ignore_index=index)
        results.append((*stats, gradient))
        assert gradient.any(-1).equal(ignored != IGNORED)
    assert all(same_bits(first, other) for first, *others in zip(*results, strict=True) for other in others)


def gradient_and_that_of_its_square(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (graph,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return first, torch.autograd.grad(graph.square().sum(), leaf)[0]


# what kernels cannot do, the reference does for them


def test_higher_derivatives_take_the_reference(kernel, rng):
    problem = Problem(logits((6, 7), rng, scale=1.0), rng, kernel)
    v = torch.randn(6, 7, generator=rng).to(problem.input.device)
    for reduction in ("none", "mean"):
        products = []
        for name in (kernel, "reference"):
            leaf = problem.leaf()
            loss = large_margin_cross_entropy(leaf, problem.target, backend=name, reduction=reduction, label_smoothing=0.1).sum()
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            (product,) = torch.autograd.grad(gradient, leaf, v)
            products.append((gradient.detach(), product))
        for got, expected in zip(*products, strict=True):
            assert expected.abs().max() > 0
            assert_within(got, expected.double(), 1.0, 4)
    stats = row_stats(leaf, problem.target, backend=kernel)
    (gradient,) = torch.autograd.grad((stats.log_odds + stats.spread).sum(), leaf, create_graph=True)
    assert torch.autograd.grad(gradient, leaf, v)[0].abs().max() > 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_hooks_on_the_logits_run_once(backend, reduction, rng):
    problem = Problem(logits((6, 7), rng, scale=1.0), rng, backend)
    for create_graph in (False, True):
        leaf = problem.leaf()
        input = leaf * 1
        input.register_hook(lambda gradient: gradient * 10)
        input.retain_grad()
        loss = large_margin_cross_entropy(input, problem.target, backend=backend, reduction=reduction).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=create_graph)
        _, expected = outcome(problem, reduction=reduction)
        assert_within(gradient, 10 * expected.double(), 10.0, 2)
        assert gradient.requires_grad == create_graph


def where_floating(convert: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    return convert(tensor) if tensor.is_floating_point() else tensor


def test_saved_tensors_may_come_back_changed(kernel, rng):
    problem = Problem(logits((6, 7), rng, scale=1.0), rng, kernel)
    for convert in (torch.Tensor.double, torch.Tensor.bfloat16, lambda t: t.t().clone().t() if t.dim() == 2 else t):
        leaf = problem.leaf()
        with torch.autograd.graph.saved_tensors_hooks(partial(where_floating, convert), lambda t: t):
            stats = row_stats(leaf, problem.target, backend=kernel)
            loss = large_margin_cross_entropy(leaf, problem.target, backend=kernel)
        (gradient,) = torch.autograd.grad(loss + stats.log_odds.sum(), leaf)
        with_reference = row_stats(leaf, problem.target, backend="reference").log_odds.sum() + large_margin_cross_entropy(
            leaf, problem.target
        )
        (expected,) = torch.autograd.grad(with_reference, leaf)
        assert_within(gradient, expected.double(), 2.0, 2, torch.bfloat16)


def test_the_logits_alone_may_come_back_changed(rng):
    skip_unless_available("cpu")
    problem = Problem(logits((20, 33), rng, scale=1.0), rng, "cpu")
    leaf = problem.leaf()
    stats = row_stats(leaf, problem.target, backend="cpu")
    node: Any = stats.log_odds.grad_fn
    node._raw_saved_tensors[0].register_hooks(torch.Tensor.bfloat16, lambda t: t)
    (gradient,) = torch.autograd.grad(stats.log_odds.sum(), leaf)
    (expected,) = torch.autograd.grad(row_stats(leaf, problem.target, backend="reference").log_odds.sum(), leaf)
    assert_within(gradient, expected.double(), 2.0, 2, torch.bfloat16)


@every("loss", [large_margin_cross_entropy, focal_cross_entropy])  # by the kernel of the loss, and by the statistics
def test_checkpointing_keeps_nothing_of_the_size_of_the_logits(loss, rng):
    skip_unless_available("cpu")
    features, layer = torch.randn(64, 8, generator=rng), torch.nn.Linear(8, 5000)
    target = torch.randint(5000, (64,), generator=rng)

    def criterion(x: Tensor) -> Tensor:
        return loss(layer(x), target)

    with torch.profiler.profile(profile_memory=True) as profiler:
        found = torch.utils.checkpoint.checkpoint(criterion, features, use_reentrant=False)
    held = sum(event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    assert held < 64 * 5000 * 4 / 2
    (gradient,) = torch.autograd.grad(found, layer.weight)
    assert same_bits(gradient, torch.autograd.grad(criterion(features), layer.weight)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_computes(device, rng):
    input, target = torch.randn(4, 5, generator=rng).to(device), torch.tensor([0, 1, 2, 3], device=device)
    traced = torch.jit.trace(lambda f: large_margin_cross_entropy(f, target), (input,))
    other = torch.randn(4, 5, generator=rng).to(device)
    assert_within(traced(other), large_margin_cross_entropy(other, target).double(), 8.0, 2)


def test_functorch_and_forward_mode_take_the_reference(kernel_device, rng):
    input, target = torch.randn(4, 5, generator=rng).to(kernel_device), torch.tensor([0, -100, 2, 4], device=kernel_device)

    def losses(f: Tensor, backend: str | None = None) -> Tensor:
        return large_margin_cross_entropy(f, target, reduction="none", backend=backend)

    def reference(f: Tensor) -> Tensor:
        return losses(f, "reference")

    for transform in (torch.func.jacrev, torch.func.jacfwd, lambda f: torch.func.hessian(lambda x: f(x).sum())):
        assert same_bits(transform(losses)(input), transform(reference)(input))  # never silent zeros
        assert transform(losses)(input).abs().max() > 0
    batch = torch.randn(3, 4, 5, generator=rng).to(kernel_device)
    assert same_bits(torch.vmap(losses)(batch), torch.vmap(reference)(batch))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, torch.ones_like(input))
        assert torch.autograd.forward_ad.unpack_dual(losses(dual)).tangent is not None
    leaf = input.clone().requires_grad_()
    for compute in (
        lambda: losses(leaf).sum(),
        lambda: large_margin_cross_entropy(leaf, target),
        lambda: row_stats(leaf, target).log_odds.sum(),
    ):
        value = compute()  # a graph from before the level; its upstream gradient carries the tangent
        with torch.autograd.forward_ad.dual_level():
            one, two = torch.tensor([1.0, 2.0], device=kernel_device)
            upstream = torch.autograd.forward_ad.make_dual(one, two)
            (gradient,) = torch.autograd.grad(value, leaf, upstream)
            primal, tangent = torch.autograd.forward_ad.unpack_dual(gradient)
            assert tangent is not None
            assert_within(tangent, 2 * primal.double(), 4.0, 2)
    (batched,) = torch.autograd.grad(losses(leaf), leaf, torch.eye(4, device=kernel_device), is_grads_batched=True)
    assert_within(batched, torch.func.jacrev(losses)(input).double(), 1.0, 2)
    upstreams = torch.tensor([1.0, 2.0], device=kernel_device)
    (batched,) = torch.autograd.grad(losses(leaf).sum(), leaf, upstreams, is_grads_batched=True)
    assert_within(batched[1], 2 * torch.func.grad(lambda f: losses(f).sum())(input).double(), 1.0, 2)


def test_forcing_a_backend_warns_once_where_the_reference_steps_in(rng):
    skip_unless_available("triton")
    ladder.warn_once.cache_clear()
    target = torch.tensor([0, 1, 2, 3], device=device_of("triton"))
    input = torch.randn(4, 5, generator=rng, dtype=torch.float64).to(target.device)
    with pytest.warns(UserWarning, match="backend='triton' does not compute float64 logits"):
        loss = large_margin_cross_entropy(input, target, backend="triton")
    assert same_bits(loss, large_margin_cross_entropy(input, target, backend="reference"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        large_margin_cross_entropy(input, target, backend="triton")
        large_margin_cross_entropy(input, target)  # nobody asked for the kernel
        large_margin_cross_entropy(input.float(), input.softmax(1), backend="triton")  # class probabilities: the kernel has them
    weight = torch.ones(5, device=target.device, requires_grad=True)
    with pytest.warns(UserWarning, match="backend='triton' does not compute these class probabilities"):
        large_margin_cross_entropy(input.float(), input.softmax(1), weight, backend="triton")
    ladder.warn_once.cache_clear()


@pytest.mark.parametrize("way", ["eager", pytest.param("compiled", marks=compiles)])
def test_a_backend_that_cannot_be_had_is_an_error(way, monkeypatch, rng):
    input, target = torch.randn(4, 5, generator=rng), torch.tensor([0, 1, 2, 3])

    def loss(input: Tensor, target: Tensor, backend: Any = None) -> Tensor:
        torch._dynamo.reset()
        function = large_margin_cross_entropy if way == "eager" else torch.compile(large_margin_cross_entropy, backend="eager")
        return function(input, target, backend=backend)

    with pytest.raises(ValueError, match="backend='cpu' does not compute on meta"):
        loss(input.to("meta"), target.to("meta"), backend="cpu")
    monkeypatch.setattr(ladder, "load", lambda name: "it was not compiled")
    with pytest.raises(ValueError, match="backend='triton' does not compute on cpu"):
        loss(input, target, backend="triton")
    with pytest.raises(RuntimeError, match="backend='cpu' cannot be used: it was not compiled"):
        loss(input, target, backend="cpu")
    assert same_bits(loss(input, target), large_margin_cross_entropy(input, target, backend="reference"))


@compiles
def test_compiled_code_asks_no_kernel_of_another_device(monkeypatch, rng):
    torch._dynamo.reset()
    interpreted = SimpleNamespace(INTERPRETED=True, DTYPES=(torch.float32,))
    monkeypatch.setattr(ladder, "load", lambda name: interpreted if name == "triton" else "it was not compiled")
    input, target = torch.randn(4, 5, generator=rng), torch.tensor([0, 1, 2, 3])
    loss = torch.compile(large_margin_cross_entropy, backend="eager", fullgraph=True)(input, target, backend="triton")
    assert same_bits(loss, large_margin_cross_entropy(input, target, backend="reference"))


@every("dtype", ALL_DTYPES)
def test_the_kernel_runs_unless_told_otherwise(dtype, rng):
    skip_unless_available("cpu")
    input, target = torch.randn(4, 5, generator=rng).to(dtype).requires_grad_(), torch.tensor([0, 1, 2, 3])
    for loss in (large_margin_cross_entropy, crammer_singer_hinge, hard_margin_softplus):
        assert "LargeMarginCrossEntropy" in type(loss(input, target).grad_fn).__name__
    assert "RowStatsByKernels" in type(row_stats(input, target).log_odds.grad_fn).__name__
    loss = large_margin_cross_entropy(input, target, backend="reference")  # type: ignore[assignment]
    assert "LargeMarginCrossEntropy" not in type(loss.grad_fn).__name__  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_triton_has_the_whole_loss_under_the_same_conditions(kind, rng):
    skip_unless_available("triton")
    input = torch.randn(4, 5, generator=rng).to(device_of("triton")).requires_grad_()
    target = torch.arange(4, device=input.device) if kind == "indices" else torch.rand(4, 5, generator=rng).to(input.device)
    weight = torch.ones(5, device=input.device)

    def operation(input: Tensor, weight: Tensor) -> str:
        return type(large_margin_cross_entropy(input, target, weight, backend="triton").grad_fn).__name__

    assert "InTwoPasses" in operation(input, weight) and "InTwoPasses" in operation(input.half(), weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "InTwoPasses" not in operation(input, weight.clone().requires_grad_())
        assert "InTwoPasses" not in operation(input.double(), weight)


# compiled code


@compiles
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiled_code_calls_the_kernels_without_a_graph_break(reduction, kernel_device, rng):
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    input = torch.randn(6, 9, generator=rng).to(kernel_device).requires_grad_()
    target = torch.tensor([0, 1, -100, 3, 4, 5], device=kernel_device)
    criterion = LargeMarginCrossEntropyLoss(reduction=reduction, label_smoothing=0.1)
    assert torch.compile(criterion, backend=keep, fullgraph=True)(input, target).shape == criterion(input, target).shape
    assert any("largemargin.row_stats" in str(node.target) for node in graphs[0].graph.nodes)
    got = torch.compile(criterion, backend="aot_eager", fullgraph=True, dynamic=True)(input, target)
    assert_within(got, criterion(input, target).double(), 8.0, 2)
    (gradient,) = torch.autograd.grad(got.sum(), input)
    assert_within(gradient, torch.autograd.grad(criterion(input, target).sum(), input)[0].double(), 1.0, 2)


@compiles
def test_forward_mode_over_compiled_code_takes_the_reference(kernel_device, rng):
    torch._dynamo.reset()
    input, target = torch.randn(4, 5, generator=rng).to(kernel_device), torch.tensor([0, 1, -100, 3], device=kernel_device)
    compiled = torch.compile(lambda f: large_margin_cross_entropy(f, target), backend="aot_eager")
    compiled(input)  # once without, so that the guard is tested
    tangents = []
    for function in (compiled, lambda f: large_margin_cross_entropy(f, target, backend="reference")):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(input, torch.arange(20.0, device=kernel_device).view(4, 5))
            tangents.append(torch.autograd.forward_ad.unpack_dual(function(dual)).tangent)
    assert tangents[0] is not None
    assert_within(tangents[0], tangents[1].double(), 20.0, 2)


@compiles
def test_functorch_inside_compiled_code_takes_the_reference(kernel_device, rng):
    torch._dynamo.reset()
    input, target = torch.randn(4, 5, generator=rng).to(kernel_device), torch.tensor([0, 1, -100, 3], device=kernel_device)

    def gradient(f: Tensor) -> Tensor:
        return torch.func.grad(lambda x: large_margin_cross_entropy(x, target))(f)

    assert_within(torch.compile(gradient, backend="aot_eager", fullgraph=True)(input), gradient(input).double(), 1.0, 2)


def test_the_operators_are_well_formed(kernel, rng):
    from largemargin.backends import registered

    problem = Problem(logits((5, 7), rng), rng, kernel)
    if kernel == "triton" and not HAS_KERNELS:
        pytest.skip("on the CPU the operator is the CPU kernel")
    index = torch.where(problem.target < 0, -1, problem.target)
    torch.library.opcheck(
        registered.row_stats, (problem.leaf(), index), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


# donated logits: the gradient in the place of the logits


DONATED = combined(dtype=DTYPES, shape=[(20, 33), (3, 7, 5), (3, 600, 5)], reduction=["none", "sum", "mean"])


@every("dtype, shape, reduction", DONATED)
def test_donated_logits_give_the_same_loss_and_gradient(kernel, dtype, shape, reduction, rng):
    features = logits(shape, rng, dtype, scale=1.0).to(device_of(kernel)).requires_grad_()
    target = torch.randint(shape[1], (shape[0], *shape[2:]), generator=rng).to(features.device)
    results = []
    for donate in (False, True):
        input = features * 1
        loss = large_margin_cross_entropy(input, target, reduction=reduction, donate=donate, backend=kernel)
        (gradient,) = torch.autograd.grad(loss.sum() * 0.5, features)
        waits = reduction == "none" or (kernel == "cpu" and dtype == torch.float16)  # for the scale of the loss
        assert (input._version > 0) == (donate and not waits)
        results.append((loss.detach(), gradient))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def donated(rng: torch.Generator, kernel: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    skip_unless_available(kernel)
    features = torch.randn(6, 9, generator=rng).to(device_of(kernel)).requires_grad_()
    target = torch.arange(6, device=features.device)
    target[2] = -100
    return features, features * 1, target


def test_donated_logits_raise_for_whoever_still_needs_them(kernel, rng):
    _, input, target = donated(rng, kernel)
    other = input.square().sum()  # saves the logits for its backward pass
    loss = large_margin_cross_entropy(input, target, donate=True, backend=kernel)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


def test_donated_logits_have_one_backward_pass(rng):
    features, input, target = donated(rng)
    loss = large_margin_cross_entropy(input, target, donate=True)
    with pytest.raises(RuntimeError, match="donate=True has one backward pass and no higher derivatives"):
        torch.autograd.grad(loss, features, create_graph=True)
    (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)  # which the refusal did not cost
    assert same_bits(gradient, torch.autograd.grad(large_margin_cross_entropy(features, target), features)[0])
    with pytest.raises(RuntimeError, match="donate=True has one backward pass and no higher derivatives"):
        loss.backward()


def test_logits_that_the_backward_pass_overwrites_have_one(rng):
    features, input, target = donated(rng, "triton")
    loss = large_margin_cross_entropy(input, target, donate=True, backend="triton")
    (differentiable,) = torch.autograd.grad(loss, features, create_graph=True)  # by the reference, which leaves them
    (gradient,) = torch.autograd.grad(loss, features, retain_graph=True)
    assert_within(gradient, differentiable.detach().double(), 1.0, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    input = features * 1
    losses = [large_margin_cross_entropy(input, target, donate=True, backend="triton") for _ in range(2)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (losses[0] + losses[1]).backward()


def test_donated_logits_that_change_before_the_backward_pass_are_noticed(kernel, rng):
    _, input, target = donated(rng, kernel)
    loss = large_margin_cross_entropy(input, target, donate=True, backend=kernel)
    with torch.no_grad():
        input.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_are_donated_once(rng):
    _, input, target = donated(rng)
    large_margin_cross_entropy(input, target, donate=True)
    with pytest.raises(ValueError, match="input was donated to another loss already"):
        large_margin_cross_entropy(input, target, donate=True)


@every("view", [lambda f: f, lambda f: f[:], lambda f: f.view(6, 9), lambda f: f.t().t(), lambda f: f.narrow(0, 0, 6)])
def test_a_leaf_cannot_be_donated(view, rng):
    features, _, target = donated(rng)
    before = features.detach().clone()
    with pytest.raises(ValueError, match="donate=True overwrites input, but input is a"):
        large_margin_cross_entropy(view(features), target, donate=True)
    with torch.no_grad():  # no gradient, nothing to overwrite
        large_margin_cross_entropy(view(features), target, donate=True)
    assert torch.equal(features.detach(), before)


@compiles
def test_compiled_code_keeps_donated_logits(rng):
    features, input, target = donated(rng, "cpu")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_and_logits(features):
        logits = features * 1
        return large_margin_cross_entropy(logits, target, donate=True), logits

    loss, logits = loss_and_logits(features)
    expected = large_margin_cross_entropy(input, target)
    gradient, expected_gradient = (torch.autograd.grad(value, features)[0] for value in (loss, expected))
    assert_within(loss.detach(), expected.detach(), 16, 2)
    assert_within(gradient, expected_gradient, 1, 4)
    assert same_bits(logits.detach(), features.detach())


def test_donated_ignored_rows_leak_nothing(kernel, rng):
    for upstream in (float("inf"), float("nan")):
        _, input, target = donated(rng, kernel)
        loss = large_margin_cross_entropy(input, target, donate=True, backend=kernel)
        (gradient,) = torch.autograd.grad(loss, input, torch.tensor(upstream, device=input.device))
        assert (gradient[2] == 0).all() and not gradient[0].isfinite().any()


def test_logits_that_share_memory_are_not_overwritten(kernel, rng):
    row = torch.randn(1, 9, generator=rng).to(device_of(kernel)).requires_grad_()
    input, target = (row * 1).expand(4, 9), torch.arange(4, device=row.device)
    before = input.detach().clone()
    loss = large_margin_cross_entropy(input, target, donate=True, backend=kernel)
    (gradient,) = torch.autograd.grad(loss, row)
    assert torch.equal(input.detach(), before)
    (expected,) = torch.autograd.grad(large_margin_cross_entropy(row.expand(4, 9), target, backend=kernel), row)
    assert same_bits(gradient, expected)


# class probabilities by the kernels


class Soft:
    """Logits with masked and leading classes, probabilities with a row of zeros, weights, and all of it in float64."""

    def __init__(
        self,
        shape: tuple[int, ...],
        rng: torch.Generator,
        dtype: torch.dtype = torch.float32,
        weighted: bool = False,
        backend: str = "cpu",
    ) -> None:
        skip_unless_available(backend, dtype)
        self.backend, device = backend, device_of(backend)
        self.input = logits(shape, rng, dtype)
        target = torch.rand(shape, generator=rng) * 2 / shape[1]
        target[:1] = target[:1].where(torch.rand(target[:1].shape, generator=rng) < 0.5, 0.0)
        target[-1:] = 0.0
        self.target = target.masked_fill(self.input == -INF, 0.0).to(device, dtype)
        self.input = self.input.to(device)
        self.weight = torch.rand(shape[1], generator=rng).to(device) if weighted else None
        self.wanted = (True, True)

    def with_(self, **changes: Any) -> "Soft":
        other = copy.copy(self)
        other.__dict__.update(changes)
        return other

    def reference(self) -> "Soft":
        return self.with_(backend="reference")

    def exact(self) -> "Soft":
        weight = None if self.weight is None else self.weight.double()
        return self.reference().with_(input=self.input.double(), target=self.target.double(), weight=weight)

    def leaves(self) -> tuple[Tensor, Tensor]:
        input_wanted, target_wanted = self.wanted
        return self.input.detach().requires_grad_(input_wanted), self.target.detach().requires_grad_(target_wanted)

    def loss(self, input: Tensor, target: Tensor, **options: Any) -> Tensor:
        return large_margin_cross_entropy(input, target, weight=self.weight, backend=self.backend, **options)

    def results(self, factor: float = 1.0, **options: Any) -> list[Tensor]:
        """The loss and its gradients."""
        leaves = self.leaves()
        loss = self.loss(*leaves, **options)
        return [loss.detach(), *torch.autograd.grad(loss.sum() * factor, [x for x in leaves if x.requires_grad])]

    def check(self, factor: float = 1.0, **options: Any) -> None:
        """As the reference in float64, and its NaN and infinities."""
        found = (soft.results(factor, **options) for soft in (self, self.reference(), self.exact()))
        for got, their, truth, leaf in zip(*found, (None, *self.leaves()), strict=True):
            assert got.dtype == (torch.float32 if leaf is None else leaf.dtype) and got.shape == their.shape
            assert torch.equal(got.isnan(), their.isnan()) and torch.equal(got.isinf(), their.isinf())
            finite = truth.isfinite() & got.isfinite()
            size = truth[finite].abs().max() if finite.any() else 0.0
            scale = (8 + 8 * options.get("lam", 0.3)) * max(1.0, factor) + size
            assert_rounded(
                got[finite],
                truth[finite],
                torch.as_tensor(scale, dtype=torch.float64).to(truth).expand(truth[finite].shape),
                2,
                self.backend,
            )


SOFT_OPTIONS = combined(
    dtype=DTYPES,
    shape=[(5, 2), (20, 17), (3, 2500), (2, 9000), (2, 19, 5, 4), (1, 1100, 3)],
    divergence=DIVERGENCES,
    terms=[(0.3, 0.0, 1.0), (0.0, 0.0, 0.7), (0.0, 1.0, 1.0), (9.0, -3.0, 0.7)],  # lam, hard_bias, and the factor of the loss
    smoothing=[0.0, 0.1, 1.0],
    weighted=[False, True],
    reduction=["none", "sum", "mean"],
)


@every("dtype, shape, divergence, terms, smoothing, weighted, reduction", SOFT_OPTIONS)
def test_every_option_with_class_probabilities(kernel, dtype, shape, divergence, terms, smoothing, weighted, reduction, rng):
    soft = Soft(shape, rng, dtype, weighted, kernel)
    lam, hard_bias, factor = terms
    soft.check(lam=lam, hard_bias=hard_bias, factor=factor, label_smoothing=smoothing, divergence=divergence, reduction=reduction)


def test_the_largest_of_all_classes_may_lie_in_any_tile(kernel, rng):
    soft = Soft((2, 9000), rng, backend=kernel)
    soft.input[0, 8900], soft.input[1, 100] = 60.0, 60.0
    soft.target[:, ::300] += 0.1
    soft.check(reduction="none")


@pytest.mark.parametrize("shape", [(2, 300, 37), (1, 19, 300)], ids=str)  # several blocks of classes; several tasks of rows
@every("dtype", DTYPES)
def test_class_probabilities_of_rows_side_by_side(shape, dtype, rng):
    soft = Soft(shape, rng, dtype, weighted=True)
    for options in ({}, {"divergence": "kl_uq", "label_smoothing": 0.1}, {"hard_bias": 1.0, "reduction": "none"}):
        soft.check(**options)


STRIDES_OF_TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "their own": lambda target, like: target,
    "those of the logits": lambda target, like: like.detach().clone(memory_format=torch.preserve_format).copy_(target),
    "one row repeated": lambda target, like: target[:1].expand(target.shape),
}


def strides_of_both(fixtures: dict[str, Any]) -> list[tuple[str, str, torch.dtype]]:
    """Every stride of logits with every stride of targets and every dtype.

    In Triton's interpreter targets and dtypes take turns: both kernels get their strides from layout.py.
    """
    if is_interpreted(fixtures["kernel"]):
        turns = itertools.cycle(zip(STRIDES_OF_TARGETS, (*DTYPES[1:], DTYPES[0]), strict=True))
        return [(name, *turn) for name, turn in zip(STRIDES, turns, strict=False)]
    return list(itertools.product(STRIDES, STRIDES_OF_TARGETS, DTYPES))


@every("name, of_target, dtype", strides_of_both)
def test_strides_of_class_probabilities(kernel, name, of_target, dtype, rng):
    skip_unless_available(kernel, dtype)
    input = strided(name, rng, dtype, device_of(kernel))
    plain = Soft(tuple(input.shape), rng, dtype, backend=kernel).with_(input=input)
    like = torch.empty_strided(input.shape, input.stride(), dtype=dtype, device=input.device)
    like = input if "expanded" in name or "repeated" in name else like
    target = STRIDES_OF_TARGETS[of_target](plain.target, like)
    expected = plain.with_(input=input.contiguous(), target=target.contiguous()).results(label_smoothing=0.1)
    for got, same in zip(plain.with_(target=target).results(label_smoothing=0.1), expected, strict=True):
        assert_within(got, same.double(), 4.0, 2, dtype)


BESIDE = combined(
    shape=[(3, 5), (3, 5, 2), (3, 5, 20), (3, 1500)],
    value=[float("nan"), INF, -INF],
    place=[0, 2, 4],
    options=[{}, {"lam": 0.0}, {"divergence": "kl_qu", "hard_bias": 1.0}, {"label_smoothing": 1.0}],
)


@every("shape, value, place, options", BESIDE)
def test_nan_and_infinity_beside_class_probabilities(kernel, shape, value, place, options, rng):
    input, target = torch.randn(shape, generator=rng), torch.rand(shape, generator=rng) / shape[1]
    soft = Soft(shape, rng, backend=kernel)
    soft = soft.with_(input=input.to(soft.input.device), target=target.to(soft.input.device))
    soft.input[0, place] = value  # -inf: a masked class with a share, an infinite loss and the pull of a masked target
    soft.input[1] = -INF
    soft.check(reduction="none", **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@every("shape", [(4, 7), (4, 7, 20)])
def test_certain_probabilities_beside_masks_of_the_lowest_number(kernel, shape, divergence, rng):
    soft = Soft(shape, rng, backend=kernel).with_(wanted=(True, False))
    soft.input[:, 4:] = torch.finfo(torch.float32).min  # their sum is infinite
    soft = soft.with_(target=torch.nn.functional.one_hot(soft.input.argmax(1), 7).movedim(-1, 1).float())
    losses, their_losses = (each.results(reduction="none", divergence=divergence)[0] for each in (soft, soft.reference()))
    assert not losses.isnan().any() and torch.equal(losses.isinf(), their_losses.isinf())


def test_one_hot_probabilities_are_class_indices_in_the_kernel(kernel, rng):
    soft = Soft((30, 40), rng, backend=kernel)
    rows = torch.arange(30, device=soft.input.device)
    target = soft.input.argmax(1).where(rows % 2 == 0, rows)  # the largest logit, and others
    onehot = soft.with_(target=torch.nn.functional.one_hot(target, 40).float(), wanted=(True, False))
    for options in ({}, {"hard_bias": 1.0, "divergence": "kl_uq"}, {"label_smoothing": 0.1}):
        leaf = soft.input.clone().requires_grad_()
        loss = large_margin_cross_entropy(leaf, target, reduction="none", backend=kernel, **options)
        (expected,) = torch.autograd.grad(loss.sum(), leaf)
        finite = loss.isfinite()
        got, gradient = onehot.results(reduction="none", **options)
        assert torch.equal(finite, got.isfinite())
        assert_within(got[finite], loss.detach()[finite].double(), 32.0, 2)
        assert_within(gradient, expected.double(), 2.0, 2)


def test_the_tail_of_a_confident_row_keeps_its_digits(kernel, rng):
    for lead in (12.0, 50.0, 100.0):
        others = torch.randn(300, generator=rng)
        input = torch.cat([others[:100], (others.logsumexp(0) + lead)[None], others[100:]])[None]
        input = input.to(device_of(kernel)).requires_grad_()
        target = torch.nn.functional.one_hot(torch.tensor([100]), 301).to(input)
        loss = large_margin_cross_entropy(input, target, lam=0.0, backend=kernel)
        (gradient,) = torch.autograd.grad(loss, input)
        exact = input.detach().cpu().double()
        behind = others.double().logsumexp(0) - exact[0, 100]
        tail, truth = torch.nn.functional.softplus(behind, threshold=200), exact.softmax(1)
        truth[0, 100] = -behind.sigmoid()
        assert_within(loss, tail, tail * lead, 2)
        assert_within(gradient, truth, tail * lead, 2)


def test_a_low_hard_bias_keeps_the_digits_of_small_losses(kernel, rng):
    soft = Soft((6, 40), rng, backend=kernel)
    soft = soft.with_(input=torch.randn(6, 40, generator=rng).to(soft.input.device))
    got, truth = (x.results(lam=0.0, hard_bias=-30.0)[0] for x in (soft, soft.exact()))
    assert 0 < truth < 1e-8
    assert_within(got, truth, 40 * truth, 2)


@every("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_probabilities_of_another_dtype_have_a_gradient_in_theirs(kernel, dtype, rng):
    soft = Soft((6, 9), rng, backend=kernel)
    exact = soft.target.to(dtype)
    expected = soft.with_(target=exact.float()).results()
    for got, same in zip(soft.with_(target=exact).results(), expected, strict=True):
        assert_within(got, same.double(), 16.0, 1, max((dtype, torch.float32), key=lambda d: torch.finfo(d).eps))


def test_rows_without_a_share_have_no_loss_and_no_gradient(kernel, rng):
    losses, gradient, _ = Soft((6, 30), rng, backend=kernel).results(reduction="none")
    assert losses[-1] == 0 and (gradient[-1] == 0).all() and (losses[1:-1] > 0).all()


@every("wanted", [(True, False), (False, True), (True, True)])
def test_every_pass_with_probabilities_has_its_own_upstream(kernel, wanted, rng):
    soft = Soft((8, 33), rng, backend=kernel).with_(wanted=wanted)
    _, *unit = soft.results()
    for reduction in ("mean", "none"):
        leaves = soft.leaves()
        loss = soft.loss(*leaves, reduction=reduction)
        total = loss if reduction == "mean" else loss.mean()
        held = []
        for factor in (1.0, 3.0, 65536.0, 0.0, -0.1):
            asked = [x for x in leaves if x.requires_grad]
            held.append((factor, torch.autograd.grad(total * factor, asked, retain_graph=True)))
        for factor, gradients in held:
            for got, one in zip(gradients, unit, strict=True):
                assert_within(got, one.double() * factor, abs(factor) * one.abs().max().double() + 1e-30, 2)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_higher_derivatives_and_batches_with_probabilities_take_the_reference(kernel, reduction, rng):
    soft = Soft((4, 7), rng, backend=kernel)
    products = []
    for each in (soft, soft.reference()):
        leaves = soft.leaves()
        losses = each.loss(*leaves, reduction=reduction)
        gradients = torch.autograd.grad(losses.sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in gradients), leaves, retain_graph=True)
        upstreams = torch.stack([torch.ones_like(losses), torch.full_like(losses, 2.0)])
        batched = torch.autograd.grad(losses, leaves, upstreams, is_grads_batched=True)
        products.append([*gradients, *second, *batched])
    for got, expected in zip(*products, strict=True):
        assert expected.abs().max() > 0
        assert_within(got, expected.double(), 1 + expected.abs().max(), 4)


def test_transforms_of_class_probabilities_take_the_reference(rng):
    soft = Soft((4, 5), rng)

    def losses(f: Tensor, t: Tensor, backend: Any = None) -> Tensor:
        return large_margin_cross_entropy(f, t, reduction="none", backend=backend)

    for transform in (torch.func.jacrev, torch.func.jacfwd, torch.vmap):
        got, expected = (transform(partial(losses, backend=name))(soft.input, soft.target) for name in (None, "reference"))
        assert same_bits(got, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(soft.target, torch.ones(4, 5))
        assert torch.autograd.forward_ad.unpack_dual(losses(soft.input, dual)).tangent is not None


def test_saved_class_probabilities_may_come_back_changed(kernel, rng):
    soft = Soft((6, 7), rng, backend=kernel)
    expected = soft.results()
    for convert in (torch.Tensor.double, torch.Tensor.bfloat16, lambda t: t.t().clone().t() if t.dim() == 2 else t, torch.Tensor.clone):
        leaves = soft.leaves()
        with torch.autograd.graph.saved_tensors_hooks(partial(where_floating, convert), lambda t: t):
            loss = soft.loss(*leaves)
        for got, same in zip(torch.autograd.grad(loss, leaves), expected[1:], strict=True):
            assert_within(got, same.double(), 8.0, 2, torch.bfloat16)


def test_hooks_beside_class_probabilities_run_once(kernel, rng):
    soft = Soft((6, 7), rng, backend=kernel)
    _, *expected = soft.results()
    for create_graph in (False, True):
        leaves = soft.leaves()
        inputs = [leaf * 1 for leaf in leaves]
        for x in inputs:
            x.register_hook(lambda gradient: gradient * 10)
        gradients = torch.autograd.grad(soft.loss(*inputs), leaves, create_graph=create_graph)
        for got, one in zip(gradients, expected, strict=True):
            assert_within(got, 10 * one.double(), 10.0 + 10 * one.abs().max(), 2)


@every("wanted", [(True, False), (True, True)])
@every("shape", [(6, 33), (3, 1500), (3, 7, 5), (3, 7, 20)])
def test_donated_logits_with_class_probabilities(kernel, shape, wanted, rng):
    soft = Soft(shape, rng, backend=kernel).with_(wanted=wanted)
    soft.input.clamp_(min=-9)  # they become products
    results = []
    for donate in (False, True):
        leaves = soft.leaves()
        input = leaves[0] * 1
        loss = soft.loss(input, leaves[1], donate=donate)
        gradients = torch.autograd.grad(loss * 0.5, [x for x in leaves if x.requires_grad])
        assert (input._version > 0) == donate
        results.append([loss.detach(), *gradients])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(ValueError, match="donate=True overwrites input, but input is a leaf"):
        large_margin_cross_entropy(*soft.leaves(), donate=True)


@pytest.mark.parametrize("wanted", [(True, False), (True, True)])
def test_peak_memory_with_class_probabilities_is_the_gradients(wanted, rng):
    soft = Soft((64, 4096), rng).with_(wanted=wanted)
    leaves = soft.leaves()
    with torch.profiler.profile(profile_memory=True) as profiler:
        large_margin_cross_entropy(*leaves).backward()
    taken = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert sum(n for n in taken if n > 0) < (sum(wanted) + 0.01) * soft.input.nbytes, taken


def test_class_probabilities_do_not_depend_on_the_number_of_threads(rng):
    for shape in ((900, 37), (5, 5000), (3, 19, 20, 7)):
        soft, threads = Soft(shape, rng), torch.get_num_threads()
        try:
            results = []
            for count in (1, 3):
                torch.set_num_threads(count)
                results.append(soft.results())
        finally:
            torch.set_num_threads(threads)
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


FLOAT64_OPTIONS: list[dict[str, Any]] = [
    {},
    {"lam": 0.0, "reduction": "none"},
    {"divergence": "kl_qu", "hard_bias": 1.0, "reduction": "none"},
    {"divergence": "kl_uq", "label_smoothing": 0.1, "reduction": "sum"},
    {"lam": 2.0, "hard_bias": -2.0, "label_smoothing": 1.0},
]


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("shape", [(6, 1), (40, 17), (9, 1000), (3, 3000), (6, 19, 5, 4), (2, 700, 2)], ids=str)
@every("options", FLOAT64_OPTIONS)
def test_float64_is_right_to_its_last_digits(shape, soft, options, rng):
    check_float64(shape, soft, options, rng)


def check_float64(shape: tuple[int, ...], soft: bool, options: dict[str, Any], rng: torch.Generator) -> None:
    problem: Any = Soft(shape, rng, torch.float64, weighted=True) if soft else Problem(logits(shape, rng, torch.float64), rng, "cpu")
    weight, leads = torch.rand(shape[1], generator=rng, dtype=torch.float64), torch.tensor([0.0, 30.0, 600.0, 720.0])
    input = problem.input.movedim(1, -1)
    input[..., shape[1] // 2] += leads[torch.randint(4, input.shape[:-1], generator=rng)]  # also beyond what e^z can tell
    found = []
    for backend in ("cpu", "reference"):
        leaf, target = problem.leaf() if not soft else problem.leaves()[0], problem.target.detach().requires_grad_(soft)
        loss = large_margin_cross_entropy(leaf, target, weight, backend=backend, **options)
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), [leaf, target] if soft else [leaf])])
    for got, truth in zip(*found, strict=True):
        assert got.dtype == torch.float64
        size = truth.abs().nan_to_num(posinf=0.0)
        assert_within(got, truth, 8 + size.max() if truth is found[1][0] else 1 + size.max(), 8)


def test_statistics_in_float64_are_right_to_their_last_digits(rng):
    for shape in ((40, 17), (9, 1000), (6, 19, 5, 4), (2, 700, 2)):
        problem = Problem(logits(shape, rng, torch.float64), rng, "cpu")
        upstream = [torch.randn(problem.target.shape, generator=rng, dtype=torch.float64) for _ in range(5)]
        leaves = problem.leaf(), problem.leaf()
        stats, truth = (
            row_stats(leaf, problem.target, backend=backend) for leaf, backend in zip(leaves, ("cpu", "reference"), strict=True)
        )
        for got, true in zip(stats, truth, strict=True):
            assert_within(got, true.detach(), 8 + true.detach().abs().nan_to_num(posinf=0.0), 4)
        finite = [u.masked_fill(~t.isfinite(), 0.0) for u, t in zip(upstream, truth, strict=False)]
        gradients = [torch.autograd.grad(each[:5], leaf, finite)[0] for each, leaf in zip((stats, truth), leaves, strict=True)]
        assert_within(gradients[0], gradients[1], vjp_scale(leaves[1], problem.target, finite) + 1e-300, 8)


def test_the_tail_of_a_confident_row_in_float64(rng):
    skip_unless_available("cpu")
    for lead in (12.0, 100.0, 700.0, 740.0):
        others = torch.randn(300, generator=rng, dtype=torch.float64)
        input = torch.cat([others[:100], (others.logsumexp(0) + lead)[None], others[100:]])[None].requires_grad_()
        for target in (torch.tensor([100]), torch.nn.functional.one_hot(torch.tensor([100]), 301).double()):
            loss = large_margin_cross_entropy(input, target, lam=0.0, backend="cpu")
            assert_within(loss, math.exp(-lead) if lead > 40 else math.log1p(math.exp(-lead)), math.exp(-lead) * lead, 2)


def test_the_kernel_takes_class_probabilities_unless_told_otherwise(rng):
    skip_unless_available("cpu")
    input, target = torch.randn(4, 5, generator=rng, requires_grad=True), torch.rand(4, 5, generator=rng)
    for logits in (input, input.double()):
        assert type(large_margin_cross_entropy(logits, target).grad_fn).__name__ == "LargeMarginCrossEntropyBackward"
    weight = torch.ones(5, requires_grad=True)
    for loss in (
        large_margin_cross_entropy(input, target, backend="reference"),
        large_margin_cross_entropy(input, target, weight),
    ):
        assert type(loss.grad_fn).__name__ != "LargeMarginCrossEntropyBackward"


# memory


def test_peak_memory_is_one_gradient(rng):
    skip_unless_available("cpu")
    input, target = torch.randn(256, 4096, generator=rng, requires_grad=True), torch.randint(4096, (256,), generator=rng)
    size = input.nbytes
    for factor in (1.0, 0.37):
        with torch.profiler.profile(profile_memory=True) as profiler:
            (gradient,) = torch.autograd.grad(large_margin_cross_entropy(input, target) * factor, input)
        taken = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        assert sum(n for n in taken if n > 0) < 1.01 * size, taken
        assert gradient.shape == input.shape


# the number of threads, the instruction set


def test_the_result_does_not_depend_on_the_number_of_threads(rng):
    skip_unless_available("cpu")
    for shape in ((3000, 37), (5, 20000), (3, 19, 50, 7)):
        problem, threads = Problem(logits(shape, rng), rng, "cpu"), torch.get_num_threads()
        try:
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(outcome(problem))
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_of_this_machine(isa, monkeypatch, rng):
    skip_unless_available("cpu")
    order = ["baseline", "avx2", "avx512"]
    best = cpu.describe().split(", ")[1]
    if order.index(isa) > order.index(best):
        pytest.skip(f"this machine has no {isa}")
    kernel = cpu.kernel_for(isa)
    monkeypatch.setattr(cpu, "kernel_for", lambda: kernel)
    for shape in ((40, 17), (3, 1025), (2, 19, 9, 8)):
        for dtype in (torch.float32, *HALVES):
            compare_statistics(Problem(logits(shape, rng, dtype), rng, "cpu"), rng)
            Soft(shape, rng, dtype).check(divergence="kl_qu", hard_bias=1.0)
        for soft in (False, True):
            check_float64(shape, soft, {"divergence": "kl_qu", "hard_bias": 1.0, "reduction": "none"}, rng)


# the loss by Triton: one launch in each pass


@pytest.fixture
def triton_kernels():
    skip_unless_available("triton")
    return ladder.load("triton")


class Recorded:
    """A kernel that writes down its launches, and does nothing else."""

    def __init__(self, name: str, launches: list[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return lambda *_, **__: self.launches.append(self.name)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_each_pass_is_one_launch(triton_kernels, monkeypatch, kind, reduction, rng):
    launches: list[str] = []
    for name in ("_loss", "_loss_gradient"):
        monkeypatch.setattr(triton_kernels, name, Recorded(name, launches))
    monkeypatch.setattr(triton_kernels._checks, "can_look_at", lambda target: False)  # as on a GPU
    counter = torch.zeros(1, dtype=torch.int32, device=device_of("triton"))
    monkeypatch.setattr(triton_kernels, "_counter", lambda device: counter)
    soft = Soft((6, 7), rng, weighted=True, backend="triton")
    leaf, target = soft.leaves()
    target = target if kind == "probabilities" else target.argmax(1)
    upstream = torch.ones((6,) if reduction == "none" else (), device=leaf.device)
    with torch.profiler.profile() as profiler:
        torch.autograd.grad(soft.loss(leaf, target, reduction=reduction, label_smoothing=0.1), leaf, upstream)
    assert launches == ["_loss", "_loss_gradient"]
    called = {event.name for event in profiler.events() if event.name.startswith("aten::")}
    assert called <= {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::detach", "aten::reshape", "aten::view"}


def test_the_last_program_adds_up_the_losses_and_leaves_a_zero(triton_kernels, monkeypatch, rng):
    counter = torch.zeros(1, dtype=torch.int32, device=device_of("triton"))
    monkeypatch.setattr(triton_kernels, "_counter", lambda device: counter)
    problem = Problem(logits((11, 1000), rng), rng, "triton")  # as many programs as rows
    truth = large_margin_cross_entropy(problem.input.double(), problem.target, backend="reference")
    for summed in (triton_kernels.SUMMED.value, 4, 1):
        if not HAS_KERNELS:  # a compiled kernel keeps the first
            monkeypatch.setattr(triton_kernels, "SUMMED", type(triton_kernels.SUMMED)(summed))
        for _ in range(2):
            assert_within(outcome(problem)[0], truth, truth, 2)
            assert counter.item() == 0


def test_labels_of_eight_bits(kernel, rng):
    problem = Problem(logits((30, 200), rng), rng, kernel)
    small = problem.with_(target=problem.target.clamp(min=0).to(torch.uint8))
    wide = small.with_(target=small.target.long())
    assert all(same_bits(a, b) for a, b in zip(outcome(small), outcome(wide), strict=True))


# Triton kernels are compiled for real, though not run, where there is no GPU


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from largemargin.backends import triton as kernels

H100, A100, MI300 = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)
REAL = ("lam_e", "lam_a", "lam_log_count", "hard_bias", "keep", "smoothing")
ONE = ("inner", "class_stride", "target_class_stride", "grad_class_stride", "target_grad_class_stride")  # triton compiles a 1 in


def build(arch, dtype, name, target, rows, classes, warps, options, integer="i64", all_else=True):
    kernel = getattr(kernels, name)
    pointers = {"logits": dtype, "gradient": dtype, "target": target, "target_gradient": target, "largest": "i64", "counter": "i32"}
    signature, constants = {}, {}
    for parameter in kernel.params:
        word = parameter.name
        if parameter.is_constexpr or (integer == "i32" and word in ONE):
            signature[word] = "constexpr"
            constants[(parameter.num,)] = {"ROWS": rows, "CLASSES": classes, **dict.fromkeys(ONE, 1), **options}.get(word, all_else)
        elif word.endswith("_ptr"):
            signature[word] = "*" + pointers.get(word.removesuffix("_ptr"), "fp32")
        else:
            signature[word] = "fp32" if word in REAL else integer
    compiled = compile(ASTSource(kernel, signature, constants), target=arch, options={"num_warps": warps})
    print(arch.backend, name, sorted(compiled.asm))


STATISTICS = {"WHOLE": False}
INDICES = {"SOFT": False, "WHOLE": False, "HAS_DIVERGENCE": False, "HAS_BIAS": False}
PROBABILITIES = {"SOFT": True, "WHOLE": False}
for turn, (arch, dtype) in enumerate(((H100, "bf16"), (A100, "fp32"), (MI300, "fp16"))):  # with every option
    for number, (name, target, options) in enumerate((
        ("_forward", "i64", STATISTICS), ("_backward", "i64", STATISTICS), ("_loss", "i64", INDICES), ("_loss_gradient", "i64", INDICES),
        ("_loss", "fp32", PROBABILITIES), ("_loss_gradient", "fp32", PROBABILITIES),
    )):
        if number % 3 == turn or sys.argv[1] == "every GPU":
            build(arch, dtype, name, target, 2, 128, 4, options)
least = {"HAS_L": True, "REDUCED": True, "MEAN": True, "SAVES": True, "WHOLE": True, "HAS_GRADIENT": True}
for name, target, soft, classes in (  # with the options of every day, in tiles as large as they come
    ("_forward", "i64", False, 16384), ("_backward", "i64", False, 8192), ("_loss", "i64", False, 16384),
    ("_loss_gradient", "u8", False, 8192), ("_loss", "bf16", True, 8192), ("_loss_gradient", "bf16", True, 4096),
):
    build(H100, "bf16", name, target, 1, classes, 16, {**least, "SOFT": soft, "HAS_DIVERGENCE": soft}, "i32", False)
"""


@pytest.mark.parametrize(
    ("gpus", "nvidia", "amd"), [("one GPU", 10, 2), pytest.param("every GPU", 18, 6, marks=pytest.mark.slow)], ids=["one GPU", "every GPU"]
)
def test_triton_kernels_compile_for_gpus(gpus, nvidia, amd, tmp_path):
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", COMPILE, gpus], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    assert (run.stdout.count("ptx"), run.stdout.count("hsaco")) == (nvidia, amd)


# GPUs only


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["indices", "probabilities"])
def on_gpu(request) -> tuple[Tensor, Tensor]:
    input = torch.randn(64, 1000, device="cuda", requires_grad=True)
    return input, torch.randint(1000, (64,), device="cuda") if request.param == "indices" else torch.rand(64, 1000, device="cuda")


@needs_gpu
@pytest.mark.parametrize("donate", [False, True])
def test_nothing_waits_for_the_device(on_gpu, donate):
    input, target = on_gpu
    large_margin_cross_entropy(input, target).backward()  # compiles
    with waiting_refused():
        (large_margin_cross_entropy(input * 1, target, label_smoothing=0.1, donate=donate) * 0.5).backward()
    assert input.grad.isfinite().all()


@needs_gpu
def test_a_step_is_two_kernels_and_holds_one_gradient(on_gpu):
    input, target = on_gpu

    def step() -> None:
        loss = large_margin_cross_entropy(input, target)
        torch.autograd.grad(loss, input, torch.ones_like(loss))

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    assert torch.cuda.max_memory_allocated() - held < 1.05 * input.nbytes
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len([name for name in names if "_loss" in name]) == 2 and len(names) <= 3, names  # and the ones of the upstream gradient


@needs_gpu
def test_losses_of_two_streams_do_not_meet(on_gpu):
    input, target = on_gpu
    expected = large_margin_cross_entropy(input, target)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    found = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(large_margin_cross_entropy(input, target))
    torch.cuda.synchronize()
    assert all(same_bits(loss, expected) for loss in found)


@needs_gpu
def test_a_graph_can_be_captured_and_replayed(on_gpu, rng):
    input, target = on_gpu
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(large_margin_cross_entropy(input, target), input)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = large_margin_cross_entropy(input, target)
        (gradient,) = torch.autograd.grad(loss, input)
    with torch.no_grad():
        input.copy_(torch.randn(64, 1000, generator=rng))
    graph.replay()
    expected = large_margin_cross_entropy(input, target)
    assert same_bits(loss.detach(), expected.detach())
    assert same_bits(gradient, torch.autograd.grad(expected, input)[0])
