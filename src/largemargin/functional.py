"""The losses of the paper, as short formulas on the statistics of a row, shaped like :func:`torch.nn.functional.cross_entropy`.

In the symbols of :mod:`.rowstats` (``l`` the log-odds of the target, ``e`` and ``a`` the two averages of ``log q``, K non-targets):

    softmax loss                (2, 3, 6)   softplus(-l)
    with a hard bias b          (15)        softplus(b - l)
    D(q||u), D(u||q), half sum  (10, 8)     log K + e,  -log K - a,  (e - a) / 2
    the large-margin loss       (11)        softplus(b - l) + lam * divergence
    label smoothing             (13)        (1 - eps) softplus(-l) + eps * mean over all classes of -log p_c

The hinges and the hard margin that the paper compares with are in :mod:`.hinges`.
"""

from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, fused
from ._backends import Divergence, LossOptions
from ._backends.ladder import Backend
from ._reduce import REDUCTIONS, Reduction, reduce, reduce_rows
from .dtensors import check_indices_only, check_plain, is_dtensor, local_rows, reduced
from .ops import checked_rows, class_index, classes_last, stats_of_all_classes, stats_of_rows
from .rowstats import RowStats, accumulation_dtype
from .shards import Shard, SplitStats, check_all_here, check_eager, eagerly, shard_of, stats_of_shard
from .tracing import is_symbolic, no_script, record

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # there are builds of torch without it

DIVERGENCES = get_args(Divergence)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), the paper's L of eq. (3)."""
    # torch's default threshold of 20 is 2e-9 off in float64; log1p(exp(-|x|)) + max(x, 0) has the wrong derivative at 0
    return F.softplus(x, threshold=40)


def divergence(stats: RowStats, kind: Divergence = "symmetric") -> Tensor:
    r"""How far the non-target logits are from uniform: the paper's regulariser, differentiable.

    .. math:: \tilde D = \tfrac12 \{D(q \| u) + D(u \| q)\} \; (8), \quad D(q \| u) = \log K + E_q[\log q], \quad
              D(u \| q) = -\log K - \tfrac1K \textstyle\sum_{c \neq y} \log q_c \; (10)

    It never depends on the target's logit. With two classes there is one non-target, q = u, and it is 0: the large-margin loss
    of a two-class problem is the softmax loss.

    Args:
        stats: what :func:`row_stats` returns.
        kind: ``"symmetric"`` for (8), ``"kl_qu"`` for D(q||u), ``"kl_uq"`` for D(u||q).

    Returns:
        One value a row, shaped like the fields of ``stats``; at least 0 up to rounding, never clamped (that would stop its gradient).

    Raises:
        ValueError: unknown ``kind``.

    Example:
        >>> import torch, largemargin
        >>> stats = largemargin.row_stats(torch.tensor([[5.0, 1.0, 1.0], [5.0, 3.0, 1.0]]), torch.tensor([0, 0]))
        >>> largemargin.divergence(stats)
        tensor([0.0000, 0.3808])

    Source: Kobayashi, BMVC 2019, eqs. (8) and (10).
    """
    _checks.check_word("kind", kind, DIVERGENCES)
    if kind == "symmetric":
        return stats.spread / 2  # eq. (8); log K cancels
    log_num_nontargets = stats.num_nontargets.clamp(min=1).log()
    return log_num_nontargets + stats.neg_entropy if kind == "kl_qu" else -log_num_nontargets - stats.mean_log_q  # eq. (10)


def checked_options(
    lam: float, divergence: Divergence, hard_bias: float, label_smoothing: float, ignore_index: int, reduction: Reduction
) -> LossOptions:
    _checks.check_number("lam", lam, low=0)
    _checks.check_word("divergence", divergence, DIVERGENCES)
    _checks.check_number("hard_bias", hard_bias)
    _checks.check_label_smoothing(label_smoothing)
    _checks.check_word("reduction", reduction, REDUCTIONS)
    return LossOptions(lam, divergence, hard_bias, label_smoothing, ignore_index, reduction)


def _margin_term(stats: RowStats, lam: float, kind: Divergence, hard_bias: float, label_smoothing: float) -> Tensor:
    """``(1 - eps) softplus(b - l) + lam D``: eqs. (3), (11) and (15), and the first term of (13)."""
    loss = softplus(hard_bias - stats.log_odds)
    if label_smoothing == 1:
        loss = torch.where(loss.isfinite(), 0.0, loss)  # 0 * inf is NaN; a masked target stays infinite
    elif label_smoothing > 0:
        loss = (1 - label_smoothing) * loss
    return loss + lam * divergence(stats, kind) if lam > 0 else loss


