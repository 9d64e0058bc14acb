r"""Metrics of logits: margins, the margin hidden in the loss, divergences, errors and calibration.

A row with NaN or +inf, or without classes, has no statistics: its value and any mean over it are NaN, and as a prediction it is wrong.
:class:`MarginMetrics` counts such rows as ``invalid_rows`` and leaves them out of its other means. A class whose logit is -inf is not in
the row. Half precision is computed in float32, and sums are float64. The prediction is the first of the largest logits; confidence is its
probability. Metrics are not differentiable. DTensor logits are gathered: each rank needs memory for all of them, and gets plain results.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from . import _checks, _shared
from ._reduce import REDUCTIONS, Reduction, reduce_rows
from .backends.protocol import Predictions
from .loss import Divergence, softplus
from .loss import divergence as divergence_of_stats
from .rows import collectives, dense
from .rows.dtensors import gathered
from .rowstats import RowStats, accumulation_dtype
from .tracing import as_one_call


class _Batch:
    """Rows of logits with class indices, and what several figures need."""

    def __init__(self, input: Tensor, target: Tensor, ignore_index: int) -> None:
        self.input, self.target, self.ignore_index = gathered(input), gathered(target), ignore_index
        _checks.check_indices_of(self.input, self.target, ignore_index)

    @functools.cached_property
    def rows(self) -> dense.Rows:
        return dense.Rows.of(self.input, self.target, self.ignore_index)

    @functools.cached_property
    def stats(self) -> RowStats:
        """The statistics; NaN in every field of a row without statistics."""
        computed = dense.stats(self.rows, None)
        invalid = computed.log_odds.isnan()
        return RowStats(*(field.masked_fill(invalid, torch.nan) for field in computed))

    @functools.cached_property
    def predictions(self) -> Predictions:
        return dense.predictions(self.input, self.target, self.ignore_index)

    @functools.cached_property
    def invalid(self) -> Tensor:
        """Whether a row has no statistics."""
        return self.predictions.stats.log_odds.isnan()


# each figure that is a mean is a sum of these numbers of a row, times factors
_PARTS: dict[str, Callable[[RowStats], Tensor]] = {
    "log_odds": lambda stats: stats.log_odds,
    "neg_entropy": lambda stats: stats.neg_entropy,
    "mean_log_q": lambda stats: stats.mean_log_q,
    "rho": lambda stats: stats.rho,
    "spread": lambda stats: stats.spread,
    "log_count": lambda stats: stats.num_nontargets.clamp(min=1).log(),
    "nll": lambda stats: softplus(-stats.log_odds),
}
_MEANS: dict[str, dict[str, float]] = {
    "margin": {"log_odds": 1.0, "rho": 1.0},
    "rho_hat": {"rho": 1.0},
    "divergence": {"spread": 0.5},  # eq. (8)
    "kl_qu": {"log_count": 1.0, "neg_entropy": 1.0},  # eq. (10)
    "kl_uq": {"log_count": -1.0, "mean_log_q": -1.0},
    "log_odds": {"log_odds": 1.0},
    "nontarget_entropy": {"neg_entropy": -1.0},
    "nll": {"nll": 1.0},
}


def _mean(batch: _Batch, name: str) -> Tensor:
    """The figure of each row."""
    first, *rest = (_PARTS[part](batch.stats) * factor for part, factor in _MEANS[name].items())
    return sum(rest, start=first)


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
        found = found.to(accumulation_dtype(input.dtype)) if reduction == "none" else _wide(found)
        return reduce_rows(found, batch.rows.labels.class_index.to(found.device), None, reduction)

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
    return _mean(batch, "margin")


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
    return _mean(batch, "rho_hat")


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
    return _mean(batch, "log_odds")


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
    return _mean(batch, "nontarget_entropy")


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
    return _mean(batch, "nll")


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
    return (batch.predictions.ahead == 0) & ~batch.invalid


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
    return (batch.predictions.ahead >= k) | batch.invalid


# adaptive_ece sorts log-odds of confidences into cells of 1/256 nat from -16 to 48, because sums over cells can be merged
_LOWEST_LOG_ODDS, _CELLS_PER_NAT, _NUM_CELLS = -16, 256, 64 * 256


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
        return found.masked_fill(batch.invalid.any().to(found.device), torch.nan)

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
    return _of_batch(batch, num_bins)["ece"]


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
    return _of_batch(batch, num_bins)["adaptive_ece"]


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


# what a stream counts of the rows of a batch, beside _PARTS; a row without statistics counts in "rows" alone
_COUNTS = ("right", "behind", "valid", "rows")
_SUMS: dict[str, dict[str, float]] = {
    "rows": {"rows": 1.0},
    "invalid_rows": {"rows": 1.0, "valid": -1.0},
    "right": {"right": 1.0},
    "outside": {"behind": 1.0, "rows": 1.0, "valid": -1.0},
    **_MEANS,
}


class _Places(NamedTuple):
    """Where the sums of a batch and its rows belong in the vector of all sums; the same for every batch."""

    of_invalid: Tensor  # what a row without statistics has in the place of _PARTS, _COUNTS and log-odds
    # a row is added to its bin and to its cell, and counted in its cell; these make the three places from its confidence and log-odds
    scale: Tensor
    shift: Tensor
    first: Tensor
    last: Tensor
    # the sums over rows, times `factor`, are added to the sums at `goal`
    factor: Tensor
    part: Tensor
    goal: Tensor


@functools.cache
@torch.inference_mode(False)
def _places(num_bins: int, device: torch.device) -> _Places:
    parts = [*_PARTS, *_COUNTS]
    terms = [(parts.index(part), factor, goal) for goal, figure in enumerate(_SUMS.values()) for part, factor in figure.items()]
    part, factor, goal = zip(*terms, strict=True)
    bins, cells, counts, end = itertools.accumulate((len(_SUMS), num_bins, _NUM_CELLS, _NUM_CELLS))
    in_cells = 1e-3 - _LOWEST_LOG_ODDS * _CELLS_PER_NAT

    def column(*numbers: float) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=device).unsqueeze(1)

    return _Places(
        of_invalid=column(*(part == "rows" for part in parts), 0.0),
        scale=column(num_bins, _CELLS_PER_NAT, _CELLS_PER_NAT),
        # bins are closed on the right; the rounding of a confidence on an edge, such as 1/3, must not decide its bin
        shift=column(bins - 1e-6, cells + in_cells, counts + in_cells),
        first=column(bins, cells, counts),
        last=column(cells - 1, counts - 1, end - 1),
        factor=torch.tensor(factor, dtype=torch.float64, device=device),
        part=torch.tensor(part, device=device),
        goal=torch.tensor(goal, device=device),
    )


def _added(totals: Tensor, batch: _Batch, num_bins: int, top_k: int) -> Tensor:
    """``totals``, with the rows of a batch added in place."""
    stats, log_odds, ahead = batch.predictions
    dtype = log_odds.dtype
    kept = (ahead >= 0).to(dtype)
    parts = [part(stats) for part in _PARTS.values()]
    parts[-1] = parts[-1] * kept  # the statistics of an ignored row are 0, but not its nll
    # in one dtype, because torch stacks several ten times as slowly
    rows = _wide(torch.stack([*parts, (ahead == 0).to(dtype), (ahead >= top_k).to(dtype), kept, kept, log_odds]))
    rows = rows.reshape(len(rows), -1)
    # a tensor of a subclass, such as a fake one, goes with constants of its own kind, which must not stay for later calls
    places = (_places if type(rows) is Tensor else _places.__wrapped__)(num_bins, rows.device)
    rows = torch.where(rows[0].isnan(), places.of_invalid, rows)
    *_, right, _, valid, _, log_odds = rows.unbind()
    confidence = log_odds.sigmoid()
    gap = (confidence - right) * valid
    at = torch.addcmul(places.shift, torch.stack([confidence, log_odds, log_odds]), places.scale)
    at = at.clamp(places.first, places.last).long().flatten()
    index = torch.cat([places.goal, at])
    values = torch.cat([rows.sum(1)[places.part] * places.factor, gap, gap, valid])
    return totals.index_add_(0, index.to(totals.device), values.to(totals.device))


@torch.inference_mode(False)  # else only inference mode could add to them
def _zeros(num_bins: int, device: torch.device | str | None = None) -> Tensor:
    return torch.zeros(len(_SUMS) + num_bins + 2 * _NUM_CELLS, dtype=torch.float64, device=device)


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


def _of_batch(batch: _Batch, num_bins: int) -> dict[str, Tensor]:
    device = batch.target.device
    totals = _zeros(num_bins, "cpu" if device.type == "mps" else device)
    return _figures(_added(totals, batch, num_bins, 1), num_bins, 1)


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
        >>> figures["rows"], figures["accuracy"], figures["top2_error"], round(figures["margin"], 6)
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
        _added(self._totals, _Batch(input, target, self.ignore_index), self.num_bins, self.top_k)

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
                self.sums = _added(self.sums.clone(), _Batch(preds, target, ignore_index), num_bins, top_k)

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
