"""Losses for labels that are partly wrong: bounded in the probability of the target, or with a bounded part.

With CE = softplus(-l), p = sigmoid(l) and K non-targets:

    generalised cross-entropy       (1 - p^q) / q
    symmetric cross-entropy         alpha CE + 4 beta (1 - p)
    normalised and reverse          alpha CE / (CE + K (softplus(l) - a)) + 4 beta (1 - p)
    Taylor cross-entropy            sum over i = 1..t of (1 - p)^i / i
"""

from typing import Unpack

import torch
from torch import Tensor

from .. import _checks
from ..loss import error_probability, softplus
from ..rowstats import RowStats
from .rows import LossRows, RegularizedOptions, RowLoss, row_loss

MINUS_LOG_0 = 4.0  # of the reverse cross-entropy, which takes the logarithm of labels


@row_loss
def generalized_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, q: float = 0.7, **options: Unpack[RegularizedOptions]
) -> Tensor:
    r"""A loss between the softmax loss (q near 0) and the mean absolute error (q = 1). It is at most 1 / q, so a wrong label pulls less.

    .. math:: (1 - p_y^q) / q

    The paper also truncates the loss below a probability k and prunes such samples in turns. This is the loss without truncation.

    Args:
        q: above 0, at most 1; the paper uses 0.7.

    Example:
        >>> import torch, largemargin
        >>> largemargin.generalized_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), q=1.0)
        tensor(0.5000)

    Source: Zhang and Sabuncu, *Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels*, NeurIPS 2018.
    """
    _checks.check_positive("q", q, "q near 0 is the softmax loss")
    if q > 1:
        raise ValueError(f"q must be at most 1, got {q!r}; q=1 is the mean absolute error")
    rows = LossRows.of(input, target, weight, **options)
    stats = rows.stats()
    return rows.reduce(-torch.expm1(-q * softplus(-stats.log_odds)) / q, stats)  # p^q without rounding p, which may be near 1


class GeneralizedCrossEntropyLoss(RowLoss, function=generalized_cross_entropy):
    """:func:`.generalized_cross_entropy` as a module."""

    q: float
    lam: float


@row_loss
def symmetric_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 0.1,
    beta: float = 1.0,
    **options: Unpack[RegularizedOptions],
) -> Tensor:
    r"""The softmax loss plus its reverse, in which label and prediction change places.

    .. math:: -\alpha \log p_y + \beta A (1 - p_y), \qquad A = -\log 0 := 4

    The reverse term is :math:`-\sum_c p_c \log t_c` for the one-hot label t, and needs a value for log 0, which is -4 here. The
    authors' code clips labels at 1e-4, so that A = 9.21: for its values multiply ``beta`` by 2.303.

    Args:
        alpha: the factor of the softmax loss, at least 0; the paper uses 0.1 for CIFAR-10 and 6 for CIFAR-100.
        beta: the factor of the reverse term, at least 0; the paper uses 1 and 0.1.

    Example:
        >>> import torch, largemargin
        >>> largemargin.symmetric_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(2.0693)

    Source: Wang et al., *Symmetric Cross Entropy for Robust Learning with Noisy Labels*, ICCV 2019.
    """
    _check_factors(alpha, beta)
    rows = LossRows.of(input, target, weight, **options)
    stats = rows.stats()
    losses = _reverse(stats, beta)
    if alpha > 0:  # 0 * inf is NaN
        losses = losses + alpha * softplus(-stats.log_odds)
    return rows.reduce(losses, stats)


class SymmetricCrossEntropyLoss(RowLoss, function=symmetric_cross_entropy):
    """:func:`.symmetric_cross_entropy` as a module."""

    alpha: float
    beta: float
    lam: float


@row_loss
def normalized_reverse_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    **options: Unpack[RegularizedOptions],
) -> Tensor:
    r"""NCE + RCE: the softmax loss divided by its sum over all classes as the target, plus the reverse cross-entropy.

    .. math:: \alpha \frac{\log p_y}{\sum_c \log p_c} + \beta A (1 - p_y), \qquad A = -\log 0 := 4

    Both terms are bounded. The first one is 0 for a target alone in its row, and 1 for a masked target. Its denominator rewards
    non-target logits that are far from uniform; ``lam`` has the opposite effect. For A see :func:`symmetric_cross_entropy`.

    Args:
        alpha: the factor of the first term, at least 0; the paper uses 1 for CIFAR-10 and 10 for CIFAR-100.
        beta: the factor of the second term, at least 0; the paper uses 1 and 0.1.

    Example:
        >>> import torch, largemargin
        >>> largemargin.normalized_reverse_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(2.5000)

    Source: Ma et al., *Normalized Loss Functions for Deep Learning with Noisy Labels*, ICML 2020.
    """
    _check_factors(alpha, beta)
    rows = LossRows.of(input, target, weight, **options)
    stats = rows.stats()
    return rows.reduce(alpha * _normalized(stats) + _reverse(stats, beta), stats)


class NormalizedReverseCrossEntropyLoss(RowLoss, function=normalized_reverse_cross_entropy):
    """:func:`.normalized_reverse_cross_entropy` as a module."""

    alpha: float
    beta: float
    lam: float


@row_loss
def taylor_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, order: int = 2, **options: Unpack[RegularizedOptions]
) -> Tensor:
    r"""The softmax loss as a Taylor series in 1 - p, cut off. Order 1 is the mean absolute error, an infinite order the softmax loss.

    .. math:: \sum_{i=1}^{t} \frac{(1 - p_y)^i}{i}

    Args:
        order: the number t of terms, at least 1; each one takes an operation.

    Example:
        >>> import torch, largemargin
        >>> largemargin.taylor_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.6250)

    Source: Feng et al., *Can Cross Entropy Loss Be Robust to Label Noise?*, IJCAI 2020.
    """
    _checks.check_at_least_1("order", order)
    rows = LossRows.of(input, target, weight, **options)
    stats = rows.stats()
    error = error_probability(stats.log_odds)
    losses = power = error
    for i in range(2, order + 1):
        power = power * error
        losses = losses + power / i
    return rows.reduce(losses, stats)


class TaylorCrossEntropyLoss(RowLoss, function=taylor_cross_entropy):
    """:func:`.taylor_cross_entropy` as a module."""

    order: int
    lam: float


def _check_factors(alpha: float, beta: float) -> None:
    _checks.check_number("alpha", alpha, low=0)
    _checks.check_number("beta", beta, low=0)


def _reverse(stats: RowStats, beta: float) -> Tensor:
    return beta * MINUS_LOG_0 * error_probability(stats.log_odds)


def _normalized(stats: RowStats) -> Tensor:
    """``-log p_y`` over the sum of ``-log p_c``. At an infinite log-odds both may be infinite or 0, so they have values of their own."""
    infinite = stats.log_odds.isinf()
    l = stats.log_odds.masked_fill(infinite, 0.0)
    cross_entropy = softplus(-l)
    total = cross_entropy + stats.num_nontargets * (softplus(l) - stats.mean_log_q)  # -log p_c = softplus(l) - log q_c
    return torch.where(infinite, (stats.log_odds < 0).to(total.dtype), cross_entropy / total)
