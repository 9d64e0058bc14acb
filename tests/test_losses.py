"""The modules: each is its function with the arguments stored."""

import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import largemargin
from combinations import every
from largemargin import (
    LargeMarginCrossEntropyLoss,
    LargeMarginInSoftmaxLoss,
    LinearLargeMarginCrossEntropyLoss,
    large_margin_cross_entropy,
)
from measure import assert_within, same_bits
from registry import HINGES, LARGE_MARGIN, LOSSES

MODULES = [*(loss.module for loss in LOSSES), LargeMarginInSoftmaxLoss]
each_module = pytest.mark.parametrize("module", MODULES)
each_twin = pytest.mark.parametrize(
    ("module", "function", "settings"), [(loss.module, loss.function, settings) for loss in LOSSES for settings in loss.settings]
)


@pytest.fixture
def batch(rng, device) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 5, generator=rng).to(device) * 3, torch.tensor([0, 1, 3, 4, 2, 0], device=device)


def of_the_author(input: Tensor, target: Tensor, reg_lambda: float, deg_logit: float | None, reduction: str) -> Tensor:
    """The loss of the author's own class, rewritten from its description: the target is masked by -1e6 instead of left out."""
    mask = nn.functional.one_hot(target, input.shape[1]).to(input.dtype)
    if deg_logit is not None:
        input = input - deg_logit * mask
    cross_entropy = nn.functional.cross_entropy(input, target, reduction=reduction)
    masked = input - 1e6 * mask
    uniform = 1 / (input.shape[1] - 1)
    regulariser = 0.5 * ((masked.softmax(1) - uniform) * masked.log_softmax(1) * (1 - mask)).sum(1)
    return cross_entropy + reg_lambda * (regulariser if reduction == "none" else getattr(regulariser, reduction)())


