"""The paper at 50 digits: equations (1) to (15), as printed but for the misprints named below. No formula of the library is used.

Logits are Python floats (exact), ``y`` is the target's position. A class whose logit is -inf is first deleted from the row. What the
paper leaves open (a deleted target, no non-target left) follows the semantics of the library's documentation.

Misprints: (11), (13), (14), (15) have ``x`` for the logits ``f``, and in (12) ``x_c`` is ``f_c``.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import mpmath

ctx = mpmath.MPContext()
ctx.dps = 50
Number: TypeAlias = Any  # ctx.mpf
INF = ctx.inf


def target_and_others(f: Sequence[float], y: int) -> tuple[Number, list[Number]]:
    """``f_y``, and the logits of the classes c != y that are in the row."""
    return ctx.mpf(f[y]), [ctx.mpf(value) for c, value in enumerate(f) if c != y and value != -float("inf")]


def softplus(x: Number) -> Number:
    return INF if x == INF else ctx.log1p(ctx.exp(x))


def hinge_function(x: Number) -> Number:
    return max(ctx.mpf(0), x)


def log_sum_exp(values: Sequence[Number]) -> Number:
    return ctx.log(ctx.fsum(map(ctx.exp, values))) if values else -INF


# the softmax loss, Sec. 2.2


def softmax_loss_as_posterior(f: Sequence[float], y: int) -> Number:
    """(2), -log p_y; loses as many digits as the target leads by."""
    target, others = target_and_others(f, y)
    return -ctx.log(ctx.exp(target) / (ctx.exp(target) + ctx.fsum(map(ctx.exp, others))))


def softmax_loss(f: Sequence[float], y: int) -> Number:
    """(3), its first form, which keeps its digits however far the target leads."""
    target, others = target_and_others(f, y)
    if target == -INF:
        return INF if others else ctx.nan
    return ctx.log1p(ctx.fsum(ctx.exp(value - target) for value in others))


def softmax_loss_as_softplus(f: Sequence[float], y: int) -> Number:
    """(3), its second form."""
    target, others = target_and_others(f, y)
    return softplus(log_sum_exp(others) - target)


def softmax_loss_as_margin(f: Sequence[float], y: int) -> Number:
    """(6)."""
    target, others = target_and_others(f, y)
    return softplus(max(others) - target + rho(f, y))


def margin_loss(f: Sequence[float], y: int, loss: Callable[[Number], Number], bias: Number) -> Number:
    """(1)."""
    target, others = target_and_others(f, y)
    return loss(max(others) - target + bias) if others else ctx.mpf(0)


def lse_bounds(f: Sequence[float], y: int) -> tuple[Number, Number, Number]:
    """(4): the three sides."""
    _, others = target_and_others(f, y)
    return max(others), log_sum_exp(others), max(others) + ctx.log(len(others))


def rho(f: Sequence[float], y: int) -> Number:
    """(7), the bracket of (5)."""
    _, others = target_and_others(f, y)
    return ctx.log(ctx.fsum(ctx.exp(value - max(others)) for value in others)) if others else ctx.mpf(0)


# the regulariser, Sec. 2.3


def posterior(f: Sequence[float], y: int) -> list[Number]:
    """q of (9), over the classes of the row but y."""
    _, others = target_and_others(f, y)
    largest = max(others, default=ctx.mpf(0))
    terms = [ctx.exp(value - largest) for value in others]
    total = ctx.fsum(terms)
    return [term / total for term in terms]


def kl_qu(f: Sequence[float], y: int) -> Number:
    """D(q||u) of (10)."""
    q = posterior(f, y)
    return ctx.fsum(q_c * ctx.log(len(q) * q_c) for q_c in q)


def kl_uq(f: Sequence[float], y: int) -> Number:
    """D(u||q) of (10)."""
    q = posterior(f, y)
    return ctx.fsum(ctx.log(1 / (len(q) * q_c)) / len(q) for q_c in q)


def symmetric(f: Sequence[float], y: int) -> Number:
    """(8), its first form."""
    return (kl_qu(f, y) + kl_uq(f, y)) / 2


def symmetric_as_one_sum(f: Sequence[float], y: int) -> Number:
    """(8), its second form."""
    q = posterior(f, y)
    return ctx.fsum((q_c - ctx.mpf(1) / len(q)) * ctx.log(q_c) for q_c in q) / 2


DIVERGENCES = {"symmetric": symmetric, "kl_qu": kl_qu, "kl_uq": kl_uq}


# the losses


def ours(f: Sequence[float], y: int, lam: float) -> Number:
    """(11)."""
    q = posterior(f, y)
    return softmax_loss(f, y) + ctx.mpf(lam) / 2 * ctx.fsum((q_c - ctx.mpf(1) / len(q)) * ctx.log(q_c) for q_c in q)


def ours_gradient(f: Sequence[float], y: int, lam: float) -> list[Number]:
    """(12); p_y - 1 is written as minus the sum of the other p_c, without the cancellation that would cost it its digits."""
    f = [ctx.mpf(value) for value in f]
    lam = ctx.mpf(lam)
    others = [c for c in range(len(f)) if c != y and f[c] != -INF]
    q = dict(zip(others, posterior(f, y), strict=True))
    mean = ctx.fsum(f[d] * q[d] for d in others)
    gradient = [ctx.mpf(0)] * len(f)
    for c in others:
        p_c = 1 / ctx.fsum(ctx.exp(f[d] - f[c]) for d in (*others, y))
        gradient[c] = p_c + lam / 2 * (q[c] * (f[c] - mean) + (q[c] - ctx.mpf(1) / len(others)))
        gradient[y] -= p_c
    return gradient


def label_smoothing(f: Sequence[float], y: int, eps: float) -> Number:
    """(13), its first form, the sum over the classes of the row."""
    eps = ctx.mpf(eps)
    classes = [c for c in range(len(f)) if f[c] != -float("inf")]
    first = (1 - eps) * softmax_loss(f, y) if eps < 1 else ctx.mpf(0)
    return first + eps / len(classes) * ctx.fsum(softmax_loss(f, c) for c in classes)


def multiclass_hinge(f: Sequence[float], y: int, margin: float = 1.0) -> Number:
    """(14)."""
    target, others = target_and_others(f, y)
    return ctx.fsum(hinge_function(value - target + ctx.mpf(margin)) for value in others) / max(len(others), 1)


def modified(f: Sequence[float], y: int, bias: float = 1.0) -> Number:
    """(15), its first form, with the constant as an argument."""
    target, others = target_and_others(f, y)
    if not others:
        return ctx.nan if target == -INF else ctx.mpf(0)
    return softplus(log_sum_exp(others) - target + ctx.mpf(bias))


def modified_as_posterior(f: Sequence[float], y: int) -> Number:
    """(15), its second form."""
    target, others = target_and_others(f, y)
    shifted = ctx.exp(target - 1)
    return -ctx.log(shifted / (shifted + ctx.fsum(map(ctx.exp, others))))


def crammer_singer(f: Sequence[float], y: int, margin: float = 1.0) -> Number:
    """(1) with the hinge."""
    return margin_loss(f, y, hinge_function, ctx.mpf(margin))


def hard_margin_softplus(f: Sequence[float], y: int, margin: float = 1.0) -> Number:
    """Sec. 3, Margin by LSE: (1) with softplus."""
    return margin_loss(f, y, softplus, ctx.mpf(margin))


# what the library makes of them


def large_margin(
    f: Sequence[float],
    y: int,
    weight: Sequence[float] | None = None,
    *,
    lam: float = 0.3,
    divergence: str = "symmetric",
    hard_bias: float = 0.0,
    label_smoothing: float = 0.0,
) -> Number:
    """The loss of one row: (15) and (8) or (10), scaled by w_y, and the weighted second term of (13)."""
    eps = ctx.mpf(label_smoothing)
    w = [ctx.mpf(1)] * len(f) if weight is None else [ctx.mpf(value) for value in weight]
    classes = [c for c in range(len(f)) if f[c] != -float("inf")]
    loss = ctx.mpf(lam) * DIVERGENCES[divergence](f, y)
    if eps < 1:
        loss += (1 - eps) * modified(f, y, hard_bias)
    return w[y] * loss + (eps / len(classes) * ctx.fsum(w[c] * softmax_loss(f, c) for c in classes) if eps > 0 else 0)


def expectation(
    f: Sequence[float], t: Sequence[float], weight: Sequence[float] | None = None, *, label_smoothing: float = 0.0, **options
) -> Number:
    """The loss of one row for class probabilities ``t``: the sum over y of t_y times the loss of y, O(C^2)."""
    eps = ctx.mpf(label_smoothing)
    w = [1.0] * len(f) if weight is None else weight
    classes = [c for c in range(len(f)) if f[c] != -float("inf")]
    total = ctx.mpf(0)
    for y, share in enumerate(t):
        if share == 0:
            continue
        if f[y] == -float("inf"):
            return INF
        unsmoothed = (1 - eps) * large_margin(f, y, **{**options, "lam": 0.0}) if eps < 1 else ctx.mpf(0)
        margin = ctx.mpf(options.get("lam", 0.3)) * DIVERGENCES[options.get("divergence", "symmetric")](f, y)
        total += ctx.mpf(share) * ctx.mpf(w[y]) * (unsmoothed + margin)
    return total + (eps / len(classes) * ctx.fsum(ctx.mpf(w[c]) * softmax_loss(f, c) for c in classes) if eps > 0 else 0)


def gradient(loss: Callable[[list[Number]], Number], f: Sequence[float]) -> list[float]:
    """The gradient of any loss above, by central differences; exactly 0 at a deleted class.

    At 120 digits a step of 1e-40 leaves an error of 1e-80 or so: nothing beside a gradient of 1e-48, at 110 nats.
    """
    with ctx.workdps(120):
        step = ctx.mpf(10) ** -40
        result = []
        for c, value in enumerate(f):
            if value == -float("inf"):
                result.append(0.0)
                continue
            moved = [[ctx.mpf(other) + (sign * step if d == c else 0) for d, other in enumerate(f)] for sign in (1, -1)]
            result.append(float((loss(moved[0]) - loss(moved[1])) / (2 * step)))
        return result
