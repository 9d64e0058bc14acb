r"""L-Softmax multiplies the target's angle by m.

The margin is one number per row, added to the target's plain logit. It needs no angle: with c = cos(theta), cos(m theta) is the Chebyshev
polynomial T_m(c), and k, the index of the piece of the half circle, is the number of borders cos(j pi / m) above c. So nothing is singular
at c = +-1, where the derivative of acos is infinite.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..rowstats import accumulation_dtype
from ..schedules import Schedule, check_schedule
from ._target import Head, rows_of_target


class LSoftmaxLinear(Head):
    r"""A linear classifier without bias whose target logit, in training, is computed from m times its angle.

    .. math:: f_c = w_c^\top x, \quad f_y = \frac{\lambda w_y^\top x + \|w_y\| \|x\| \psi(\theta_y)}{1 + \lambda}, \quad
        \psi(\theta) = (-1)^k \cos(m \theta) - 2k \text{ for } \theta \in [k \pi / m, (k + 1) \pi / m] \quad (4)-(6)

    Logits are plain without a target, in ``eval()``, and for a negative target. The margin is computed in at least float32. From a random
    start a multiplier of 3 or more hardly trains without a schedule.

    Args:
        in_features, num_classes: the width D of the features, and C.
        angular_multiplier: m, at least 1; 1 means no margin.
        schedule: lambda, such as an :class:`.AnnealedLambda`. It advances with each training forward with a target, and the ``state_dict``
            of the head has its count. None is a lambda of 0: the whole margin at once.
        device, dtype: of the parameters.

    Example:
        >>> import torch
        >>> from largemargin.heads.lsoftmax import LSoftmaxLinear
        >>> from largemargin.schedules import AnnealedLambda
        >>> head = LSoftmaxLinear(16, 10, schedule=AnnealedLambda.for_steps(1000))
        >>> features, target = torch.randn(8, 16), torch.arange(8)
        >>> bool((head(features, target) <= head(features)).all())
        True
        >>> head.eval()(features, target).equal(head(features))
        True

    Source: Liu et al., "Large-Margin Softmax Loss for Convolutional Neural Networks", ICML 2016.
    """

    _has_margin = True
    _shown = ("angular_multiplier",)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        angular_multiplier: int = 4,
        *,
        schedule: Schedule | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        _checks.check_at_least_1("angular_multiplier", angular_multiplier)
        if schedule is not None:
            check_schedule("schedule", schedule, "None")
        self.angular_multiplier = angular_multiplier
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.schedule = schedule if schedule is None else schedule.to(self.weight.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear``, uniform within 1 / sqrt(D), and reset the schedule."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.schedule is not None:
            self.schedule.reset()

    def _logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)

    def _target_logit(self, features: Tensor, target: Tensor, plain: Tensor) -> Tensor:
        _checks.check_at_least_1("angular_multiplier", self.angular_multiplier)  # an attribute that may have been changed
        margin = self._margin(features, target)  # (...)
        return plain + (margin if self.schedule is None else margin / (1 + self.schedule()))

    def _margin(self, features: Tensor, target: Tensor) -> Tensor:
        r""":math:`\|w_y\| \|x\| (\psi - \cos \theta_y)`, never positive."""
        dtype = accumulation_dtype(torch.promote_types(features.dtype, self.weight.dtype))
        x, w = features.to(dtype), rows_of_target(self.weight, target).to(dtype)  # (..., D)
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(w, dim=-1)
        present = norms >= torch.finfo(dtype).tiny
        cos = torch.where(present, (x * w).sum(-1), 0.0) / norms.clamp(min=torch.finfo(dtype).tiny)  # 0 without an angle
        return norms * (psi(cos, self.angular_multiplier) - cos)


def psi(cos: Tensor, m: int) -> Tensor:
    r""":math:`\psi = (-1)^k T_m(\cos \theta) - 2k`, which falls from 1 at an angle of 0 to 1 - 2m at pi; autograd sees k as constant."""
    before, chebyshev = torch.ones_like(cos), cos
    for _ in range(m - 1):
        before, chebyshev = chebyshev, 2 * cos * chebyshev - before
    k = torch.zeros_like(cos)
    for j in range(1, m):
        k = k + (cos < math.cos(j * math.pi / m))
    return (1 - 2 * (k % 2)) * chebyshev - 2 * k
