"""The losses on the classification margin: (1) with the hinge and with softplus, and (14). Other laws of theirs are in test_row_losses."""

import math

import pytest
import torch
import torch.nn.functional as F

import oracle
import strategies
from combinations import every
from largemargin import crammer_singer_hinge, hard_margin_softplus, multiclass_hinge, row_stats
from measure import INF, RowScale, assert_within
from problems import value_and_gradient
from properties import given, st
from registry import DTYPES

# loss -> the paper's equation
EQUATIONS = {
    multiclass_hinge: oracle.multiclass_hinge,
    crammer_singer_hinge: oracle.crammer_singer,
    hard_margin_softplus: oracle.hard_margin_softplus,
}
SPARSE = (crammer_singer_hinge, hard_margin_softplus)
each_hinge = pytest.mark.parametrize("hinge", EQUATIONS, ids=lambda hinge: hinge.__name__)


@each_hinge
@given(row=strategies.rows(), margin=st.sampled_from([1.0, 0.0, -2.0, 5.0]))
def test_loss_equals_the_paper(hinge, row, margin, device):
    scale = RowScale(*row)
    truth = float(EQUATIONS[hinge](row.logits, row.target, margin))
    if hinge is hard_margin_softplus:
        natural = min(truth, 1.0) * (scale.log_odds + abs(margin)) + truth
    else:
        natural = scale.log_odds + abs(margin) + (scale.depth if hinge is multiclass_hinge else 0)
    for dtype in DTYPES:
        loss = hinge(torch.tensor(row.logits, dtype=dtype, device=device), torch.tensor(row.target, device=device), margin=margin)
        assert_within(loss, truth, natural, 2)


@each_hinge
@given(data=st.data(), batch=strategies.batches())
def test_weight_ignored_rows_and_reduction(hinge, data, batch, device):
    weight, reduction = data.draw(strategies.weights(batch.num_classes)), data.draw(strategies.reductions)
    kept = [y != batch.ignore_index for y in batch.targets]
    w = [(weight[y] if weight else 1.0) if keep else 0.0 for y, keep in zip(batch.targets, kept, strict=True)]
    rows = zip(batch.logits, batch.targets, w, kept, strict=True)
    truth = [float(EQUATIONS[hinge](f, y)) * weight_y if keep else 0.0 for f, y, weight_y, keep in rows]
    reach = max(
        (RowScale(f, y).log_odds + RowScale(f, y).depth for f, y, keep in zip(batch.logits, batch.targets, kept, strict=True) if keep),
        default=0,
    )
    count = {"none": 1.0, "sum": 1.0, "mean": sum(w)}[reduction]
    expected = truth if reduction == "none" else sum(truth) / count if count else math.nan
    loss = hinge(
        torch.tensor(batch.logits, dtype=torch.float64, device=device).reshape(len(w), batch.num_classes),
        torch.tensor(batch.targets, dtype=torch.int64, device=device),
        None if weight is None else torch.tensor(weight, dtype=torch.float64, device=device),
        ignore_index=batch.ignore_index,
        reduction=reduction,
    )
    assert_within(loss, expected, (1 + reach) * max(1.0, sum(w)) / (count or 1.0), 3)


def test_dense_hinge_is_torchs_multi_margin_loss_over_k_in_place_of_c(rng, device):
    input, target = torch.randn(16, 7, generator=rng, dtype=torch.float64).to(device) * 2, torch.randint(7, (16,), generator=rng).to(device)
    for margin in (1.0, 0.25):
        for reduction in ("none", "sum", "mean"):
            theirs = F.multi_margin_loss(input, target, margin=margin, reduction=reduction) * 7 / 6
            assert_within(multiclass_hinge(input, target, margin=margin, reduction=reduction), theirs, 32.0, 1)


def test_mean_divides_by_the_summed_weights_where_torch_divides_by_the_rows(rng, device):
    input, target = torch.randn(16, 7, generator=rng, dtype=torch.float64).to(device), torch.randint(7, (16,), generator=rng).to(device)
    weight = torch.rand(7, generator=rng, dtype=torch.float64).to(device) + 0.5
    theirs = F.multi_margin_loss(input, target, weight=weight, reduction="sum") * 7 / 6
    assert_within(multiclass_hinge(input, target, weight), theirs / weight[target].sum(), 16.0, 1)


@every("dtype", DTYPES)
@every("hinge", SPARSE)
def test_sparse_hinges_move_only_the_target_and_the_largest_other(hinge, dtype, rng, device):
    input, target = (torch.randn(64, 20, generator=rng).to(device) * 3).to(dtype), torch.randint(20, (64,), generator=rng).to(device)
    _, gradient = value_and_gradient(hinge, input, target, reduction="sum")
    others = input.scatter(1, target[:, None], -INF)
    touched = F.one_hot(target, 20).bool() | F.one_hot(others.argmax(1), 20).bool()
    assert not gradient[~touched].any()
    lead = (input.gather(1, target[:, None]) - others.amax(1, keepdim=True))[:, 0].double()
    slope = torch.sigmoid(1 - lead) if hinge is hard_margin_softplus else (lead < 1).double()
    assert_within(gradient.gather(1, target[:, None])[:, 0], -slope, 1 + lead.abs(), 2)
    assert_within(gradient.gather(1, others.argmax(1, keepdim=True))[:, 0], slope, 1 + lead.abs(), 2)


def test_dense_hinge_moves_every_violating_class(rng, device):
    input, target = torch.randn(64, 20, generator=rng, dtype=torch.float64).to(device), torch.randint(20, (64,), generator=rng).to(device)
    _, gradient = value_and_gradient(multiclass_hinge, input, target, reduction="sum")
    is_target = F.one_hot(target, 20).bool()
    violates = ((input - input.gather(1, target[:, None]) + 1 > 0) & ~is_target).double()
    expected = torch.where(is_target, -violates.sum(1, keepdim=True) / 19, violates / 19)
    assert_within(gradient, expected, 1.0, 1)


@each_hinge
def test_gradcheck(hinge, rng, device):
    input, target = torch.randn(16, 7, generator=rng, dtype=torch.float64).to(device) * 2, torch.randint(7, (16,), generator=rng).to(device)
    assert torch.autograd.gradcheck(lambda f: hinge(f, target, reduction="none"), input.requires_grad_())


def test_the_margin_is_log_odds_plus_rho(rng, device):
    input, target = torch.randn(16, 8, generator=rng).to(device) * 3, torch.randint(8, (16,), generator=rng).to(device)
    stats = row_stats(input, target)
    others = input.double().scatter(1, target[:, None], -INF)
    margin = input.double().gather(1, target[:, None])[:, 0] - others.amax(1)
    assert_within(stats.log_odds + stats.rho, margin, 16.0, 1)


def test_the_bound_of_footnote_1(device):
    # rho bounds the margin strictly for the hinge: the loss is 0 exactly from there on; softly for the softplus, which is never 0
    margins = torch.tensor([-1.0, 0.0, 0.5, 1.0, 1.5, 30.0], device=device)
    input = torch.stack([margins, torch.zeros(6, device=device), torch.full((6,), -2.0, device=device)], 1)
    target = torch.zeros(6, dtype=torch.long, device=device)
    assert (crammer_singer_hinge(input, target, reduction="none") == 0).tolist() == [False, False, False, True, True, True]
    soft = hard_margin_softplus(input, target, reduction="none")
    assert (soft > 0).all() and (soft[margins >= 1] <= math.log(2) + 1e-7).all() and (soft.diff() < 0).all()
    assert_within(soft[-1], math.exp(-29), math.exp(-29), 16)
