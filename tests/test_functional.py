"""The large-margin loss: equal to the paper's for every combination of options, in the tails and at the edges; and its laws."""

import math

import pytest
import torch
import torch.nn.functional as F

import oracle
import strategies
from combinations import every
from largemargin import large_margin_cross_entropy, linear_large_margin_cross_entropy
from measure import INF, assert_within, loss_scale, same_bits
from problems import loss_and_gradient, problem
from properties import assume, given, st
from registry import DIVERGENCES, DTYPES

# name -> (the paper's equation, the options that make the loss it)
EQUATIONS = {
    "(3)": (oracle.softmax_loss, {"lam": 0.0}),
    "(11)": (lambda f, y: oracle.ours(f, y, 0.3), {}),
    "(11) with lambda 9": (lambda f, y: oracle.ours(f, y, 9.0), {"lam": 9.0}),
    "(3) + (10), D(q||u)": (lambda f, y: oracle.softmax_loss(f, y) + oracle.kl_qu(f, y), {"lam": 1.0, "divergence": "kl_qu"}),
    "(3) + (10), D(u||q)": (lambda f, y: oracle.softmax_loss(f, y) + oracle.kl_uq(f, y), {"lam": 1.0, "divergence": "kl_uq"}),
    "(13)": (lambda f, y: oracle.label_smoothing(f, y, 0.1), {"lam": 0.0, "label_smoothing": 0.1}),
    "(13) with epsilon 1": (lambda f, y: oracle.label_smoothing(f, y, 1.0), {"lam": 0.0, "label_smoothing": 1.0}),
    "(15)": (oracle.modified, {"lam": 0.0, "hard_bias": 1.0}),
    "(15) + 0.3 (8)": (lambda f, y: oracle.modified(f, y) + oracle.ctx.mpf(0.3) * oracle.symmetric(f, y), {"hard_bias": 1.0}),
}


# the paper


@pytest.mark.parametrize("equation", EQUATIONS)
@given(row=strategies.rows())
def test_each_equation_of_the_paper(equation, row, device):
    paper, options = EQUATIONS[equation]
    # the equations need a non-target: test_no_nontarget_left
    assume(any(value != -INF for c, value in enumerate(row.logits) if c != row.target))
    kept = [value for value in row.logits if value != -INF]
    y = sum(value != -INF for value in row.logits[: row.target])
    truth, scale = float(paper(kept, y)), loss_scale(*row, **options)
    for dtype in DTYPES:
        input, target = torch.tensor(row.logits, dtype=dtype, device=device), torch.tensor(row.target, device=device)
        assert_within(large_margin_cross_entropy(input, target, **options), truth, scale, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), batch=strategies.batches())
def test_every_combination_of_options_equals_the_paper(dtype, data, batch, device):
    weight = data.draw(strategies.weights(batch.num_classes))
    row_options = {
        "lam": data.draw(strategies.lams),
        "divergence": data.draw(strategies.divergences),
        "hard_bias": data.draw(strategies.hard_biases),
        "label_smoothing": data.draw(strategies.smoothings),
    }
    reduction = data.draw(strategies.reductions)
    kept = [(f, y) for f, y in zip(batch.logits, batch.targets, strict=True) if y != batch.ignore_index]
    truths = iter([oracle.large_margin(f, y, weight, **row_options) for f, y in kept])
    scales = iter([loss_scale(f, y, weight, **row_options) for f, y in kept])
    truth = [next(truths) if y != batch.ignore_index else oracle.ctx.mpf(0) for y in batch.targets]
    scale = [next(scales) if y != batch.ignore_index else 0.0 for y in batch.targets]
    expected: float | list[float]
    expected_scale: float | list[float]
    if reduction == "none":
        expected, expected_scale = [float(value) for value in truth], scale
    else:
        count = sum(weight[y] if weight else 1.0 for _, y in kept) if reduction == "mean" else 1.0
        expected = float(sum(truth) / count) if count else math.nan
        if count == 0 and sum(truth) != 0:
            expected = math.inf  # every kept row weighs 0, but has a smoothing term: as torch
        expected_scale = sum(scale) / count if count else 1.0
    input = torch.tensor(batch.logits, dtype=dtype, device=device).reshape(len(batch.targets), batch.num_classes)
    loss = large_margin_cross_entropy(
        input,
        torch.tensor(batch.targets, dtype=torch.int64, device=device),
        None if weight is None else torch.tensor(weight, dtype=dtype, device=device),
        ignore_index=batch.ignore_index,
        reduction=reduction,
        **row_options,
    )
    assert_within(loss, expected, expected_scale, 3)


