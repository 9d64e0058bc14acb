"""The softmax loss with a factor or a term that depends on the probability of the target: hard rows count more, or less.

With CE = softplus(-l) and p = sigmoid(l):

    focal           (1 - p)^gamma CE
    dual focal      (1 - p + (1 - p) e^-rho)^gamma CE, where (1 - p) e^-rho is the largest non-target probability
    PolyLoss-1      CE + epsilon (1 - p)
"""

from typing import Unpack

import torch
from torch import Tensor

from .. import _checks
from ..loss import error_probability, softplus
from .rows import LossRows, RegularizedOptions, RowLoss, row_loss


@row_loss
def focal_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, gamma: float = 2.0, **options: Unpack[RegularizedOptions]
) -> Tensor:
    r"""The softmax loss of a row times a power of its error probability, so that easy rows count less.

    .. math:: -(1 - p_y)^\gamma \log p_y \quad (4)

    The paper has it for sigmoids; for a softmax it is used against over-confidence. The paper's factor for each class is ``weight``.

    Args:
        gamma: at least 0; 0 is the softmax loss, the paper uses 2.

    Example:
        >>> import torch, largemargin
        >>> largemargin.focal_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(0.1733)

    Source: Lin et al., *Focal Loss for Dense Object Detection*, ICCV 2017; Mukhoti et al., NeurIPS 2020, for calibration.
    """
    _checks.check_number("gamma", gamma, low=0)
    rows = LossRows.of(input, target, weight, **options)
    stats = rows.stats()
    return rows.reduce(_scaled(gamma * _log_error(stats.log_odds), softplus(-stats.log_odds)), stats)


class FocalCrossEntropyLoss(RowLoss, function=focal_cross_entropy):
    """:func:`.focal_cross_entropy` as a module."""

    gamma: float
    lam: float


@row_loss
def dual_focal_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, gamma: float = 5.0, **options: Unpack[RegularizedOptions]
) -> Tensor:
    r"""Focal loss with the largest non-target probability in its factor, against over-confidence and under-confidence.

    .. math:: -(1 - p_y + \max_{c \neq y} p_c)^\gamma \log p_y

    The paper and its code take the largest probability below that of the target, not the largest non-target one. The two agree where the
    target is on top. The paper's is not a function of the statistics of a row: it jumps where a class overtakes the target, and is 0
    where the target is the least likely class.

    Args:
        gamma: at least 0; 0 is the softmax loss.

    Example:
        >>> import torch, largemargin
        >>> largemargin.dual_focal_cross_entropy(torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0]), gamma=1.0)
        tensor(0.0765)

    Source: Tao et al., *Dual Focal Loss for Calibration*, ICML 2023.
    """
    _checks.check_number("gamma", gamma, low=0)
    rows = LossRows.of(input, target, weight, **options)
    stats = rows.stats()
    log_factor = gamma * (_log_error(stats.log_odds) + softplus(-stats.rho))  # (1 - p) (1 + e^-rho)
    return rows.reduce(_scaled(log_factor, softplus(-stats.log_odds)), stats)


class DualFocalCrossEntropyLoss(RowLoss, function=dual_focal_cross_entropy):
    """:func:`.dual_focal_cross_entropy` as a module."""

    gamma: float
    lam: float


@row_loss
def poly1_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, *, epsilon: float = 2.0, **options: Unpack[RegularizedOptions]
) -> Tensor:
    r"""The softmax loss with another first coefficient of its series in 1 - p.

    .. math:: -\log p_y + \epsilon (1 - p_y)

    Args:
        epsilon: finite; the paper uses 2 for ImageNet and -1 for detection. Below -1 a row of small error has a negative loss.

    Example:
        >>> import torch, largemargin
        >>> largemargin.poly1_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([0]))
        tensor(1.6931)

    Source: Leng et al., *PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions*, ICLR 2022.
    """
    _checks.check_number("epsilon", epsilon)
    rows = LossRows.of(input, target, weight, **options)
    stats = rows.stats()
    return rows.reduce(softplus(-stats.log_odds) + epsilon * error_probability(stats.log_odds), stats)


class Poly1CrossEntropyLoss(RowLoss, function=poly1_cross_entropy):
    """:func:`.poly1_cross_entropy` as a module."""

    epsilon: float
    lam: float


def _log_error(log_odds: Tensor) -> Tensor:
    """log(1 - p), finite. A power of 1 - p is its exponential, because the derivatives of a power of 0 may be infinite."""
    return -softplus(log_odds.clamp(max=1e4))


def _scaled(log_factor: Tensor, cross_entropy: Tensor) -> Tensor:
    """``e^log_factor * cross_entropy``. If that is infinite, the target is masked: the factor is constant, and its gradient 0 * inf."""
    factor, infinite = log_factor.exp(), cross_entropy == torch.inf
    return torch.where(infinite, factor.detach() * cross_entropy, factor * cross_entropy.masked_fill(infinite, 0.0))
