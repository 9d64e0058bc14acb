r"""L-Softmax: the target's angle counts m times.

The margin is one number a row, added to the plain logit of its target. It needs no angle: with c = cos(theta), cos(m theta) is the
Chebyshev polynomial T_m(c), and the piece k of the half circle that theta is in is the number of the borders cos(j pi / m) above c. So
nothing is singular at c = +-1, where the derivative of acos is infinite.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..rowstats import accumulation_dtype
from ..schedules import Schedule, check_schedule
from ..tracing import as_one_node, refuse_script
from ._target import check_features, logit_of_target, rows_of_target, with_logit_of_target


class LSoftmaxLinear(nn.Module):
    r"""A linear classifier without bias whose target logit, in training, is that of m times its angle.

    .. math:: f_c = w_c^\top x, \quad f_y = \frac{\lambda w_y^\top x + \|w_y\| \|x\| \psi(\theta_y)}{1 + \lambda}, \quad
        \psi(\theta) = (-1)^k \cos(m \theta) - 2k \text{ for } \theta \in [k \pi / m, (k + 1) \pi / m] \quad (4)-(6)

    ``head(features, target)`` has this margin in training mode; without a target, and in eval mode, the logits are plain. Rows with a
    negative target are plain too. The margin is computed in float32 at least. From a random start a multiplier of 3 or more hardly trains
    without a schedule.

    Args:
        in_features: the width D of the features.
        num_classes: C.
        angular_multiplier: m, at least 1; 1 is no margin.
        schedule: lambda, such as an :class:`.AnnealedLambda`; it advances at each training forward with a target, and its count is in the
            ``state_dict`` of the head. None is a lambda of 0, the whole margin at once.
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

    __prepare_scriptable__ = refuse_script

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
        super().__init__()
        names = ("in_features", in_features), ("num_classes", num_classes), ("angular_multiplier", angular_multiplier)
        for name, value in names:
            _checks.check_at_least_1(name, value)
        if schedule is not None:
            check_schedule("schedule", schedule, "None")
        self.in_features, self.num_classes, self.angular_multiplier = in_features, num_classes, angular_multiplier
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.schedule = schedule if schedule is None else schedule.to(self.weight.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, uniform within 1 / sqrt(D); the schedule begins again."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.schedule is not None:
            self.schedule.reset()

    @as_one_node
    def forward(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        """The logits (..., C) of features (..., D), with the margin of classes ``target`` (...), int64, in training mode."""
        check_features(features, target, self.in_features, self.num_classes, weight=self.weight)
        logits = F.linear(features, self.weight)
        if target is None or not self.training:
            return logits
        margin = self._margin(features, target)  # (...)
        if self.schedule is not None:
            margin = margin / (1 + self.schedule())
        return with_logit_of_target(logits, target, logit_of_target(logits, target) + margin)

    def _margin(self, features: Tensor, target: Tensor) -> Tensor:
        r""":math:`\|w_y\| \|x\| (\psi - \cos \theta_y)`, never positive."""
        dtype = accumulation_dtype(torch.promote_types(features.dtype, self.weight.dtype))
        x, w = features.to(dtype), rows_of_target(self.weight, target).to(dtype)  # (..., D)
        norms: Tensor = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(w, dim=-1)
        present = norms >= torch.finfo(dtype).tiny
        cos = torch.where(present, (x * w).sum(-1), 0.0) / norms.clamp(min=torch.finfo(dtype).tiny)  # 0 where there is no angle
        return norms * (psi(cos, self.angular_multiplier) - cos)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, angular_multiplier={self.angular_multiplier}"

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, target: Tensor | None = None) -> Tensor: ...


def psi(cos: Tensor, m: int) -> Tensor:
    r""":math:`\psi = (-1)^k T_m(\cos \theta) - 2k`, which falls from 1 at an angle of 0 to 1 - 2m at pi; k is constant to autograd."""
    before, chebyshev = torch.ones_like(cos), cos
    for _ in range(m - 1):
        before, chebyshev = chebyshev, 2 * cos * chebyshev - before
    k = torch.zeros_like(cos)
    for j in range(1, m):
        k = k + (cos < math.cos(j * math.pi / m))
    return (1 - 2 * (k % 2)) * chebyshev - 2 * k
