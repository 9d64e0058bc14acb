"""The loss for timm's train script, made from the arguments of the script."""

from typing import Any

from largemargin import LargeMarginCrossEntropyLoss

_OTHER_LOSSES = {"jsd_loss": "--jsd-loss", "bce_loss": "--bce-loss"}


def train_loss(args: Any, **options: Any) -> LargeMarginCrossEntropyLoss:
    """The loss for ``train_loss_fn`` in timm's ``train.py``; ``validate_loss_fn`` stays ``nn.CrossEntropyLoss()``.

    The loss smooths labels, except with mixup or cutmix: timm smooths their targets already.

    Args:
        args: the script's arguments. The function reads ``smoothing``, ``mixup``, ``cutmix``, ``cutmix_minmax``, ``jsd_loss``,
            ``bce_loss``, ``loss`` and ``task``; older scripts lack the last two.
        options: of :class:`.LargeMarginCrossEntropyLoss`, without ``label_smoothing``: ``lam``, ``divergence``, ``hard_bias`` ...

    Raises:
        ValueError: the arguments ask for another loss.

    Example:
        >>> from argparse import Namespace
        >>> from largemargin.integrations.timm import train_loss
        >>> train_loss(Namespace(smoothing=0.1, mixup=0.0, cutmix=0.0, cutmix_minmax=None)).label_smoothing
        0.1
        >>> train_loss(Namespace(smoothing=0.1, mixup=0.2, cutmix=0.0, cutmix_minmax=None), lam=1.0).label_smoothing
        0.0
    """
    for name, flag in _OTHER_LOSSES.items():
        if getattr(args, name, False):
            raise ValueError(f"args.{name} must be off, got {getattr(args, name)!r}: it selects another loss; leave {flag} out")
    if getattr(args, "loss", None) not in (None, "ce"):
        raise ValueError(f"args.loss must be 'ce', got {args.loss!r}: it selects another loss; leave --loss out")
    if getattr(args, "task", None) == "multilabel":
        raise ValueError("args.task must not be 'multilabel', because the loss is a softmax over exclusive classes; leave --task out")
    mixes = getattr(args, "mixup", 0) > 0 or getattr(args, "cutmix", 0) > 0 or getattr(args, "cutmix_minmax", None) is not None
    return LargeMarginCrossEntropyLoss(label_smoothing=0.0 if mixes else getattr(args, "smoothing", 0.0), **options)
