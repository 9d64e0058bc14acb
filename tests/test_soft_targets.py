"""Class probabilities: the expectation of the loss over the classes, which the paper's one-class loss defines."""

import math

import pytest
import torch

import oracle
import strategies
from combinations import every
from largemargin import large_margin_cross_entropy
from measure import INF, assert_within, loss_scale
from problems import loss_and_gradient
from properties import given, st
from registry import DIVERGENCES, DTYPES


def soft_scale(f: list[float], t: list[float], weight: list[float] | None = None, *, label_smoothing: float = 0.0, **options) -> float:
    w = [1.0] * len(f) if weight is None else weight
    scale = sum(share * w[y] * loss_scale(f, y, **options) for y, share in enumerate(t) if share > 0)
    if label_smoothing > 0:
        kept = [c for c, value in enumerate(f) if value != -INF]
        top = max(f[c] for c in kept)
        scale += label_smoothing * sum(w[c] * (1 + math.log(len(kept)) + top - f[c]) for c in kept) / len(kept)
    return scale


@given(row=strategies.rows(max_classes=10), data=st.data())
def test_loss_equals_the_expectation(row, data, device):
    f = row.logits
    t, weight = data.draw(strategies.probabilities(f)), data.draw(strategies.weights(len(f)))
    options = {
        "lam": data.draw(strategies.lams),
        "divergence": data.draw(strategies.divergences),
        "hard_bias": data.draw(strategies.hard_biases),
        "label_smoothing": data.draw(strategies.smoothings),
    }
    truth, scale = float(oracle.expectation(f, t, weight, **options)), soft_scale(f, t, weight, **options)
    for dtype in DTYPES:
        loss = large_margin_cross_entropy(
            torch.tensor(f, dtype=dtype, device=device),
            torch.tensor(t, dtype=dtype, device=device),
            None if weight is None else torch.tensor(weight, dtype=dtype, device=device),
            reduction="sum",
            **options,
        )
        assert_within(loss, truth, scale, 4)


