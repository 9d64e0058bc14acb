r"""The super-symmetric classifier, to which the regulariser of eq. (8) leads, and the distance of a classifier from it.

    w_c . w_c = v,    w_c . w_c' = -v / (C - 1)        (Sec. 3)

The classes are the corners of a regular simplex around 0 in a space of C - 1 dimensions: their Gram matrix is v C / (C - 1) (I - 11'/C).
With B (C, C - 1) an orthonormal basis of the vectors that sum to 0, and a frame F (C - 1, D) with orthonormal rows,

    W = sqrt(v C / (C - 1)) B F                        so W W' = v C / (C - 1) B B', and B B' = I - 11'/C

B has the columns, without the first, of the reflection that maps the first axis to a constant vector. So the rows of B F are the rows of F
minus a multiple of their sum: no matrix product, and no special case for D = C - 1.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks
from ..products import linear
from ..rows.dtensors import gathered
from ..rowstats import accumulation_dtype
from ..tracing import as_one_call
from ._target import Head

Frame = Literal["fixed", "learned"]


class SuperSymmetricLinear(Head):
    r"""A linear classifier without bias that is always super-symmetric: its classes are the corners of a regular simplex.

    .. math:: w_c^\top w_c = v, \qquad w_c^\top w_{c'} = -\frac{v}{C-1} \quad (c \neq c') \qquad \text{(Sec. 3)}

    Features along :math:`w_y` have equal logits at all other classes, so every divergence of eqs. (8) and (10) is 0. The paper finds the
    constraint too strong at the start of training and suggests to enforce it gradually, as :func:`super_symmetry_penalty` does. There is no
    margin: the head accepts ``target`` as other heads do, but it has no effect.

    Args:
        in_features, num_classes: the width D of the features, at least C - 1, and C, at least 2.
        frame: ``"fixed"``, a random one in a buffer, or ``"learned"``, the orthonormal factor (QR) of a free parameter.
        scale: v, the squared length of every class, positive.
        learn_scale: whether to train v, by its logarithm.
        device, dtype: of the classifier.

    Example:
        >>> import torch
        >>> from largemargin.heads.super_symmetric import SuperSymmetricLinear
        >>> head = SuperSymmetricLinear(16, 3)
        >>> head.weight @ head.weight.T
        tensor([[ 1.0000, -0.5000, -0.5000],
                [-0.5000,  1.0000, -0.5000],
                [-0.5000, -0.5000,  1.0000]])

    Source: Otsu, ICPR 1982; Kobayashi, BMVC 2019, Sec. 3 (the paper's own form of the constraint was in a supplement that is lost).
    """

    frame: Tensor
    log_scale: Tensor
    _factor = "frame"

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        frame: Frame = "fixed",
        scale: float = 1.0,
        learn_scale: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes)
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}; a simplex needs two corners")
        if in_features < num_classes - 1:
            raise ValueError(
                f"in_features must be at least num_classes - 1 = {num_classes - 1}, got {in_features}, to hold a simplex of {num_classes} "
                "corners; widen the features, or use super_symmetry_penalty on a free classifier"
            )
        _checks.check_word("frame", frame, get_args(Frame))
        _checks.check_positive("scale", scale, "it is the squared length of every class")
        self.initial_scale = scale
        self.frame_is_learned = frame == "learned"
        _register(self, "frame", torch.empty(num_classes - 1, in_features, device=device, dtype=dtype), self.frame_is_learned)
        _register(self, "log_scale", torch.empty((), device=device, dtype=dtype), learn_scale)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw a random frame, and set the scale of the constructor."""
        # half precision has no QR
        self.frame.copy_(nn.init.orthogonal_(torch.empty_like(self.frame, dtype=accumulation_dtype(self.frame.dtype))))
        self.log_scale.fill_(math.log(self.initial_scale))

    @property
    def weight(self) -> Tensor:
        """The classes (C, D), for any loss that takes the weight of an ``nn.Linear``."""
        num_classes, dtype = self.num_classes, accumulation_dtype(self.frame.dtype)
        frame = _orthonormal(self.frame).to(dtype) if self.frame_is_learned else self.frame.to(dtype)
        total = frame.sum(0, keepdim=True)
        corners = torch.cat([-total / math.sqrt(num_classes), frame - total / (num_classes + math.sqrt(num_classes))])
        length = (self.log_scale.to(dtype).exp() * num_classes / (num_classes - 1)).sqrt()
        return (length * corners).to(self.frame.dtype)

    def _logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight)

    def extra_repr(self) -> str:
        frame = "learned" if self.frame_is_learned else "fixed"
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, frame={frame!r}, scale={self.initial_scale}, "
            f"learn_scale={isinstance(self.log_scale, nn.Parameter)}"
        )


