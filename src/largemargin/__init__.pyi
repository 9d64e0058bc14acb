from . import heads as heads
from . import metrics as metrics
from . import schedules as schedules
from .functional import large_margin_cross_entropy as large_margin_cross_entropy
from .functional import linear_large_margin_cross_entropy as linear_large_margin_cross_entropy
from .functional import row_stats as row_stats
from .functional import sharded_large_margin_cross_entropy as sharded_large_margin_cross_entropy
from .functional import sharded_linear_large_margin_cross_entropy as sharded_linear_large_margin_cross_entropy
from .loss import divergence as divergence
from .losses.hinges import CrammerSingerHingeLoss as CrammerSingerHingeLoss
from .losses.hinges import HardMarginSoftplusLoss as HardMarginSoftplusLoss
from .losses.hinges import MulticlassHingeLoss as MulticlassHingeLoss
from .losses.hinges import crammer_singer_hinge as crammer_singer_hinge
from .losses.hinges import hard_margin_softplus as hard_margin_softplus
from .losses.hinges import multiclass_hinge as multiclass_hinge
from .losses.large_margin import LargeMarginCrossEntropyLoss as LargeMarginCrossEntropyLoss
from .losses.large_margin import LargeMarginInSoftmaxLoss as LargeMarginInSoftmaxLoss
from .losses.large_margin import LinearLargeMarginCrossEntropyLoss as LinearLargeMarginCrossEntropyLoss
from .losses.large_margin import OpaqueLargeMarginLoss as OpaqueLargeMarginLoss
from .parallel.class_parallel import ClassParallelLinear as ClassParallelLinear
from .parallel.class_parallel import gather_rows as gather_rows
from .rowstats import RowStats as RowStats

__version__: str
__all__: list[str]
