r"""Features as a mixture of Gaussians, one a class: a class's logit is its log-density, up to a constant that all classes share.

The distances of all rows to all classes are matrix products: :math:`\|x - \mu\|^2 = \|x\|^2 - 2 x^\top \mu + \|\mu\|^2`. Far from the
origin that is a small difference of large numbers, so features and means are first taken relative to the mean of the means, which changes
no distance. What remains is an error of a few roundings of :math:`\|x\|^2 + \|\mu\|^2` so measured. The distance to the target's mean
alone, of which margin and likelihood are made, is computed as it is defined.
"""

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from .. import _checks
from ..products import linear
from ..rowstats import accumulation_dtype
from ..schedules import Schedule, check_schedule
from ..tracing import as_one_node, refuse_script
from ._target import check_features, logit_of_target, rows_of_target, with_logit_of_target

Covariance = Literal["identity", "diagonal"]
MIN_VARIANCE = 1e-4  # the authors' too; without it the log-likelihood has no bound and variances run to 0


class GaussianMixtureHead(nn.Module):
    r"""The log-densities of Gaussians, one a class, as logits; in training the target's distance is enlarged by a margin.

    .. math:: f_c = -d_c - \tfrac12 \log |\Lambda_c|, \quad d_c = \tfrac12 (x - \mu_c)^\top \Lambda_c^{-1} (x - \mu_c), \quad
        f_y = -(1 + \alpha) d_y - \tfrac12 \log |\Lambda_y|

    ``head(features, target)`` has this margin in training mode; without a target, and in eval mode, the logits are plain. Rows with a
    negative target are plain too. The loss of the paper is ``softmax loss of the logits + head.likelihood(features, target)``.

    Logits are float32 at least, under autocast too: they are large, and half precision would leave nothing of their differences.

    Distances grow with D. From a thousand features of size 1 or so the margin :math:`\alpha d_y` is a hundred nats and more and the softmax
    saturates: the paper's comparison has it collapse for VGG. With ``scale_by_dimension`` it decides by a few nats, and learns more slowly.
    The divisor is :math:`\sqrt{D}`, the size of the differences of distances of random features; D itself leaves next to nothing of them.

    Args:
        in_features: the width D of the features.
        num_classes: C.
        covariance: ``"identity"``, the practical choice, or ``"diagonal"``, with a variance, at least 1e-4, for each class and feature.
            Learnt variances are unstable: the likelihood rewards small ones without end. Give them a small learning rate.
        alpha: the margin, at least 0, or a schedule of it, such as a :class:`.SteppedAlpha`, which advances at each training forward with
            a target and whose count is in the ``state_dict`` of the head.
        likelihood_weight: the lambda of the paper, by which :meth:`likelihood` is multiplied, at least 0.
        scale_by_dimension: divide log-densities and distances by sqrt(D), in logits, margin and likelihood; not in the paper.
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

    __prepare_scriptable__ = refuse_script

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
        super().__init__()
        _checks.check_at_least_1("in_features", in_features)
        _checks.check_at_least_1("num_classes", num_classes)
        _checks.check_word("covariance", covariance, get_args(Covariance))
        if _checks.is_number(alpha):
            _checks.check_number("alpha", alpha, low=0.0)
        else:
            check_schedule("alpha", alpha, "a number")
        _checks.check_number("likelihood_weight", likelihood_weight, low=0.0)
        self.in_features, self.num_classes, self.covariance = in_features, num_classes, covariance
        self.likelihood_weight, self.scale_by_dimension = likelihood_weight, scale_by_dimension
        self.means = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.log_variances = nn.Parameter(torch.empty_like(self.means)) if covariance == "diagonal" else None  # above the smallest
        self.alpha = alpha.to(self.means.device) if isinstance(alpha, Schedule) else alpha
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Means of variance 2 / D, as the authors', variances of 1; a schedule begins again."""
        nn.init.kaiming_normal_(self.means)
        if self.log_variances is not None:
            nn.init.constant_(self.log_variances, math.log1p(-MIN_VARIANCE))
        if isinstance(self.alpha, Schedule):
            self.alpha.reset()

    @as_one_node
    def forward(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        """The logits (..., C) of features (..., D), with the margin of classes ``target`` (...), int64, in training mode."""
        check_features(features, target, self.in_features, self.num_classes, means=self.means)
        logits = self._log_densities(features)
        if target is None or not self.training:
            return logits
        alpha = self.alpha() if isinstance(self.alpha, Schedule) else self.alpha
        margin = alpha * self._distance_to_target(features, target)  # (...)
        return with_logit_of_target(logits, target, logit_of_target(logits, target) - margin)

    def likelihood(self, features: Tensor, target: Tensor) -> Tensor:
        r"""The likelihood term of the loss, to be added to it; 0 where all rows are ignored.

        .. math:: \lambda \operatorname{mean}_n (d_{y_n} + \tfrac12 \log |\Lambda_{y_n}|)

        Args:
            features: shape (..., D), floating.
            target: class indices, shape (...), int64; rows with a negative one are left out of the mean.

        Returns:
            A scalar; float32, or float64 for float64.

        Raises:
            TypeError, ValueError, RuntimeError, IndexError: for features and targets that do not fit the head or each other.
        """
        check_features(features, target, self.in_features, self.num_classes, means=self.means)
        terms = self._distance_to_target(features, target)
        if self.log_variances is not None:
            half_log_det = 0.5 * self._log_covariance(terms.dtype).sum(-1) / self._divisor
            terms = terms + torch.where(target >= 0, half_log_det[target.clamp(min=0)], 0.0)
        return self.likelihood_weight * terms.sum() / (target >= 0).sum().clamp(min=1)

    def param_groups(self, lr: float, means_factor: float = 2.0) -> list[dict[str, Any]]:
        """Groups for an optimiser: the means with ``means_factor`` times the learning rate, the authors' 2, any variances with ``lr``."""
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
        """The logarithms of the variances, (C, D)."""
        assert self.log_variances is not None
        free = self.log_variances.to(dtype)
        return torch.logaddexp(free, torch.full_like(free, math.log(MIN_VARIANCE)))

    def _log_densities(self, features: Tensor) -> Tensor:
        """The plain logits, (..., C)."""
        dtype = self._dtype(features)
        means = self.means.to(dtype)
        center = means.detach().mean(0)
        x, means = features.to(dtype) - center, means - center
        if self.log_variances is None:
            distances = 0.5 * (x.square().sum(-1, keepdim=True) + means.square().sum(-1)) - linear(x, means)
            return -distances / self._divisor
        log_covariance = self._log_covariance(dtype)
        precision = torch.exp(-log_covariance)
        distances = 0.5 * (linear(x.square(), precision) + (means.square() * precision).sum(-1)) - linear(x, means * precision)
        return -(distances + 0.5 * log_covariance.sum(-1)) / self._divisor

    def _distance_to_target(self, features: Tensor, target: Tensor) -> Tensor:
        """d_y, (...), which is 0 for rows without a class."""
        dtype = self._dtype(features)
        difference = features.to(dtype) - rows_of_target(self.means, target).to(dtype)  # (..., D)
        squares = torch.where((target >= 0).unsqueeze(-1), difference, 0.0).square()
        if self.log_variances is not None:
            squares = squares * torch.exp(-rows_of_target(self._log_covariance(dtype), target))
        return 0.5 * squares.sum(-1) / self._divisor

    def extra_repr(self) -> str:
        alpha = "" if isinstance(self.alpha, Schedule) else f"alpha={self.alpha}, "
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, covariance={self.covariance!r}, {alpha}"
            f"likelihood_weight={self.likelihood_weight}, scale_by_dimension={self.scale_by_dimension}"
        )

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, target: Tensor | None = None) -> Tensor: ...
