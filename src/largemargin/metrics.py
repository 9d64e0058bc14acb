r"""Metrics of logits: margins, the margin hidden in the loss, divergences, errors and calibration.

A row with NaN or +inf, or without classes, has no statistics: its value and any mean over it are NaN, and as a prediction it is wrong.
:class:`MarginMetrics` counts such rows as ``invalid_rows`` and leaves them out of its other means. A class whose logit is -inf is not in
the row. Half precision is computed in float32, and sums are float64. The prediction is the first of the largest logits; confidence is its
probability. Metrics are not differentiable. DTensor logits are gathered: each rank needs memory for all of them, and gets plain results.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks, _shared
from ._reduce import REDUCTIONS, Labels, Reduction, reduce_rows
from .loss import Divergence, softplus
from .loss import divergence as divergence_of_stats
from .rows import collectives, dense
from .rows.dense import Rows
from .rows.dtensors import gathered
from .rowstats import IGNORED, RowStats
from .tracing import as_one_call


class _Batch:
    """Rows of logits with class indices, and what several figures need."""

    def __init__(self, input: Tensor, target: Tensor, ignore_index: int) -> None:
        input, target = gathered(input), gathered(target)
        _checks.check_indices_of(input, target, ignore_index)
        self.rows = Rows.of(input, target, ignore_index)
        self.index = self.rows.labels.class_index
        self.computed = dense.stats(self.rows, None)
        self.invalid = self.computed.log_odds.isnan()  # a row without statistics

    @functools.cached_property
    def stats(self) -> RowStats:
        """The statistics; NaN in every field of an invalid row."""
        return RowStats(*(field.masked_fill(self.invalid, torch.nan) for field in self.computed))

    @functools.cached_property
    def kept(self) -> Tensor:
        return self.index >= 0

    @functools.cached_property
    def prediction(self) -> Tensor:
        return self.rows.logits.argmax(-1)

    @functools.cached_property
    def right(self) -> Tensor:
        return (self.prediction == self.index) & ~self.invalid

    def outside_top(self, k: int) -> Tensor:
        """Whether at least k classes come before the target; of equal logits the first comes first, as in argmax."""
        logits, index = self.rows.logits, self.index.clamp(min=0).unsqueeze(-1)
        of_target = logits.gather(-1, index)
        before = torch.arange(logits.shape[-1], device=index.device) < index
        ahead = ((logits > of_target) | ((logits == of_target) & before)).sum(-1, dtype=torch.int32)
        return (ahead >= k) | (of_target.squeeze(-1) == -torch.inf) | self.invalid

    def log_odds_of_prediction(self) -> Tensor:
        prediction = torch.where(self.kept, self.prediction, IGNORED)
        return _wide(dense.stats(Rows(self.rows.logits, Labels(prediction, None)), None).log_odds)


_MEANS: dict[str, Callable[[RowStats], Tensor]] = {
    "margin": lambda stats: stats.log_odds + stats.rho,
    "rho_hat": lambda stats: stats.rho,
    "divergence": divergence_of_stats,
    "kl_qu": lambda stats: divergence_of_stats(stats, "kl_qu"),
    "kl_uq": lambda stats: divergence_of_stats(stats, "kl_uq"),
    "log_odds": lambda stats: stats.log_odds,
    "nontarget_entropy": lambda stats: -stats.neg_entropy,
    "nll": lambda stats: softplus(-stats.log_odds),
}


def _wide(values: Tensor) -> Tensor:
    # Apple's GPUs have no float64
    return (values.cpu() if values.device.type == "mps" else values).double()


class _RowMetric(Protocol):
    """A figure of logits and class indices; ``own`` and ``named`` are its own settings."""

    def __call__(
        self, input: Tensor, target: Tensor, *own: Any, ignore_index: int = -100, reduction: Reduction = "mean", **named: Any
    ) -> Tensor:
        """The figure of logits and class indices."""


def _prototype(input: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean") -> Tensor:
    """The arguments of every figure of rows.

    Args:
        input: logits, shape ``(C,)``, ``(N, C)`` or ``(N, C, d1, ..., dk)``, floating.
        target: class indices, shape ``()``, ``(N,)`` or ``(N, d1, ..., dk)``.
        ignore_index: rows with this target do not count.
        reduction: ``"mean"`` over the counted rows (NaN without any), ``"sum"``, or ``"none"``: one value per row, 0 if ignored.

    Returns:
        A float64 scalar, or with ``reduction="none"`` a tensor like ``target``, in float32, or float64 for float64 input.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`row_stats`; ValueError for an unknown word or a count below 1.
    """
    raise NotImplementedError


def _complete(metric: Callable[..., Any], documented: Callable[..., Any], own: Sequence[inspect.Parameter], shared: Sequence[str]) -> None:
    """Give ``metric`` the name of ``documented``, and the signature and docstring with what figures share."""
    for function in (metric, inspect.unwrap(metric)):  # the innermost is the one that errors name
        for name in ("__module__", "__name__", "__qualname__"):
            setattr(function, name, getattr(documented, name))
    prototype = inspect.signature(_prototype).parameters
    parameters = [prototype["input"], prototype["target"], *own, *(prototype[name] for name in shared)]
    metric.__signature__ = inspect.Signature(parameters, return_annotation=Tensor)  # type: ignore[attr-defined]
    if documented.__doc__ and _prototype.__doc__:
        doc = _shared.sections(_shared.completed(documented.__doc__, _prototype.__doc__, (parameter.name for parameter in parameters)))
        if "reduction" in shared:
            doc["Returns"] = doc["Returns"].rstrip() + _shared.sections(_prototype.__doc__)["Returns"]
        doc["Example"] = "\n        >>> import torch\n        >>> from largemargin import metrics" + doc["Example"]
        metric.__doc__ = _shared.joined(doc)


def _row_metric(values: Callable[..., Tensor]) -> _RowMetric:
    """Make a public function from ``values(batch, ...)``, one number per row, with the shared parts of its docstring."""
    _, *own = inspect.signature(values).parameters.values()

    @as_one_call
    @torch.no_grad()
    def metric(input: Tensor, target: Tensor, *given: Any, ignore_index: int = -100, reduction: Reduction = "mean", **named: Any) -> Tensor:
        _checks.check_word("reduction", reduction, REDUCTIONS)
        batch = _Batch(input, target, ignore_index)
        found = values(batch, *given, **named)
        found = found.to(batch.computed.rho.dtype) if reduction == "none" else _wide(found)
        return reduce_rows(found, batch.index.to(found.device), None, reduction)

    _complete(metric, values, own, ["ignore_index", "reduction"])
    return metric


@_row_metric
def margin(batch: _Batch, /) -> Tensor:
    r"""The classification margin: the lead of the target's logit over the largest other.

    .. math:: f_y - \max_{c \neq y} f_c = l + \hat\rho

    Returns:
        Nats; negative for a misclassified row, inf without another class.

    Example:
        >>> metrics.margin(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]), reduction="none")
        tensor([ 1.0000, -0.5000])

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, Sec. 2.1.
    """
    return _MEANS["margin"](batch.stats)


@_row_metric
def rho_hat(batch: _Batch, /) -> Tensor:
    r"""The margin hidden in the softmax loss; the paper's Fig. 3 shows it over training.

    .. math:: \hat\rho = \mathrm{LSE}(\{f_c\}_{c \neq y}) - \max_{c \neq y} f_c \; (7)

    Returns:
        Nats, between 0 and log(C - 1) (eq. 4).

    Example:
        >>> metrics.rho_hat(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.4100, dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eq. (7) and Fig. 3.
    """
    return _MEANS["rho_hat"](batch.stats)


@_row_metric
def divergence(batch: _Batch, /, *, kind: Divergence = "symmetric") -> Tensor:
    r"""The distance of the non-target logits from uniform: the paper's regulariser.

    .. math:: \tilde D = \tfrac12 \{D(q \| u) + D(u \| q)\} \; (8), \quad D(q \| u), \; D(u \| q) \; (10)

    Args:
        kind: ``"symmetric"`` for (8), ``"kl_qu"`` for D(q||u), ``"kl_uq"`` for D(u||q).

    Returns:
        Nats, at least 0 up to rounding.

    Example:
        >>> metrics.divergence(torch.tensor([[5.0, 1.0, 1.0], [5.0, 3.0, 1.0]]), torch.tensor([0, 0]))
        tensor(0.1904, dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eqs. (8) and (10).
    """
    return divergence_of_stats(batch.stats, kind)


@_row_metric
def log_odds(batch: _Batch, /) -> Tensor:
    r"""The target's log-odds.

    .. math:: l = f_y - \mathrm{LSE}(\{f_c\}_{c \neq y}) = \log \frac{p_y}{1 - p_y}

    Returns:
        Nats; inf without another class.

    Example:
        >>> metrics.log_odds(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 0]))
        tensor(0., dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eq. (3): the loss is softplus(-l).
    """
    return _MEANS["log_odds"](batch.stats)


@_row_metric
def nontarget_entropy(batch: _Batch, /) -> Tensor:
    r"""The entropy of the softmax over the non-target classes.

    .. math:: H(q) = -\sum_{c \neq y} q_c \log q_c = \log K - D(q \| u)

    Returns:
        Nats, between 0 and log(C - 1).

    Example:
        >>> metrics.nontarget_entropy(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.5292, dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eqs. (9) and (10).
    """
    return _MEANS["nontarget_entropy"](batch.stats)


@_row_metric
def nll(batch: _Batch, /) -> Tensor:
    r"""The negative log-likelihood, which is the softmax loss.

    .. math:: -\log p_y = \mathrm{softplus}(-l) \; (3)

    Returns:
        Nats; inf if the target's logit is -inf.

    Example:
        >>> metrics.nll(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.9035, dtype=torch.float64)

    Source: Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, eqs. (2) and (3).
    """
    return _MEANS["nll"](batch.stats)


@_row_metric
def accuracy(batch: _Batch, /) -> Tensor:
    r"""The share of rows whose prediction is the target.

    .. math:: [\arg\max_c f_c = y]

    Returns:
        A share in [0, 1]; 1.0 or 0.0 per row.

    Example:
        >>> metrics.accuracy(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.5000, dtype=torch.float64)

    Source: the errors of Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, Tables 1 to 4, are 100 (1 - accuracy).
    """
    return batch.right


@_row_metric
def topk_error(batch: _Batch, /, k: int = 5) -> Tensor:
    r"""The share of rows whose target is not among the k largest logits.

    .. math:: [\#\{c : f_c > f_y\} \geq k]

    Of equal logits the first counts as larger, so k = 1 gives 1 - accuracy. A row with NaN, +inf or a masked target is wrong.

    Args:
        k: the number of largest logits, at least 1; from C on, only rows that are always wrong count as wrong.

    Returns:
        A share in [0, 1]; 1.0 or 0.0 per row.

    Example:
        >>> metrics.topk_error(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]), k=2)
        tensor(0.5000, dtype=torch.float64)

    Source: the top-5 errors of Kobayashi, *Large Margin In Softmax Cross-Entropy Loss*, BMVC 2019, Table 4, are in percent.
    """
    _checks.check_at_least_1("k", k)
    return batch.outside_top(k)


# adaptive_ece sorts log-odds of confidences into cells of 1/256 nat from -16 to 48, because sums over cells can be merged
_LOWEST_LOG_ODDS, _CELLS_PER_NAT, _NUM_CELLS = -16, 256, 64 * 256


def _calibration_sums(batch: _Batch, num_bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 sums over valid rows: confidence minus correctness in each bin and each cell, and the rows of each cell."""
    log_odds = batch.log_odds_of_prediction().flatten()
    valid = (batch.kept & ~batch.invalid).flatten().to(log_odds.device)
    log_odds = torch.where(valid, log_odds, 0.0)
    confidence = log_odds.sigmoid()
    gap = torch.where(valid, confidence - _wide(batch.right).flatten(), 0.0)
    # bins are closed on the right; the rounding of a confidence on an edge, such as 1/3, must not decide its bin
    bins = (confidence * num_bins - 1e-6).ceil().long().clamp(1, num_bins) - 1
    cells = ((log_odds.clamp(-1e4, 1e4) - _LOWEST_LOG_ODDS) * _CELLS_PER_NAT + 1e-3).floor().long().clamp(0, _NUM_CELLS - 1)
    of_bins = gap.new_zeros(num_bins).index_add_(0, bins, gap)
    of_cells = gap.new_zeros(_NUM_CELLS).index_add_(0, cells, gap)
    return of_bins, of_cells, gap.new_zeros(_NUM_CELLS).index_add_(0, cells, valid.double())


def _equal_width(of_bins: Tensor, num_rows: Tensor) -> Tensor:
    return of_bins.abs().sum() / num_rows


def _equal_mass(of_cells: Tensor, rows_of_cells: Tensor, num_bins: int) -> Tensor:
    """Cut the rows into equal shares; a cell on a cut is divided in proportion."""
    sum_rows, sum_gaps = rows_of_cells.cumsum(0), of_cells.cumsum(0)
    num_rows = sum_rows[-1]
    cuts = torch.arange(1, num_bins + 1, dtype=torch.float64, device=sum_rows.device) * num_rows / num_bins
    cell = torch.searchsorted(sum_rows, cuts).clamp(max=_NUM_CELLS - 1)
    beyond = (sum_rows[cell] - cuts) / rows_of_cells[cell]  # the share of the cell above the cut
    gaps_below = sum_gaps[cell] - beyond * of_cells[cell]
    return gaps_below.diff(prepend=gaps_below.new_zeros(1)).abs().sum() / num_rows


def _calibration(error: Callable[[_Batch, int], Tensor]) -> Callable[..., Tensor]:
    """Make a public function of the calibration error of rows, NaN where a row that counts has no statistics."""

    @as_one_call
    @torch.no_grad()
    def metric(input: Tensor, target: Tensor, *, num_bins: int = 15, ignore_index: int = -100) -> Tensor:
        _checks.check_at_least_1("num_bins", num_bins)
        batch = _Batch(input, target, ignore_index)
        found = error(batch, num_bins)
        poisoned = (batch.invalid & batch.kept).any()
        return found.masked_fill(poisoned.to(found.device), torch.nan)

    num_bins = inspect.Parameter("num_bins", inspect.Parameter.KEYWORD_ONLY, default=15, annotation=int)
    _complete(metric, error, [num_bins], ["ignore_index"])
    return metric


@_calibration
def ece(batch: _Batch, num_bins: int) -> Tensor:
    r"""Expected calibration error: the mean gap between confidence and accuracy, over bins of equal width.

    .. math:: \sum_b \tfrac{|B_b|}{N} \, |\mathrm{conf}(B_b) - \mathrm{acc}(B_b)|, \quad B_b = \{n : (b-1)/B < p_n \leq b/B\}

    A confidence counts as on an edge if their distance is below 1e-6 of the width of a bin.

    Args:
        num_bins: how many bins between 0 and 1.

    Returns:
        A float64 scalar in [0, 1]; NaN if no row counts, or one holds NaN or +inf.

    Example:
        >>> metrics.ece(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]))
        tensor(0.3391, dtype=torch.float64)

    Source: Guo, Pleiss, Sun and Weinberger, *On Calibration of Modern Neural Networks*, ICML 2017, eq. (3).
    """
    of_bins, _, rows_of_cells = _calibration_sums(batch, num_bins)
    return _equal_width(of_bins, rows_of_cells.sum())


@_calibration
def adaptive_ece(batch: _Batch, num_bins: int) -> Tensor:
    r"""Expected calibration error over bins of equal mass: the rows sorted by confidence and cut into equal parts.

    .. math:: \tfrac1B \sum_b |\mathrm{conf}(B_b) - \mathrm{acc}(B_b)|, \quad |B_b| = N / B

    Rows are sorted by the log-odds of their confidence, to 1/256 nat between -16 and 48. Bins share tied rows in proportion, so the order
    of rows has no effect, and sums can be merged. A full sort differs by at most the share of rows tied at a cut, summed over the cuts.

    Args:
        num_bins: how many bins of N / num_bins rows each; a row on a cut is shared.

    Returns:
        A float64 scalar in [0, 1]; NaN if no row counts, or one holds NaN or +inf.

    Example:
        >>> metrics.adaptive_ece(torch.tensor([[2.0, 1.0, -1.0], [0.0, 0.5, 0.5]]), torch.tensor([0, 0]), num_bins=2)
        tensor(0.3391, dtype=torch.float64)

    Source: Nguyen and O'Connor, *Posterior calibration and exploratory analysis for natural language processing models*, EMNLP 2015.
    """
    _, of_cells, rows_of_cells = _calibration_sums(batch, 1)
    return _equal_mass(of_cells, rows_of_cells, num_bins)


@as_one_call
@torch.no_grad()
def super_symmetry(weight: Tensor) -> Tensor:
    r"""The distance of a classifier from the super-symmetric form, to which the paper's regulariser pushes it.

    The form is :math:`w_c^\top w_c = v, \; w_c^\top w_{c'} = -\tfrac{v}{C-1}`. With the Gram matrix G of the centred rows
    :math:`w_c - \bar w` (a vector common to all rows does not affect the softmax) and the form's :math:`M = v (I - \tfrac1C 1 1^\top)`:

    .. math:: \min_v \|G - M\|_F / \|G\|_F, \quad v = \mathrm{tr} \, G / (C - 1)

    The distance is the spread of the C - 1 eigenvalues of G: 0 for the form, sqrt(1 - 1 / (C - 1)) for rows on a line. The form needs
    D >= C - 1 features; with fewer the distance is at least sqrt(1 - D / (C - 1)). Scale, rotation and a common shift of the rows have no
    effect. The distance is the sine of the angle between G and the form: :math:`\sqrt{p (2 - p)}` for :func:`.super_symmetry_penalty` p.

    Args:
        weight: the weight of the classifier, as in an ``nn.Linear``, shape ``(C, D)`` with C >= 2, floating.

    Returns:
        A float64 scalar in [0, 1); NaN if all rows are equal.

    Raises:
        TypeError, ValueError: ``weight`` is not such a tensor.

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
    centred = centred / centred.abs().amax()  # keeps fourth powers from underflow and overflow
    if num_features < num_classes:  # the same eigenvalues, except zeros
        gram = centred.T @ centred
        ideal, missing = torch.eye(num_features, dtype=gram.dtype, device=gram.device), num_classes - 1 - num_features
    else:
        gram = centred @ centred.T
        ideal, missing = torch.eye(num_classes, dtype=gram.dtype, device=gram.device) - 1 / num_classes, 0
    v = gram.trace() / (num_classes - 1)
    distance: Tensor = ((gram - v * ideal).square().sum() + missing * v.square()).sqrt()
    size: Tensor = torch.linalg.matrix_norm(gram)
    return distance / size


def _sums(input: Tensor, target: Tensor, ignore_index: int, num_bins: int, top_k: int) -> Tensor:
    """All sums of a batch: rows, invalid rows, rows right, rows outside the top k, the figures of _MEANS, and the calibration sums."""
    batch = _Batch(input, target, ignore_index)
    kept, valid = batch.kept, batch.kept & ~batch.invalid
    counts = torch.stack([kept, kept & batch.invalid, kept & batch.right, kept & batch.outside_top(top_k)]).flatten(1).sum(1)
    values = torch.stack([value(batch.computed) for value in _MEANS.values()])
    sums = _wide(torch.where(valid, values, 0.0)).flatten(1).sum(1)
    return torch.cat([counts.to(sums), sums, *_calibration_sums(batch, num_bins)])


@torch.inference_mode(False)  # else only inference mode could add to them
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

    The split and order of batches, and the number of objects or ranks, do not change the result, up to rounding. ``accuracy`` and the
    top-k error are over all ``rows``; other figures leave out ``invalid_rows``. An infinite value (of a masked target, or a row of one
    class) makes its mean infinite, or NaN beside an infinite value of the other sign.

    Args:
        num_bins: the bins of ``ece`` and ``adaptive_ece``.
        top_k: the k of :func:`topk_error`.
        ignore_index: rows with this target do not count.
        device: the device of the sums, 260 kB of float64. On the device of the logits an update does not synchronise; for ``reduce``
            with NCCL it must be the rank's GPU. Apple GPUs have no float64.

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
        self._num_bins, self._top_k, self.ignore_index = num_bins, top_k, ignore_index
        self._totals = _zeros(num_bins, device)

    @property
    def num_bins(self) -> int:
        return self._num_bins

    @property
    def top_k(self) -> int:
        return self._top_k

    @torch.no_grad()
    def update(self, input: Tensor, target: Tensor) -> None:
        """Count a batch: logits (N, C) or (N, C, d1, ..., dk) with class indices (N,) or (N, d1, ..., dk)."""
        self._totals += _sums(input, target, self.ignore_index, self.num_bins, self.top_k).to(self._totals.device)

    def compute(self) -> dict[str, float]:
        """The figures by name: counts, shares in [0, 1] and nats; NaN if nothing was counted."""
        return {name: value.item() for name, value in _figures(self._totals.cpu(), self.num_bins, self.top_k).items()}

    def merge(self, other: "MarginMetrics") -> None:
        """Add the sums of ``other``, which must have the same ``num_bins`` and ``top_k``."""
        if not isinstance(other, MarginMetrics):
            raise TypeError(f"other must be a MarginMetrics, got {_checks.describe(other)}")
        for name in ("num_bins", "top_k"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"other must have {name}={getattr(self, name)} to be merged, got {name}={getattr(other, name)}")
        self._totals += other._totals.to(self._totals.device)

    def reset(self) -> None:
        """Set all sums to 0."""
        self._totals.zero_()

    def reduce(self, group: dist.ProcessGroup | None = None) -> "MarginMetrics":
        """A new object with the sums of all ranks of ``group``, by one all-reduce, which all ranks must call.

        ``None`` is the default group, or this process alone if ``torch.distributed`` is not initialised.
        """
        whole = MarginMetrics(num_bins=self.num_bins, top_k=self.top_k, ignore_index=self.ignore_index, device=self._totals.device)
        whole.merge(self)
        if dist.is_available() and dist.is_initialized():
            ranks = dist.group.WORLD if group is None else group
            assert ranks is not None
            collectives.check_group(ranks)
            collectives.all_reduce(whole._totals, ranks)
        return whole


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    applied = fn(tensor)
    return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)


@functools.cache
def _torchmetric(base: Any, num_bins: int, top_k: int, ignore_index: int) -> Any:
    """One class for each setting, because torchmetrics merges objects of one class only."""

    class TorchMetric(base):  # type: ignore[misc]
        is_differentiable = False
        full_state_update = False
        sums: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.add_state("sums", default=_zeros(num_bins), dist_reduce_fx="sum")

        def update(self, preds: Tensor, target: Tensor) -> None:
            with torch.no_grad():
                # not in place: reset() in inference mode leaves a tensor that only inference mode may write
                self.sums = self.sums + _sums(preds, target, ignore_index, num_bins, top_k).to(self.sums.device)

        def compute(self) -> dict[str, Tensor]:
            return _figures(self.sums, num_bins, top_k)

        def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> Any:
            # torchmetrics handles half() and the like, but to(dtype) of a module around the metric would round the sums
            return super()._apply(lambda tensor: _moved(tensor, fn), exclude_state)

        def _load_from_state_dict(self, *arguments: Any) -> None:
            super()._load_from_state_dict(*arguments)
            if isinstance(self.sums, Tensor):  # the tensor of the checkpoint may have another dtype
                self.sums = self.sums.double()

        def __reduce__(self) -> tuple[Any, ...]:  # pickle cannot find a class inside a function
            return functools.partial(as_torchmetric, num_bins=num_bins, top_k=top_k, ignore_index=ignore_index), (), self.__getstate__()

    return TorchMetric


def as_torchmetric(*, num_bins: int = 15, top_k: int = 5, ignore_index: int = -100) -> Any:
    r"""A ``torchmetrics.Metric`` with the figures of :class:`MarginMetrics`; needs ``torchmetrics``.

    Args:
        num_bins, top_k, ignore_index: as in :class:`MarginMetrics`.

    Returns:
        The metric; ``compute`` gives a dict of float64 scalars on its device. You can copy it, pickle it and put it into a collection. A
        cast of the metric, or of a module around it, can move the sums to another device but leaves them float64.

    Raises:
        ImportError: ``torchmetrics`` is not installed.
        TypeError, ValueError: a count is not an integer of at least 1.

    Example:
        >>> from largemargin import metrics
        >>> metric = metrics.as_torchmetric()  # doctest: +SKIP
        >>> metric.update(logits, target)  # doctest: +SKIP

    Source: the interface of torchmetrics, https://lightning.ai/docs/torchmetrics.
    """
    try:
        from torchmetrics import Metric  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        if error.name != "torchmetrics":  # it is installed, but lacks another package
            raise
        raise ImportError("as_torchmetric needs torchmetrics; install it with: pip install torchmetrics") from error
    MarginMetrics(num_bins=num_bins, top_k=top_k, ignore_index=ignore_index)  # checks them
    return _torchmetric(Metric, num_bins, top_k, ignore_index)()
