"""The share that some classes of a row have in its loss of probabilities; the other classes are elsewhere.

:mod:`.all_classes` takes the arg-max j out of a row. Here each part takes out its own largest class: it is a :class:`.parts.Part` with
that class as the target. All parts together give the sums without j, to which the largest classes of the other parts are added. Then a
part knows the loss of its classes as targets. The gradient of a class needs sums over all targets, and the gradients with respect to the
statistics of j. These and the loss are eight numbers a row, which add up over the parts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.protocol import Backend
from ..loss import LossOptions, loss_of_probabilities
from ..rowstats import Cotangents, Record, Softmax, accumulation_dtype, finish, merge, row_stats_vjp
from .all_classes import Peeled, peel, stats_of
from .parts import Part, part_of

NUM_SUMS = 8  # the loss, four sums over the targets but j, three gradients of j


def part_of_largest(logits: Tensor, backend: Backend) -> tuple[Part, Tensor]:
    """The part of ``logits`` (..., C) whose target is the largest class, and that class; 0 without classes."""
    has_classes = logits.shape[-1] > 0
    largest = logits.argmax(-1) if has_classes else torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return part_of(logits, largest, None, backend), largest


def merge_largest(parts: Part) -> tuple[Part, Tensor]:
    """The row whose target is its arg-max j, from such parts along the first dimension of every field, and the part that has j."""
    owner = parts.target_logit.argmax(0)
    numbers = torch.arange(len(parts.target_logit), device=owner.device).reshape(-1, *[1] * owner.dim())
    added = (numbers != owner) & (parts.target_logit != -torch.inf)
    count = added.to(parts.max.dtype)
    zero = torch.zeros_like(count)
    largest = Record(torch.where(added, parts.target_logit, -torch.inf), count, zero, zero, count)
    others = merge(Record(*(torch.cat(fields) for fields in zip(parts.record, largest, strict=True))))
    return Part(*others, parts.target_logit.amax(0)), owner


class Share(NamedTuple):
    logits: Tensor  # (..., C)
    merged: Part  # the row whose target is j
    row: Peeled
    cotangents: tuple[Tensor, Tensor, Tensor]  # of log_odds, neg_entropy and mean_log_q, each (..., C)
    sums: Tensor  # (NUM_SUMS, ...), to be added over the parts

    @classmethod
    def of(cls, logits: Tensor, probabilities: Tensor, weight: Tensor | None, merged: Part, top: Tensor, options: LossOptions) -> "Share":
        """``top`` is j, or ELSEWHERE."""
        logits = logits.to(accumulation_dtype(logits.dtype))
        row = peel(logits, top, merged)
        stats = stats_of(logits, row, finish(merged.record, merged.target_logit))
        leaves = [field.requires_grad_() for field in (stats.log_odds, stats.neg_entropy, stats.mean_log_q, stats.spread)]
        num_classes = merged.num_classes + (merged.target_logit != -torch.inf)
        with torch.enable_grad():
            losses = loss_of_probabilities(stats, probabilities, weight, options._replace(reduction="none"), 1, num_classes)
            g_l, g_e, g_a, g_spread = torch.autograd.grad(losses.sum(), leaves, allow_unused=True, materialize_grads=True)
        cotangents = g_l, g_e + g_spread, g_a - g_spread
        pulls = [row.but_top(pull).sum(-1) for pull in row.pulls(*cotangents)]
        of_top = [torch.where(row.is_top, cotangent, 0.0).sum(-1) for cotangent in cotangents]
        return cls(logits, merged, row, cotangents, torch.stack([losses.detach(), *pulls, *of_top]))

    def gradient(self, totals: Tensor) -> Tensor:
        """The gradient of the losses with respect to the logits, from the sums of all parts."""
        if self.logits.shape[-1] == 0:
            return torch.zeros_like(self.logits)
        _, *pulls, of_l, of_e, of_a = totals.to(self.logits.dtype)
        g_l = self.cotangents[0]
        rests = [self.row.rest(pull, total) for pull, total in zip(self.row.pulls(*self.cotangents), pulls, strict=True)]
        grad = row_stats_vjp(self.logits, self.row.top, Cotangents(of_l, of_e, of_a), Softmax.of(self.merged.record))
        return torch.where(self.row.kept, grad + self.row.pulled(g_l, rests), g_l)
