"""The large-margin loss as modules. Each keeps its options, and its ``forward`` calls the function in :mod:`largemargin.functional`.

A module that takes logits is an ``nn.CrossEntropyLoss``, because frameworks use ``isinstance`` to decide whether to apply a softmax to
predictions. :class:`OpaqueLargeMarginLoss` is for tools that replace such a loss by formulas of the softmax loss.
"""

import math
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor, nn

from .. import _checks, plain_layer
from .._backend_names import BACKENDS
from .._reduce import Reduction
from ..functional import large_margin_cross_entropy, linear_large_margin_cross_entropy, takes_options
from ..loss import LinearOptions, LossOptions, Options
from .rows import LossModule

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions  # from torch 2.13 on


class _HasOptions(LossModule):
    _names = LossOptions._fields

    def _set_options(self, weight: Tensor | None, options: Options) -> LossOptions:
        given = LossOptions(*map(_of_python, LossOptions.of(type(self).__name__, options)))
        _checks.check_integer("ignore_index", given.ignore_index)
        _checks.check_word("backend", given.backend, BACKENDS)
        _checks.check_is_weight(weight, "lam")
        for name, value in given._asdict().items():
            setattr(self, name, value)
        return given


def _of_python(value: Any) -> Any:
    """The same without numpy's type, which torch.compile cannot trace."""
    return value.item() if hasattr(value, "item") else value