@each_twin
@pytest.mark.parametrize("weighted", [False, True])
def test_module_equals_its_function(module, function, settings, weighted, batch, device):
    weight = torch.rand(5).to(device) if weighted else None
    leaves = [batch[0].clone().requires_grad_() for _ in range(2)]
    losses = [module(weight, **settings)(leaves[0], batch[1]), function(leaves[1], batch[1], weight, **settings)]
    assert same_bits(losses[0].detach(), losses[1].detach())
    gradients = [torch.autograd.grad(loss.sum(), leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
    assert same_bits(*gradients)


def test_module_takes_probabilities(batch, rng, device):
    input, target = batch[0], torch.rand(6, 5, generator=rng).to(device)
    assert same_bits(LargeMarginCrossEntropyLoss()(input, target), large_margin_cross_entropy(input, target))


@pytest.mark.parametrize(("module", "function"), [(loss.module, loss.function) for loss in LOSSES])
def test_module_takes_the_arguments_of_its_function(module, function):
    of_module = inspect.signature(module).parameters
    of_function = dict(list(inspect.signature(function).parameters.items())[2:])  # without input and target
    for name, parameter in of_module.items():
        assert (parameter.kind, parameter.default) == (of_function[name].kind, of_function[name].default), name
    assert set(of_function) - set(of_module) <= {"backend"}


def test_only_losses_of_a_softmax_are_cross_entropies():
    # frameworks ask this to decide whether predictions are a softmax away from the model's output
    assert [issubclass(module, nn.CrossEntropyLoss) for module in MODULES] == [True, False, False, False, True]
    assert all(issubclass(module, nn.Module) for module in MODULES)


@each_module
@pytest.mark.parametrize("weighted", [False, True])
def test_survives_pickle_and_deepcopy(module, weighted, batch, device):
    original = module(weight=torch.rand(5).to(device) if weighted else None, ignore_index=2, reduction="none")
    for twin in (pickle.loads(pickle.dumps(original)), copy.deepcopy(original)):
        assert type(twin) is module
        assert same_bits(twin(*batch), original(*batch))
        assert repr(twin) == repr(original)
        if weighted:
            assert twin.weight is not original.weight


@each_module
def test_state_dict_is_the_weight(module, device):
    assert list(module().state_dict()) == []
    assert list(module().parameters()) == []
    weight = torch.rand(5).to(device)
    loaded = module(weight=torch.ones(5, device=device))
    loaded.load_state_dict(module(weight=weight).state_dict())
    assert list(loaded.state_dict()) == ["weight"] and torch.equal(loaded.weight, weight)


@each_module
def test_to_moves_the_weight(module, batch, device):
    loss = module(weight=torch.rand(5).to(device))
    assert loss.to(torch.float64).weight.dtype == torch.float64
    assert loss(batch[0].double(), batch[1]).dtype == torch.float64
    assert loss.to("meta").weight.device.type == "meta"


@every(
    "module, options",
    [
        *((loss.module, settings) for loss in LOSSES for settings in loss.settings),
        (LargeMarginInSoftmaxLoss, {}),
        (LargeMarginInSoftmaxLoss, {"reg_lambda": 0.5, "deg_logit": True, "ignore_index": 2, "reduction": "none"}),
    ],
)
def test_repr_is_the_call_that_makes_it(module, options, batch):
    loss = module(**options)
    again = eval(repr(loss), vars(largemargin) | {module.__name__: module})
    assert repr(again) == repr(loss)
    assert same_bits(again(*batch), loss(*batch))


def linear(**options) -> LinearLargeMarginCrossEntropyLoss:
    torch.manual_seed(0)
    return LinearLargeMarginCrossEntropyLoss(5, 5, **options)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        *((make, settings) for make in (LargeMarginCrossEntropyLoss, linear) for settings in LARGE_MARGIN.settings[1:]),
        (LargeMarginInSoftmaxLoss, {"reg_lambda": 0.5, "deg_logit": True, "ignore_index": 2, "reduction": "sum"}),
        *((hinge.module, settings) for hinge in HINGES for settings in hinge.settings[1:]),
    ],
)
def test_a_setting_changed_later_is_that_of_a_new_module(make, settings, batch, device):
    changed, new = make().to(device), make(**settings).to(device)
    assert repr(changed) != repr(new) and not torch.equal(changed(*batch), new(*batch))
    for name, value in settings.items():
        assert hasattr(changed, name)
        setattr(changed, name, value)
    assert repr(changed) == repr(new) and same_bits(changed(*batch), new(*batch))


@each_module
def test_training_and_evaluation_are_one_loss(module, batch):
    loss = module()
    assert same_bits(loss.train()(*batch), loss.eval()(*batch))


@every(
    "module, options, error",
    [
        (LargeMarginCrossEntropyLoss, {"lam": -1.0}, ValueError),
        (LargeMarginCrossEntropyLoss, {"lam": math.nan}, ValueError),
        (LargeMarginCrossEntropyLoss, {"lam": torch.tensor(0.3)}, TypeError),
        (LargeMarginCrossEntropyLoss, {"divergence": "foo"}, ValueError),
        (LargeMarginCrossEntropyLoss, {"hard_bias": math.inf}, ValueError),
        (LargeMarginCrossEntropyLoss, {"label_smoothing": 1.5}, RuntimeError),
        (LargeMarginCrossEntropyLoss, {"label_smoothing": -0.1}, ValueError),
        (LargeMarginCrossEntropyLoss, {"backend": "foo"}, ValueError),
        (LargeMarginInSoftmaxLoss, {"reg_lambda": -1.0}, ValueError),
        (LargeMarginInSoftmaxLoss, {"reg_lambda": None}, TypeError),
        (LargeMarginInSoftmaxLoss, {"deg_logit": math.inf}, ValueError),
        (LargeMarginInSoftmaxLoss, {"deg_logit": "1"}, TypeError),
        *((hinge.module, {"margin": math.nan}, ValueError) for hinge in HINGES),
        *((hinge.module, {"margin": "1"}, TypeError) for hinge in HINGES),
        *((module, {"reduction": "foo"}, ValueError) for module in MODULES),
        *((module, {"reduction": None}, ValueError) for module in MODULES),
        *((module, {"ignore_index": 1.5}, TypeError) for module in MODULES),
        *((module, {"weight": [1.0, 2.0]}, TypeError) for module in MODULES),
    ],
)
def test_bad_arguments_raise_at_construction(module, options, error):
    with pytest.raises(error, match=f"^{next(iter(options))} must"):
        module(**options)


