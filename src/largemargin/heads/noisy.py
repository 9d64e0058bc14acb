"""Noisy softmax: the target's logit is lowered at random, most where features and class disagree."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..rowstats import accumulation_dtype
from ..tracing import as_one_node, refuse_script
from ._target import check_features, logit_of_target, rows_of_target, with_logit_of_target


class NoisySoftmaxLinear(nn.Module):
    r"""An ``nn.Linear`` that in training takes annealed noise off the target's logit, against early saturation of the softmax.

    .. math:: f_y - \alpha \|w_y\| \|x\| (1 - \cos\theta_y) |\xi|, \qquad \xi \sim \mathcal{N}(0, 1) \text{ for each row}

    The noise vanishes by itself as features align with their class. Without a target and in ``eval()`` it is an ``nn.Linear``; rows with a
    negative target, which the losses ignore, have no noise either. It is drawn as dropout is: ``torch.manual_seed`` repeats it. The
    gradient goes through the norms and the cosine.

    Args:
        in_features: the width D of the features.
        num_classes: C.
        alpha_squared: :math:`\alpha^2`, at least 0; the attribute may be changed in training.
        bias: whether the classifier has one; it takes no part in the noise.
        device, dtype: of the classifier.

    Example:
        >>> import torch
        >>> from largemargin.heads.noisy import NoisySoftmaxLinear
        >>> head = NoisySoftmaxLinear(16, 100)
        >>> head(torch.randn(8, 16), torch.arange(8)).shape
        torch.Size([8, 100])

    Source: Chen, Deng and Du, Noisy Softmax, CVPR 2017.
    """

    __prepare_scriptable__ = refuse_script

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
        super().__init__()
        _checks.check_at_least_1("in_features", in_features)
        _checks.check_at_least_1("num_classes", num_classes)
        _checks.check_number("alpha_squared", alpha_squared, low=0.0)
        self.in_features, self.num_classes = in_features, num_classes
        self.alpha_squared = alpha_squared
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_classes, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, uniform within 1 / sqrt(D)."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @as_one_node
    def forward(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        """The logits (..., C) of features (..., D); in training those of ``target`` (...) with noise."""
        check_features(features, target, self.in_features, self.num_classes, weight=self.weight)
        logits = F.linear(features, self.weight, self.bias)
        if target is None or not self.training or self.alpha_squared == 0:
            return logits
        dtype = accumulation_dtype(logits.dtype)
        x, w = features.to(dtype), rows_of_target(self.weight, target).to(dtype)
        # |w| |x| (1 - cos)
        distance = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(w, dim=-1) - (x * w).sum(-1)
        noise = math.sqrt(self.alpha_squared) * torch.randn_like(distance).abs()
        return with_logit_of_target(logits, target, logit_of_target(logits, target) - noise * distance)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, alpha_squared={self.alpha_squared}, "
            f"bias={self.bias is not None}"
        )

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, target: Tensor | None = None) -> Tensor: ...