class _LogitsLoss(_HasOptions):
    """A loss of logits. With ``donate`` a kernel may overwrite them."""

    donate: bool

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` and class indices or probabilities ``target``."""
        return large_margin_cross_entropy(input, target, self.weight, **self._options(), donate=self.donate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, donate={self.donate}"


class LargeMarginCrossEntropyLoss(_LogitsLoss, nn.CrossEntropyLoss):
    """:func:`.large_margin_cross_entropy` as a module; replaces ``nn.CrossEntropyLoss``.

    Example:
        >>> import torch
        >>> from largemargin import LargeMarginCrossEntropyLoss
        >>> criterion = LargeMarginCrossEntropyLoss(lam=0.3)
        >>> criterion(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(0.2045)
    """

    @takes_options
    def __init__(self, weight: Tensor | None = None, *, donate: bool = False, **options: Unpack[Options]) -> None:
        given = self._set_options(weight, options)
        super().__init__(weight, ignore_index=given.ignore_index, reduction=given.reduction, label_smoothing=given.label_smoothing)
        self.donate = donate


class LargeMarginInSoftmaxLoss(LargeMarginCrossEntropyLoss):
    """:class:`LargeMarginCrossEntropyLoss` with the argument names and order of the paper author's own class.

    Both agree for unweighted rows (N, C) in float32 and float64. Elsewhere this class follows the library: the regulariser leaves ignored
    rows out, ``weight`` scales both terms, and half precision, (N, C, d1, ..., dk) and probabilities work.

    Args:
        reg_lambda: the paper's lambda, an alias of ``lam``.
        deg_logit: an alias of ``hard_bias``, in nats; ``True`` is 1.0 (eq. 15), ``None`` and ``False`` are 0.
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
        return self.lam

    @reg_lambda.setter
    def reg_lambda(self, value: float) -> None:
        _checks.check_number("reg_lambda", value, low=0)
        self.lam = value

    @property
    def deg_logit(self) -> float | bool | None:
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


class OpaqueLargeMarginLoss(_LogitsLoss):
    """:class:`LargeMarginCrossEntropyLoss` as a plain module, with the same arguments, values and ``state_dict``.

    Some tools test ``isinstance(loss, nn.CrossEntropyLoss)`` and then use the curvature or sampling of the softmax loss, which is wrong
    for this loss (docs/guide.md lists them). They differentiate this module instead, or refuse it.

    Example:
        >>> import torch
        >>> from largemargin import OpaqueLargeMarginLoss
        >>> criterion = OpaqueLargeMarginLoss(lam=0.3)
        >>> criterion(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]))
        tensor(0.2045)
        >>> isinstance(criterion, torch.nn.CrossEntropyLoss)
        False
    """

    @takes_options
    def __init__(self, weight: Tensor | None = None, *, donate: bool = False, **options: Unpack[Options]) -> None:
        super().__init__()
        self._set_options(weight, options)
        self.register_buffer("weight", weight)
        self.donate = donate


class LinearLargeMarginCrossEntropyLoss(_HasOptions):
    """A linear classifier and its loss in one, by :func:`.linear_large_margin_cross_entropy`, which never stores all logits.

    With ``lam=0`` it equals torch's ``nn.LinearCrossEntropyLoss``, and its ``state_dict`` has the same names.

    Args:
        in_features, num_classes: the width D of the features, and C.
        bias: whether the classifier has a bias; the default is that of ``nn.Linear``, while torch's ``LinearCrossEntropyLoss`` has none.
        weight: a factor for each class, shape ``(num_classes,)``.
        out_features: ``(d1, ..., dk)`` for logits (N, C, d1, ..., dk). The classifier then has C x d1 x ... x dk outputs, class by class.
        lam, divergence, hard_bias, label_smoothing, reduction, backend: as in :func:`.large_margin_cross_entropy`.
        ignore_index, options: as in :func:`.linear_large_margin_cross_entropy`; torch's options change nothing, and are not kept.
        device, dtype: of the classifier.

    The classifier is the attribute ``linear``; ``criterion.linear(features)`` gives the logits for prediction. If ``linear`` does more than
    multiply and add (an adapter, a hook, pruning, quantisation, offloading), the loss calls it and stores its logits, with one warning.

    Example:
        >>> import torch
        >>> from largemargin import LinearLargeMarginCrossEntropyLoss
        >>> criterion = LinearLargeMarginCrossEntropyLoss(16, 100)
        >>> criterion(torch.randn(8, 16), torch.arange(8)).backward()
        >>> criterion.linear.weight.grad.shape
        torch.Size([100, 16])
    """

    @takes_options
    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        weight: Tensor | None = None,
        *,
        out_features: tuple[int, ...] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ignore_index: int | None = -100,
        options: "LinearCrossEntropyOptions | None" = None,
        **others: Unpack[LinearOptions],
    ) -> None:
        super().__init__()
        self._set_options(weight, {**others, "ignore_index": -100 if ignore_index is None else ignore_index})
        _checks.check_torch_options(options)
        _checks.check_sizes("out_features", out_features)
        self.out_features = tuple(out_features)
        self.linear = nn.Linear(in_features, num_classes * math.prod(out_features), bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self._said: set[str] = set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"out_features": (), **state})  # modules pickled by an older version have none

    def forward(self, input: Tensor, target: Tensor | None = None, **teacher: Any) -> Tensor:
        """The loss of features ``input`` (..., D) and class indices (...) or probabilities (..., C).

        With ``out_features`` the features are (N, D), and ``target`` has the shape (N, d1, ..., dk) or (N, C, d1, ..., dk). A teacher
        takes the place of ``target``: ``teacher_input``, ``teacher_linear_weight``, ``teacher_linear_bias`` and ``temperature``, as in
        :func:`.linear_large_margin_cross_entropy`.
        """
        layer, options = plain_layer.weight_and_bias(self.linear), self._options()
        if isinstance(layer, str):
            if teacher:
                raise NotImplementedError(f"linear {layer}: the loss cannot be fused with it; give the teacher's softmax as target")
            _checks.warn_once(self._said, f"linear {layer}: the loss cannot be fused with it, so it is computed from its logits")
            return plain_layer.loss_of_logits(self.linear(input), target, self.weight, self.out_features, **options)
        linear_weight, linear_bias = layer
        if self.out_features:
            linear_weight = linear_weight.unflatten(0, (-1, *self.out_features))
            linear_bias = None if linear_bias is None else linear_bias.unflatten(0, (-1, *self.out_features))
        return linear_large_margin_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=self.weight, **teacher, **options
        )

    if TYPE_CHECKING:

        def __call__(self, input: Tensor, target: Tensor | None = None, **teacher: Any) -> Tensor: ...
