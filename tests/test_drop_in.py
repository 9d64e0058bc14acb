"""What those meet who come from nn.CrossEntropyLoss or another library: tools that look at its type, weights of other types, writes."""

import inspect
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import largemargin
from combinations import every
from largemargin import LargeMarginCrossEntropyLoss, OpaqueLargeMarginLoss, large_margin_cross_entropy
from largemargin.heads import CosineLinear
from measure import same_bits

OPTIONS = [
    {},
    {"weight": torch.linspace(0.5, 1.5, 5), "label_smoothing": 0.1, "divergence": "kl_qu"},
    {"lam": 0.0, "hard_bias": 1.0, "ignore_index": 2, "reduction": "sum"},
    {"reduction": "none", "backend": "reference"},
]


def small_problem() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(0), requires_grad=True), torch.arange(8) % 5


# the form of the loss that is no subclass


@every("name, value", {"lam": 5.0, "ignore_index": 0, "label_smoothing": 0.2, "reduction": "sum", "hard_bias": 1.0}.items())
def test_the_opaque_loss_follows_its_attributes(name, value):
    logits, target = small_problem()
    opaque, ours = OpaqueLargeMarginLoss(), LargeMarginCrossEntropyLoss()
    assert getattr(opaque, name) == getattr(ours, name)
    for loss in (opaque, ours):
        setattr(loss, name, value)
    assert same_bits(opaque(logits, target), ours(logits, target))


@every("options", OPTIONS)
@every("probabilities", [False, True])
def test_the_opaque_loss_is_the_same_loss_of_another_type(options, probabilities):
    logits, target = small_problem()
    if probabilities:
        if options.get("ignore_index", -1) >= 0:
            pytest.skip("ignore_index needs class indices")
        target = logits.detach().flip(0).softmax(-1)
    opaque, ours = OpaqueLargeMarginLoss(**options), LargeMarginCrossEntropyLoss(**options)
    assert not isinstance(opaque, (nn.CrossEntropyLoss, nn.modules.loss._Loss))
    assert not any(isinstance(module, nn.CrossEntropyLoss) for module in opaque.modules())
    found, expected = opaque(logits, target), ours(logits, target)
    assert same_bits(found, expected)
    assert same_bits(*(torch.autograd.grad(loss.sum(), logits)[0] for loss in (found, expected)))
    assert repr(opaque).partition("(")[2] == repr(ours).partition("(")[2]
    assert opaque.reduction == ours.reduction


def test_the_opaque_loss_takes_the_arguments_and_the_state_of_the_other():
    assert inspect.signature(OpaqueLargeMarginLoss) == inspect.signature(LargeMarginCrossEntropyLoss)
    weight = torch.linspace(0.5, 1.5, 5)
    opaque = OpaqueLargeMarginLoss(torch.ones(5))
    opaque.load_state_dict(LargeMarginCrossEntropyLoss(weight).state_dict())
    assert same_bits(opaque.weight, weight)
    with pytest.raises(ValueError, match="lam"):
        OpaqueLargeMarginLoss(lam=-1.0)


def test_a_tool_that_knows_the_softmax_loss_by_its_type_refuses_the_opaque_one():
    curvlinops = pytest.importorskip("curvlinops")
    network = nn.Linear(3, 5)
    data = [(torch.randn(4, 3), torch.arange(4))]

    def kfac(criterion: nn.Module) -> object:
        return curvlinops.KFACLinearOperator(network, criterion, list(network.parameters()), data, check_deterministic=False)

    kfac(LargeMarginCrossEntropyLoss())  # taken for the softmax loss: why there is another form
    with pytest.raises(ValueError, match="loss"):
        kfac(OpaqueLargeMarginLoss())


# weights

WEIGHTS = [np.ones(5), [1.0] * 5, (1.0,) * 5]
TAKERS = [
    getattr(largemargin, name) for name in largemargin.__all__ if "weight" in inspect.signature(getattr(largemargin, name)).parameters
]