@given(
    row=strategies.rows(min_classes=2, max_classes=6, scales=(1e-2, 1.0, 5.0, 30.0)),
    data=st.data(),
)
def test_gradient_equals_the_papers_derivative(row, data, device):
    weight = data.draw(strategies.weights(len(row.logits)))
    options = {
        "lam": data.draw(strategies.lams),
        "divergence": data.draw(strategies.divergences),
        "hard_bias": data.draw(strategies.hard_biases),
        "label_smoothing": data.draw(strategies.smoothings),
    }
    truth = oracle.gradient(lambda f: oracle.large_margin(f, row.target, weight, **options), row.logits)
    # a term e^z z with |z| roundings of its own stays below 1, however large |z| is
    heaviest = max(weight) if weight else 1.0
    reach = 3 + math.log(len(row.logits)) + abs(options["hard_bias"])
    for dtype in DTYPES:
        _, gradient = loss_and_gradient(
            torch.tensor(row.logits, dtype=dtype, device=device),
            torch.tensor(row.target, device=device),
            None if weight is None else torch.tensor(weight, dtype=dtype, device=device),
            reduction="sum",
            **options,
        )
        assert_within(gradient, truth, heaviest * reach * (1 + options["lam"]), 3)


@pytest.mark.parametrize("lam", [0.0, 0.3, 9.0])
@given(row=strategies.rows(min_classes=2, scales=(1e-2, 1.0, 5.0, 30.0), masked=False))
def test_gradient_equals_eq_12(lam, row, device):
    # entry by entry: the target's, however small, has as many digits as it is nats away
    _, gradient = loss_and_gradient(torch.tensor(row.logits, device=device), torch.tensor(row.target, device=device), lam=lam)
    truth = [float(value) for value in oracle.ours_gradient(row.logits, row.target, lam)]
    reach = 1 + max(row.logits) - min(row.logits)
    assert_within(gradient[row.target], truth[row.target], abs(truth[row.target]) * reach, 2)
    if lam == 0:
        assert_within(gradient, truth, torch.tensor(truth).abs() * reach, 4)
    else:
        assert_within(gradient, truth, (1 + lam) * (2 + math.log(len(truth))), 3)


@every("divergence", DIVERGENCES)
@every("lead", strategies.LEADS)
def test_confident_rows_keep_their_digits(lead, divergence, rng, device):
    others = torch.randn(9, generator=rng).to(device)
    input = torch.cat([(others.max() + lead)[None], others])
    row = (input.tolist(), 0)
    loss, gradient = loss_and_gradient(input, torch.tensor(0, device=device), lam=0.0)
    truth, target_truth = float(oracle.softmax_loss(*row)), float(oracle.ours_gradient(*row, 0.0)[0])
    quantum = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps  # the spacing of subnormal numbers
    assert abs(loss.item() - truth) <= 1.2e-7 * (1 + lead) * truth + quantum
    assert abs(gradient[0].item() - target_truth) <= 1.2e-7 * (1 + lead) * truth + quantum
    if lead >= 20:  # what is avoided
        leaf = input.clone().requires_grad_()
        theirs = F.cross_entropy(leaf, torch.tensor(0, device=device))
        assert theirs.item() == 0 and torch.autograd.grad(theirs, leaf)[0][0] == 0
    # the regulariser is finite and does not depend on f_y
    _, with_margin = loss_and_gradient(input, torch.tensor(0, device=device), lam=0.3, divergence=divergence)
    assert with_margin[0] == gradient[0]
    assert with_margin.isfinite().all()


