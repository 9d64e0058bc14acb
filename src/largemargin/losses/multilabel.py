"""The two-way loss for samples with several classes each. Its rows are samples, and then classes: no function of the row statistics.

For one sample with logits f, positive classes P and other classes N, and the temperature T:

    softplus( LSE_N f + T LSE_P (-f / T) )

With one positive class this is softplus(LSE_N f - f_y), the softmax loss (3). The second way is the same over the samples of each class.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .. import _checks
from ..loss import softplus
from ..rowstats import accumulation_dtype
from ..tracing import as_one_call, refuse_script

TwoWayReduction = Literal["mean", "sum"]


@as_one_call
def two_way_multilabel(
    input: Tensor, target: Tensor, *, temperature: float = 4.0, negative_temperature: float = 1.0, reduction: TwoWayReduction = "mean"
) -> Tensor:
    r"""A softmax loss for multi-hot targets, over the classes of each sample and over the samples of each class.

    .. math:: \frac1N \sum_i \ell(f_{i\cdot}, t_{i\cdot}) + \frac1C \sum_c \ell(f_{\cdot c}, t_{\cdot c}), \qquad
        \ell(f, t) = \mathrm{softplus}\Big( T' \log \sum_{t_j = 0} e^{f_j / T'} + T \log \sum_{t_j > 0} e^{-f_j / T} \Big)

    A sample without a positive class, and a class without a positive sample, does not count: N and C are the numbers of the others.
    The loss is 0 if there are none, where the authors' code has NaN. That code gives the entries to leave out the exponent -100; here
    they are left out, which differs only for logits that far apart. A class is compared over the samples of this call: with several
    processes gather the logits first. A logit of -inf at a negative entry leaves it out; at a positive entry the loss is infinite.

    Args:
        input: logits, shape ``(N, C)``; half precision is computed in float32.
        target: shape ``(N, C)``, any real dtype: above 0 for a class that the sample has, 0 for others; a negative entry does not count.
        temperature: T of the positive entries, positive; the larger, the more equally they pull.
        negative_temperature: T' of the negative entries, positive.
        reduction: ``"mean"``, or ``"sum"`` without the factors 1 / N and 1 / C.

    Returns:
        A scalar, float64 for float64 input, else float32.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is of the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch, largemargin
        >>> logits, target = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]), torch.tensor([[1, 0, 1], [0, 1, 0]])
        >>> largemargin.two_way_multilabel(logits, target)
        tensor(0.9824)

    Source: Kobayashi, *Two-Way Multi-Label Loss*, CVPR 2023, and its code.
    """
    _checks.check_word("reduction", reduction, get_args(TwoWayReduction))
    _checks.check_positive("temperature", temperature, "the paper uses 4")
    _checks.check_positive("negative_temperature", negative_temperature, "the paper uses 1")
    _checks.check_multi_hot(input, target)
    logits, positive, negative = input.to(accumulation_dtype(input.dtype)), target > 0, target == 0
    total: Tensor = logits.new_zeros(())
    for dim in (1, 0):
        of_negative = negative_temperature * _log_sum_exp(logits / negative_temperature, negative, dim)
        of_positive = temperature * _log_sum_exp(-logits / temperature, positive, dim)
        counts = positive.any(dim)
        losses = torch.where(counts, softplus(of_negative + of_positive), 0.0)
        total = total + (losses.sum() if reduction == "sum" else losses.sum() / counts.sum().clamp(min=1))
    return total


class TwoWayMultilabelLoss(nn.Module):
    """:func:`.two_way_multilabel` as a module."""

    __prepare_scriptable__ = refuse_script

    def __init__(self, *, temperature: float = 4.0, negative_temperature: float = 1.0, reduction: TwoWayReduction = "mean") -> None:
        super().__init__()
        self.temperature = _checks.check_positive("temperature", temperature, "the paper uses 4")
        self.negative_temperature = _checks.check_positive("negative_temperature", negative_temperature, "the paper uses 1")
        _checks.check_word("reduction", reduction, get_args(TwoWayReduction))
        self.reduction: TwoWayReduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` and the multi-hot ``target``."""
        return two_way_multilabel(
            input,
            target,
            temperature=self.temperature,
            negative_temperature=self.negative_temperature,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, negative_temperature={self.negative_temperature}, reduction={self.reduction!r}"


def _log_sum_exp(values: Tensor, kept: Tensor, dim: int) -> Tensor:
    """The logarithm of the sum of the exponentials of the kept values; -inf, without a gradient, where there is none."""
    kept = kept & (values != -torch.inf)
    present = kept.any(dim)
    filled = torch.where(kept, values, -torch.inf).masked_fill(~present.unsqueeze(dim), 0.0)
    return torch.where(present, filled.logsumexp(dim), -torch.inf)