def _mean_cross_entropy(stats: RowStats) -> Tensor:
    """The mean of ``-log p_c`` over the classes of the row: the second term of (13), ``D(u||p) + log C``."""
    return _mean_cross_entropy_of(stats, torch.ones_like(stats.log_odds), stats.num_nontargets, stats.num_nontargets * stats.mean_log_q)


def _mean_cross_entropy_of(stats: RowStats, target_weight: Tensor, sum_weight: Tensor, weighted_log_q: Tensor) -> Tensor:
    """The mean of ``-w_c log p_c``, from the sums of ``w_c`` and ``w_c log q_c`` over the non-targets."""
    l, count = stats.log_odds, stats.num_nontargets
    off_target = torch.where(count == 0, 0.0, sum_weight * softplus(l) - weighted_log_q)  # -log p_c = softplus(l) - log q_c
    masked = l == -torch.inf  # then y is no class of the row
    return (off_target + torch.where(masked, 0.0, target_weight * softplus(-l))) / (count + (~masked).to(l.dtype))


def _weighted_mean_cross_entropy(logits: Tensor, weight: Tensor | None) -> Tensor:
    """The mean of ``-w_c log p_c`` over the classes of the row; ``logits`` (..., C), not of half precision."""
    kept = logits != -torch.inf
    losses = torch.where(kept, -logits.log_softmax(-1), 0.0)
    if weight is not None:
        losses = losses * weight.to(losses.dtype)
    return losses.sum(-1) / kept.sum(-1)


