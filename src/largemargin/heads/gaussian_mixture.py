r"""Features as a mixture of Gaussians, one per class: a class's logit is its log-density, up to a common constant.

The distances of all rows to all classes are matrix products: :math:`\|x - \mu\|^2 = \|x\|^2 - 2 x^\top \mu + \|\mu\|^2`. Far from the
origin this is a small difference of large numbers, so the code first subtracts the mean of the means from features and means. The error
is then a few roundings of :math:`\|x\|^2 + \|\mu\|^2`. Margin and likelihood compute the distance to the target's mean by its definition.
"""

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import _checks
from ..products import linear
from ..rowstats import accumulation_dtype
from ..schedules import Schedule, check_schedule
from ._target import Head, rows_of_target

Covariance = Literal["identity", "diagonal"]
MIN_VARIANCE = 1e-4  # as the authors'; without it the log-likelihood is unbounded and variances go to 0


class GaussianMixtureHead(Head):
    r"""The log-densities of Gaussians, one per class, as logits; in training a margin enlarges the target's distance.

    .. math:: f_c = -d_c - \tfrac12 \log |\Lambda_c|, \quad d_c = \tfrac12 (x - \mu_c)^\top \Lambda_c^{-1} (x - \mu_c), \quad
        f_y = -(1 + \alpha) d_y - \tfrac12 \log |\Lambda_y|

    Logits are plain without a target, in ``eval()``, and for a negative target. They are at least float32, under autocast too, because half
    precision would lose their differences. The paper's loss is ``softmax loss of the logits + head.likelihood(features, target)``.

    Distances grow with D. With a thousand features of size 1 the margin :math:`\alpha d_y` is over a hundred nats and the softmax is
    saturated; in the paper's comparison it collapses for VGG. ``scale_by_dimension`` brings the margin to a few nats, but slows training.
    The divisor is :math:`\sqrt{D}`, the size of the differences of distances of random features; D itself would be too large.

    Args:
        in_features, num_classes: the width D of the features, and C.
        covariance: ``"identity"``, the practical choice, or ``"diagonal"``, with a variance, at least 1e-4, for each class and feature.
            Learnt variances are unstable, because the likelihood rewards ever smaller ones: give them a small learning rate.
        alpha: the margin, at least 0, or a schedule such as :class:`.SteppedAlpha`. It advances with each training forward with a target,
            and the ``state_dict`` of the head has its count.
        likelihood_weight: the lambda of the paper, the factor of :meth:`likelihood`, at least 0.
        scale_by_dimension: divide log-densities and distances by sqrt(D) everywhere; not in the paper.
        device, dtype: of the parameters.

    Example:
        >>> import torch
        >>> from largemargin import LargeMarginCrossEntropyLoss
        >>> from largemargin.heads.gaussian_mixture import GaussianMixtureHead
        >>> head, criterion = GaussianMixtureHead(16, 10, alpha=0.3), LargeMarginCrossEntropyLoss()
        >>> features, target = torch.randn(8, 16), torch.arange(8)
        >>> loss = criterion(head(features, target), target) + head.likelihood(features, target)
        >>> loss.backward()
        >>> head.means.grad.shape
        torch.Size([10, 16])

    Source: Wan et al., "Rethinking Feature Distribution for Loss Functions in Image Classification", CVPR 2018.
    """

    _factor = "means"
    _has_margin = True

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        covariance: Covariance = "identity",
        alpha: float | Schedule = 0.1,
        likelihood_weight: float = 0.1,
        scale_by_dimension: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        _checks.check_word("covariance", covariance, get_args(Covariance))
        if _checks.is_number(alpha):
            alpha = _checks.check_number("alpha", alpha, low=0.0)
        else:
            check_schedule("alpha", alpha, "a number")
        self.likelihood_weight = _checks.check_number("likelihood_weight", likelihood_weight, low=0.0)
        self.scale_by_dimension = scale_by_dimension
        self.means = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.log_variances = nn.Parameter(torch.empty_like(self.means)) if covariance == "diagonal" else None  # of variance - MIN_VARIANCE
        self.alpha = alpha.to(self.means.device) if isinstance(alpha, Schedule) else alpha
        alpha_shown = () if isinstance(alpha, Schedule) else ("alpha",)
        self._shown = ("covariance", *alpha_shown, "likelihood_weight", "scale_by_dimension")
        self.reset_parameters()

    @property
    def covariance(self) -> Covariance:
        return "identity" if self.log_variances is None else "diagonal"

    def reset_parameters(self) -> None:
        """Initialise means with variance 2 / D, as the authors do, and variances with 1; reset a schedule."""
        nn.init.kaiming_normal_(self.means)
        if self.log_variances is not None:
            nn.init.constant_(self.log_variances, math.log1p(-MIN_VARIANCE))
        if isinstance(self.alpha, Schedule):
            self.alpha.reset()

    def _target_logit(self, features: Tensor, target: Tensor, plain: Tensor) -> Tensor:
        alpha = self.alpha() if isinstance(self.alpha, Schedule) else self.alpha
        return plain - alpha * self._distance_to_target(features, target)

    def likelihood(self, features: Tensor, target: Tensor) -> Tensor:
        r"""The likelihood term, to add to the loss; 0 if all rows are ignored.

        .. math:: \lambda \operatorname{mean}_n (d_{y_n} + \tfrac12 \log |\Lambda_{y_n}|)

        Args:
            features: shape (..., D), floating.
            target: class indices, shape (...), int64; the mean leaves out rows with a negative one.

        Returns:
            A scalar; float32, or float64 for float64 input.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: features and targets that do not fit the head or each other.
        """
        self._check(features, target)
        terms = self._distance_to_target(features, target)
        if self.log_variances is not None:
            half_log_det = 0.5 * self._log_covariance(terms.dtype).sum(-1) / self._divisor
            terms = terms + torch.where(target >= 0, half_log_det[target.clamp(min=0)], 0.0)
        return self.likelihood_weight * terms.sum() / (target >= 0).sum().clamp(min=1)

    def param_groups(self, lr: float, means_factor: float = 2.0) -> list[dict[str, Any]]:
        """Groups for an optimiser: means with the rate ``means_factor * lr`` (the authors use 2), variances with ``lr``."""
        groups: list[dict[str, Any]] = [{"params": [self.means], "lr": means_factor * lr}]
        if self.log_variances is not None:
            groups.append({"params": [self.log_variances], "lr": lr})
        return groups

    @property
    def _divisor(self) -> float:
        return math.sqrt(self.in_features) if self.scale_by_dimension else 1.0

    def _dtype(self, features: Tensor) -> torch.dtype:
        return accumulation_dtype(torch.promote_types(features.dtype, self.means.dtype))

    def _log_covariance(self, dtype: torch.dtype) -> Tensor:
        assert self.log_variances is not None
        free = self.log_variances.to(dtype)
        return torch.logaddexp(free, torch.full_like(free, math.log(MIN_VARIANCE)))

    def _logits(self, features: Tensor) -> Tensor:
        dtype = self._dtype(features)
        means = self.means.to(dtype)
        center = means.detach().mean(0)
        x, means = features.to(dtype) - center, means - center
        if self.log_variances is None:
            # the halves before their sum, which has a number for each class and row
            half_squares = 0.5 * x.square().sum(-1, keepdim=True) + 0.5 * means.square().sum(-1)
            return self._divided(linear(x, means) - half_squares)
        log_covariance = self._log_covariance(dtype)
        precision = torch.exp(-log_covariance)
        half_squares = 0.5 * (linear(x.square(), precision) + (means.square() * precision).sum(-1))
        return self._divided(linear(x, means * precision) - half_squares - 0.5 * log_covariance.sum(-1))

    def _divided(self, logits: Tensor) -> Tensor:
        return logits / self._divisor if self.scale_by_dimension else logits

    def _distance_to_target(self, features: Tensor, target: Tensor) -> Tensor:
        """d_y, (...); 0 for a negative target."""
        dtype = self._dtype(features)
        difference = features.to(dtype) - rows_of_target(self.means, target).to(dtype)  # (..., D)
        squares = torch.where((target >= 0).unsqueeze(-1), difference, 0.0).square()
        if self.log_variances is not None:
            squares = squares * torch.exp(-rows_of_target(self._log_covariance(dtype), target))
        return 0.5 * squares.sum(-1) / self._divisor
