"""Distillation: a loss against a teacher is the loss of all logits against the teacher's softmax, without holding either."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from combinations import covering
from devices import CPU
from largemargin import LinearLargeMarginCrossEntropyLoss, large_margin_cross_entropy, linear_large_margin_cross_entropy
from largemargin.rows import tiles
from measure import assert_within, compiles, peak_bytes, same_bits
from registry import DIVERGENCES


@pytest.fixture(params=(2**20, 200), ids=("one tile", "a row a tile"))
def tile(request, monkeypatch) -> int:
    monkeypatch.setattr(tiles, "TILE", request.param)
    monkeypatch.setattr(tiles, "TILE_OF_GPU", request.param)
    return request.param


class Lesson(NamedTuple):
    """Student and teacher, over the same rows and classes, with features of different widths."""

    student: tuple[Tensor, Tensor, Tensor]
    teacher: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(
        cls, rng: torch.Generator, device: torch.device, dtype: torch.dtype = torch.float64, positions: tuple[int, ...] = ()
    ) -> "Lesson":
        def layer(width: int) -> tuple[Tensor, Tensor, Tensor]:
            shapes = (7, width), (13, *positions, width), (13, *positions)
            input, weight, bias = (torch.randn(shape, generator=rng).to(device, dtype) for shape in shapes)
            return input, weight, bias

        return cls(layer(5), layer(3))

    def leaves(self) -> list[Tensor]:
        return [tensor.detach().clone().requires_grad_() for tensor in self.student]

    def to(self, dtype: torch.dtype) -> "Lesson":
        return Lesson(*(tuple(tensor.to(dtype) for tensor in layer) for layer in self))


def fused(leaves: list[Tensor], teacher: tuple[Tensor, Tensor, Tensor | None], **options: Any) -> Tensor:
    input, linear_weight, linear_bias = leaves
    names = ("teacher_input", "teacher_linear_weight", "teacher_linear_bias")
    return linear_large_margin_cross_entropy(
        input, linear_weight, linear_bias=linear_bias, **dict(zip(names, teacher, strict=True)), **options
    )


def logits_of(input: Tensor, linear_weight: Tensor, linear_bias: Tensor) -> Tensor:
    return torch.einsum("nd,c...d->nc...", input, linear_weight) + linear_bias


def plain(leaves: list[Tensor], teacher: tuple[Tensor, Tensor, Tensor], temperature: float = 1.0, **options: Any) -> Tensor:
    target = (logits_of(*teacher) / temperature).softmax(1)
    return large_margin_cross_entropy(logits_of(*leaves), target, **options, backend="reference")


def assert_same_loss_and_gradients(lesson: Lesson, mine: Lesson, **options: Any) -> None:
    """``mine`` is the lesson in the dtype under test."""
    exact, leaves = lesson.leaves(), mine.leaves()
    truth, loss = plain(exact, lesson.teacher, **options), fused(leaves, mine.teacher, **options)
    assert loss.shape == truth.shape
    assert_within(loss, truth.detach(), 64 + truth.detach().abs(), 8)
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(truth.device)
    for factor in (1.0, -2.0):  # the second pass computes both logits again
        gradients = torch.autograd.grad(loss, leaves, (factor * upstream).to(loss.dtype), retain_graph=True)
        for got, expected in zip(gradients, torch.autograd.grad(truth, exact, factor * upstream, retain_graph=True), strict=True):
            assert_within(got, expected, 64 + expected.abs(), 8)


OPTIONS = {
    "reduction": ("none", "sum", "mean"),
    "divergence": DIVERGENCES,
    "lam": (0.0, 0.3),
    "hard_bias": (0.0, 1.0),
    "label_smoothing": (0.0, 0.1),
    "temperature": (0.5, 1.0, 4.0),
    "weighted": (False, True),
    "masked": (False, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_loss_of_the_logits(dtype, tile, rng, device):
    lesson = Lesson.of(rng, device, torch.float32).to(torch.float64)
    weight = torch.rand(13, generator=rng).to(device)
    masks = lesson._replace(
        student=(*lesson.student[:2], lesson.student[2].clone().index_fill_(0, torch.tensor(4, device=device), -torch.inf)),
        teacher=(*lesson.teacher[:2], lesson.teacher[2].clone().index_fill_(0, torch.tensor([4, 9], device=device), -torch.inf)),
    )
    for case in covering(2, **OPTIONS):
        options = dict(zip(OPTIONS, case, strict=True))
        taken = masks if options.pop("masked") else lesson
        assert_same_loss_and_gradients(taken, taken.to(dtype), weight=weight if options.pop("weighted") else None, **options)


def test_equals_the_loss_of_the_logits_at_every_position(tile, rng, device):
    lesson = Lesson.of(rng, device, positions=(2, 3))
    for reduction in ("none", "mean"):
        assert_same_loss_and_gradients(lesson, lesson, reduction=reduction, temperature=2.0)


def test_leading_dimensions_and_padding_of_either_classifier(tile, rng, device):
    input, linear_weight = torch.randn(2, 3, 5, generator=rng).to(device), torch.randn(9, 5, generator=rng).to(device)
    teacher, classifier = torch.randn(2, 3, 4, generator=rng).to(device), torch.randn(8, 4, generator=rng).to(device)
    bias = torch.randn(8, generator=rng).to(device)
    losses = fused([input, linear_weight, None], (teacher, classifier, bias), reduction="none", num_classes=7)
    target = F.linear(teacher, classifier[:7], bias[:7]).softmax(-1)
    expected = linear_large_margin_cross_entropy(input, linear_weight[:7], target, reduction="none")
    assert losses.shape == (2, 3)
    assert_within(losses, expected, 64.0, 2)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_rows(reduction, device):
    leaves = [torch.ones(shape, requires_grad=True, device=device) for shape in ((0, 3), (5, 3), (5,))]
    loss = fused(leaves, (torch.ones(0, 2, device=device), torch.ones(5, 2, device=device), None), reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else (loss == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss.sum(), leaves))


def test_a_teacher_may_have_a_dtype_of_its_own(tile, rng):
    # on the CPU, where half precision is multiplied in float32
    lesson = Lesson.of(rng, CPU, torch.bfloat16)
    for student, teacher in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float64)):
        leaves = lesson.to(student).leaves()
        loss = fused(leaves, lesson.to(teacher).teacher)
        assert loss.dtype == (torch.float64 if teacher == torch.float64 else torch.float32)
        exact = lesson.to(torch.float64)
        assert_within(loss, plain(exact.leaves(), exact.teacher).detach(), 64.0, 4, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_products_as_on_a_gpu(dtype, monkeypatch, rng):
    monkeypatch.setattr(tiles, "TILE", 200)
    monkeypatch.setattr(tiles.Layer, "is_half", property(lambda self: self.input.dtype == self.weight.dtype != torch.float32))
    lesson = Lesson.of(rng, CPU, dtype)
    leaves, exact = lesson.leaves(), lesson.to(torch.float64)
    truth_leaves = exact.leaves()
    for reduction in ("mean", "none"):
        loss, truth = fused(leaves, lesson.teacher, reduction=reduction), plain(truth_leaves, exact.teacher, reduction=reduction)
        assert_within(loss, truth.detach(), 64 + truth.detach().abs(), 8, torch.float32)
        for got, expected in zip(torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(truth.sum(), truth_leaves), strict=True):
            assert (got.double() - expected).norm() < torch.finfo(dtype).eps * expected.norm()


def test_no_gradient_reaches_the_teacher(tile, rng, device):
    lesson = Lesson.of(rng, device)
    teacher = tuple(tensor.requires_grad_() for tensor in lesson.teacher)
    frozen = fused(list(lesson.student), teacher)
    assert not frozen.requires_grad
    fused(lesson.leaves(), teacher).backward()
    assert all(tensor.grad is None for tensor in teacher)


def test_a_teacher_that_moves_before_the_backward_pass_is_noticed(rng, device):
    lesson = Lesson.of(rng, device)
    loss = fused(lesson.leaves(), lesson.teacher, reduction="none")
    lesson.teacher[1].mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.sum().backward()


def test_the_square_of_the_temperature_keeps_the_size_of_the_gradient(rng, device):
    """Hinton et al., eq. (4): at a high temperature the gradient of a row's logits is the difference of both logits, over C."""
    lesson, temperature = Lesson.of(rng, device), 1e4
    input, linear_weight, linear_bias = lesson.leaves()
    leaves = [input / temperature, linear_weight, linear_bias / temperature]
    loss = temperature**2 * fused(leaves, lesson.teacher, temperature=temperature, lam=0.0, reduction="sum")
    (of_bias,) = torch.autograd.grad(loss, linear_bias)
    student, teacher = logits_of(*lesson.student), logits_of(*lesson.teacher)
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    torch.testing.assert_close(of_bias, gap.sum(0) / 13, rtol=1e-2, atol=1e-3)


