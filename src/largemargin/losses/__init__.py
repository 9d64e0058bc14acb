"""The losses as modules. Those that are a formula on the statistics are functions here too: a file a family, with :mod:`.rows` as base."""

from .hinges import CrammerSingerHingeLoss as CrammerSingerHingeLoss
from .hinges import HardMarginSoftplusLoss as HardMarginSoftplusLoss
from .hinges import MulticlassHingeLoss as MulticlassHingeLoss
from .large_margin import LargeMarginCrossEntropyLoss as LargeMarginCrossEntropyLoss
from .large_margin import LargeMarginInSoftmaxLoss as LargeMarginInSoftmaxLoss
from .large_margin import LinearLargeMarginCrossEntropyLoss as LinearLargeMarginCrossEntropyLoss
from .large_margin import OpaqueLargeMarginLoss as OpaqueLargeMarginLoss
