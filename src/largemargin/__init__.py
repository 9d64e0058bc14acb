"""Classification losses with a margin (Kobayashi, Large Margin In Softmax Cross-Entropy Loss, BMVC 2019).

In reading order: the statistics of a row, the losses made of them, and their modules. Names load on first use, so that the command
line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _operators

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from .class_parallel import ClassParallelLinear, gather_rows
    from .functional import divergence, large_margin_cross_entropy, sharded_large_margin_cross_entropy
    from .hinges import crammer_singer_hinge, hard_margin_softplus, multiclass_hinge
    from .linear import linear_large_margin_cross_entropy
    from .losses import (
        CrammerSingerHingeLoss,
        HardMarginSoftplusLoss,
        LargeMarginCrossEntropyLoss,
        LargeMarginInSoftmaxLoss,
        LinearLargeMarginCrossEntropyLoss,
        MulticlassHingeLoss,
        OpaqueLargeMarginLoss,
    )
    from .ops import row_stats
    from .rowstats import RowStats
    from .sharded_linear import sharded_linear_large_margin_cross_entropy

_HOME = {
    "RowStats": "rowstats",
    "row_stats": "ops",
    "divergence": "functional",
    "large_margin_cross_entropy": "functional",
    "multiclass_hinge": "hinges",
    "crammer_singer_hinge": "hinges",
    "hard_margin_softplus": "hinges",
    "linear_large_margin_cross_entropy": "linear",
    "sharded_large_margin_cross_entropy": "functional",
    "sharded_linear_large_margin_cross_entropy": "sharded_linear",
    "ClassParallelLinear": "class_parallel",
    "gather_rows": "class_parallel",
    "LargeMarginCrossEntropyLoss": "losses",
    "LargeMarginInSoftmaxLoss": "losses",
    "LinearLargeMarginCrossEntropyLoss": "losses",
    "MulticlassHingeLoss": "losses",
    "OpaqueLargeMarginLoss": "losses",
    "CrammerSingerHingeLoss": "losses",
    "HardMarginSoftplusLoss": "losses",
}

__all__ = [
    "ClassParallelLinear",
    "CrammerSingerHingeLoss",
    "HardMarginSoftplusLoss",
    "LargeMarginCrossEntropyLoss",
    "LargeMarginInSoftmaxLoss",
    "LinearLargeMarginCrossEntropyLoss",
    "MulticlassHingeLoss",
    "OpaqueLargeMarginLoss",
    "RowStats",
    "crammer_singer_hinge",
    "divergence",
    "gather_rows",
    "hard_margin_softplus",
    "large_margin_cross_entropy",
    "linear_large_margin_cross_entropy",
    "multiclass_hinge",
    "row_stats",
    "sharded_large_margin_cross_entropy",
    "sharded_linear_large_margin_cross_entropy",
]


_MODULES = ("heads", "metrics", "schedules")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_operators.register()