@every("lag", strategies.LEADS)
def test_a_target_far_behind(lag, rng, device):
    others = torch.randn(9, generator=rng).to(device)
    input = torch.cat([(others.max() - lag)[None], others])
    loss, gradient = loss_and_gradient(input, torch.tensor(0, device=device), lam=0.0)
    assert_within(loss, float(oracle.softmax_loss(input.tolist(), 0)), 1 + lag, 1)
    assert gradient[0].item() == pytest.approx(-1, rel=1e-5) and gradient[0] >= -1


@every("offset", [0.0, 1e2, 1e4, 1e5])
def test_a_common_offset_costs_no_digits(offset, rng, device):
    input, target = problem(rng, device, classes=50)
    input = input + offset  # rounds the logits; the truth is that of the rounded ones
    loss, gradient = loss_and_gradient(input, target, reduction="none")
    truth, gradient_truth = loss_and_gradient(input.double(), target, reduction="none")
    losses = [float(oracle.ours(f, y, 0.3)) for f, y in zip(input.tolist(), target.tolist(), strict=True)]
    paper = torch.tensor(losses, dtype=torch.float64, device=device)
    assert ((loss.double() - paper).abs() <= 2e-6 * paper.float().clamp(min=1)).all()
    assert ((truth - paper).abs() <= 1e-13).all()
    assert ((gradient - gradient_truth).abs() <= 1e-6 * gradient_truth.abs().amax(1, keepdim=True)).all()


# the statistics' own tests have the rest
@every("smoothing", [0.0, 0.1, 1.0])
@every("weighted", [False, True])
@every("divergence", DIVERGENCES)
def test_masked_classes_are_deleted(divergence, weighted, smoothing, rng, device):
    input, target = problem(rng, device, dtype=torch.float64)
    keep = [0, 2, 3, 6, 9]
    target = torch.tensor(keep, device=device)[target % 5]
    input[:, [1, 4, 5, 7, 8]] = -INF
    weight = torch.rand(10, generator=rng, dtype=torch.float64).to(device) + 0.5 if weighted else None
    options = {"divergence": divergence, "label_smoothing": smoothing, "hard_bias": 0.5}
    loss, gradient = loss_and_gradient(input, target, weight, **options)
    position = torch.tensor([keep.index(y) for y in target], device=device)
    expected, expected_gradient = loss_and_gradient(input[:, keep], position, None if weight is None else weight[keep], **options)
    assert_within(loss, expected, 16.0, 2)
    assert_within(gradient[:, keep], expected_gradient, 4.0, 2)
    assert not gradient[:, [1, 4, 5, 7, 8]].any()


@every("smoothing", [0.0, 0.1, 1.0])
@every("weighted", [False, True])
def test_masked_target_has_infinite_loss(weighted, smoothing, device):
    # its regulariser, and the other rows, are unaffected
    input = torch.tensor([[-INF, 1.0, 3.0], [0.0, 1.0, 3.0]], device=device)
    weight = torch.tensor([1.0, 2.0, 3.0], device=device) if weighted else None
    loss, gradient = loss_and_gradient(
        input, torch.tensor([0, 0], device=device), weight, label_smoothing=smoothing, reduction="none", lam=0.0
    )
    assert loss[0] == INF and loss[1].isfinite()
    assert gradient.isfinite().all()
    assert_within(gradient.sum(1), torch.zeros(2), 8.0, 1)
    # smoothing is the mean over the two classes of the row
    q = torch.tensor([1.0, 3.0], device=device).double().softmax(0)
    w = torch.tensor([1.0, 2.0, 3.0] if weighted else [1.0] * 3, device=device).double()
    if smoothing < 1:
        assert_within(gradient[0, 0], smoothing - 1, 1.0, 1)
        assert_within(gradient[0, 1:], (1 - smoothing) * w[0] * q + smoothing / 2 * (w[1:].sum() * q - w[1:]), 2.0, 2)