def call_with_weight(taker: Callable[..., object], weight: object) -> object:
    counts = {"class_counts": torch.ones(5)} if "class_counts" in inspect.signature(taker).parameters else {}
    if isinstance(taker, type):
        sizes = (5, 5) if taker is largemargin.LinearLargeMarginCrossEntropyLoss else ()
        return taker(*sizes, weight=weight, **counts)
    logits, target = small_problem()
    linear = (torch.ones(5, 5),) if "linear" in taker.__name__ else ()
    group = {"group": None} if "sharded" in taker.__name__ else {}
    return taker(logits, *linear, target, weight=weight, **group, **counts)


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: type(weight).__name__)
def test_weights_that_are_no_tensor_are_refused_with_the_fix(weight):
    for taker in TAKERS:
        with pytest.raises(TypeError, match=r"^weight must be .*torch\.as_tensor\(weight\)$"):
            call_with_weight(taker, weight)
        call_with_weight(taker, torch.as_tensor(weight))


@pytest.mark.parametrize(("criterion", "name"), [(LargeMarginCrossEntropyLoss, "lam"), (largemargin.MulticlassHingeLoss, "margin")])
def test_a_number_in_the_place_of_the_weight_is_told_its_name(criterion, name):
    with pytest.raises(TypeError, match=f"{name}=0.5$"):
        criterion(0.5)


# writing into the logits between forward and backward

CASES = [
    ({}, torch.float32),
    ({}, torch.bfloat16),
    ({}, torch.float16),
    ({}, torch.float64),
    ({"reduction": "sum"}, torch.float32),
    ({"reduction": "none"}, torch.float32),
    ({"backend": "reference"}, torch.float32),
    ({"donate": True}, torch.float32),
    ({"label_smoothing": 0.1}, torch.float32),
]


@every("factor", [1.0, 3.0])
@every("options, dtype", CASES)
def test_writing_into_the_logits_gives_the_gradient_of_before_or_raises(options, dtype, factor):
    leaf, target = small_problem()
    leaf = leaf.detach().to(dtype).requires_grad_()
    (expected,) = torch.autograd.grad(factor * large_margin_cross_entropy(leaf * 1, target, **options).sum(), leaf)
    logits = leaf * 1
    loss = factor * large_margin_cross_entropy(logits, target, **options).sum()
    with torch.no_grad():
        logits.add_(torch.arange(5))
    try:
        (found,) = torch.autograd.grad(loss, leaf)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert same_bits(found, expected)


# ArcFace of pytorch-metric-learning


@pytest.mark.parametrize("pull", [0.0, 8.0])
def test_arcface_has_the_values_of_pytorch_metric_learning_below_pi_minus_m(pull):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    theirs = losses.ArcFaceLoss(10, 16, margin=28.6, scale=64)
    target = torch.arange(8)
    embeddings = torch.randn(8, 16) + pull * F.normalize(theirs.W.detach().T[target])
    values = []
    for margin in (math.radians(28.6), 0.5):
        head = CosineLinear(16, 10, scale=64.0, margin=margin, kind="arcface")
        with torch.no_grad():
            head.weight.copy_(theirs.W.T)
        values.append(LargeMarginCrossEntropyLoss(lam=0)(head(embeddings, target), target).item())
    expected = theirs(embeddings, target).item()
    assert values[0] == pytest.approx(expected, rel=2e-5)
    assert values[1] != pytest.approx(expected, rel=2e-4)


def test_arcface_differs_from_pytorch_metric_learning_beyond_pi_minus_m():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    torch.manual_seed(0)
    theirs = losses.ArcFaceLoss(10, 16, margin=28.6, scale=64)
    target, margin = torch.arange(8), math.radians(28.6)
    embeddings = -theirs.W.detach().T[target]  # at an angle of pi
    head = CosineLinear(16, 10, scale=64.0, margin=margin, kind="arcface")
    with torch.no_grad():
        head.weight.copy_(theirs.W.T)
    ours = LargeMarginCrossEntropyLoss(lam=0)(head(embeddings, target), target).item()
    offset = 64 * (margin * math.sin(margin) - (1 - math.cos(margin)))  # how much lower their target's logit is
    assert theirs(embeddings, target).item() - ours == pytest.approx(offset, rel=1e-3)