# no logits are held; on the CPU, as the products of a GPU take a workspace besides


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_neither_logits_are_held(reduction, monkeypatch, rng):
    monkeypatch.setattr(tiles, "TILE", 20_000)
    leaves = [torch.randn(shape, generator=rng, requires_grad=True) for shape in ((100, 16), (4000, 16))]
    teacher = torch.randn(100, 8, generator=rng), torch.randn(4000, 8, generator=rng), None

    def step() -> None:
        torch.autograd.grad(fused([*leaves, None], teacher, reduction=reduction).sum(), leaves)

    gradients = sum(leaf.nbytes for leaf in leaves)
    assert peak_bytes(step) < gradients + 27 * 4 * 4000 + 100_000  # a row at a time; the logits of each would take 1,600,000


# transforms, higher derivatives and compiled code, which take all logits


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_higher_derivatives_and_transforms(tile, rng, device):
    lesson = Lesson.of(rng, device)
    leaves = lesson.leaves()
    loss = lambda *p: fused([*p], lesson.teacher, temperature=2.0)  # noqa: E731
    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for got, truth in zip(torch.func.grad(loss, (0, 1, 2))(*lesson.student), expected, strict=True):
        assert_within(got, truth, 16.0, 2)
    rows = torch.func.vmap(lambda x, t: fused([x[None], *leaves[1:]], (t[None], *lesson.teacher[1:])))(leaves[0], lesson.teacher[0])
    assert_within(rows, fused(leaves, lesson.teacher, reduction="none").detach(), 16.0, 2)
    found = torch.func.jvp(lambda t: fused(list(lesson.student), (t, *lesson.teacher[1:])), lesson.teacher[:1], lesson.teacher[:1])
    assert not found[1].any()


