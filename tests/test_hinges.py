"""The losses on the classification margin: (1) with the hinge and with softplus, and (14)."""

import math

import pytest
import torch
import torch.nn.functional as F

import oracle
import strategies
from combinations import every
from largemargin import crammer_singer_hinge, hard_margin_softplus, multiclass_hinge, row_stats
from measure import INF, RowScale, assert_within, same_bits
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


@pytest.mark.parametrize("dtype", DTYPES)
@each_hinge
@given(row=strategies.rows(), margin=st.sampled_from([1.0, 0.0, -2.0, 5.0]))
def test_loss_equals_the_paper(hinge, dtype, row, margin, device):
    loss = hinge(torch.tensor(row.logits, dtype=dtype, device=device), torch.tensor(row.target, device=device), margin=margin)
    scale = RowScale(*row)
    truth = float(EQUATIONS[hinge](row.logits, row.target, margin))
    if hinge is hard_margin_softplus:
        natural = min(truth, 1.0) * (scale.log_odds + abs(margin)) + truth
    else:
        natural = scale.log_odds + abs(margin) + (scale.depth if hinge is multiclass_hinge else 0)
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


@every("positions", [(4,), (2, 3)])
@each_hinge
def test_k_dimensions_equal_the_flattened_rows(hinge, positions, rng, device):
    input, target = torch.randn(3, 5, *positions, generator=rng).to(device), torch.randint(5, (3, *positions), generator=rng).to(device)
    target[0, 0] = -100
    for reduction in ("none", "sum", "mean"):
        loss, gradient = value_and_gradient(hinge, input, target, reduction=reduction)
        flat, flat_gradient = value_and_gradient(hinge, input.movedim(1, -1).reshape(-1, 5), target.flatten(), reduction=reduction)
        assert_within(loss.flatten(), flat.flatten(), 32.0, 1)
        assert_within(gradient.movedim(1, -1).reshape(-1, 5), flat_gradient, 2.0, 1)


@each_hinge
def test_masked_classes_are_deleted(hinge, rng, device):
    input, target = torch.randn(8, 6, generator=rng, dtype=torch.float64).to(device), torch.tensor([0, 1, 2, 3] * 2, device=device)
    keep = [0, 2, 3, 5]
    target, position = torch.tensor(keep, device=device)[target], target
    input[:, [1, 4]] = -INF
    loss, gradient = value_and_gradient(hinge, input, target)
    expected, expected_gradient = value_and_gradient(hinge, input[:, keep], position)
    assert_within(loss, expected, 8.0, 1)
    assert_within(gradient[:, keep], expected_gradient, 2.0, 1)
    assert not gradient[:, [1, 4]].any()


@every("garbage", [math.nan, INF, -INF, 3e38])
@each_hinge
def test_ignored_rows_never_leak(hinge, garbage, rng, device):
    input, target = torch.randn(3, 5, generator=rng).to(device), torch.tensor([0, -100, 2], device=device)
    input[1] = garbage
    loss, gradient = value_and_gradient(hinge, input, target)
    assert_within(loss, hinge(input[[0, 2]], target[[0, 2]]).double(), 8.0, 1)
    assert not gradient[1].any() and gradient.isfinite().all() and gradient[[0, 2]].any()


@every("row", [[INF, 1.0, 0.0], [0.0, INF, 0.0], [math.nan, 1.0, 0.0], [0.0, math.nan, 0.0], [-INF, -INF, -INF]])
@each_hinge
def test_infinities_and_nan_in_a_kept_row_give_nan(hinge, row, device):
    losses = hinge(torch.tensor([row, [2.0, 1.5, 0.0]], device=device), torch.tensor([0, 0], device=device), reduction="none")
    assert losses.isnan().tolist() == [True, False]


@each_hinge
def test_masked_target_has_infinite_loss(hinge, device):
    losses, gradient = value_and_gradient(
        hinge, torch.tensor([[-INF, 1.0, 0.0]], device=device), torch.tensor([0], device=device), reduction="none"
    )
    assert losses[0] == INF
    assert gradient[0, 0] == -1
    assert_within(gradient.sum(), 0.0, 1.0, 1)


@every("row", [[2.0], [2.0, -INF]])
@each_hinge
def test_no_nontarget_left(hinge, row, device):
    loss, gradient = value_and_gradient(hinge, torch.tensor([row], device=device), torch.tensor([0], device=device))
    assert loss == 0 and not gradient.any()


@each_hinge
def test_everything_ignored(hinge, rng, device):
    for rows in (0, 3):
        input, target = torch.randn(rows, 4, generator=rng).to(device), torch.full((rows,), -100, device=device)
        for reduction, check in {"mean": torch.isnan, "sum": torch.logical_not, "none": torch.logical_not}.items():
            loss, gradient = value_and_gradient(hinge, input, target, reduction=reduction)
            assert check(loss).all() and not gradient.any()


@every("dtype", [torch.float16, torch.bfloat16])
@each_hinge
def test_half_precision_is_computed_in_float32(hinge, dtype, rng, device):
    input, target = (torch.randn(8, 5, generator=rng).to(device) * 5).to(dtype), torch.randint(5, (8,), generator=rng).to(device)
    loss, gradient = value_and_gradient(hinge, input, target)
    full, full_gradient = value_and_gradient(hinge, input.float(), target)
    assert same_bits(loss, full) and same_bits(gradient, full_gradient.to(dtype))


@each_hinge
def test_common_offsets_cost_no_digits(hinge, rng, device):
    # multiples of 1/8: the shifted logits are exact
    input, target = torch.randint(-64, 65, (16, 8), generator=rng).to(device) / 8, torch.randint(8, (16,), generator=rng).to(device)
    for offset in (2.0**10, -(2.0**17)):
        for got, expected in zip(value_and_gradient(hinge, input + offset, target), value_and_gradient(hinge, input, target), strict=True):
            assert same_bits(got, expected)


@each_hinge
def test_inputs_are_never_modified(hinge, rng, device):
    logits = torch.randn(6, 5, generator=rng).to(device).requires_grad_() * 1
    target = torch.tensor([0, 1, -100, 3, 4, 0], device=device)
    weight = torch.rand(5).to(device)
    before = [(tensor.detach().clone(), tensor._version) for tensor in (logits, target, weight)]
    hinge(logits, target, weight).backward()
    for tensor, (copy, version) in zip((logits, target, weight), before, strict=True):
        assert torch.equal(tensor.detach(), copy) and tensor._version == version


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
