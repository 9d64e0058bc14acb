"""The laws of every loss of class indices beside ours, from the table in row_losses.py."""

import copy
import functools
import inspect
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import largemargin
import oracle
import strategies
from largemargin import row_stats
from measure import INF, RowScale, assert_within, compiles, same_bits
from properties import given
from row_losses import HINGES, OTHERS, ROW_LOSSES, Case

# torch's own forward-mode formulas are scripted, which torch deprecates; warnings are errors here
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

LAM = 0.3
each_loss = pytest.mark.parametrize("case", ROW_LOSSES, ids=lambda case: case.name)
each_other = pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)


def loss_and_gradient(case: Case, input: Tensor, target: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = input.clone().requires_grad_()
    loss = case.loss(leaf, target, *args, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def natural(case: Case, f: list[float], y: int, options: dict[str, Any], truth: float) -> float:
    """The scale of a row's loss: its terms, and how much of the log-odds' rounding reaches it. It is as small as the loss where that is."""
    given = {**case.defaults(), **options}
    factor = given.get("scale", 1.0)
    row = RowScale([factor * value for value in f], y)
    size = abs(truth)
    if case.function is largemargin.poly1_cross_entropy:  # two terms that nearly cancel for epsilon = -1
        size = float(oracle.softmax_loss(f, y)) * (1 + abs(given["epsilon"]))
    if case.function is largemargin.confidence_penalty:
        size += 2 * given["beta"] * float(case.paper(f, y, beta=0.0) - case.paper(f, y, beta=1.0))
        size += given["beta"] * row.reach * torch.finfo(torch.float32).tiny  # it multiplies 1 - p, which has lost digits down there
    scale = size + min(size, 1.0) * row.log_odds * (1 + max(given.get(name, 0.0) for name in ("gamma", "order", "q")))
    if case.function in (largemargin.max_suppression, largemargin.margin_label_smoothing):
        scale += given["alpha"] * (row.depth + row.reach + given.get("margin", 0.0))
    if "class_counts" in case.takes:  # these make new logits, whose rounding is of their own size
        scale += min(size, 1.0) * factor * (max(abs(value) for value in f if value != -INF) + 16)
    return scale + given["lam"] * row.spread


@each_other
@given(row=strategies.rows(max_classes=12, offsets=(0.0, 10.0)))
def test_loss_equals_the_paper(case, row, device):
    for options in ({}, {**case.options, "lam": LAM}):
        truth = float(case.paper(*row, **options))
        scale = natural(case, row.logits, row.target, options, truth)
        if case.function is largemargin.ldam and -INF in row.logits:
            continue  # the rarest class may be masked, and still sets the margins
        for dtype in (torch.float32, torch.float64):
            loss = case.loss(torch.tensor(row.logits, dtype=dtype, device=device), torch.tensor(row.target, device=device), **options)
            assert_within(loss, truth, scale, 4)


def _of_class_0(case: Case, options: dict[str, Any], f: list[float]) -> Any:
    return case.paper(f, 0, **options)


@each_other
def test_gradient_equals_the_papers_from_certain_to_hopeless(case, device):
    others = [0.0, -1.5, -4.0, 0.25]
    for lead in (0.5, 16.0, 100.0, -16.0, -100.0):
        row = [lead, *others]
        for options in ({}, {**case.options, "lam": LAM}):
            truth = torch.tensor(oracle.gradient(functools.partial(_of_class_0, case, options), row), dtype=torch.float64)
            _, got = loss_and_gradient(
                case, torch.tensor(row, dtype=torch.float64, device=device), torch.tensor(0, device=device), **options
            )
            steepest = max(abs(float(case.paper(row, 0, **{**options, "lam": 0.0}))), truth.abs().max().item())
            scale = natural(case, row, 0, options, float(case.paper(row, 0, **options)))
            assert_within(got, truth, max(steepest, scale) * (1 + abs(lead)) * 8, 2)


@each_other
def test_derivatives_of_both_orders(case, rng, device):
    input = (torch.randn(4, 5, generator=rng, dtype=torch.float64).to(device) * 2).requires_grad_()
    target, masked = torch.tensor([0, 3, -100, 1], device=device), torch.zeros(4, 5, dtype=torch.bool, device=device)
    masked[1, 2] = True

    def losses(f: Tensor) -> Tensor:
        return case.loss(f.masked_fill(masked, -INF), target, lam=LAM, reduction="none", **case.options)

    assert gradcheck(losses, input, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(losses, input)


@each_other
def test_derivatives_are_finite_where_the_target_is_certain_or_hopeless(case, device):
    scale = {"scale": 1.0} if "scale" in case.takes else {}
    cases = itertools.product((torch.float16, torch.bfloat16, torch.float32, torch.float64), (100.0, -100.0))
    for dtype, lead in (*cases, (torch.float32, 1e4), (torch.float32, -1e4)):
        input = torch.tensor([[lead, 1.0, 0.0], [0.0, 0.0, lead]], dtype=dtype, device=device, requires_grad=True)
        loss = case.loss(input, torch.tensor([0, 0], device=device), lam=LAM, **scale)
        (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
        (second,) = torch.autograd.grad((gradient.double() * torch.tensor([1.0, -2.0, 4.0], device=device)).sum(), input)
        assert loss.isfinite() and gradient.isfinite().all() and second.isfinite().all(), (dtype, lead)


@each_other
def test_lam_adds_the_regulariser_to_every_row(case, rng, device):
    input, target = torch.randn(6, 5, generator=rng, dtype=torch.float64).to(device), torch.tensor([0, 1, -100, 3, 4, 0], device=device)
    seen = input
    if case.function is largemargin.logit_adjusted:
        counts = case.of_classes(5)["class_counts"].to(device)
        seen = input + (counts / counts.sum()).log()
    elif case.function is largemargin.ldam:
        seen = 30 * input
    added = case.loss(input, target, reduction="none", lam=LAM) - case.loss(input, target, reduction="none")
    assert_within(added, LAM * largemargin.divergence(row_stats(seen, target)), 64.0, 4)
    two = input[:, :2].contiguous(), target.clamp(max=1)
    assert same_bits(case.loss(*two, lam=LAM), case.loss(*two))  # one non-target class is always uniform


@each_loss
def test_reduction_weights_and_dimensions_are_those_of_the_rows(case, rng, device):
    options = {**case.options, **({"lam": LAM} if "lam" in case.takes else {})}
    input, target = torch.randn(3, 5, 2, 2, generator=rng).to(device), torch.randint(5, (3, 2, 2), generator=rng).to(device)
    target[0, 0, 1], weight = -100, torch.rand(5, generator=rng).to(device)
    flat, kept = input.movedim(1, -1).reshape(-1, 5), target.flatten() >= 0
    rows = torch.stack([case.loss(f, y, **options) for f, y in zip(flat[kept], target.flatten()[kept], strict=True)])
    w = weight[target.flatten()[kept]]
    expected = {"none": (w * rows), "sum": (w * rows).sum(), "mean": (w * rows).sum() / w.sum()}
    for reduction, truth in expected.items():
        loss, gradient = loss_and_gradient(case, input, target, weight, reduction=reduction, **options)
        _, of_flat = loss_and_gradient(case, flat, target.flatten(), weight, reduction=reduction, **options)
        assert_within(loss.flatten()[kept] if reduction == "none" else loss, truth.double(), 32 + rows.abs().sum().item(), 2)
        assert_within(gradient.movedim(1, -1).reshape(-1, 5), of_flat.double(), 64.0, 1)
        if reduction == "none":
            assert not loss.flatten()[~kept].any()


@each_loss
def test_masked_classes_are_deleted(case, rng, device):
    input, target = torch.randn(8, 6, generator=rng, dtype=torch.float64).to(device), torch.tensor([0, 1, 2, 3] * 2, device=device)
    keep = [0, 2, 3, 5]
    target, position = torch.tensor(keep, device=device)[target], target
    input[:, [1, 4]] = -INF
    of_kept = {name: value[keep].to(device) for name, value in case.of_classes(6).items()}
    loss, gradient = loss_and_gradient(case, input, target)
    expected, expected_gradient = loss_and_gradient(case, input[:, keep], position, **of_kept)
    assert_within(loss, expected, 64.0, 1)
    assert_within(gradient[:, keep], expected_gradient, 64.0, 1)
    assert not gradient[:, [1, 4]].any()


@each_loss
def test_ignored_rows_never_leak(case, rng, device):
    for garbage in (math.nan, INF, -INF, 3e38):
        input, target = torch.randn(3, 5, generator=rng).to(device), torch.tensor([0, -100, 2], device=device)
        input[1] = garbage
        loss, gradient = loss_and_gradient(case, input, target)
        assert_within(loss, case.loss(input[[0, 2]], target[[0, 2]]).double(), 64.0, 1)
        assert not gradient[1].any() and gradient.isfinite().all() and gradient[[0, 2]].any()


@each_loss
def test_rows_at_the_edge(case, device):
    first = torch.tensor([0], device=device)
    for row in ([INF, 1.0, 0.0], [0.0, INF, 0.0], [math.nan, 1.0, 0.0], [0.0, math.nan, 0.0], [-INF, -INF, -INF]):
        losses = case.loss(torch.tensor([row, [2.0, 1.5, 0.0]], device=device), first.repeat(2), reduction="none")
        assert losses.isnan().tolist() == [True, False], row
    for row in ([2.0], [2.0, -INF]):  # no non-target
        loss, gradient = loss_and_gradient(case, torch.tensor([row], device=device), first)
        assert loss == 0 and not gradient.any()
    loss, gradient = loss_and_gradient(case, torch.tensor([[-INF, 1.0, 0.0]], device=device), first)  # a masked target
    assert loss.isfinite().item() is not case.infinite
    assert gradient.isfinite().all() and (gradient[0, 0] < 0).item() is case.infinite
    assert case not in HINGES or gradient[0, 0] == -1
    assert_within(gradient.sum(), 0.0, 64.0, 1)
    for rows in (0, 3):  # everything ignored
        input, target = torch.randn(rows, 4).to(device), torch.full((rows,), -100, device=device)
        for reduction, check in {"mean": torch.isnan, "sum": torch.logical_not, "none": torch.logical_not}.items():
            loss, gradient = loss_and_gradient(case, input, target, reduction=reduction)
            assert check(loss).all() and not gradient.any()
    nothing = torch.zeros(2, 0, device=device), torch.full((2,), -100, device=device)  # no class
    assert case.loss(*nothing, reduction="sum") == 0


@each_loss
def test_half_precision_is_computed_in_float32(case, rng, device):
    for dtype in (torch.float16, torch.bfloat16):
        input, target = (torch.randn(8, 5, generator=rng).to(device) * 5).to(dtype), torch.randint(5, (8,), generator=rng).to(device)
        loss, gradient = loss_and_gradient(case, input, target)
        full, full_gradient = loss_and_gradient(case, input.float(), target)
        assert same_bits(loss, full) and same_bits(gradient, full_gradient.to(dtype))


@each_loss
def test_a_common_offset_changes_nothing(case, rng, device):
    # multiples of 1/8: the shifted logits are exact; losses with class counts make new logits, which are rounded
    input, target = torch.randint(-64, 65, (16, 8), generator=rng).to(device) / 8, torch.randint(8, (16,), generator=rng).to(device)
    for offset in (2.0**10, -(2.0**17)):
        for got, expected in zip(loss_and_gradient(case, input + offset, target), loss_and_gradient(case, input, target), strict=True):
            if "class_counts" in case.takes:
                assert_within(got, expected.double(), 30 * abs(offset), 2)
            else:
                assert same_bits(got, expected)


@each_loss
def test_inputs_are_never_modified(case, rng, device):
    logits = torch.randn(6, 5, generator=rng).to(device).requires_grad_() * 1
    target, weight = torch.tensor([0, 1, -100, 3, 4, 0], device=device), torch.rand(5).to(device)
    given = {"input": logits, "target": target, "weight": weight, **{name: x.to(device) for name, x in case.of_classes(5).items()}}
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in given.items()}
    case.function(**given).backward()
    for name, tensor in given.items():
        assert torch.equal(tensor.detach(), before[name][0]) and tensor._version == before[name][1]


@compiles
@each_other
def test_what_torch_does_to_functions_keeps_the_loss(case, rng, device):
    torch._dynamo.reset()
    input, target = torch.randn(6, 5, generator=rng).to(device), torch.tensor([0, 1, -100, 3, 4, 0], device=device)
    options = {name: value.float().to(device) for name, value in case.of_classes(5).items()}

    def loss(f: Tensor, y: Tensor, **more: Any) -> Tensor:
        return case.function(f, y, lam=LAM, **options, **more)

    value, gradient = loss_and_gradient(case, input, target, lam=LAM, **options)
    leaf = input.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(leaf, target)
    assert_within(compiled.detach(), value.double(), 64.0, 1)
    assert_within(torch.autograd.grad(compiled, leaf)[0], gradient.double(), 64.0, 1)
    assert_within(torch.func.grad(loss)(input, target), gradient.double(), 64.0, 1)
    assert_within(torch.func.jacfwd(loss)(input, target), gradient.double(), 64.0, 4)
    of_rows = torch.func.vmap(lambda f, y: loss(f, y, reduction="sum"))(input, target)
    assert_within(of_rows, loss(input, target, reduction="none").double(), 64.0, 2)


# modules


def module(case: Case, weight: Tensor | None = None, **options: Any) -> torch.nn.Module:
    return case.module(weight, **{**case.of_classes(5), **options})


@each_other
def test_module_is_its_function_with_the_arguments_stored(case, rng, device):
    input, target = torch.randn(6, 5, generator=rng).to(device) * 3, torch.tensor([0, 1, 3, 4, 2, 0], device=device)
    weight = torch.rand(5, generator=rng)
    options = {**case.options, "lam": LAM, "ignore_index": 2, "reduction": "none"}
    made = module(case, weight, **options).to(device)
    expected = case.loss(input, target, weight.to(device), **options)
    changed = module(case, weight).to(device)
    for name, value in options.items():
        setattr(changed, name, value)
    for twin in (made, changed, pickle.loads(pickle.dumps(made)), copy.deepcopy(made).eval()):
        assert same_bits(twin(input, target), expected) and repr(twin) == repr(made)
    of_classes = case.of_classes(5)
    call = repr(made).replace("(", "(weight, **of_classes, ", 1)
    again = eval(call, {"weight": weight, "of_classes": of_classes, case.module.__name__: case.module})
    assert same_bits(again.to(device)(input, target), expected)
    loaded = module(case, torch.ones(5), **options).to(device)
    loaded.load_state_dict(made.state_dict())
    assert same_bits(loaded(input, target), expected) and set(made.state_dict()) == {"weight", *of_classes}
    assert made.double()(input.double(), target).dtype == torch.float64 and made.to("meta").weight.is_meta
    assert not isinstance(made, torch.nn.CrossEntropyLoss) and not list(made.parameters())


@each_other
def test_module_takes_the_arguments_of_its_function(case):
    parameters = inspect.signature(case.function).parameters
    assert list(parameters)[:3] == ["input", "target", "weight"]
    assert dict(list(parameters.items())[2:]) == dict(inspect.signature(case.module).parameters)
    assert case.module.__name__.lower() == case.name.replace("_", "") + "loss"


# errors


WRONG: dict[str, list[tuple[dict[str, Any], type[Exception], str]]] = {
    "generalized_cross_entropy": [({"q": 0.0}, ValueError, "q must be above 0"), ({"q": 1.5}, ValueError, "q must be at most 1, got 1.5")],
    "symmetric_cross_entropy": [({"alpha": -1.0}, ValueError, "alpha must be"), ({"beta": math.inf}, ValueError, "beta must be")],
    "normalized_reverse_cross_entropy": [({"alpha": -1.0}, ValueError, "alpha must be"), ({"beta": "1"}, TypeError, "beta must be")],
    "taylor_cross_entropy": [({"order": 0}, ValueError, "order must be at least 1"), ({"order": 2.5}, TypeError, "order must be an int")],
    "focal_cross_entropy": [({"gamma": -1.0}, ValueError, "gamma must be")],
    "dual_focal_cross_entropy": [({"gamma": None}, TypeError, "gamma must be")],
    "poly1_cross_entropy": [({"epsilon": math.nan}, ValueError, "epsilon must be finite")],
    "confidence_penalty": [({"beta": -0.1}, ValueError, "beta must be")],
    "max_suppression": [({"alpha": -0.1}, ValueError, "alpha must be")],
    "margin_label_smoothing": [({"margin": -1.0}, ValueError, "margin must be"), ({"alpha": -1.0}, ValueError, "alpha must be")],
    "logit_adjusted": [
        ({"tau": math.inf}, ValueError, "tau must be finite"),
        ({"class_counts": torch.ones(4)}, ValueError, r"class_counts must be .* 5 classes.* got float32 of shape \(4,\); torch.bincount"),
        ({"class_counts": torch.ones(5, dtype=torch.bool)}, ValueError, "class_counts must be .* got bool"),
        ({"class_counts": [1.0] * 5}, TypeError, r"class_counts must be a torch.Tensor.*torch.as_tensor\(class_counts\)"),
        ({"class_counts": torch.tensor([3, 0, 1, 1, 1])}, ValueError, "class_counts must be above 0, but holds 0"),
    ],
    "ldam": [({"max_margin": -1.0}, ValueError, "max_margin must be"), ({"scale": 0.0}, ValueError, "scale must be above 0.*30")],
}


@each_other
def test_wrong_arguments_are_named(case):
    input, target = torch.zeros(2, 5), torch.tensor([0, 1])
    common: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"lam": -1.0}, ValueError, "lam must be"),
        ({"reduction": "foo"}, ValueError, "reduction must be"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be"),
        ({"divergence": "kl_qu"}, TypeError, rf"^{case.name}\(\) got an unexpected keyword argument 'divergence'"),
        ({"target": torch.rand(2, 5)}, RuntimeError, "target must be int64 class indices"),
        ({"target": torch.tensor([0, 5])}, IndexError, "target must hold class indices"),
        ({"weight": torch.ones(4)}, RuntimeError, "weight must have one entry"),
    ]
    for wrong, error, words in [*WRONG[case.name], *common]:
        with pytest.raises(error, match=words):
            case.function(**{"input": input, "target": target, **case.of_classes(5), **wrong})
    with pytest.raises(TypeError, match=r"weight must be .* pass every other argument by name"):
        case.module(0.3, **case.of_classes(5))
    with pytest.raises(TypeError, match=rf"^{case.module.__name__}\(\) got an unexpected keyword argument 'foo'"):
        module(case, foo=1.0)


def test_a_module_without_its_counts_says_so():
    with pytest.raises(TypeError, match=r"LDAMLoss\(\) needs class_counts, a tensor with an entry for each class; pass class_counts="):
        largemargin.LDAMLoss()
    with pytest.raises(TypeError, match=r"class_counts must be a torch\.Tensor"):
        largemargin.LogitAdjustedLoss(class_counts=[1, 2])
