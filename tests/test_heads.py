"""What all heads have in common: they work with every loss, and over ranks."""

import inspect

import numpy as np
import pytest
import torch

import on_ranks
from largemargin import (
    HardMarginSoftplusLoss,
    LargeMarginCrossEntropyLoss,
    heads,
    large_margin_cross_entropy,
    schedules,
)
from measure import compiles
from registry import HEADS
from row_losses import ROW_LOSSES

MAKERS = [
    on_ranks.lsoftmax,
    on_ranks.gaussian_mixture,
    on_ranks.super_symmetric,
    on_ranks.cosface,
    on_ranks.arcface,
    on_ranks.sphereface,
    on_ranks.t_vmf,
]
MODULES = [value for value in map(heads.__dict__.get, heads.__all__) if inspect.isclass(value)]
each_head = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def test_the_registry_has_every_head():
    assert {type(make(6, 4)) for make in HEADS.values()} == set(MODULES)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("make", [*MAKERS, on_ranks.center], ids=lambda make: make.__name__)
def test_distributed_data_parallel_has_the_gradients_of_all_rows(ranks, make):
    ranks.assert_on(2, on_ranks.head_under_ddp, make)


@pytest.mark.xdist_group("ranks")
def test_the_classes_of_a_cosine_head_can_be_split(ranks):
    ranks.assert_on(2, on_ranks.cosface_in_the_sharded_loss)


@each_head
def test_every_loss_takes_the_logits_of_every_head(make, rng, device):
    head = make().to(device)
    features = torch.randn(2, 4, 6, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    target = torch.tensor([[0, 1, 2, 3], [3, -100, 1, 0]], device=device)
    for loss in (large_margin_cross_entropy, *(case.loss for case in ROW_LOSSES)):
        logits = head(features, target)
        value = loss(logits.movedim(-1, 1), target)
        (gradient,) = torch.autograd.grad(value, features)
        assert logits.shape == (2, 4, 4) and value.isfinite() and gradient.isfinite().all()
        assert (gradient[1, 1] == 0).all()  # the ignored row


@each_head
def test_prediction_never_knows_the_label(make, rng, device):
    head, target = make().to(device), torch.arange(7, device=device) % 4
    features = torch.randn(7, 6, generator=rng, dtype=torch.float64).to(device)
    assert torch.equal(head.eval()(features, target), head(features))
    others = torch.ones(7, 4, dtype=torch.bool, device=device).scatter(1, target.unsqueeze(1), False)
    assert torch.equal(head.train()(features, target)[others], head(features)[others])


@pytest.mark.parametrize("module", MODULES)
def test_features_that_do_not_fit_are_named_with_and_without_a_target(module):
    head, target = module(6, 4), torch.tensor([0, 1, 2])
    for features in (torch.zeros(3, 5), torch.zeros(3, 6, dtype=torch.int64), torch.tensor(0.0)):
        for call in ((features, target), *([] if module is heads.CenterLoss else [(features,)])):
            with pytest.raises(ValueError, match=r"features must be floating of shape \(\.\.\., in_features=6\), got "):
                head(*call)


@pytest.mark.parametrize("module", MODULES)
def test_features_come_before_classes_everywhere(module):
    assert list(inspect.signature(module).parameters)[:2] == ["in_features", "num_classes"]
    assert "in_features=6, num_classes=4" in repr(module(6, 4))


NUMPYS = {
    "LargeMarginCrossEntropyLoss": lambda x: LargeMarginCrossEntropyLoss(lam=x, hard_bias=x, label_smoothing=x),
    "HardMarginSoftplusLoss": lambda x: HardMarginSoftplusLoss(margin=x),
    "CosineLinear": lambda x: heads.CosineLinear(6, 4, scale=x, margin=x),
    "TVMFLinear": lambda x: heads.TVMFLinear(6, 4, kappa=x, scale=x),
    "GaussianMixtureHead": lambda x: heads.GaussianMixtureHead(6, 4, alpha=x, likelihood_weight=x),
    "NoisySoftmaxLinear": lambda x: heads.NoisySoftmaxLinear(6, 4, alpha_squared=x),
    "CenterLoss": lambda x: heads.CenterLoss(6, 4, alpha=x),
    "AnnealedLambda": lambda x: schedules.AnnealedLambda(x, x, x, x),
    "SteppedAlpha": lambda x: schedules.SteppedAlpha(x, x + 1, x.astype(int) + 2, x),
    "GradualWeight": lambda x: schedules.GradualWeight(x.astype(int) + 2, x, x),
}


@pytest.mark.parametrize("make", NUMPYS.values(), ids=NUMPYS)
@compiles
def test_modules_made_with_numbers_of_numpy_compile(make, rng, device):
    torch._dynamo.reset()  # all share one wrapper, of which torch keeps only so many compilations
    module = make(np.float64(0.25)).to(device).eval()
    batch = torch.randn(3, 6, generator=rng).to(device), torch.tensor([0, 3, 1], device=device)
    inputs = () if isinstance(module, schedules.Schedule) else batch
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), module(*inputs))


def test_public_names_are_there():
    assert all(hasattr(heads, name) for name in heads.__all__)


@pytest.mark.parametrize(
    "head",
    [
        heads.SuperSymmetricLinear(4, 3),
        heads.TVMFLinear(4, 3),
        heads.CosineLinear(4, 3, margin=0.0),
        heads.CosineLinear(4, 3, kind="sphereface", margin=1),
        heads.NoisySoftmaxLinear(4, 3, alpha_squared=0.0),
    ],
    ids=str,
)
def test_a_head_without_a_margin_never_reads_the_target(head):
    head.zero_grad()
    gradient = torch.func.grad(lambda x: head(x, torch.tensor([9])).sum())(torch.ones(1, 4))  # labels cannot be looked at here
    assert torch.equal(gradient, torch.func.grad(lambda x: head(x).sum())(torch.ones(1, 4)))


@pytest.mark.parametrize(
    ("head", "name", "value"),
    [
        (heads.CosineLinear(4, 3), "kind", "ArcFace"),
        (heads.CosineLinear(4, 3, kind="sphereface"), "margin", 1.5),
        (heads.LSoftmaxLinear(4, 3), "angular_multiplier", 0),
        (heads.TVMFLinear(4, 3), "kappa", -1.0),
        (heads.NoisySoftmaxLinear(4, 3), "alpha_squared", -1.0),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_attribute_that_was_changed_is_checked_when_it_counts(head, name, value):
    setattr(head, name, value)
    with pytest.raises(ValueError, match=name):
        head(torch.ones(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize(("head", "name"), [(heads.CenterLoss(4, 3), "as_parameter"), (heads.GaussianMixtureHead(4, 3), "covariance")])
def test_what_a_head_was_built_with_cannot_be_changed(head, name):
    with pytest.raises(AttributeError):
        setattr(head, name, True)