@no_script
def large_margin_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    lam: float = 0.3,
    divergence: Divergence = "symmetric",
    hard_bias: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
    donate: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy plus a regulariser that widens its margin; a drop-in for :func:`torch.nn.functional.cross_entropy`.

    .. math:: \mathrm{softplus}(b - l) + \lambda \tilde D(q) \quad (11, 15), \qquad l = f_y - \mathrm{LSE}(\{f_c\}_{c \neq y})

    With ``weight`` and ``label_smoothing`` a row's loss is
    :math:`w_y [(1-\epsilon)\,\mathrm{softplus}(b - l) + \lambda D] + \tfrac{\epsilon}{C} \sum_c w_c (-\log p_c)`,
    over the C classes of the row. For probabilities
    ``t`` it is the expectation over :math:`y \sim t`. With ``lam=0`` and ``hard_bias=0`` value and gradient are those of
    :func:`torch.nn.functional.cross_entropy`.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``; any floating dtype, half precision is computed in
            float32. A class whose logit is -inf is not in the row.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``, int64 (or uint8), or class probabilities of the
            shape of ``input``, floating.
        weight: a factor for each class, shape ``(C,)``, floating; it scales both terms.
        lam: the paper's lambda, at least 0; 0 leaves the regulariser out.
        divergence: ``"symmetric"`` (8), ``"kl_qu"`` or ``"kl_uq"`` (10).
        hard_bias: the constant b of eq. (15), in nats, finite; the paper's modified loss has 1.
        label_smoothing: the epsilon of eq. (13), in [0, 1].
        ignore_index: rows with this target have loss 0 and an exactly zero gradient; class indices only.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``, which divides by the summed weights of the kept rows (class indices) or by the
            number of rows (probabilities), as torch does, for all terms.
        backend: ``"reference"``, ``"cpu"`` or ``"triton"``; ``None`` takes the fastest that can (see docs/backends.md).
        donate: ``input`` may be overwritten by its gradient (``"sum"`` and ``"mean"`` on the CPU kernel), which saves the memory of
            one; a leaf may not. Take what else you need from the logits before. Their version counter moves on, so whoever still needs
            them for a backward pass gets torch's error; there is one backward pass. Elsewhere nothing is overwritten.

    Returns:
        A scalar, or with ``reduction="none"`` the loss of each row, shaped like class indices; float32, or float64 for float64.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: the type :func:`torch.nn.functional.cross_entropy` raises for the same
            mistake; ValueError or TypeError for an argument torch does not have. Labels out of range raise on the CPU; on an
            accelerator and in compiled code their rows are NaN.

    Example:
        >>> import torch
        >>> from largemargin import large_margin_cross_entropy
        >>> logits = torch.tensor([[3.0, 1.0, 0.0], [0.5, 2.0, -1.0]], requires_grad=True)
        >>> loss = large_margin_cross_entropy(logits, torch.tensor([0, 1]))
        >>> loss
        tensor(0.2586, grad_fn=<...>)
        >>> loss.backward()
        >>> large_margin_cross_entropy(logits, torch.tensor([0, 1]), lam=0)  # = torch.nn.functional.cross_entropy
        tensor(0.2056, grad_fn=<...>)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eqs. (8), (11), (13) and (15).
    """
    if is_symbolic(input, target):
        return record(large_margin_cross_entropy, locals())  # type: ignore[no-any-return]
    options = checked_options(lam, divergence, hard_bias, label_smoothing, ignore_index, reduction)
    _checks.check_input(input, target)
    _checks.check_weight(weight, input)

    if is_dtensor(input):
        return _loss_of_dtensor(input, target, weight, options, backend)
    check_plain("weight", weight)
    if _checks.is_probabilities(input, target):
        _checks.check_probabilities(input, target, ignore_index)
        check_plain("target", target)
        return _loss_of_probabilities(input, target, weight, options, backend)
    _checks.check_indices(input, target, ignore_index)
    if donate:
        _checks.check_donated(input)
    if fused.applies(input, target, weight, backend):
        return fused.loss(input, target, weight, options, _loss_of_indices, donate)
    return _loss_of_indices(input, target, weight, options, backend)


def _loss_of_indices(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, backend: Backend | None = "reference"
) -> Tensor:
    """The loss for class indices, in the words of the paper: a few formulas on the statistics of each row."""
    label_smoothing = options.label_smoothing
    if label_smoothing > 0 and weight is not None:
        input = input.to(accumulation_dtype(input.dtype))  # two terms read it: their gradients are to be added before they are rounded
    rows = checked_rows(input, target, options.ignore_index)
    stats = stats_of_rows(rows, backend)
    cross_entropy = None
    if label_smoothing > 0 and weight is None:
        cross_entropy = _mean_cross_entropy(stats)
    elif label_smoothing > 0:
        # an ignored row is emptied first: log_softmax would pass its NaN on to the gradient
        cross_entropy = _weighted_mean_cross_entropy(rows.logits.masked_fill(rows.class_index.unsqueeze(-1) < 0, 0.0), weight)
    return _loss_of_stats(stats, rows.class_index, weight, options, cross_entropy)


def _loss_of_stats(stats: RowStats, index: Tensor, weight: Tensor | None, options: LossOptions, cross_entropy: Tensor | None) -> Tensor:
    """The loss of rows with class indices ``index``, -1 where ignored; ``cross_entropy`` is the mean over the classes, for smoothing."""
    lam, divergence, hard_bias, label_smoothing, _, reduction = options
    losses = _margin_term(stats, lam, divergence, hard_bias, label_smoothing)
    return reduce_rows(losses, index, weight, reduction, None if cross_entropy is None else label_smoothing * cross_entropy)


class LossOfRows(NamedTuple):
    """The loss of rows as a function of their statistics, whoever sums these up."""

    class_index: Tensor  # (...), of all classes, or IGNORED
    valid: Tensor | None  # (...), False where the label was out of range; None where that has been checked
    weight: Tensor | None  # (num_classes,)
    options: LossOptions

    @property
    def summed_weight(self) -> Tensor | None:
        """The weights that are to be summed up with the statistics."""
        return self.weight if self.options.label_smoothing > 0 else None

    def __call__(self, found: SplitStats) -> Tensor:
        stats, weight, options = found.stats, self.weight, self.options
        if self.valid is not None:
            stats = RowStats(*(torch.where(self.valid, field, torch.nan) for field in stats))
        cross_entropy = None
        if options.label_smoothing > 0 and weight is None:
            cross_entropy = _mean_cross_entropy(stats)
        elif weight is not None and found.sum_weight is not None and found.weighted_log_q is not None:
            target_weight = weight.to(found.sum_weight.dtype)[self.class_index.clamp(min=0)]
            cross_entropy = _mean_cross_entropy_of(stats, target_weight, found.sum_weight, found.weighted_log_q)
        return _loss_of_stats(stats, self.class_index, weight, options, cross_entropy)


@eagerly
def sharded_large_margin_cross_entropy(
    input_shard: Tensor,
    target: Tensor,
    *,
    group: "ProcessGroup | None",
    class_start: int | None = None,
    num_classes: int | None = None,
    weight: Tensor | None = None,
    lam: float = 0.3,
    divergence: Divergence = "symmetric",
    hard_bias: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    backend: Backend | None = None,
) -> Tensor:
    r"""The large-margin loss of logits whose classes are split over the ranks of a group; equal to that of the whole logits.

    .. math:: \ell(\,[f^{(0)} \dots f^{(p-1)}], y), \quad \ell \text{ of eqs. (8), (11), (13), (15)}

    Rank r holds the logits :math:`f^{(r)}` of some classes, in the order of the ranks; a rank may have few or none. One all-gather of
    six float32 a row (eight with weights and smoothing) gives every rank the same loss, bit for bit. The backward pass is local: a rank's
    gradient is that of this one loss, not divided by the number of ranks, and every rank has to go back from the same loss. It cannot be
    differentiated twice.

    Args:
        input_shard: logits of this rank's classes, shape ``(N, C_r)``, ``(N, C_r, d1, ..., dk)`` or ``(C_r,)``; the same rows everywhere.
        target: class indices among all classes, the same on every rank; shape and dtype as in :func:`large_margin_cross_entropy`.
        group: the ranks that share the classes; ``None`` is the loss of ``input_shard`` alone.
        class_start: the index of this rank's first class.
        num_classes: of all ranks together. On an accelerator both, given on every rank, save an exchange of sizes and a wait for it.
        weight: a factor for each class, shape ``(num_classes,)``.
        lam: the paper's lambda, at least 0.
        divergence: ``"symmetric"`` (8), ``"kl_qu"`` or ``"kl_uq"`` (10).
        hard_bias: the constant b of eq. (15), in nats, finite.
        label_smoothing: the epsilon of eq. (13), in [0, 1].
        ignore_index: rows with this target have loss 0 and an exactly zero gradient.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``.
        backend: who computes the rows, as in :func:`large_margin_cross_entropy`.

    Returns:
        What :func:`large_margin_cross_entropy` returns for the whole logits, on every rank.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`large_margin_cross_entropy`; TypeError for another kind of group;
            ValueError where shards and the numbers given do not fit; RuntimeError where a rank of the group is lost.

    Example:
        >>> import torch, largemargin
        >>> from torch.distributed import group  # under torchrun: group.WORLD
        >>> largemargin.sharded_large_margin_cross_entropy(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([0]), group=None)
        tensor(0.2045)

    Source: the record of a row is merged as in docs/maths.md; one gather of a few numbers a row as in TransformerEngine.
    """
    options = checked_options(lam, divergence, hard_bias, label_smoothing, ignore_index, reduction)
    _checks.check_input(input_shard, target)
    if group is None:
        check_all_here(_checks.num_classes(input_shard), class_start, num_classes)
        return large_margin_cross_entropy(input_shard, target, weight, **options._asdict(), backend=backend)
    _checks.check_indices(input_shard, target, ignore_index)
    for name, value in (("target", target), ("weight", weight)):
        check_plain(name, value)
    check_eager("sharded_large_margin_cross_entropy")
    shard, _ = shard_of(_checks.num_classes(input_shard), target, group, class_start, num_classes)
    return _loss_of_shard(input_shard, target, weight, options, backend, shard)


def _loss_of_shard(
    input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, backend: Backend | None, shard: Shard
) -> Tensor:
    """The loss of logits of some classes, shaped as in :func:`large_margin_cross_entropy`."""
    _checks.check_weight(weight, input, shard.num_classes)
    logits = input.movedim(1, -1) if input.dim() > 2 else input
    target = target.long().reshape(logits.shape[:-1])
    loss = LossOfRows(*class_index(target, shard.num_classes, options.ignore_index), weight, options)
    if loss.summed_weight is not None and loss.summed_weight.requires_grad:
        raise ValueError("weight must not require a gradient where classes are split and label_smoothing > 0; pass weight.detach()")
    summed = shard.own(loss.summed_weight, logits.dtype)
    if summed is not None:
        logits = logits.to(summed.dtype)  # two terms read them: their gradients are to be added before they are rounded
    return loss(stats_of_shard(logits, shard.local(loss.class_index), summed, shard.group, backend))


def _loss_of_dtensor(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, backend: Backend | None) -> Tensor:
    """The loss of DTensor logits, as a DTensor."""
    check_indices_only(input, target)
    _checks.check_indices(input, target, options.ignore_index)
    rows, whole = local_rows(input, target, weight)
    a_row = options.reduction == "none"
    local = options._replace(reduction="none" if a_row else "sum")
    if rows.shard is None:
        loss = large_margin_cross_entropy(rows.logits, rows.target, rows.weight, **local._asdict(), backend=backend)
    else:
        loss = _loss_of_shard(rows.logits, rows.target, rows.weight, local, backend, rows.shard)
    return reduced(loss, rows, options.ignore_index, options.reduction, whole)


def _loss_of_probabilities(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, backend: Backend | None) -> Tensor:
    """The loss for class probabilities: its expectation over y ~ target."""
    lam, divergence, hard_bias, label_smoothing, _, reduction = options
    logits, t = classes_last(input.to(accumulation_dtype(input.dtype))), classes_last(target)
    losses = _margin_term(stats_of_all_classes(logits, backend), lam, divergence, hard_bias, label_smoothing)
    losses = torch.where((t == 0) & (losses == torch.inf), 0.0, losses)  # a masked class without a share adds nothing
    losses = (losses * t if weight is None else losses * t * weight.to(losses.dtype)).sum(-1)
    if label_smoothing > 0:
        losses = losses + label_smoothing * _weighted_mean_cross_entropy(logits, weight)
    return reduce(losses, losses.numel() if _checks.num_classes(input) else 0, reduction)
