"""The losses of :mod:`.functional` as modules: each stores the arguments, and its ``forward`` delegates.

Where the input is logits of a softmax the module is an ``nn.CrossEntropyLoss``: frameworks ask ``isinstance`` to decide whether
predictions are a softmax away. Tools that put the softmax's own formulas in place of such a loss take :class:`OpaqueLargeMarginLoss`.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _checks, hinges, plain_layer
from . import functional as F
from ._backends import Divergence
from ._backends.ladder import BACKENDS, Backend
from ._reduce import REDUCTIONS, Reduction
from .linear import linear_large_margin_cross_entropy
from .tracing import refuse_script


class LargeMarginCrossEntropyLoss(nn.CrossEntropyLoss):
    """:func:`.large_margin_cross_entropy` as a module; replaces ``nn.CrossEntropyLoss``.

    Example:
        >>> import torch
        >>> from largemargin import LargeMarginCrossEntropyLoss
        >>> criterion = LargeMarginCrossEntropyLoss(lam=0.3)
        >>> criterion(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(0.2045)
    """

    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        lam: float = 0.3,
        divergence: Divergence = "symmetric",
        hard_bias: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: Backend | None = None,
        donate: bool = False,
    ) -> None:
        F.checked_options(lam, divergence, hard_bias, label_smoothing, ignore_index, reduction)
        _checks.check_integer("ignore_index", ignore_index)
        _checks.check_word("backend", backend, BACKENDS)
        _checks.check_given_first(weight, "lam")
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.lam = lam
        self.divergence: Divergence = divergence
        self.hard_bias = hard_bias
        self.backend: Backend | None = backend
        self.donate = donate

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` and class indices or probabilities ``target``."""
        return F.large_margin_cross_entropy(
            input,
            target,
            self.weight,
            lam=self.lam,
            divergence=self.divergence,
            hard_bias=self.hard_bias,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            reduction=self.reduction,  # type: ignore[arg-type]  # torch types it as str
            backend=self.backend,
            donate=self.donate,
        )

    def extra_repr(self) -> str:
        return (
            f"lam={self.lam}, divergence={self.divergence!r}, hard_bias={self.hard_bias}, label_smoothing={self.label_smoothing}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}, backend={self.backend!r}, "
            f"donate={self.donate}"
        )

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...


class LargeMarginInSoftmaxLoss(LargeMarginCrossEntropyLoss):
    """:class:`LargeMarginCrossEntropyLoss` under the names and in the order of the author's own class, for those who switch.

    Equal to the author's for unweighted rows (N, C) in float32 and float64. Elsewhere it follows this library: ignored rows are left out of
    the regulariser, ``weight`` scales both terms, half precision works, and so do (N, C, d1, ..., dk) and probabilities.

    Args:
        reg_lambda: the paper's lambda.
        deg_logit: what is subtracted from the target's logit, in nats: ``True`` is 1.0 (eq. 15), ``None`` and ``False`` are 0.
        weight, ignore_index, reduction: as in :func:`.large_margin_cross_entropy`.
        size_average, reduce: torch's deprecated spelling of ``reduction``.

    Example:
        >>> import torch
        >>> from largemargin import LargeMarginInSoftmaxLoss
        >>> LargeMarginInSoftmaxLoss(0.3, True)(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(0.4423)

    Source: Kobayashi, BMVC 2019, eqs. (11) and (15).
    """

    def __init__(
        self,
        reg_lambda: float = 0.3,
        deg_logit: float | bool | None = None,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        if size_average is not None or reduce is not None:
            reduction = nn.CrossEntropyLoss(size_average=size_average, reduce=reduce).reduction  # type: ignore[assignment]
        _checks.check_number("reg_lambda", reg_lambda, low=0)
        _checks.check_is_weight(weight)
        super().__init__(weight, lam=reg_lambda, hard_bias=_hard_bias(deg_logit), ignore_index=ignore_index, reduction=reduction)

    @property
    def reg_lambda(self) -> float:
        """The author's name of ``lam``."""
        return self.lam

    @reg_lambda.setter
    def reg_lambda(self, value: float) -> None:
        _checks.check_number("reg_lambda", value, low=0)
        self.lam = value

    @property
    def deg_logit(self) -> float | bool | None:
        """The author's name of ``hard_bias``."""
        return self.hard_bias

    @deg_logit.setter
    def deg_logit(self, value: float | bool | None) -> None:
        self.hard_bias = _hard_bias(value)

    def extra_repr(self) -> str:
        return f"reg_lambda={self.lam}, deg_logit={self.hard_bias}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


def _hard_bias(deg_logit: float | bool | None) -> float:
    if deg_logit is None:
        return 0.0
    _checks.check_number("deg_logit", deg_logit)
    return float(deg_logit)


class OpaqueLargeMarginLoss(nn.Module):
    """:class:`LargeMarginCrossEntropyLoss` as a module that is no ``nn.CrossEntropyLoss``: the same arguments, values and ``state_dict``.

    It is for tools that ask ``isinstance(loss, nn.CrossEntropyLoss)`` and then compute with the softmax's own curvature or sampling, which
    is not that of this loss (docs/guide.md names them). They differentiate such a module instead, or refuse it.

    Example:
        >>> import torch
        >>> from largemargin import OpaqueLargeMarginLoss
        >>> criterion = OpaqueLargeMarginLoss(lam=0.3)
        >>> criterion(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(0.2045)
        >>> isinstance(criterion, torch.nn.CrossEntropyLoss)
        False
    """

    weight: Tensor | None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        lam: float = 0.3,
        divergence: Divergence = "symmetric",
        hard_bias: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: Backend | None = None,
        donate: bool = False,
    ) -> None:
        super().__init__()
        self.lam, self.divergence, self.hard_bias, self.label_smoothing = lam, divergence, hard_bias, label_smoothing
        self.ignore_index, self.reduction, self.backend, self.donate = ignore_index, reduction, backend, donate
        LargeMarginCrossEntropyLoss(weight, **self._options())  # which checks them
        self.register_buffer("weight", weight)

    def _options(self) -> dict[str, Any]:
        names = ("lam", "divergence", "hard_bias", "label_smoothing", "ignore_index", "reduction", "backend", "donate")
        return {name: getattr(self, name) for name in names}

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` and class indices or probabilities ``target``."""
        return F.large_margin_cross_entropy(input, target, self.weight, **self._options())

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...


class LinearLargeMarginCrossEntropyLoss(nn.Module):
    """A linear classifier and its loss in one, :func:`.linear_large_margin_cross_entropy`: the logits are never held.

    Args:
        in_features: the width D of the features.
        num_classes: C.
        bias: whether the classifier has one.
        weight: a factor for each class, shape ``(num_classes,)``.
        lam, divergence, hard_bias, label_smoothing, ignore_index, reduction, backend: as in :func:`.large_margin_cross_entropy`.
        device, dtype: of the classifier.

    The classifier is the attribute ``linear``, an ``nn.Linear``; ``criterion.linear(features)`` are the logits for prediction. The loss is
    always that of these logits. Where ``linear`` does more than multiply and add (an adapter, a hook, pruning, quantisation, offloading),
    the loss calls it and needs the memory of the logits; a warning names the cause, once.

    Example:
        >>> import torch
        >>> from largemargin import LinearLargeMarginCrossEntropyLoss
        >>> criterion = LinearLargeMarginCrossEntropyLoss(16, 100)
        >>> criterion(torch.randn(8, 16), torch.arange(8)).backward()
        >>> criterion.linear.weight.grad.shape
        torch.Size([100, 16])
    """

    weight: Tensor | None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        weight: Tensor | None = None,
        *,
        lam: float = 0.3,
        divergence: Divergence = "symmetric",
        hard_bias: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        backend: Backend | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        LargeMarginCrossEntropyLoss(  # which checks them
            weight,
            lam=lam,
            divergence=divergence,
            hard_bias=hard_bias,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            reduction=reduction,
            backend=backend,
        )
        self.linear = nn.Linear(in_features, num_classes, bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.lam = lam
        self.divergence: Divergence = divergence
        self.hard_bias = hard_bias
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.backend: Backend | None = backend
        self._said: set[str] = set()

    def _options(self) -> dict[str, Any]:
        names = ("lam", "divergence", "hard_bias", "label_smoothing", "ignore_index", "reduction", "backend")
        return {name: getattr(self, name) for name in names}

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of features ``input`` (..., D) and class indices ``target`` (...)."""
        layer = plain_layer.weight_and_bias(self.linear)
        if isinstance(layer, str):
            _checks.warn_once(self._said, f"linear {layer}: the loss cannot be fused with it, and is computed from the logits it makes")
            return plain_layer.loss_of_logits(self.linear(input), target, self.weight, **self._options())
        linear_weight, linear_bias = layer
        return linear_large_margin_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, **self._options()
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...


class _HingeLoss(nn.Module):
    """What the losses on the classification margin store. They are no cross-entropies: their input is not a softmax away from p."""

    weight: Tensor | None
    __prepare_scriptable__ = refuse_script

    def __init__(
        self, weight: Tensor | None = None, *, margin: float = 1.0, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        _checks.check_given_first(weight, "margin")
        _checks.check_number("margin", margin)
        _checks.check_integer("ignore_index", ignore_index)
        _checks.check_word("reduction", reduction, REDUCTIONS)
        self.register_buffer("weight", weight)
        self.margin = margin
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def _options(self) -> dict[str, Any]:
        return {"margin": self.margin, "ignore_index": self.ignore_index, "reduction": self.reduction}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...


class MulticlassHingeLoss(_HingeLoss):
    """:func:`.multiclass_hinge` (eq. 14) as a module."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` and class indices ``target``."""
        return hinges.multiclass_hinge(input, target, self.weight, **self._options())


class CrammerSingerHingeLoss(_HingeLoss):
    """:func:`.crammer_singer_hinge` (eq. 1) as a module."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` and class indices ``target``."""
        return hinges.crammer_singer_hinge(input, target, self.weight, **self._options())


class HardMarginSoftplusLoss(_HingeLoss):
    """:func:`.hard_margin_softplus` (Sec. 3) as a module."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` and class indices ``target``."""
        return hinges.hard_margin_softplus(input, target, self.weight, **self._options())
