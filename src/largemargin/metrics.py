r"""What logits say about a classifier: margins, the margin hidden in the loss, divergences, errors and calibration.

Every figure is a function of the statistics of a row, or a count. A row with NaN or +inf in it, or without any class, has no statistics:
its value is NaN in every function here, and so is a mean over it; as a prediction it is wrong. :class:`MarginMetrics` counts such rows
as ``invalid_rows`` and leaves them out of its other means. A class whose logit is -inf is not in the row. Half precision is computed
in float32, and sums are float64. Nothing here is differentiable: for that there is ``row_stats``.

DTensor logits are gathered: every rank then has all of them in memory, and gets the same plain tensors as results.

The prediction is the first of the largest logits, and confidence is its probability.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks, shards
from ._backends import Divergence
from ._reduce import REDUCTIONS, Reduction, reduce_rows
from .dtensors import gathered
from .functional import DIVERGENCES, softplus
from .functional import divergence as divergence_of_stats
from .ops import Rows, checked_rows, stats_of_rows
from .rowstats import IGNORED, RowStats
from .tracing import as_one_call


def _measure(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Rows, RowStats]:
    """The rows and their statistics, NaN in every field where a row has none."""
    rows = checked_rows(gathered(input), gathered(target), ignore_index)
    stats = stats_of_rows(rows, None)
    invalid = stats.log_odds.isnan()
    return rows, RowStats(*(field.masked_fill(invalid, torch.nan) for field in stats))


def _wide(values: Tensor) -> Tensor:
    """In float64, which the GPUs of Apple do not have."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _reduced(values: Tensor, rows: Rows, reduction: Reduction) -> Tensor:
    _checks.check_word("reduction", reduction, REDUCTIONS)
    values = values if reduction == "none" else _wide(values)
    return reduce_rows(values, rows.class_index.to(values.device), None, reduction)


