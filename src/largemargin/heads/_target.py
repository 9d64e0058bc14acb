"""The base class of the heads, which take features and class indices and edit the target's logit."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _checks, _state
from ..rows.dtensors import summed
from ..rowstats import accumulation_dtype
from ..schedules import Schedule
from ..tracing import as_one_node, refuse_script


class Head(nn.Module):
    """A classifier that edits the target's logit in training.

    A subclass defines :meth:`_logits`. One with a margin also defines :attr:`_has_margin` and :meth:`_target_logit`. Logits are plain
    without a target, in ``eval()``, and for a negative target, which the losses ignore.
    """

    __prepare_scriptable__ = refuse_script
    _factor = "weight"  # the tensor that multiplies the features
    _shown: tuple[str, ...] = ()  # attributes that repr() shows beside the two sizes

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        _checks.check_at_least_1("in_features", in_features)
        _checks.check_at_least_1("num_classes", num_classes)
        self.in_features, self.num_classes = in_features, num_classes

    @property
    def _has_margin(self) -> bool:
        return False

    def _logits(self, features: Tensor) -> Tensor:
        """The plain logits (..., C) of features (..., D)."""
        raise NotImplementedError

    def _target_logit(self, features: Tensor, target: Tensor, plain: Tensor) -> Tensor:
        """The target's logit of each row (...), from the plain one."""
        raise NotImplementedError

    @as_one_node
    def forward(self, features: Tensor, target: Tensor | None = None) -> Tensor:
        """The logits (..., C) of features (..., D); in training the logits of ``target`` (...), int64, have the margin."""
        self._check(features, target)
        logits = self._logits(features)
        if target is not None and not self.training:
            for child in self.children():
                if isinstance(child, Schedule):  # it is not called, and a recomputation in the wrong mode would pass it by
                    _state.check_evaluation(child.step)
        if target is None or not self.training or not self._has_margin:
            return logits
        plain = logit_of_target(logits, target)
        edited = self._target_logit(features, target, plain.to(accumulation_dtype(plain.dtype)))
        return with_logit_of_target(logits, target, torch.where(target >= 0, edited.to(plain.dtype), plain))

    def _check(self, features: Tensor, target: Tensor | None) -> None:
        check_features(features, target, self.in_features, self.num_classes, **{self._factor: getattr(self, self._factor)})

    def extra_repr(self) -> str:
        names = ("in_features", "num_classes", *self._shown)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    if TYPE_CHECKING:

        def __call__(self, features: Tensor, target: Tensor | None = None) -> Tensor: ...


def check_features(features: object, target: object, in_features: int, num_classes: int, **own: Tensor) -> None:
    """Check features (..., D) and classes (...) or None. The ``own`` tensors of the head must be DTensors if these are."""
    _checks.check_tensor("features", features)
    assert isinstance(features, Tensor)
    if features.dim() < 1 or features.shape[-1] != in_features or features.dtype not in _checks.FLOATING:
        raise ValueError(f"features must be floating of shape (..., in_features={in_features}), got {_checks.describe(features)}")
    _checks.check_alike(features=features, **own)
    if target is None:
        return
    _checks.check_tensor("target", target)
    assert isinstance(target, Tensor)
    if target.shape != features.shape[:-1] or target.dtype != torch.int64:
        fix = "convert it with target.long()" if target.shape == features.shape[:-1] else "a head takes class indices only"
        raise ValueError(
            f"target must be int64 class indices of shape {tuple(features.shape[:-1])} for features of shape {tuple(features.shape)}, "
            f"got {_checks.describe(target)}; {fix}"
        )
    _checks.check_alike(features=features, target=target)
    _checks.check_same_device("target", target, features)
    if _checks.can_look_at(target) and bool((target >= num_classes).any()):
        raise IndexError(f"target must be below num_classes={num_classes}, or negative for rows to ignore, but holds {int(target.max())}")


def rows_of_target(weight: Tensor, labels: Tensor) -> Tensor:
    """The row of ``weight`` (C, D) of each label, (..., D); an arbitrary one for a negative label."""
    return summed(F.embedding(labels.clamp(min=0), weight))


def logit_of_target(logits: Tensor, labels: Tensor) -> Tensor:
    """The target's logit of each row (...); an arbitrary one for a negative label."""
    return summed(logits.gather(-1, labels.clamp(min=0).unsqueeze(-1))).squeeze(-1)


def with_logit_of_target(logits: Tensor, labels: Tensor, edited: Tensor) -> Tensor:
    """The logits with ``edited`` at each row's target; for a negative label this is what :func:`logit_of_target` gave."""
    return logits.scatter(-1, labels.clamp(min=0).unsqueeze(-1), edited.unsqueeze(-1))
