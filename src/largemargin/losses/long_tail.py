"""Losses that know how often each class occurs in the training set.

logit adjustment    the softmax loss of f_c + tau log pi_c, with the shares pi of the classes
LDAM                softplus(s Delta_y - l) for logits s f: a hard bias, eq. (15), that depends on the class
"""

from typing import Unpack

from torch import Tensor

from .. import _checks
from .._reduce import weights_of
from ..loss import softplus
from .rows import LossRows, RegularizedOptions, RowLoss, row_loss


@row_loss
def logit_adjusted(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    class_counts: Tensor,
    tau: float = 1.0,
    **options: Unpack[RegularizedOptions],
) -> Tensor:
    r"""The softmax loss of logits plus the log shares of the classes, for a test set on which the classes are balanced.

    .. math:: -\log \frac{\pi_y^\tau e^{f_y}}{\sum_c \pi_c^\tau e^{f_c}}, \qquad \pi_c = n_c / \textstyle\sum_d n_d

    With tau = 1 it is the balanced softmax of Ren et al. Predict with the plain logits. ``lam`` acts on the adjusted logits.

    Args:
        class_counts: the number n of training samples of each class, shape ``(C,)``, floating or int64, above 0; any multiple will do.
        tau: finite; 0 is the softmax loss.

    Example:
        >>> import torch, largemargin
        >>> largemargin.logit_adjusted(torch.tensor([[0.0, 0.0]]), torch.tensor([1]), class_counts=torch.tensor([90, 10]))
        tensor(2.3026)

    Source: Menon et al., *Long-Tail Learning via Logit Adjustment*, ICLR 2021; Ren et al., *Balanced Meta-Softmax*, NeurIPS 2020.
    """
    _checks.check_number("tau", tau)
    rows = LossRows.of(input, target, weight, **options)
    counts = _counts(rows, input, class_counts)
    log_shares = (counts / counts.sum()).log()
    rows = rows.with_logits(rows.logits + tau * (log_shares if rows.shard is None else rows.shard.part(log_shares)))
    stats = rows.stats()
    return rows.reduce(softplus(-stats.log_odds), stats)


class LogitAdjustedLoss(RowLoss, function=logit_adjusted):
    """:func:`.logit_adjusted` as a module; the counts are a buffer."""

    class_counts: Tensor
    tau: float
    lam: float


@row_loss
def ldam(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    class_counts: Tensor,
    max_margin: float = 0.5,
    scale: float = 30.0,
    **options: Unpack[RegularizedOptions],
) -> Tensor:
    r"""LDAM: the softmax loss of scaled cosines with a margin on the target, which is larger for rarer classes.

    .. math:: \mathrm{softplus}(s \Delta_y - l(s f)), \qquad \Delta_c = \Delta\, (\min_d n_d / n_c)^{1/4}

    For logits take the cosines of ``CosineLinear(scale=1.0, margin=0.0)``. The paper also turns on class weights late in training
    (DRW): set the module's ``weight`` then. ``lam`` acts on the scaled logits.

    Args:
        class_counts: the number n of training samples of each class, shape ``(C,)``, floating or int64, above 0; any multiple will do.
        max_margin: Delta, the margin of the rarest class, at least 0.
        scale: s, positive.

    Example:
        >>> import torch, largemargin
        >>> largemargin.ldam(torch.tensor([[0.9, 0.4]]), torch.tensor([0]), class_counts=torch.tensor([10, 160]))
        tensor(0.6931)

    Source: Cao et al., *Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss*, NeurIPS 2019, and its code.
    """
    _checks.check_number("max_margin", max_margin, low=0)
    _checks.check_positive("scale", scale, "the paper uses 30")
    rows = LossRows.of(input, target, weight, **options)
    counts = _counts(rows, input, class_counts)
    margins = max_margin * (counts.amin() / counts) ** 0.25
    rows = rows.with_logits(scale * rows.logits)
    stats = rows.stats()
    return rows.reduce(softplus(scale * weights_of(rows.rows.labels.class_index, margins) - stats.log_odds), stats)


class LDAMLoss(RowLoss, function=ldam):
    """:func:`.ldam` as a module; the counts are a buffer."""

    class_counts: Tensor
    max_margin: float
    scale: float
    lam: float


def _counts(rows: LossRows, input: Tensor, class_counts: Tensor) -> Tensor:
    """The checked counts of all classes (C,), in the dtype of the logits."""
    class_counts = _checks.check_class_counts(class_counts, input)
    if not class_counts.numel():  # the rows have one masked class then
        return rows.logits.new_ones(1)
    return class_counts.to(rows.logits.dtype)
