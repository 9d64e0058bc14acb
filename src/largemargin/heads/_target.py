"""What the heads share: they take features and classes, and edit the logit of the target."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks
from ..dtensors import check_alike
from ..rowstats import accumulation_dtype


def check_features(features: object, target: object, in_features: int, num_classes: int, **own: Tensor) -> None:
    """What a head takes: features (..., D), and classes (...) or None; its ``own`` tensors are plain where these are."""
    _checks.check_tensor("features", features)
    assert isinstance(features, Tensor)
    if features.dim() < 1 or features.shape[-1] != in_features or features.dtype not in _checks.FLOATING:
        raise ValueError(
            f"features must be floating with {in_features} numbers in their last dimension, got {_checks.describe(features)}; "
            "check in_features of the head"
        )
    check_alike(features=features, **own)
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
    check_alike(features=features, target=target)
    _checks.check_same_device("target", target, features)
    if _checks.can_look_at(target) and bool((target >= num_classes).any()):
        raise IndexError(
            f"target must hold class indices below {num_classes}, or negative ones for rows without a class, but holds "
            f"{int(target.max())}; check num_classes of the head"
        )


def rows_of_target(weight: Tensor, labels: Tensor) -> Tensor:
    """The row of ``weight`` (C, D) that belongs to each label, (..., D); any one where the label is negative."""
    return F.embedding(labels.clamp(min=0), weight)


def logit_of_target(logits: Tensor, labels: Tensor) -> Tensor:
    """The target's logit of each row (...), in at least float32; any one where the label is negative."""
    plain = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return plain.to(accumulation_dtype(logits.dtype))


def with_logit_of_target(logits: Tensor, labels: Tensor, edited: Tensor) -> Tensor:
    """The logits with the ``edited`` one of each row's target; rows with a negative label stay as they are."""
    at = labels.clamp(min=0).unsqueeze(-1)
    kept = (labels >= 0).unsqueeze(-1)
    return logits.scatter(-1, at, torch.where(kept, edited.unsqueeze(-1).to(logits.dtype), logits.gather(-1, at)))
