r"""Logits that are s times the cosine between features and classes, and margins on the target's angle: CosFace and ArcFace.

    plain, also called NormFace     s cos(theta_c)
    CosFace, AM-Softmax             s (cos(theta_y) - m)    at the target
    ArcFace                         s cos(theta_y + m)      at the target

ArcFace's derivative with respect to the cosine, s sin(theta + m) / sin(theta), is infinite at theta = 0 and pi; with respect to features
and classes it is not. So sin(theta) is not sqrt(1 - cos^2), which has lost all its digits there, but |x - w| |x + w| / 2 of the two unit
vectors: right at any angle, and its gradient is bounded.
"""

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..rowstats import accumulation_dtype
from ..tracing import as_one_node, refuse_script
from ._target import check_features, logit_of_target, rows_of_target, with_logit_of_target

Kind = Literal["cosface", "arcface", "arcface_insightface"]
MARGINS: dict[Kind, float] = {"cosface": 0.35, "arcface": 0.5, "arcface_insightface": 0.5}  # of their papers


class CosineLinear(nn.Module):
    r"""A linear classifier of cosines, with the margin of CosFace or ArcFace on the target's logit in training.

    .. math:: f_c = s \cos\theta_c, \qquad f_y = s (\cos\theta_y - m) \text{ (CosFace)}, \quad s \cos(\theta_y + m) \text{ (ArcFace)}

    Without a target and in ``eval()`` no logit has a margin; nor have rows with a negative target, which the losses ignore.

    Beyond :math:`\theta = \pi - m`, where :math:`\cos(\theta + m)` would rise again, ArcFace goes on as :math:`\cos\theta + \cos m - 1`:
    continuous, falling, with the slope of the plain cosine. (The authors' code has :math:`\cos\theta - m \sin m` there, with a step.)
    ``"arcface_insightface"`` is what that library trains today: the value :math:`s\cos(\theta + m)` at every angle, with the gradient of
    the plain cosine, since it edits the logits in place behind autograd's back. The exact gradient does not fade as the angle does.

    CosFace never needs the logits: its margin is the hard bias b = s m of eq. (15), so :meth:`features`, :meth:`weights` and
    :attr:`hard_bias` are what the fused and the sharded losses take. A zero vector has cosine 0 with every other.

    Args:
        in_features: the width D of the features.
        num_classes: C.
        scale: s, positive; 30 in AM-Softmax, 64 in CosFace and ArcFace.
        margin: m, at least 0; of CosFace a cosine, of ArcFace an angle in radians below pi. ``None`` is that of the paper, 0.35 or 0.5;
            0 is the plain head.
        kind: ``"cosface"``, ``"arcface"`` or ``"arcface_insightface"``.
        device, dtype: of the classifier.

    Example:
        >>> import torch
        >>> from largemargin import linear_large_margin_cross_entropy
        >>> from largemargin.heads.cosine import CosineLinear
        >>> head = CosineLinear(16, 100)
        >>> x, y = torch.randn(8, 16), torch.arange(8)
        >>> head(x, y).shape
        torch.Size([8, 100])
        >>> loss = linear_large_margin_cross_entropy(head.features(x), head.weights(), y, hard_bias=head.hard_bias)

    Source: Wang et al., CosFace, CVPR 2018; Wang et al., AM-Softmax, 2018; Deng et al., ArcFace, CVPR 2019.
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 30.0,
        margin: float | None = None,
        kind: Kind = "cosface",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.check_at_least_1("in_features", in_features)
        _checks.check_at_least_1("num_classes", num_classes)
        _checks.check_positive("scale", scale, "the papers have 30 or 64")
        _checks.check_word("kind", kind, get_args(Kind))
        margin = MARGINS[kind] if margin is None else margin
        _checks.check_number("margin", margin, low=0.0)
        if kind != "cosface" and margin >= math.pi:
            raise ValueError(f"margin of kind={kind!r} must be an angle in radians below pi, got {margin!r}; math.radians converts degrees")
        self.in_features, self.num_classes = in_features, num_classes
        self.scale, self.margin = scale, margin
        self.kind: Kind = kind
        self.weight = nn.Parameter(torch.empty(num_classes, in_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Directions uniform on the sphere, of length about 1."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def features(self, features: Tensor) -> Tensor:
        """Features (..., D) with length s: the first factor of the logits."""
        return (self.scale * unit(features)).to(features.dtype)

    def weights(self) -> Tensor:
        """The classes (C, D) with length 1: the second factor of the logits."""
        return unit(self.weight).to(self.weight.dtype)

    @property
    def hard_bias(self) -> float:
        """The b = s m of eq. (15) that is the margin of CosFace, for any loss of the plain logits; ArcFace has none."""
        if self.kind != "cosface" and self.margin:
            raise ValueError(f"hard_bias is the margin of kind='cosface', and kind is {self.kind!r}: call the head with the target instead")
        return self.scale * self.margin

    @as_one_node
    def forward(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        """The logits (..., C) of features (..., D); in training those of ``target`` (...) with the margin."""
        check_features(features, target, self.in_features, self.num_classes, weight=self.weight)
        logits = F.linear(self.features(features), self.weights())
        if target is None or not self.training or self.margin == 0:
            return logits
        return with_logit_of_target(logits, target, self._logit_with_margin(features, logit_of_target(logits, target), target))

    def _logit_with_margin(self, features: Tensor, plain: Tensor, target: Tensor) -> Tensor:
        if self.kind == "cosface":
            return plain - self.hard_bias
        x, w = unit(features), unit(rows_of_target(self.weight, target))
        cos = (x * w).sum(-1)
        sin = torch.linalg.vector_norm(x - w, dim=-1) * torch.linalg.vector_norm(x + w, dim=-1) / 2
        sin = torch.where((x == 0).all(-1) | (w == 0).all(-1), 1.0, sin)  # a zero vector has a cosine of 0
        cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
        shifted: Tensor = self.scale * (cos * cos_m - sin * sin_m)
        if self.kind == "arcface_insightface":
            return plain + (shifted - plain).detach()
        return torch.where(cos > -cos_m, shifted, self.scale * (cos + cos_m - 1))

    def __dir__(self) -> list[str]:
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in names if name != "hard_bias" or self.kind == "cosface"]  # torch.jit.trace asks for each of them

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, scale={self.scale}, margin={self.margin}, kind={self.kind!r}"
        )

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, target: Tensor | None = None) -> Tensor: ...


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., D) with length 1, in at least float32; a zero vector stays zero, with the gradient of one of length 1."""
    vectors = vectors.to(accumulation_dtype(vectors.dtype))
    largest = vectors.detach().abs().amax(-1, keepdim=True)  # squares of its size neither vanish nor overflow
    vectors = vectors / largest.masked_fill(largest == 0, 1.0)
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, 1.0)