@as_one_call
@torch.no_grad()
def margin(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Tensor:
    r"""The classification margin: by how much the target's logit leads the largest other.

    .. math:: f_y - \max_{c \neq y} f_c = l + \hat\rho

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        ignore_index: rows with this target are not counted, whatever they hold.
        reduction: ``"mean"`` over the counted rows (NaN where there is none), ``"sum"``, or ``"none"``: one value a row, 0 if ignored.

    Returns:
        Nats, negative where the row is misclassified, inf where no other class is left.
        A float64 scalar, or with ``reduction="none"`` a tensor like ``target``, in float32 or (for float64 input) float64.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for an unknown ``reduction``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.margin(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]), reduction="none")
        tensor([ 1.0000, -0.5000])

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, Sec. 2.1.
    """
    rows, stats = _measure(input, target, ignore_index)
    return _reduced(stats.log_odds + stats.rho, rows, reduction)


@as_one_call
@torch.no_grad()
def rho_hat(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Tensor:
    r"""The margin hidden in the softmax loss, which the paper's Fig. 3 shows over training.

    .. math:: \hat\rho = \mathrm{LSE}(\{f_c\}_{c \neq y}) - \max_{c \neq y} f_c \; (7)

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        ignore_index: rows with this target are not counted, whatever they hold.
        reduction: ``"mean"`` over the counted rows (NaN where there is none), ``"sum"``, or ``"none"``: one value a row, 0 if ignored.

    Returns:
        Nats, between 0 and log(C - 1) (eq. 4).
        A float64 scalar, or with ``reduction="none"`` a tensor like ``target``, in float32 or (for float64 input) float64.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for an unknown ``reduction``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.rho_hat(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.4100, dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eq. (7) and Fig. 3.
    """
    rows, stats = _measure(input, target, ignore_index)
    return _reduced(stats.rho, rows, reduction)


@as_one_call
@torch.no_grad()
def divergence(
    input: Tensor, target: Tensor, *, kind: Divergence = "symmetric", ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    r"""How far the non-target logits are from uniform: the paper's regulariser, measured.

    .. math:: \tilde D = \tfrac12 \{D(q \| u) + D(u \| q)\} \; (8), \quad D(q \| u), \; D(u \| q) \; (10)

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        kind: ``"symmetric"`` for (8), ``"kl_qu"`` for D(q||u), ``"kl_uq"`` for D(u||q).
        ignore_index: rows with this target are not counted, whatever they hold.
        reduction: ``"mean"`` over the counted rows (NaN where there is none), ``"sum"``, or ``"none"``: one value a row, 0 if ignored.

    Returns:
        Nats, at least 0 up to rounding.
        A float64 scalar, or with ``reduction="none"`` a tensor like ``target``, in float32 or (for float64 input) float64.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for an unknown ``kind`` or ``reduction``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.divergence(torch.tensor([[5.0, 1.0, 1.0], [5.0, 3.0, 1.0]]), torch.tensor([0, 0]))
        tensor(0.1904, dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eqs. (8) and (10).
    """
    _checks.check_word("kind", kind, DIVERGENCES)
    rows, stats = _measure(input, target, ignore_index)
    return _reduced(divergence_of_stats(stats, kind), rows, reduction)


@as_one_call
@torch.no_grad()
def log_odds(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Tensor:
    r"""The target's log-odds.

    .. math:: l = f_y - \mathrm{LSE}(\{f_c\}_{c \neq y}) = \log \frac{p_y}{1 - p_y}

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        ignore_index: rows with this target are not counted, whatever they hold.
        reduction: ``"mean"`` over the counted rows (NaN where there is none), ``"sum"``, or ``"none"``: one value a row, 0 if ignored.

    Returns:
        Nats, inf where no other class is left.
        A float64 scalar, or with ``reduction="none"`` a tensor like ``target``, in float32 or (for float64 input) float64.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for an unknown ``reduction``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.log_odds(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0]))
        tensor(0., dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eq. (3): the loss is softplus(-l).
    """
    rows, stats = _measure(input, target, ignore_index)
    return _reduced(stats.log_odds, rows, reduction)


@as_one_call
@torch.no_grad()
def nontarget_entropy(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Tensor:
    r"""The entropy of the softmax over the non-target classes.

    .. math:: H(q) = -\sum_{c \neq y} q_c \log q_c = \log K - D(q \| u)

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        ignore_index: rows with this target are not counted, whatever they hold.
        reduction: ``"mean"`` over the counted rows (NaN where there is none), ``"sum"``, or ``"none"``: one value a row, 0 if ignored.

    Returns:
        Nats, between 0 and log(C - 1).
        A float64 scalar, or with ``reduction="none"`` a tensor like ``target``, in float32 or (for float64 input) float64.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for an unknown ``reduction``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.nontarget_entropy(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.5292, dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eqs. (9) and (10).
    """
    rows, stats = _measure(input, target, ignore_index)
    return _reduced(-stats.neg_entropy, rows, reduction)


@as_one_call
@torch.no_grad()
def nll(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Tensor:
    r"""The negative log-likelihood, which is the softmax loss.

    .. math:: -\log p_y = \mathrm{softplus}(-l) \; (3)

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        ignore_index: rows with this target are not counted, whatever they hold.
        reduction: ``"mean"`` over the counted rows (NaN where there is none), ``"sum"``, or ``"none"``: one value a row, 0 if ignored.

    Returns:
        Nats, inf where the target's logit is -inf.
        A float64 scalar, or with ``reduction="none"`` a tensor like ``target``, in float32 or (for float64 input) float64.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for an unknown ``reduction``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.nll(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.9035, dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eqs. (2) and (3).
    """
    rows, stats = _measure(input, target, ignore_index)
    return _reduced(softplus(-stats.log_odds), rows, reduction)


def _right(rows: Rows, stats: RowStats) -> Tensor:
    """Whether the prediction is the target."""
    return (rows.logits.argmax(-1) == rows.class_index) & ~stats.log_odds.isnan()


def _outside_top(rows: Rows, stats: RowStats, k: int) -> Tensor:
    """Whether k classes or more come before the target; of equal logits the first comes first, as in argmax."""
    index = rows.class_index.clamp(min=0).unsqueeze(-1)
    of_target = rows.logits.gather(-1, index)
    before = torch.arange(rows.logits.shape[-1], device=index.device) < index
    ahead = ((rows.logits > of_target) | ((rows.logits == of_target) & before)).sum(-1)
    return (ahead >= k) | (of_target.squeeze(-1) == -torch.inf) | stats.log_odds.isnan()


@as_one_call
@torch.no_grad()
def accuracy(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Tensor:
    r"""The share of rows whose prediction is the target.

    .. math:: [\arg\max_c f_c = y]

    A row with NaN or +inf predicts nothing, and is wrong.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        ignore_index: rows with this target are not counted, whatever they hold.
        reduction: ``"mean"`` over the counted rows (NaN where there is none), ``"sum"``, or ``"none"``: one value a row, 0 if ignored.

    Returns:
        A share in [0, 1] as a float64 scalar; with ``reduction="none"`` 1.0 or 0.0 a row, shaped like ``target``.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for an unknown ``reduction``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.accuracy(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.5000, dtype=torch.float64)

    Source: the errors of Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, Tables 1 to 4, are 100 (1 - accuracy).
    """
    rows, stats = _measure(input, target, ignore_index)
    return _reduced(_right(rows, stats).to(stats.log_odds.dtype), rows, reduction)


@as_one_call
@torch.no_grad()
def topk_error(input: Tensor, target: Tensor, k: int = 5, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Tensor:
    r"""The share of rows whose target is not among the k largest logits.

    .. math:: [\#\{c : f_c > f_y\} \geq k]

    Of equal logits the first counts as larger, so that k = 1 is 1 - accuracy. A row with NaN or +inf is wrong, and so is one whose
    target is masked.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        k: how many of the largest logits, at least 1; from C on, only rows that are wrong for every k are wrong.
        ignore_index: rows with this target are not counted, whatever they hold.
        reduction: ``"mean"`` over the counted rows (NaN where there is none), ``"sum"``, or ``"none"``: one value a row, 0 if ignored.

    Returns:
        A share in [0, 1] as a float64 scalar; with ``reduction="none"`` 1.0 or 0.0 a row, shaped like ``target``.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for ``k < 1`` or an unknown ``reduction``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.topk_error(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]), k=2)
        tensor(0.5000, dtype=torch.float64)

    Source: the top-5 errors of Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, Table 4, are in percent.
    """
    _checks.check_at_least_1("k", k)
    rows, stats = _measure(input, target, ignore_index)
    return _reduced(_outside_top(rows, stats, k).to(stats.log_odds.dtype), rows, reduction)


# calibration

# adaptive_ece tells confidences apart by their log-odds, in cells of 1/256 nat from -16 to 48: sums over cells can be merged
_LOWEST_LOG_ODDS, _CELLS_PER_NAT, _NUM_CELLS = -16, 256, 64 * 256


def _log_odds_of_prediction(rows: Rows) -> Tensor:
    prediction = torch.where(rows.class_index == IGNORED, IGNORED, rows.logits.argmax(-1))
    return _wide(stats_of_rows(Rows(rows.logits, prediction, None), None).log_odds)


def _calibration_sums(rows: Rows, stats: RowStats, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the valid rows, float64: of confidence minus correctness in each bin and in each cell, and the rows of each cell."""
    log_odds = _log_odds_of_prediction(rows).flatten()
    valid = ((rows.class_index >= 0) & ~stats.log_odds.isnan()).flatten().to(log_odds.device)
    log_odds = torch.where(valid, log_odds, 0.0)
    confidence = log_odds.sigmoid()
    gap = torch.where(valid, confidence - _wide(_right(rows, stats)).flatten(), 0.0)
    # bins are closed on the right; a confidence of 1/3 is on the edge of one, and its rounding must not decide where it goes
    bins = (confidence * num_bins - 1e-6).ceil().long().clamp(1, num_bins) - 1
    cells = ((log_odds.clamp(-1e4, 1e4) - _LOWEST_LOG_ODDS) * _CELLS_PER_NAT + 1e-3).floor().long().clamp(0, _NUM_CELLS - 1)
    of_bins = gap.new_zeros(num_bins).index_add_(0, bins, gap)
    of_cells = gap.new_zeros(_NUM_CELLS).index_add_(0, cells, gap)
    return of_bins, of_cells, gap.new_zeros(_NUM_CELLS).index_add_(0, cells, valid.double())


def _equal_width(of_bins: Tensor, num_rows: Tensor) -> Tensor:
    return of_bins.abs().sum() / num_rows


def _equal_mass(of_cells: Tensor, rows_of_cells: Tensor, num_bins: int) -> Tensor:
    """Cut at equal shares of the rows; a cell that is cut gives each side its share."""
    sum_rows, sum_gaps = rows_of_cells.cumsum(0), of_cells.cumsum(0)
    num_rows = sum_rows[-1]
    cuts = torch.arange(1, num_bins + 1, dtype=torch.float64, device=sum_rows.device) * num_rows / num_bins
    cell = torch.searchsorted(sum_rows, cuts).clamp(max=_NUM_CELLS - 1)
    beyond = (sum_rows[cell] - cuts) / rows_of_cells[cell]  # the share of the cell that is above the cut
    gaps_below = sum_gaps[cell] - beyond * of_cells[cell]
    return gaps_below.diff(prepend=gaps_below.new_zeros(1)).abs().sum() / num_rows


def _with_nan(value: Tensor, rows: Rows, stats: RowStats) -> Tensor:
    """NaN where a row that counts has no statistics."""
    poisoned = (stats.log_odds.isnan() & (rows.class_index >= 0)).any()
    return value.masked_fill(poisoned.to(value.device), torch.nan)


@as_one_call
@torch.no_grad()
def ece(input: Tensor, target: Tensor, *, num_bins: int = 15, ignore_index: int = -100) -> Tensor:
    r"""Expected calibration error: the mean gap between confidence and accuracy, over bins of equal width.

    .. math:: \sum_b \tfrac{|B_b|}{N} \, |\mathrm{conf}(B_b) - \mathrm{acc}(B_b)|, \quad B_b = \{n : (b-1)/B < p_n \leq b/B\}

    A confidence within 1e-6 of a bin's width of an edge counts as on it.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        num_bins: how many bins between 0 and 1.
        ignore_index: rows with this target are not counted, whatever they hold.

    Returns:
        A float64 scalar in [0, 1]; NaN where no row counts, or one has NaN or +inf in it.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for ``num_bins < 1``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.ece(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.3391, dtype=torch.float64)

    Source: Guo, Pleiss, Sun and Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017, eq. (3).
    """
    _checks.check_at_least_1("num_bins", num_bins)
    rows, stats = _measure(input, target, ignore_index)
    of_bins, _, rows_of_cells = _calibration_sums(rows, stats, num_bins)
    return _with_nan(_equal_width(of_bins, rows_of_cells.sum()), rows, stats)


@as_one_call
@torch.no_grad()
def adaptive_ece(input: Tensor, target: Tensor, *, num_bins: int = 15, ignore_index: int = -100) -> Tensor:
    r"""Expected calibration error over bins of equal mass: the rows sorted by confidence and cut into equal parts.

    .. math:: \tfrac1B \sum_b |\mathrm{conf}(B_b) - \mathrm{acc}(B_b)|, \quad |B_b| = N / B

    Confidences are told apart by their log-odds, to 1/256 nat between -16 and 48. Rows closer than that are tied, and ties are shared
    between the bins in proportion: so the order of the rows does not matter, sums can be merged, and it differs from a full sort by at
    most the sum, over the cuts between bins, of the share of rows that are tied at the cut.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        num_bins: how many bins of N / num_bins rows each; a row on a cut is shared.
        ignore_index: rows with this target are not counted, whatever they hold.

    Returns:
        A float64 scalar in [0, 1]; NaN where no row counts, or one has NaN or +inf in it.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for ``num_bins < 1``.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.adaptive_ece(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]), num_bins=2)
        tensor(0.3391, dtype=torch.float64)

    Source: Nguyen and O'Connor, *Posterior calibration and exploratory analysis for natural language processing models*, EMNLP 2015.
    """
    _checks.check_at_least_1("num_bins", num_bins)
    rows, stats = _measure(input, target, ignore_index)
    _, of_cells, rows_of_cells = _calibration_sums(rows, stats, 1)
    return _with_nan(_equal_mass(of_cells, rows_of_cells, num_bins), rows, stats)


@as_one_call
@torch.no_grad()
def super_symmetry(weight: Tensor) -> Tensor:
    r"""How far a classifier is from the super-symmetric form, to which the paper's regulariser pushes it.

    The form is :math:`w_c^\top w_c = v, \; w_c^\top w_{c'} = -\tfrac{v}{C-1}`. With the Gram matrix G of the centred rows
    :math:`w_c - \bar w` (the softmax does not see a vector common to all rows) and the form's :math:`M = v (I - \tfrac1C 1 1^\top)`:

    .. math:: \min_v \|G - M\|_F / \|G\|_F, \quad v = \mathrm{tr} \, G / (C - 1)

    It is the spread of the C - 1 eigenvalues of G: 0 for the form, sqrt(1 - 1 / (C - 1)) where the rows lie on a line. The form needs
    D >= C - 1 features; with fewer it is at least sqrt(1 - D / (C - 1)). Scale, rotation and a common shift of the rows do not matter.

    It is the sine of the angle between G and the form, and :func:`.super_symmetry_penalty` p is one less the cosine: this is
    :math:`\sqrt{p (2 - p)}`.

    Args:
        weight: the classifier's, shape ``(C, D)`` with C >= 2, floating; what an ``nn.Linear`` has.

    Returns:
        A float64 scalar in [0, 1); NaN where all rows are equal.

    Raises:
        TypeError: ``weight`` is not a tensor.
        ValueError: it does not have this shape, or is not floating.

    Example:
        >>> import torch
        >>> from largemargin import metrics
        >>> metrics.super_symmetry(torch.tensor([[1.0], [-1.0]]))
        tensor(0., dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, Sec. 3, Geometrical meaning of the regularization.
    """
    _checks.check_tensor("weight", weight)
    if weight.dim() != 2 or len(weight) < 2 or weight.dtype not in _checks.FLOATING:
        raise ValueError(f"weight must be floating of shape (C, D) with C >= 2, got {_checks.describe(weight)}; pass the layer's .weight")
    num_classes, num_features = weight.shape
    centred = _wide(gathered(weight.detach()))
    centred = centred - centred.mean(0)
    centred = centred / centred.abs().amax()  # its fourth powers are summed
    if num_features < num_classes:  # the same eigenvalues, less zeros
        gram = centred.T @ centred
        ideal, missing = torch.eye(num_features).to(gram), num_classes - 1 - num_features
    else:
        gram = centred @ centred.T
        ideal, missing = torch.eye(num_classes).to(gram) - 1 / num_classes, 0
    v = gram.trace() / (num_classes - 1)
    distance: Tensor = ((gram - v * ideal).square().sum() + missing * v.square()).sqrt()
    size: Tensor = torch.linalg.matrix_norm(gram)
    return distance / size


# streaming

_MEANS = ("margin", "rho_hat", "divergence", "kl_qu", "kl_uq", "log_odds", "nontarget_entropy", "nll")


def _sums(input: Tensor, target: Tensor, ignore_index: int, num_bins: int, top_k: int) -> Tensor:
    """All that a batch adds: rows, invalid rows, rows right, rows outside the top k, the sums of _MEANS, and those of calibration."""
    rows, stats = _measure(input, target, ignore_index)
    kept = rows.class_index >= 0
    valid = kept & ~stats.log_odds.isnan()
    counts = (kept, kept & ~valid, kept & _right(rows, stats), kept & _outside_top(rows, stats, top_k))
    divergences = [divergence_of_stats(stats, kind) for kind in DIVERGENCES]
    values = (stats.log_odds + stats.rho, stats.rho, *divergences, stats.log_odds, -stats.neg_entropy, softplus(-stats.log_odds))
    sums = [_wide(field).sum() for field in (*counts, *(torch.where(valid, value, 0.0) for value in values))]
    return torch.cat([torch.stack(sums), *_calibration_sums(rows, stats, num_bins)])


def _zeros(num_bins: int, device: torch.device | str | None = None) -> Tensor:
    return torch.zeros(4 + len(_MEANS) + num_bins + 2 * _NUM_CELLS, dtype=torch.float64, device=device)


def _figures(sums: Tensor, num_bins: int, top_k: int) -> dict[str, Tensor]:
    counts, means, of_bins, of_cells, rows_of_cells = torch.split(sums, [4, len(_MEANS), num_bins, _NUM_CELLS, _NUM_CELLS])
    num_rows, num_invalid, num_right, num_outside = counts
    num_valid = num_rows - num_invalid
    return {
        "rows": num_rows,
        "invalid_rows": num_invalid,
        "accuracy": num_right / num_rows,
        f"top{top_k}_error": num_outside / num_rows,
        **dict(zip(_MEANS, means / num_valid, strict=True)),
        "ece": _equal_width(of_bins, num_valid),
        "adaptive_ece": _equal_mass(of_cells, rows_of_cells, num_bins),
    }


class MarginMetrics:
    r"""All metrics of this module over a stream of batches, from one vector of float64 sums.

    Sums are added, so batches in any split and order, merged over any number of objects or ranks, give what the whole gives, up to
    rounding. ``accuracy`` and the top-k error are over all ``rows``; every other figure is over those that are not ``invalid_rows``.
    An infinite value (of a masked target, or a row of one class) makes its mean infinite, or NaN beside one of the other sign.

    Args:
        num_bins: the bins of ``ece`` and ``adaptive_ece``.
        top_k: the k of :func:`topk_error`.
        ignore_index: rows with this target are not counted.
        device: where the sums are kept, 260 kB of float64. On the device of the logits an update does not wait for it; for ``reduce``
            with NCCL it must be the rank's GPU. Not an Apple GPU, which has no float64.

    Example:
        >>> import torch
        >>> from largemargin.metrics import MarginMetrics
        >>> metrics = MarginMetrics(top_k=2)
        >>> for logits, target in [(torch.tensor([[2.0, 1.0, -1.0]]), [0]), (torch.tensor([[0.0, 0.5, 0.5]]), [0])]:
        ...     metrics.update(logits, torch.tensor(target))
        >>> figures = metrics.compute()
        >>> figures["rows"], figures["accuracy"], figures["top2_error"], figures["margin"]
        (2.0, 0.5, 0.5, 0.25)
    """

    def __init__(self, *, num_bins: int = 15, top_k: int = 5, ignore_index: int = -100, device: torch.device | str | None = "cpu") -> None:
        _checks.check_at_least_1("num_bins", num_bins)
        _checks.check_at_least_1("top_k", top_k)
        _checks.check_integer("ignore_index", ignore_index)
        self.num_bins, self.top_k, self.ignore_index = num_bins, top_k, ignore_index
        self._totals = _zeros(num_bins, device)

    @torch.no_grad()
    def update(self, input: Tensor, target: Tensor) -> None:
        """Count a batch: logits (N, C) or (N, C, d1, ..., dk) with class indices (N,) or (N, d1, ..., dk)."""
        self._totals += _sums(input, target, self.ignore_index, self.num_bins, self.top_k).to(self._totals.device)

    def compute(self) -> dict[str, float]:
        """The figures by name: counts, shares in [0, 1] and nats; NaN where nothing was counted."""
        return {name: value.item() for name, value in _figures(self._totals.cpu(), self.num_bins, self.top_k).items()}

    def merge(self, other: "MarginMetrics") -> None:
        """Count what ``other`` has counted as well; it must have the same ``num_bins`` and ``top_k``."""
        if not isinstance(other, MarginMetrics):
            raise TypeError(f"other must be a MarginMetrics, got {_checks.describe(other)}")
        for name in ("num_bins", "top_k"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other must have {name}={getattr(self, name)} to be merged, got {name}={getattr(other, name)}")
        self._totals += other._totals.to(self._totals.device)

    def reset(self) -> None:
        """Forget what was counted."""
        self._totals.zero_()

    def reduce(self, group: dist.ProcessGroup | None = None) -> "MarginMetrics":
        """What the ranks of ``group`` have counted together, by one all-reduce; this object keeps its own.

        All ranks must call it. ``None`` is the default group, or this process alone where ``torch.distributed`` is not initialised.
        """
        whole = MarginMetrics(num_bins=self.num_bins, top_k=self.top_k, ignore_index=self.ignore_index, device=self._totals.device)
        whole.merge(self)
        if dist.is_available() and dist.is_initialized():
            ranks = dist.group.WORLD if group is None else group
            assert ranks is not None
            shards.check_group(ranks)
            shards.all_reduce(whole._totals, ranks)
        return whole


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """What ``fn`` makes of a tensor, in the dtype that it had."""
    applied = fn(tensor)
    return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)


def as_torchmetric(*, num_bins: int = 15, top_k: int = 5, ignore_index: int = -100) -> Any:
    r"""A ``torchmetrics.Metric`` with the figures of :class:`MarginMetrics`; needs ``torchmetrics``.

    Args:
        num_bins: the bins of ``ece`` and ``adaptive_ece``.
        top_k: the k of :func:`topk_error`.
        ignore_index: rows with this target are not counted.

    Returns:
        The metric; ``compute`` gives a dict of float64 scalars on its device. It can be copied, pickled and put into a collection. A cast
        of the metric, or of a module that holds it, moves the sums to another device but leaves them float64.

    Raises:
        ImportError: ``torchmetrics`` is not installed.
        TypeError, ValueError: a count that is no integer of at least 1.

    Example:
        >>> from largemargin import metrics
        >>> metric = metrics.as_torchmetric()  # doctest: +SKIP
        >>> metric.update(logits, target)  # doctest: +SKIP

    Source: the interface of torchmetrics, https://lightning.ai/docs/torchmetrics.
    """
    try:
        from torchmetrics import Metric  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        if error.name != "torchmetrics":  # it is there, and lacks another package
            raise
        raise ImportError("as_torchmetric needs torchmetrics; install it with: pip install torchmetrics") from error
    MarginMetrics(num_bins=num_bins, top_k=top_k, ignore_index=ignore_index)  # checks them

    class TorchMetric(Metric):  # type: ignore[misc, unused-ignore]
        is_differentiable = False
        full_state_update = False
        sums: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("sums", default=_zeros(num_bins), dist_reduce_fx="sum")

        def update(self, preds: Tensor, target: Tensor) -> None:
            with torch.no_grad():
                self.sums += _sums(preds, target, ignore_index, num_bins, top_k).to(self.sums.device)

        def compute(self) -> dict[str, Tensor]:
            return _figures(self.sums, num_bins, top_k)

        def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
            # torchmetrics guards against half() and the like; to(dtype), of a module around the metric, would round the sums
            return super()._apply(lambda tensor: _moved(tensor, fn), exclude_state)

        def _load_from_state_dict(self, *arguments: Any) -> None:
            super()._load_from_state_dict(*arguments)
            if isinstance(self.sums, Tensor):  # torchmetrics takes the tensor of the checkpoint, which may have been cast
                self.sums = self.sums.double()

        def __reduce__(self) -> tuple[Any, ...]:  # pickle does not find a class inside a function
            return functools.partial(as_torchmetric, num_bins=num_bins, top_k=top_k, ignore_index=ignore_index), (), self.__getstate__()

    return TorchMetric()
