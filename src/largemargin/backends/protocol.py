"""A backend is a module with the names of :class:`Backend`: functions on rows, without autograd. ``make lint`` checks each."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..loss import HingeOptions, LossOptions
from ..rowstats import IGNORED, Cotangents, Record, RowStats, Softmax


class WholeLoss(Protocol):
    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions | HingeOptions,
        gradient: Tensor | None = None,
        target_gradient: Tensor | None = None,
        upstream: float | Tensor = 1.0,
    ) -> Tensor:
        """The reduced loss of ``logits`` (..., C) and ``target``: int64 labels (...), or probabilities (..., C) of any floating dtype.

        A label out of range raises. The gradients with respect to ``logits`` and probabilities, times ``upstream``, are written to
        ``gradient``, which may be ``logits`` itself, and ``target_gradient`` if given. ``upstream`` is a number, or with the reduction
        ``"none"`` one number per row.
        """


class LossForward(Protocol):
    def __call__(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, saves: bool
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The reduced loss of ``logits`` (..., C), and, if ``saves``, what the backward pass needs beside its arguments.

        ``target`` has labels (...) of any integer dtype, or probabilities (..., C). A label out of range gives a NaN row, or raises if
        reading the labels is free.
        """


class LossBackward(Protocol):
    def __call__(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: LossOptions,
        saved: tuple[Tensor, ...],
        upstream: Tensor,
        gradient: Tensor | None,
        target_gradient: Tensor | None = None,
    ) -> None:
        """Write the gradients times ``upstream``, which is shaped like the loss; ``gradient`` may be ``logits`` itself."""


class TwoPasses(NamedTuple):
    """The whole loss on a device for which the host should not wait: the upstream gradient stays there."""

    forward: LossForward
    backward: LossBackward


class Predictions(NamedTuple):
    """What rows of logits predict: the first of their largest logits. Every field is shaped like the target."""

    stats: RowStats  # about the target
    log_odds: Tensor  # of the prediction
    ahead: Tensor  # int64: how many classes come before the target; more than any number if it is masked, -1 if it is ignored


class Predict(Protocol):
    def __call__(self, logits: Tensor, target: Tensor, ignore_index: int) -> Predictions:
        """The predictions of ``logits`` (..., C) with int64 labels (...). A label out of range raises."""


class Backend(Protocol):
    @property
    def DTYPES(self) -> tuple[torch.dtype, ...]:
        """The dtypes of the logits that it takes."""

    @property
    def CHECKS_LABELS(self) -> bool:
        """Whether ``row_stats`` raises for a label out of range; if not, the caller checks the labels."""

    def why_not(self) -> str | None:
        """The reason why it cannot be used on this machine, or None."""

    def describe(self) -> str:
        """The version in use, in a few words."""

    def row_stats(self, logits: Tensor, target: Tensor, ignore_index: int = IGNORED, keep_exp: bool = False) -> tuple[RowStats, Softmax]:
        """The statistics of ``logits`` (..., C) about ``target`` (...), and the softmax that their gradient needs.

        A target is an index, or ``ignore_index`` for a row without statistics.

        With ``keep_exp`` the softmax may have ``exp_z``, so that the gradient needs no exponentials of its own.
        """

    def record(self, logits: Tensor, target: Tensor) -> Record:
        """The sums over the non-targets of ``logits`` (..., C); ``target`` (...) is an index, IGNORED or ELSEWHERE."""

    def row_stats_backward(
        self,
        logits: Tensor,
        target: Tensor,
        softmax: Softmax,
        cotangents: Cotangents,
        gradient: Tensor | None = None,
        ignore_index: int = IGNORED,
    ) -> Tensor:
        """The gradient with respect to ``logits``. If these are only some classes of a row, ``softmax`` is over the whole row.

        It is written to ``gradient`` if given, which may be ``logits`` itself unless rho has a cotangent. Otherwise it may overwrite
        ``softmax.exp_z``.
        """

    @property
    def predictions(self) -> Predict | None:
        """The predictions of rows in one call, or None."""

    @property
    def loss(self) -> WholeLoss | None:
        """The kernel of the whole loss, or None."""

    @property
    def two_passes(self) -> TwoPasses | None:
        """The loss of both kinds of targets in two passes, or None."""


def mark_ignored(target: Tensor, ignore_index: int) -> Tensor:
    """The target with IGNORED for ``ignore_index``."""
    return target if ignore_index == IGNORED else torch.where(target == ignore_index, IGNORED, target)


def record_of(stats: RowStats, softmax: Softmax) -> Record:
    """The sums over the non-targets, from the results of a kernel for the same row."""
    m, sum_exp, mean_q_z = softmax.state
    count = softmax.num_nontargets
    return Record(m, sum_exp, mean_q_z * sum_exp, (mean_q_z - stats.spread) * count, count)


def for_kernel(cotangents: Cotangents) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The contiguous cotangents of log_odds, neg_entropy, mean_log_q and rho, which a kernel takes."""
    g_l, g_e, g_a, g_rho, _ = (None if g is None else g.contiguous() for g in cotangents.folded())
    return g_l, g_e, g_a, g_rho
