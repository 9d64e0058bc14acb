"""The reference: the functions of :mod:`largemargin.rowstats`, for logits of any kind."""

import torch
from torch import Tensor

from .. import rowstats
from ..rowstats import IGNORED, Cotangents, Record, RowStats, Softmax
from .protocol import Predict, TwoPasses, WholeLoss, mark_ignored

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHECKS_LABELS = False
predictions: Predict | None = None
loss: WholeLoss | None = None
two_passes: TwoPasses | None = None


def why_not() -> str | None:
    return None


def describe() -> str:
    return f"torch {torch.__version__}"


def row_stats(logits: Tensor, target: Tensor, ignore_index: int = IGNORED, keep_exp: bool = False) -> tuple[RowStats, Softmax]:
    target = mark_ignored(target, ignore_index)
    return rowstats.row_stats(logits, target), Softmax.of(record(logits, target))


def record(logits: Tensor, target: Tensor) -> Record:
    return rowstats.record(rowstats.nontargets(logits.to(rowstats.accumulation_dtype(logits.dtype)), target))


def row_stats_backward(
    logits: Tensor,
    target: Tensor,
    softmax: Softmax,
    cotangents: Cotangents,
    gradient: Tensor | None = None,
    ignore_index: int = IGNORED,
) -> Tensor:
    found = rowstats.row_stats_vjp(logits, mark_ignored(target, ignore_index), cotangents, softmax)
    return found if gradient is None else gradient.copy_(found)
