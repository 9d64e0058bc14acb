"""The t-vMF similarity, a cosine with a sharper peak: only features near a class are like it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..rowstats import accumulation_dtype
from ._target import Head
from .cosine import unit


class TVMFLinear(Head):
    r"""A linear classifier with the t-vMF similarity of features and classes in place of their cosine.

    .. math:: f_c = s\, \phi(\cos\theta_c), \qquad \phi(\cos\theta) = \frac{1 + \cos\theta}{1 + \kappa (1 - \cos\theta)} - 1

    The similarity falls from 1 at an angle of 0 to -1 at pi, as the cosine does. With a large :math:`\kappa` it has fallen close to -1 at a
    right angle: the features of a class must be compact. With :math:`\kappa = 0` it is the cosine. It makes all logits, in training and in
    evaluation. There is no margin: the head accepts ``target`` as other heads do, but it has no effect.

    Args:
        in_features, num_classes: the width D of the features, and C.
        kappa: the concentration, above -1/2; the paper's code uses 4, 16 and 64, and -0.3 to do the opposite.
        scale: s, positive. ``None`` learns it, as the authors' code does: 1 + softplus of the parameter ``raw_scale``, which begins at 0.
        device, dtype: of the parameters.

    Example:
        >>> import torch
        >>> from largemargin.heads.t_vmf import TVMFLinear
        >>> head = TVMFLinear(2, 1, kappa=16.0, scale=1.0)
        >>> _ = torch.nn.init.constant_(head.weight, 1.0)
        >>> head(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])).T
        tensor([[ 1.0000, -0.9412, -1.0000]], grad_fn=<...>)

    Source: Kobayashi, *T-vMF Similarity for Regularizing Intra-Class Feature Distribution*, CVPR 2021, and its code.
    """

    raw_scale: Tensor
    _shown = ("kappa", "scale")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        kappa: float = 16.0,
        scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        self.kappa = _checked_kappa(kappa)
        self.scale = None if scale is None else _checks.check_positive("scale", scale, "None learns it")
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        if scale is None:
            self.raw_scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the classes with uniform directions and lengths of about 1, and a learned scale with 1 + log 2."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.scale is None:
            nn.init.zeros_(self.raw_scale)

    def _logits(self, features: Tensor) -> Tensor:
        cosines = F.linear(unit(features).to(features.dtype), unit(self.weight).to(self.weight.dtype))
        cos = cosines.to(accumulation_dtype(cosines.dtype)).clamp(-1.0, 1.0)  # rounding would reach the pole of a negative kappa
        similarity = (1 + cos) / (1 + _checked_kappa(self.kappa) * (1 - cos)) - 1
        return (self._scale(cos.dtype) * similarity).to(cosines.dtype)

    def _scale(self, dtype: torch.dtype) -> float | Tensor:
        return 1 + F.softplus(self.raw_scale.to(dtype)) if self.scale is None else self.scale


def _checked_kappa(kappa: float) -> float:
    number = _checks.check_number("kappa", kappa)
    if not number > -0.5:
        raise ValueError(f"kappa must be above -1/2, got {kappa!r}; the similarity has a pole there, and 0 is the cosine")
    return number
