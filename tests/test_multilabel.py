"""The two-way loss, against the formula of its paper."""

import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from largemargin import TwoWayMultilabelLoss, two_way_multilabel
from measure import INF, assert_within, compiles, same_bits
from oracle import ctx


def of_the_paper(f: list[list[float]], t: list[list[int]], T: float = 4.0, T_negative: float = 1.0, reduction: str = "mean") -> float:
    """The mean over samples plus the mean over classes, at 50 digits."""
    total = ctx.mpf(0)
    for logits, labels in ((f, t), (list(zip(*f, strict=True)), list(zip(*t, strict=True)))):
        losses = []
        for row, has in zip(logits, labels, strict=True):
            positive = [ctx.exp(-ctx.mpf(x) / ctx.mpf(T)) for x, label in zip(row, has, strict=True) if label > 0]
            negative = [ctx.exp(ctx.mpf(x) / ctx.mpf(T_negative)) for x, label in zip(row, has, strict=True) if label == 0 and x != -INF]
            if positive:
                product = ctx.fsum(negative) ** ctx.mpf(T_negative) * ctx.fsum(positive) ** ctx.mpf(T)
                losses.append(ctx.log1p(product))
        total += ctx.fsum(losses) / (max(len(losses), 1) if reduction == "mean" else 1)
    return float(total)


def problem(rng: torch.Generator, device: torch.device, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    input = torch.randn(6, 5, generator=rng, dtype=torch.float64) * scale
    target = (torch.rand(6, 5, generator=rng) < 0.4).long()
    target[0, 0], target[2], target[:, 3] = -1, 0, 0  # an entry that does not count, a sample and a class without a positive
    return input.to(device), target.to(device)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_equals_the_paper(reduction, rng, device):
    for scale, (T, T_negative) in itertools.product((0.1, 3.0, 100.0, 1e4), ((4.0, 1.0), (1.0, 2.0))):
        input, target = problem(rng, device, scale)
        for dtype in (torch.float32, torch.float64):
            logits = input.float().to(dtype)
            truth = of_the_paper(logits.tolist(), target.tolist(), T, T_negative, reduction)
            loss = two_way_multilabel(logits, target, temperature=T, negative_temperature=T_negative, reduction=reduction)
            assert_within(loss, truth, 8 * (truth + 6 * scale + 4), 2)


def test_one_class_a_sample_is_the_softmax_loss_of_samples(rng, device):
    input, labels = torch.randn(6, 5, generator=rng, dtype=torch.float64).to(device), torch.tensor([0, 1, 4, 4, 2, 0], device=device)
    target = F.one_hot(labels, 5)
    # a column alone: its positive samples have no negative class, so only the way over samples is left
    columns = sum(two_way_multilabel(f, t, reduction="sum") for f, t in zip(input.split(1, 1), target.split(1, 1), strict=True))
    softmax = F.cross_entropy(input, labels, reduction="sum")
    assert_within(two_way_multilabel(input, target, reduction="sum"), columns + softmax, 64.0, 4)
    assert_within(two_way_multilabel(input.T, target.T), two_way_multilabel(input, target), 64.0, 4)


def test_entries_that_do_not_count_get_no_gradient(rng, device):
    input, target = problem(rng, device)
    leaf = input.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(two_way_multilabel(leaf, target), leaf)
    assert gradient[0, 0] == 0 and gradient[2, 3] == 0 and gradient.any(1)[[0, 1, 3, 4, 5]].all()
    moved = input.clone()
    moved[0, 0], moved[2, 3] = 100.0, -100.0
    assert same_bits(two_way_multilabel(moved, target), two_way_multilabel(input, target))
    for other in (target.to(torch.int8), target.double()):
        assert same_bits(two_way_multilabel(input, other), two_way_multilabel(input, target))
    assert same_bits(two_way_multilabel(input, target == 1), two_way_multilabel(input, target.clamp(min=0)))


def test_nothing_to_compare_is_a_loss_of_zero(rng, device):
    input = torch.randn(6, 5, generator=rng).to(device)
    for target in (torch.zeros(6, 5), torch.ones(6, 5), torch.full((6, 5), -1.0)):
        leaf = input.clone().requires_grad_()
        loss = two_way_multilabel(leaf, target.to(device))
        assert loss == 0 and not torch.autograd.grad(loss, leaf)[0].any()
    assert two_way_multilabel(input[:0], torch.zeros(0, 5, device=device)) == 0


def test_derivatives_of_both_orders(rng, device):
    input, target = problem(rng, device)
    assert gradcheck(lambda f: two_way_multilabel(f, target), input.requires_grad_(), check_batched_grad=True)
    assert gradgradcheck(lambda f: two_way_multilabel(f, target), input)


def test_a_masked_negative_is_left_out_and_extreme_logits_have_finite_derivatives(rng, device):
    input, target = problem(rng, device)
    target[1, 1] = 0
    without = target.clone()
    without[1, 1] = -1
    leaf = input.clone()
    leaf[1, 1] = -INF
    leaf.requires_grad_()
    loss = two_way_multilabel(leaf, target)
    assert_within(loss, two_way_multilabel(input, without), 32.0, 1)
    assert torch.autograd.grad(loss, leaf)[0].isfinite().all()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        leaf = (input.sign() * 1e4).to(dtype).requires_grad_()
        loss = two_way_multilabel(leaf, target)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert loss.isfinite() and gradient.isfinite().all() and torch.autograd.grad(gradient[0].sum(), leaf)[0].isfinite().all()
        assert same_bits(loss, two_way_multilabel(leaf.float(), target))


@compiles
def test_module_and_compiled_code_compute_the_same(rng, device):
    torch._dynamo.reset()
    input, target = problem(rng, device)
    module = TwoWayMultilabelLoss(temperature=2.0, negative_temperature=0.5, reduction="sum")
    expected = two_way_multilabel(input, target, temperature=2.0, negative_temperature=0.5, reduction="sum")
    again = eval(repr(module), {"TwoWayMultilabelLoss": TwoWayMultilabelLoss})
    for twin in (module, again, pickle.loads(pickle.dumps(module)), module.eval()):
        assert same_bits(twin(input, target), expected)
    assert_within(torch.compile(module, fullgraph=True, backend="aot_eager")(input, target), expected, 64.0, 1)


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (TypeError, {"input": [[1.0]]}, r"input must be a torch\.Tensor"),
        (ValueError, {"input": torch.zeros(3)}, r"input must be floating logits of shape \(N, C\), got float32 of shape \(3,\)"),
        (ValueError, {"input": torch.zeros(2, 3).long()}, "input must be floating logits"),
        (ValueError, {"target": torch.tensor([0, 1])}, r"target must have the shape of input, \(2, 3\).*one_hot converts class indices"),
        (ValueError, {"temperature": 0.0}, "temperature must be above 0, got 0.0; the paper uses 4"),
        (ValueError, {"negative_temperature": math.inf}, "negative_temperature must be finite"),
        (ValueError, {"reduction": "none"}, "reduction must be one of 'mean', 'sum'"),
        (TypeError, {"gamma": 1.0}, "gamma"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(error, options, words):
    with pytest.raises(error, match=words):
        two_way_multilabel(**{"input": torch.zeros(2, 3), "target": torch.zeros(2, 3), **options})
    if not {"input", "target"} & set(options):
        with pytest.raises(error, match=words):
            TwoWayMultilabelLoss(**options)