@each_module
def test_unknown_arguments_raise(module):
    with pytest.raises(TypeError, match="gamma"):
        module(gamma=2.0)


# the author's names


@every("scale", [0.1, 1.0, 10.0, 1000.0])
@every("reduction", ["none", "sum", "mean"])
@every("deg_logit", [None, False, True, 0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_authors_loss_has_the_authors_values(dtype, deg_logit, reduction, scale, rng, device):
    input = (torch.randn(32, 100, generator=rng, dtype=torch.float64).to(device) * scale).to(dtype)
    target = torch.randint(100, (32,), generator=rng).to(device)
    truth = of_the_author(input.double(), target, 0.3, deg_logit, reduction)
    assert_within(LargeMarginInSoftmaxLoss(deg_logit=deg_logit, reduction=reduction)(input, target), truth, truth.abs() + 10, 2)
    theirs = of_the_author(input, target, 0.7, deg_logit, reduction)
    ours = LargeMarginInSoftmaxLoss(0.7, deg_logit=deg_logit, reduction=reduction)(input, target)
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=2e-6)


def test_the_authors_arguments_in_the_authors_order(device):
    names = ["reg_lambda", "deg_logit", "weight", "size_average", "ignore_index", "reduce", "reduction"]
    assert list(inspect.signature(LargeMarginInSoftmaxLoss).parameters) == names
    weight = torch.rand(5).to(device)
    loss = LargeMarginInSoftmaxLoss(0.5, True, weight, None, 2, None, "none")
    assert (loss.lam, loss.hard_bias, loss.weight, loss.ignore_index, loss.reduction) == (0.5, 1.0, weight, 2, "none")
    assert loss.divergence == "symmetric" and loss.label_smoothing == 0


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize(
    ("size_average", "reduce", "reduction"), [(False, None, "sum"), (True, None, "mean"), (None, False, "none"), (None, True, "mean")]
)
def test_the_authors_deprecated_spelling_of_reduction(size_average, reduce, reduction, batch):
    loss = LargeMarginInSoftmaxLoss(size_average=size_average, reduce=reduce)
    assert loss.reduction == reduction
    assert same_bits(loss(*batch), LargeMarginInSoftmaxLoss(reduction=reduction)(*batch))


def test_what_the_authors_class_got_wrong_follows_this_library(batch, device):
    input, target = batch
    weight = torch.rand(5).to(device)
    half, spatial = input.half(), input.reshape(3, 2, 5).mT
    ignored = torch.tensor([0, -100, 3, 4, -100, 0], device=device)
    loss = LargeMarginInSoftmaxLoss(weight=weight)
    assert same_bits(loss(input, ignored), large_margin_cross_entropy(input, ignored, weight))
    assert same_bits(loss(half, target), large_margin_cross_entropy(half, target, weight))
    assert same_bits(loss(spatial, target.reshape(3, 2)), large_margin_cross_entropy(spatial, target.reshape(3, 2), weight))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_numbers_of_numpy_are_numbers(dtype):
    number = pytest.importorskip("numpy").dtype(dtype).type(0.5)
    assert LargeMarginCrossEntropyLoss(lam=number, hard_bias=number)(torch.zeros(2, 3), torch.tensor([0, 1])).isfinite()