@every("smoothing", [0.0, 0.1])
@every("weighted", [False, True])
@every("row", [[INF, 1.0, 0.0], [0.0, INF, 0.0], [math.nan, 1.0, 0.0], [0.0, math.nan, 0.0], [-INF, -INF, -INF]])
@every("lam", [0.0, 0.3])
def test_infinities_and_nan_in_a_kept_row_give_nan(lam, row, weighted, smoothing, device):
    weight = torch.tensor([1.0, 2.0, 3.0], device=device) if weighted else None
    losses = large_margin_cross_entropy(
        torch.tensor([row, [1.0, 2.0, 3.0]], device=device),
        torch.tensor([0, 0], device=device),
        weight,
        lam=lam,
        label_smoothing=smoothing,
        reduction="none",
    )
    assert losses.isnan().tolist() == [True, False]


@every("garbage", [math.nan, INF, -INF, 3e38])
@every("smoothing", [0.0, 0.1])
@every("weighted", [False, True])
@every("ignore_index", [-100, 0, 255])
@every("classes", [4, 256])
def test_ignored_rows_are_left_out_of_everything(classes, ignore_index, weighted, smoothing, garbage, rng, device):
    input, _ = problem(rng, device, classes=classes, dtype=torch.float64)
    target = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2], device=device)
    ignored = torch.tensor([False, True, False, False, True, False, False, True], device=device)
    target[ignored] = ignore_index
    input[ignored] = garbage
    weight = torch.rand(classes, generator=rng, dtype=torch.float64).to(device) + 0.5 if weighted else None
    options = {"label_smoothing": smoothing, "ignore_index": ignore_index}
    for reduction in ("mean", "sum"):
        loss, gradient = loss_and_gradient(input, target, weight, reduction=reduction, **options)
        expected, expected_gradient = loss_and_gradient(input[~ignored], target[~ignored], weight, reduction=reduction, **options)
        assert_within(loss, expected, 64.0, 2)
        assert_within(gradient[~ignored], expected_gradient, 2.0, 2)
        assert not gradient[ignored].any()
    rows, _ = loss_and_gradient(input, target, weight, reduction="none", **options)
    assert not rows[ignored].any() and (rows[~ignored] > 0).all()


@every("divergence", DIVERGENCES)
def test_two_classes_have_no_regulariser(divergence, rng, device):
    input, target = problem(rng, device, classes=2, scale=10.0)
    for (loss, gradient), (plain, plain_gradient) in [
        (loss_and_gradient(input, target, lam=9.0, divergence=divergence), loss_and_gradient(input, target, lam=0.0)),
        (
            loss_and_gradient(input[:, :1], target * 0, lam=9.0, divergence=divergence),
            (torch.tensor(0.0, device=device), torch.zeros(8, 1, device=device)),
        ),
    ]:
        assert same_bits(loss, plain) and same_bits(gradient, plain_gradient)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_no_rows_and_nothing_kept(kind, rng, device):
    for rows in (0, 3) if kind == "indices" else (0,):
        input = torch.randn(rows, 4, generator=rng).to(device)
        target = torch.full((rows,), -100, device=device) if kind == "indices" else torch.rand(rows, 4, generator=rng).to(device)
        for reduction, check in {"mean": torch.isnan, "sum": torch.logical_not, "none": torch.logical_not}.items():
            loss, gradient = loss_and_gradient(input, target, reduction=reduction, label_smoothing=0.1)
            assert check(loss).all()
            assert gradient.shape == input.shape and not gradient.any()


