"""The losses as modules. Those that are a formula on the statistics are functions here too: a file a family, with :mod:`.rows` as base."""

from .hinges import CrammerSingerHingeLoss, HardMarginSoftplusLoss, MulticlassHingeLoss
from .large_margin import (
    LargeMarginCrossEntropyLoss,
    LargeMarginInSoftmaxLoss,
    LinearLargeMarginCrossEntropyLoss,
    OpaqueLargeMarginLoss,
)

__all__ = [
    "CrammerSingerHingeLoss",
    "HardMarginSoftplusLoss",
    "LargeMarginCrossEntropyLoss",
    "LargeMarginInSoftmaxLoss",
    "LinearLargeMarginCrossEntropyLoss",
    "MulticlassHingeLoss",
    "OpaqueLargeMarginLoss",
]