@compiles
def test_compiled_code_computes_the_same(rng, device):
    torch._dynamo.reset()
    lesson = Lesson.of(rng, device, torch.float32)
    leaves = lesson.leaves()
    compiled = torch.compile(lambda *p: fused([*p], lesson.teacher, temperature=2.0), backend="aot_eager", fullgraph=True)
    got, expected = compiled(*leaves), fused(leaves, lesson.teacher, temperature=2.0)
    assert_within(got, expected.detach().double(), 16.0, 2)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert_within(a, b.double(), 4.0, 2)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_takes_any_number_of_rows(strict, rng):
    lesson = Lesson.of(rng, CPU, torch.float32)

    class Model(torch.nn.Module):
        def forward(self, input: Tensor, features: Tensor) -> Tensor:
            return fused([input, *lesson.student[1:]], (features, *lesson.teacher[1:]), temperature=2.0)

    given, rows = (lesson.student[0], lesson.teacher[0]), torch.export.Dim("rows", min=3, max=64)
    program = torch.export.export(Model(), given, dynamic_shapes=({0: rows}, {0: rows}), strict=strict).module()
    for num_rows in (7, 5):
        batch = [tensor[:num_rows] for tensor in given]
        assert_within(program(*batch), Model()(*batch).double(), 16.0, 2)


def test_autocast_changes_nothing(tile, rng, device):
    lesson = Lesson.of(rng, device, torch.float32)
    expected = fused(lesson.leaves(), lesson.teacher)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert same_bits(fused(lesson.leaves(), lesson.teacher), expected)


# the module, and errors


def test_the_module_is_the_function(rng, device):
    lesson = Lesson.of(rng, device)
    criterion = LinearLargeMarginCrossEntropyLoss(5, 13, lam=0.5, dtype=torch.float64).to(device)
    given = {"teacher_input": lesson.teacher[0], "teacher_linear_weight": lesson.teacher[1], "temperature": 2.0}
    target = (F.linear(lesson.teacher[0], lesson.teacher[1]) / 2).softmax(-1)
    assert_within(criterion(lesson.student[0], **given), criterion(lesson.student[0], target).detach(), 16.0, 2)
    criterion.linear.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match=r"linear has a forward hook.*give the teacher's softmax as target"):
        criterion(lesson.student[0], **given)


def test_errors_name_the_argument(rng):
    (input, linear_weight, _), (features, classifier, bias) = Lesson.of(rng, CPU, torch.float32)
    teacher = {"teacher_input": features, "teacher_linear_weight": classifier}
    for options, error, words in (
        ({}, TypeError, "target must be a torch.Tensor, got None; .*teacher_input="),
        ({"teacher_linear_weight": classifier}, TypeError, "teacher_linear_weight needs teacher_input"),
        ({"target": torch.zeros(7).long(), "teacher_linear_bias": bias}, TypeError, "teacher_linear_bias needs teacher_input"),
        ({"target": torch.zeros(7).long(), "temperature": 2.0}, ValueError, "temperature needs teacher_input.*divide input"),
        ({**teacher, "target": torch.zeros(7).long()}, ValueError, "target must be None with teacher_input.*second call"),
        ({"teacher_input": features}, TypeError, "teacher_linear_weight must be a torch.Tensor, got None"),
        (
            {**teacher, "teacher_linear_weight": classifier.t()},
            ValueError,
            r"teacher_linear_weight must have shape \(C, D\) for teacher_input",
        ),
        ({**teacher, "teacher_input": features.long()}, NotImplementedError, "teacher_input must have a floating dtype"),
        ({**teacher, "teacher_linear_bias": bias[1:]}, ValueError, r"teacher_linear_bias must be floating of shape \(C,\), with C = 13"),
        ({**teacher, "teacher_input": features[1:]}, ValueError, r"teacher_input must have the rows of input, \(7,\), got .*\(6, 3\)"),
        (
            {**teacher, "teacher_linear_weight": classifier[1:]},
            ValueError,
            r"the classes of linear_weight, shape \(13, 3\).*give num_classes",
        ),
        ({**teacher, "teacher_linear_weight": classifier[1:], "num_classes": 13}, ValueError, "the 12 rows of teacher_linear_weight"),
        ({**teacher, "temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
        ({**teacher, "ignore_index": 0}, RuntimeError, "ignore_index=0 needs class indices, but the target is a teacher"),
    ):
        with pytest.raises(error, match=words):
            linear_large_margin_cross_entropy(input, linear_weight, **options)