def _orthonormal(frame: Tensor) -> Tensor:
    """Orthonormal rows with the span of the rows of ``frame``, in float64 if the device has it."""
    # autocast rounds the products in the derivative of QR unless they are float64
    wide = frame.to(accumulation_dtype(frame.dtype) if frame.device.type == "mps" else torch.float64)
    q, r = torch.linalg.qr(wide.mT)
    rows: Tensor = (q * r.diagonal().sgn()).mT  # the signs make it unique, hence continuous
    return rows


def _register(module: nn.Module, name: str, value: Tensor, learned: bool) -> None:
    if learned:
        module.register_parameter(name, nn.Parameter(value))
    else:
        module.register_buffer(name, value)


@as_one_call
def super_symmetry_penalty(weight: Tensor) -> Tensor:
    r"""How far a free classifier is from super-symmetric: half the squared distance between its Gram matrix and the ideal one.

    .. math:: \frac12 \left\| \frac{G}{\|G\|_F} - \frac{I - 11^\top\!/C}{\sqrt{C-1}} \right\|_F^2, \qquad
        G = \bar W \bar W^\top, \quad \bar W = (I - 11^\top\!/C)\, W

    The penalty is 0 for a super-symmetric classifier, up to a common shift of the classes, which does not affect the softmax. It is
    :math:`1 - 1/\sqrt{C-1}` for classes on one line. If D < C - 1, the least value is :math:`1 - \sqrt{D/(C-1)}`. The scale of ``weight``
    has no effect, so the factor of the penalty means the same throughout training. Increase it from 0 to enforce the constraint gradually,
    as the paper suggests. The computation is in at least float32 and needs C x C memory.

    The penalty p is 1 minus the cosine of the angle between G and the ideal; :func:`.metrics.super_symmetry`, the relative distance to the
    nearest ideal, is the sine: :math:`\sqrt{p (2 - p)}`.

    Args:
        weight: the classifier, shape ``(C, D)``, C at least 2, floating.

    Returns:
        A scalar, float32 or float64; 1/2 if all classes are equal.

    Raises:
        TypeError, ValueError: ``weight`` is not such a tensor.

    Example:
        >>> import torch
        >>> from largemargin.heads.super_symmetric import super_symmetry_penalty
        >>> super_symmetry_penalty(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.)
        >>> super_symmetry_penalty(torch.tensor([[1.0], [0.0], [-1.0]]))
        tensor(0.2929)

    Source: Kobayashi, BMVC 2019, Sec. 4.1, asks for it; the form is this library's own.
    """
    _checks.check_tensor("weight", weight)
    if weight.dim() != 2 or len(weight) < 2 or weight.dtype not in _checks.FLOATING:
        raise ValueError(f"weight must be floating of shape (C, D) with C at least 2, got {_checks.describe(weight)}")
    num_classes = len(weight)
    classes = gathered(weight).to(accumulation_dtype(weight.dtype))
    largest = classes.detach().abs().amax()  # dividing by it keeps fourth powers from underflow and overflow
    classes = classes / largest.masked_fill(largest == 0, 1.0)
    centred = classes - classes.mean(0)
    gram = linear(centred, centred)  # (C, C)
    norm: Tensor = torch.linalg.vector_norm(gram)
    ideal = (torch.eye(num_classes, dtype=gram.dtype, device=gram.device) - 1 / num_classes) / math.sqrt(num_classes - 1)
    return (gram / norm.masked_fill(norm == 0, 1.0) - ideal).square().sum() / 2