@given(row=strategies.rows(min_classes=2, max_classes=6, scales=(1e-2, 1.0, 5.0, 30.0)), data=st.data())
def test_gradient_equals_the_derivative_of_the_expectation(row, data, device):
    f = row.logits
    t, weight = data.draw(strategies.probabilities(f)), data.draw(strategies.weights(len(f)))
    options = {
        "lam": data.draw(strategies.lams),
        "divergence": data.draw(strategies.divergences),
        "hard_bias": data.draw(strategies.hard_biases),
        "label_smoothing": data.draw(strategies.smoothings),
    }
    truth = oracle.gradient(lambda logits: oracle.expectation(logits, t, weight, **options), f)
    heaviest = (max(weight) if weight else 1.0) * max(1.0, sum(t))
    reach = 3 + math.log(len(f)) + abs(options["hard_bias"])
    for dtype in DTYPES:
        _, gradient = loss_and_gradient(
            torch.tensor(f, dtype=dtype, device=device),
            torch.tensor(t, dtype=dtype, device=device),
            None if weight is None else torch.tensor(weight, dtype=dtype, device=device),
            reduction="sum",
            **options,
        )
        assert_within(gradient, truth, heaviest * reach * (1 + options["lam"]), 4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@every("offset", [0.0, 1e4, 1e5])
@every("lead", strategies.LEADS)
def test_leads_and_offsets_in_float32(lead, offset, divergence, rng, device):
    # the plain downdate of the sum of exponentials is 25% wrong at 16 nats and NaN from 18
    others = torch.randn(6, generator=rng).to(device)
    input = torch.cat([others[:3], (others.max() + lead)[None], others[3:]]) + offset
    target = torch.tensor([0.0, 0.1, 0.0, 0.7, 0.2, 0.0, 0.0], device=device)
    loss, gradient = loss_and_gradient(input, target, divergence=divergence)
    f, t = input.tolist(), target.tolist()
    truth = float(oracle.expectation(f, t, divergence=divergence))
    # the whole claim: 2.4e-7 and 2e-7 of the result's size
    assert abs(loss.item() - truth) <= 3e-7 * max(1.0, truth)
    expected = oracle.gradient(lambda logits: oracle.expectation(logits, t, divergence=divergence), f)
    assert (gradient.double() - torch.tensor(expected, dtype=torch.float64, device=device)).abs().max() <= 3e-7


@every("lead", strategies.LEADS)
def test_tails_of_a_one_hot_target(lead, rng, device):
    others = torch.randn(6, generator=rng).to(device)
    input = torch.cat([(others.max() + lead)[None], others])
    target = torch.eye(7, device=device)[0]
    loss, gradient = loss_and_gradient(input, target, lam=0.0)
    truth, target_truth = float(oracle.softmax_loss(input.tolist(), 0)), float(oracle.ours_gradient(input.tolist(), 0, 0.0)[0])
    quantum = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    assert abs(loss.item() - truth) <= 1.2e-7 * (1 + lead) * truth + quantum
    assert abs(gradient[0].item() - target_truth) <= 1.2e-7 * (1 + lead) * truth + quantum


@every("weighted", [False, True])
@every("divergence", DIVERGENCES)
@every("reduction", ["none", "sum", "mean"])
def test_one_hot_probabilities_equal_class_indices(reduction, divergence, weighted, rng, device):
    if reduction == "mean" and weighted:
        weighted = False  # indices divide by the summed weights, probabilities by the number of rows: as torch
    input = torch.randn(8, 6, generator=rng, dtype=torch.float64).to(device) * 4
    input[0, 3] = input[1, :4] = -INF
    target = torch.tensor([0, 5, 2, 3, 4, 5, 0, 1], device=device)
    weight = torch.rand(6, generator=rng, dtype=torch.float64).to(device) + 0.5 if weighted else None
    options = {"reduction": reduction, "divergence": divergence, "hard_bias": 1.0, "label_smoothing": 0.1}
    loss, gradient = loss_and_gradient(input, torch.eye(6, dtype=torch.float64, device=device)[target], weight, **options)
    expected, expected_gradient = loss_and_gradient(input, target, weight, **options)
    assert_within(loss, expected, 64.0, 2)
    assert_within(gradient, expected_gradient, 4.0, 2)


def test_mean_divides_by_the_number_of_rows_even_with_weights(rng, device):
    input, target = torch.randn(2, 5, 3, generator=rng).to(device), torch.rand(2, 5, 3, generator=rng).to(device)
    weight = torch.rand(5, generator=rng).to(device)
    total, _ = loss_and_gradient(input, target, weight, reduction="sum")
    assert_within(loss_and_gradient(input, target, weight)[0], total.double() / 6, 4.0, 1)


def test_the_loss_is_linear_in_the_target(rng, device):
    input = torch.randn(8, 6, generator=rng, dtype=torch.float64).to(device) * 3
    first, second = torch.rand(2, 8, 6, generator=rng, dtype=torch.float64).to(device)
    options = {"reduction": "none", "divergence": "kl_uq"}
    mixed = large_margin_cross_entropy(input, 0.25 * first + 2 * second, **options)
    parts = [large_margin_cross_entropy(input, target, **options) for target in (first, second)]
    assert_within(mixed, 0.25 * parts[0] + 2 * parts[1], 100.0, 1)


def test_the_gradient_of_the_target_is_the_loss_of_each_class(rng, device):
    input = torch.randn(6, generator=rng, dtype=torch.float64).to(device) * 3
    target = torch.rand(6, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(large_margin_cross_entropy(input, target), target)
    each = torch.stack([large_margin_cross_entropy(input, torch.tensor(y, device=device)) for y in range(6)])
    assert_within(gradient, each, 16.0, 2)


@every("smoothing", [0.0, 0.1])
@every("divergence", DIVERGENCES)
def test_masked_classes_without_a_share_are_deleted(divergence, smoothing, rng, device):
    input = torch.randn(8, 6, generator=rng, dtype=torch.float64).to(device)
    target = torch.rand(8, 6, generator=rng, dtype=torch.float64).to(device)
    keep = [0, 2, 3, 5]
    input[:, [1, 4]], target[:, [1, 4]] = -INF, 0.0
    options = {"divergence": divergence, "label_smoothing": smoothing}
    loss, gradient = loss_and_gradient(input, target, **options)
    expected, expected_gradient = loss_and_gradient(input[:, keep], target[:, keep], **options)
    assert_within(loss, expected, 32.0, 2)
    assert_within(gradient[:, keep], expected_gradient, 8.0, 2)
    assert not gradient[:, [1, 4]].any()


@every("smoothing", [0.0, 0.1, 1.0])
@every("lam", [0.0, 0.3])
def test_a_masked_class_with_a_share_has_infinite_loss(lam, smoothing, device):
    input = torch.tensor([[-INF, 1.0, 0.0], [2.0, 1.0, 0.0]], device=device)
    target = torch.tensor([[0.1, 0.9, 0.0], [0.1, 0.9, 0.0]], device=device)
    losses, gradient = loss_and_gradient(input, target, lam=lam, label_smoothing=smoothing, reduction="none")
    assert losses[0] == INF and losses[1].isfinite()
    assert gradient.isfinite().all()


@every("lam", [0.0, 0.3])
@every("target", [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
@every("row", [[INF, 1.0, 0.0], [0.0, INF, 0.0], [math.nan, 1.0, 0.0], [0.0, 1.0, math.nan], [-INF, -INF, -INF]])
def test_infinities_and_nan_give_nan(row, target, lam, device):
    losses = large_margin_cross_entropy(
        torch.tensor([row, [0.0, 1.0, 2.0]], device=device), torch.tensor([target, target], device=device), lam=lam, reduction="none"
    )
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("row", [[2.0], [2.0, -INF, -INF]])
def test_no_nontarget_left(row, device):
    target = torch.eye(len(row), device=device)[:1]
    loss, gradient = loss_and_gradient(torch.tensor([row], device=device), target, label_smoothing=0.1, hard_bias=1.0)
    assert loss == 0 and not gradient.any()


def test_a_row_without_shares_is_left_out_but_for_smoothing(rng, device):
    # the way to ignore a row of probabilities
    input, target = torch.randn(3, 4, generator=rng).to(device), torch.rand(3, 4, generator=rng).to(device)
    target[1] = 0
    losses, gradient = loss_and_gradient(input, target, reduction="none")
    assert losses[1] == 0 and not gradient[1].any() and (losses[[0, 2]] > 0).all()


def test_ties_for_the_largest_logit(rng, device):
    # which of them is peeled must not matter
    input = torch.tensor([3.0, 3.0, 1.0, 3.0], dtype=torch.float64, device=device)
    target = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64, device=device)
    loss, gradient = loss_and_gradient(input, target)
    assert_within(loss, float(oracle.expectation(input.tolist(), target.tolist())), 4.0, 1)
    expected = oracle.gradient(lambda logits: oracle.expectation(logits, target.tolist()), input.tolist())
    assert_within(gradient, expected, 2.0, 2)


@pytest.mark.parametrize("target_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_targets_may_have_any_floating_dtype(target_dtype, rng, device):
    input = torch.randn(3, 4, generator=rng).to(device)
    target = torch.tensor([[0.5, 0.25, 0.25, 0.0]] * 3, device=device).to(target_dtype)  # exact in all of them
    got = large_margin_cross_entropy(input, target)
    assert_within(got, large_margin_cross_entropy(input.double(), target.double()), 4.0, 2, torch.float32)


def test_gradcheck_in_every_argument(rng, device):
    input = (torch.randn(4, 5, generator=rng, dtype=torch.float64).to(device) * 2).requires_grad_()
    target = torch.rand(4, 5, generator=rng, dtype=torch.float64).to(device).requires_grad_()
    for divergence in DIVERGENCES:
        assert torch.autograd.gradcheck(
            lambda f, t, kind=divergence: large_margin_cross_entropy(f, t, divergence=kind, label_smoothing=0.1, hard_bias=0.5),
            (input, target),
        )


@pytest.mark.parametrize("lead", [0.0, 20.0, 110.0])
def test_second_derivatives_of_a_confident_row_are_finite(lead, device):
    input = torch.tensor([[lead, 0.0, -1.0]], requires_grad=True, device=device)
    loss = large_margin_cross_entropy(input, torch.tensor([[0.9, 0.1, 0.0]], device=device), lam=0.3)
    (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
    (second,) = torch.autograd.grad((gradient**2).sum(), input)
    reference = input.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        large_margin_cross_entropy(reference, torch.tensor([[0.9, 0.1, 0.0]], device=device), lam=0.3), reference, create_graph=True
    )
    (expected,) = torch.autograd.grad((expected**2).sum(), reference)
    assert_within(second, expected, 1.0, 8)


def test_a_masked_class_with_a_share_pulls_as_a_masked_target_does(device):
    row, share = torch.tensor([[-INF, 1.0, 0.0, 2.0]], device=device), 0.25
    _, soft = loss_and_gradient(row, torch.tensor([[share, 0.0, 0.0, 0.0]], device=device), reduction="sum")
    _, hard = loss_and_gradient(row, torch.tensor([0], device=device), reduction="sum")
    assert_within(soft, share * hard.double(), 1.0, 2)
