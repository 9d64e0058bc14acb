"""The oracle against itself: where the paper writes one quantity in several ways, they agree to 40 digits."""

import pytest

import oracle
import strategies
from properties import given

ctx = oracle.ctx

FORMS = {
    "(2) = (3)": (oracle.softmax_loss_as_posterior, oracle.softmax_loss),
    "(3) = (3)": (oracle.softmax_loss_as_softplus, oracle.softmax_loss),
    "(6) = (3)": (oracle.softmax_loss_as_margin, oracle.softmax_loss),
    "(8) = (8)": (oracle.symmetric_as_one_sum, oracle.symmetric),
    "(15) = (15)": (oracle.modified_as_posterior, oracle.modified),
    "(1) with (7) = (6)": (lambda f, y: oracle.margin_loss(f, y, oracle.softplus, oracle.rho(f, y)), oracle.softmax_loss_as_margin),
    "(11) = (3) + 0.3 (8)": (
        lambda f, y: oracle.ours(f, y, 0.3),
        lambda f, y: oracle.softmax_loss(f, y) + ctx.mpf(0.3) * oracle.symmetric(f, y),
    ),
    "(13) = its second form": (
        lambda f, y: oracle.label_smoothing(f, y, 0.25),
        lambda f, y: ctx.mpf(0.75) * oracle.softmax_loss(f, y) + (oracle.kl_uq([*f, 0.0], len(f)) + ctx.log(len(f))) / 4,
    ),
    "expectation at a one-hot target = the loss": (
        lambda f, y: oracle.expectation(f, [float(c == y) for c in range(len(f))], label_smoothing=0.25, lam=0.5, hard_bias=1.0),
        lambda f, y: oracle.large_margin(f, y, label_smoothing=0.25, lam=0.5, hard_bias=1.0),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@given(row=strategies.rows(min_classes=2, max_classes=8, scales=(1e-2, 1.0, 5.0), offsets=(0.0, 10.0), masked=False))
def test_forms_of_one_quantity_agree(form, row):
    left, right = (side(*row) for side in FORMS[form])
    # absolute: (2) cancels as many of the 50 digits as the target leads by, 48 at 110 nats
    lead = max(0, row.logits[row.target] - max(value for c, value in enumerate(row.logits) if c != row.target))
    assert abs(left - right) < ctx.mpf(10) ** -45 * (1 + lead)


@given(row=strategies.rows(min_classes=2, max_classes=8, masked=False))
def test_both_sides_of_eq_4(row):
    low, middle, high = oracle.lse_bounds(*row)
    slack = ctx.mpf(10) ** -44 * (1 + abs(middle))
    assert low - slack <= middle <= high + slack


@given(row=strategies.rows(min_classes=2, max_classes=6, scales=(0.1, 1.0, 5.0), offsets=(0.0,), masked=True))
def test_eq_12_is_the_derivative_of_eq_11(row):
    numeric = oracle.gradient(lambda f: oracle.large_margin(f, row.target, lam=0.3), row.logits)
    for left, right in zip(oracle.ours_gradient(row.logits, row.target, 0.3), numeric, strict=True):
        assert abs(left - right) <= 1e-15 * abs(right)  # the numeric one was rounded to float64


def test_two_categories_of_figure_4():
    """Divergences of {q, 1 - q} as read from the paper's Figure 4."""
    for q, expected in {0.6: (0.0201, 0.0204, 0.0203), 0.9: (0.3681, 0.5108, 0.4394), 0.999: (0.6852, 2.7612, 1.7232)}.items():
        f = [0.0, float(ctx.log(ctx.mpf(q) / (1 - q))), 0.0]
        got = (oracle.kl_qu(f, 0), oracle.kl_uq(f, 0), oracle.symmetric(f, 0))
        assert [round(float(value), 4) for value in got] == list(expected)