@every("options", [{}, {"label_smoothing": 0.1}, {"label_smoothing": 1.0}, {"hard_bias": 3.0}, {"lam": 0.0}])
@every("weighted", [False, True])
@every("row", [[2.0], [2.0, -INF], [2.0, -INF, -INF]])
def test_no_nontarget_left(row, weighted, options, device):
    weight = torch.rand(len(row)).to(device) if weighted else None
    loss, gradient = loss_and_gradient(
        torch.tensor([row], device=device), torch.tensor([0], device=device), weight, reduction="sum", **options
    )
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_weights_scale_both_terms_and_their_sum_is_the_denominator(divergence, rng, device):
    input, target = problem(rng, device, classes=4, dtype=torch.float64)
    target[2] = -100
    weight = torch.tensor([0.0, 0.5, 1.0, 4.0], dtype=torch.float64, device=device)
    options = {"divergence": divergence, "hard_bias": 1.0}
    unweighted, _ = loss_and_gradient(input, target, reduction="none", **options)
    w = torch.where(target >= 0, weight[target.clamp(min=0)], 0.0)
    for reduction, expected in {"none": w * unweighted, "sum": (w * unweighted).sum(), "mean": (w * unweighted).sum() / w.sum()}.items():
        assert_within(loss_and_gradient(input, target, weight, reduction=reduction, **options)[0], expected, 100.0, 1)


@pytest.mark.parametrize("gap", [0.0, 1e3])
def test_smoothing_with_weight_ignored_rows_and_margin(gap, rng, device):
    input, target = problem(rng, device, rows=6, classes=5)
    input[0, 1] += gap  # log p_c of the others is -1000: no log(0) on the way
    target[:3] = torch.tensor([0, 1, -100], device=device)
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0, 4.0], device=device)
    options = {"lam": 0.3, "divergence": "kl_uq", "hard_bias": 1.0, "label_smoothing": 0.1}
    loss, gradient = loss_and_gradient(input, target, weight, **options)
    kept = [(f, y) for f, y in zip(input.tolist(), target.tolist(), strict=True) if y >= 0]
    count = sum(weight[y].item() for _, y in kept)
    truth = sum(oracle.large_margin(f, y, weight.tolist(), **options) for f, y in kept) / count
    scale = math.fsum(loss_scale(f, y, weight.tolist(), **options) for f, y in kept) / count
    assert_within(loss, float(truth), scale, 2)
    assert gradient.isfinite().all() and not gradient[2].any()


# laws of the loss


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_regulariser_does_not_know_the_target_logit(divergence, rng, device):
    input, target = problem(rng, device, dtype=torch.float64)
    moved = input.clone()
    moved[torch.arange(8, device=device), target] += 1.5
    parts = []
    for logits in (input, moved):
        (with_margin, g), (without, g0) = (loss_and_gradient(logits, target, lam=lam, divergence=divergence) for lam in (0.3, 0.0))
        parts.append(with_margin - without)
        assert_within((g - g0)[torch.arange(8, device=device), target], torch.zeros(8), 1.0, 1)
    assert_within(parts[0], parts[1], 16.0, 1)


@given(row=strategies.rows(min_classes=2), small=st.floats(0, 4), more=st.floats(0.125, 4))
def test_monotone_in_lambda_and_bias(row, small, more, device):
    f, y = torch.tensor(row.logits, dtype=torch.float64, device=device), torch.tensor(row.target, device=device)
    slack = 8 * torch.finfo(torch.float64).eps * loss_scale(*row, lam=small + more, hard_bias=small + more)
    assert large_margin_cross_entropy(f, y, lam=small + more) >= large_margin_cross_entropy(f, y, lam=small) - slack
    assert large_margin_cross_entropy(f, y, hard_bias=small + more) >= large_margin_cross_entropy(f, y, hard_bias=small) - slack


