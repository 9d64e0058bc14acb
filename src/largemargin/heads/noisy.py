"""Noisy softmax, which lowers the target's logit at random, and most if features and class disagree."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ._target import Head, rows_of_target


class NoisySoftmaxLinear(Head):
    r"""An ``nn.Linear`` that subtracts annealed noise from the target's logit in training, against early saturation of the softmax.

    .. math:: f_y - \alpha \|w_y\| \|x\| (1 - \cos\theta_y) |\xi|, \qquad \xi \sim \mathcal{N}(0, 1) \text{ for each row}

    The noise vanishes as features align with their class. Logits are plain without a target, in ``eval()``, and for a negative target. The
    noise follows ``torch.manual_seed``, as dropout does. The gradient includes the norms and the cosine.

    Args:
        in_features, num_classes: the width D of the features, and C.
        alpha_squared: :math:`\alpha^2`, at least 0; you may change the attribute in training.
        bias: whether the classifier has one; it does not affect the noise.
        device, dtype: of the classifier.

    Example:
        >>> import torch
        >>> from largemargin.heads.noisy import NoisySoftmaxLinear
        >>> head = NoisySoftmaxLinear(16, 100)
        >>> head(torch.randn(8, 16), torch.arange(8)).shape
        torch.Size([8, 100])

    Source: Chen, Deng and Du, Noisy Softmax, CVPR 2017.
    """

    _shown = ("alpha_squared",)

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        alpha_squared: float = 0.1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        self.alpha_squared = _checks.check_number("alpha_squared", alpha_squared, low=0.0)
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ``nn.Linear``, uniform within 1 / sqrt(D)."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def _has_margin(self) -> bool:
        return self.alpha_squared != 0

    def _logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)

    def _target_logit(self, features: Tensor, target: Tensor, plain: Tensor) -> Tensor:
        _checks.check_number("alpha_squared", self.alpha_squared, low=0.0)  # an attribute that may have been changed
        x, w = features.to(plain.dtype), rows_of_target(self.weight, target).to(plain.dtype)
        # |w| |x| (1 - cos)
        distance: Tensor = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(w, dim=-1) - (x * w).sum(-1)
        noise: Tensor = math.sqrt(self.alpha_squared) * torch.randn_like(distance).abs()
        return plain - noise * distance

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"
