r"""Logits of s times the cosine between features and classes, with margins on the target's angle. A class may have several
sub-centers: its cosine is that of the nearest one.

The derivative of ArcFace by the cosine, s sin(theta + m) / sin(theta), is infinite at theta = 0 and pi, but its derivative by features
and classes is not. So the code computes sin(theta) as |x - w| |x + w| / 2 of the two unit vectors: right at any angle, with a bounded
gradient, where sqrt(1 - cos^2) has no correct digit.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..rowstats import accumulation_dtype
from ..schedules import Schedule, check_schedule
from ._target import Head, rows_of_target
from .lsoftmax import psi

Kind = Literal["cosface", "arcface", "arcface_insightface", "sphereface"]
MARGINS: dict[Kind, float] = {"cosface": 0.35, "arcface": 0.5, "arcface_insightface": 0.5, "sphereface": 4}  # of their papers


class CosineLinear(Head):
    r"""A linear classifier of cosines, with the margin of CosFace, ArcFace or SphereFace on the target's logit in training.

    .. math:: f_c = s \cos\theta_c, \qquad f_y = s (\cos\theta_y - m) \text{ (CosFace)}, \quad s \cos(\theta_y + m) \text{ (ArcFace)},
        \quad s \psi(\theta_y) \text{ (SphereFace)}

    Logits are plain (NormFace) without a target, in ``eval()``, and for a negative target. A zero vector has cosine 0 with every other.

    Beyond :math:`\theta = \pi - m`, where :math:`\cos(\theta + m)` would rise again, ArcFace continues as :math:`\cos\theta + \cos m - 1`:
    continuous, falling, with the slope of the plain cosine. (The authors' code has :math:`\cos\theta - m \sin m` there, with a step.)
    ``"arcface_insightface"`` behaves as insightface today: the value is :math:`s\cos(\theta + m)` at every angle, but the gradient is that
    of the plain cosine, because that library edits logits outside autograd. The exact gradient does not vanish with the angle.

    SphereFace has the :math:`\psi` of :class:`.LSoftmaxLinear`. In its paper the length of the feature takes the place of s; here s is a
    constant, as in the authors' later SphereFace-R. It hardly trains from a random start without a schedule.

    The margin of CosFace is the hard bias b = s m of eq. (15). So the fused and the sharded losses can take :meth:`features`,
    :meth:`weights` and :attr:`hard_bias` instead of logits.

    With ``subcenters`` = K each class has K rows of ``weight``, and :math:`\cos\theta_c` is the largest of their cosines. A class may then
    hold several kinds of samples, and wrong labels may gather at a sub-center of their own.

    Args:
        in_features, num_classes: the width D of the features, and C.
        scale: s, positive; 30 in AM-Softmax, 64 in CosFace and ArcFace.
        margin: m. For CosFace a cosine, at least 0; for ArcFace an angle in radians, at least 0 and below pi; for SphereFace the integer
            that multiplies the angle, at least 1. ``None`` is the paper's 0.35, 0.5 or 4.
        kind: ``"cosface"``, ``"arcface"``, ``"arcface_insightface"`` or ``"sphereface"``.
        subcenters: K, at least 1; its paper uses 3, with ``"arcface"``. Row ``c K + k`` of ``weight`` is sub-center k of class c.
        schedule: for ``"sphereface"``, as in :class:`.LSoftmaxLinear`: the logit is :math:`s (\lambda \cos\theta + \psi) / (1 + \lambda)`.
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

    Source: Wang et al., CosFace, CVPR 2018; Wang et al., AM-Softmax, 2018; Deng et al., ArcFace, CVPR 2019; Liu et al., SphereFace, CVPR
    2017, and SphereFace Revived, 2022; Deng et al., Sub-center ArcFace, ECCV 2020.
    """

    _shown = ("scale", "margin", "kind", "subcenters")

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        scale: float = 30.0,
        margin: float | None = None,
        kind: Kind = "cosface",
        subcenters: int = 1,
        schedule: Schedule | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        self.scale = _checks.check_positive("scale", scale, "the papers use 30 or 64")
        _checks.check_word("kind", kind, get_args(Kind))
        self.margin = _checked_margin(MARGINS[kind] if margin is None else margin, kind)
        self.kind: Kind = kind
        _checks.check_at_least_1("subcenters", subcenters)
        self.subcenters = subcenters
        if schedule is not None:
            check_schedule("schedule", schedule, "None")
            if kind != "sphereface":
                raise ValueError(f"schedule anneals the margin of kind='sphereface', but kind is {kind!r}; leave it out")
        self.weight = nn.Parameter(torch.empty(num_classes * subcenters, in_features, device=device, dtype=dtype))
        self.schedule = schedule if schedule is None else schedule.to(self.weight.device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the classes with uniform directions and lengths of about 1, and reset the schedule."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.schedule is not None:
            self.schedule.reset()

    def features(self, features: Tensor) -> Tensor:
        """Features (..., D) with length s: the first factor of the logits."""
        return (self.scale * unit(features)).to(features.dtype)

    def weights(self) -> Tensor:
        """The classes (C, D) with length 1: the second factor of the logits."""
        if self.subcenters > 1:
            raise ValueError(f"weights() needs subcenters=1, got {self.subcenters}: a largest cosine is no product; call the head instead")
        return self._unit_weight()

    def _unit_weight(self) -> Tensor:
        return unit(self.weight).to(self.weight.dtype)

    @property
    def hard_bias(self) -> float:
        """The margin of CosFace as b = s m of eq. (15), for any loss of the plain logits; the other kinds have none."""
        if self.kind == "cosface":
            return self.scale * self.margin
        if self._has_margin:
            raise ValueError(f"hard_bias is the margin of kind='cosface', but kind is {self.kind!r}: call the head with the target instead")
        return 0.0

    @property
    def _has_margin(self) -> bool:
        return self.margin != (1 if self.kind == "sphereface" else 0)

    def _logits(self, features: Tensor) -> Tensor:
        logits = F.linear(self.features(features), self._unit_weight())
        return logits if self.subcenters == 1 else logits.unflatten(-1, (self.num_classes, self.subcenters)).amax(-1)

    def _target_logit(self, features: Tensor, target: Tensor, plain: Tensor) -> Tensor:
        _checks.check_word("kind", self.kind, MARGINS)  # an attribute that may have been changed
        if self.kind == "cosface":
            return plain - self.hard_bias
        x = unit(features)
        w = self._class_of(x, target)
        cos = (x * w).sum(-1)
        if self.kind == "sphereface":
            margin = self.scale * (psi(cos, int(_checked_margin(self.margin, self.kind))) - cos)
            return plain + (margin if self.schedule is None else margin / (1 + self.schedule()))
        sin = torch.linalg.vector_norm(x - w, dim=-1) * torch.linalg.vector_norm(x + w, dim=-1) / 2
        sin = torch.where((x == 0).all(-1) | (w == 0).all(-1), 1.0, sin)  # a zero vector has a cosine of 0
        cos_m, sin_m = math.cos(self.margin), math.sin(self.margin)
        shifted: Tensor = self.scale * (cos * cos_m - sin * sin_m)
        if self.kind == "arcface_insightface":
            return plain + (shifted - plain).detach()
        return torch.where(cos > -cos_m, shifted, self.scale * (cos + cos_m - 1))

    def _class_of(self, x: Tensor, target: Tensor) -> Tensor:
        """The unit vector (..., D) of each row's class: of the sub-center nearest to ``x``."""
        if self.subcenters == 1:
            return unit(rows_of_target(self.weight, target))
        each = torch.arange(self.subcenters, device=target.device)
        w = unit(rows_of_target(self.weight, target.clamp(min=0).unsqueeze(-1) * self.subcenters + each))  # (..., K, D)
        nearest = (w * x.unsqueeze(-2)).sum(-1).detach().argmax(-1)
        return w.gather(-2, nearest[..., None, None].expand(*nearest.shape, 1, w.shape[-1])).squeeze(-2)

    def __dir__(self) -> list[str]:
        names: list[str] = super().__dir__()  # type: ignore[no-untyped-call]
        return [name for name in names if name != "hard_bias" or self.kind == "cosface"]  # torch.jit.trace asks for each of them


def _checked_margin(margin: float, kind: Kind) -> float:
    if kind == "sphereface":
        margin = _checks.check_number("margin", margin, low=1.0)
        if margin != int(margin):
            raise ValueError(
                f"margin of kind='sphereface' must be an integer, which multiplies the angle, got {margin!r}; the paper uses 4"
            )
        return int(margin)
    margin = _checks.check_number("margin", margin, low=0.0)
    if kind != "cosface" and margin >= math.pi:
        raise ValueError(f"margin of kind={kind!r} must be an angle in radians below pi, got {margin!r}; math.radians converts degrees")
    return margin


def unit(vectors: Tensor) -> Tensor:
    """Vectors (..., D) with length 1, in at least float32; a zero vector stays zero, with the gradient of a vector of length 1."""
    vectors = vectors.to(accumulation_dtype(vectors.dtype))
    largest = vectors.detach().abs().amax(-1, keepdim=True)  # dividing by it keeps squares from underflow and overflow
    vectors = vectors / largest.masked_fill(largest == 0, 1.0)
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / length.masked_fill(length == 0, 1.0)