def test_the_bias_is_a_shift_of_the_target_logit(rng, device):
    # eq. (15), with smoothing it enters the first term alone
    input, target = problem(rng, device, dtype=torch.float64)
    shifted = input.clone()
    shifted[torch.arange(8, device=device), target] -= 1.5
    biased = large_margin_cross_entropy(input, target, hard_bias=1.5)
    assert_within(biased, large_margin_cross_entropy(shifted, target), 16.0, 1)
    for bias in (0.0, 1.5):
        smoothed = large_margin_cross_entropy(input, target, lam=0, hard_bias=bias, label_smoothing=0.25)
        first = large_margin_cross_entropy(input, target, lam=0, hard_bias=bias)
        second = large_margin_cross_entropy(input, target, lam=0, label_smoothing=1.0)
        assert_within(smoothed, 0.75 * first + 0.25 * second, 16.0, 1)


def test_zero_logits_have_the_right_derivative(device):
    # where log1p(exp(-|x|)) + max(x, 0) under autograd has 0 or 1 in place of 1/2
    for classes in (2, 3, 10):
        loss, gradient = loss_and_gradient(torch.zeros(classes, device=device), torch.tensor(0, device=device))
        assert_within(loss, math.log(classes), 2.0, 1)
        truth = torch.full((classes,), 1 / classes, dtype=torch.float64, device=device)
        truth[0] -= 1
        assert_within(gradient, truth, 1.0, 1)


def test_softplus_keeps_its_digits_above_its_threshold(device):
    # torch's softplus is linear from 20 on, where it is 2e-9 off in float64
    for lag in (19.0, 21.0, 30.0, 39.0, 41.0):
        loss, gradient = loss_and_gradient(torch.tensor([-lag, 0.0], dtype=torch.float64, device=device), torch.tensor(0, device=device))
        assert_within(loss, lag + math.log1p(math.exp(-lag)), lag, 1)
        assert_within(gradient[0], -1 / (1 + math.exp(-lag)), 1.0, 1)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"divergence": "kl_qu", "hard_bias": 1.0}])
def test_defaults_are_the_papers(options, rng, device):
    input, target = problem(rng, device)
    spelt_out = {"lam": 0.3, "divergence": "symmetric", "hard_bias": 0.0, "label_smoothing": 0.0, "ignore_index": -100, "reduction": "mean"}
    got = large_margin_cross_entropy(input, target, None, **options)
    assert same_bits(got, large_margin_cross_entropy(input, target, weight=None, **{**spelt_out, **options}))


def test_losses_do_not_look_at_numbers_python_holds_as_int(rng, device):
    input, target = problem(rng, device)
    got = large_margin_cross_entropy(input, target, lam=1, hard_bias=1, label_smoothing=1)
    assert same_bits(got, large_margin_cross_entropy(input, target, lam=1.0, hard_bias=1.0, label_smoothing=1.0))


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_a_row_without_nontargets_leaves_the_gradient_of_the_class_weights_finite(smoothing, device):
    weight = torch.ones(2, requires_grad=True, device=device)
    input, target = torch.tensor([[2.0, -INF], [1.0, 2.0]], device=device), torch.tensor([0, 1], device=device)
    large_margin_cross_entropy(input, target, weight, label_smoothing=smoothing, reduction="sum").backward()
    alone = torch.ones(2, requires_grad=True, device=device)
    large_margin_cross_entropy(input[1:], target[1:], alone, label_smoothing=smoothing, reduction="sum").backward()
    assert torch.equal(weight.grad, alone.grad) and weight.grad.isfinite().all()  # the first row has a loss of 0, whatever it weighs


def test_a_label_out_of_range_that_nobody_looks_at_leaves_other_gradients_alone():
    input, target = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]]), torch.tensor([0, 7])
    options = {"weight": torch.tensor([1.0, 2.0, 3.0]), "label_smoothing": 0.1, "reduction": "none"}
    gradient = torch.func.grad(lambda f: large_margin_cross_entropy(f, target, **options)[0])(input)
    assert gradient[0].isfinite().all() and (gradient[1] == 0).all()
    classifier = torch.func.grad(lambda w: linear_large_margin_cross_entropy(input, w, target, **options)[0])(torch.eye(3))
    assert classifier.isfinite().all()
