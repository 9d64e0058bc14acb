"""The parts that every loss of class indices shares: checks, weights, ignored rows, DTensors, and a module.

CONTRIBUTING.md shows how to write such a loss from beginning to end.
"""

import functools
import inspect
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict, cast, get_args

from torch import Tensor, nn

from .. import _checks
from .._reduce import REDUCTIONS, Reduction, reduce_rows
from .._shared import Documented, takes
from ..functional import large_margin_cross_entropy
from ..loss import divergence
from ..rows import collectives, dense, dtensors
from ..rowstats import RowStats, accumulation_dtype
from ..tracing import as_one_call, refuse_script


class RowOptions(TypedDict, total=False):
    """The options that every loss of class indices has; :func:`.large_margin_cross_entropy` describes them."""

    ignore_index: int
    reduction: Reduction


class RegularizedOptions(RowOptions, total=False):
    """The options of a loss to which ``lam`` adds the paper's regulariser."""

    lam: float


def _prototype(input: Tensor, target: Tensor, weight: Tensor | None = None, *, lam: float = 0.0) -> None:
    """The arguments of every loss of class indices.

    Args:
        input, target, weight: as in :func:`large_margin_cross_entropy`; no probabilities.
        lam: at least 0; adds the paper's regulariser, ``lam`` times the symmetric divergence (8) of the row, as eq. (11) does.

    Returns:
        A scalar, or with ``reduction="none"`` the loss of each row.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`large_margin_cross_entropy`; RuntimeError for probabilities.

    """


def row_loss(function: Documented) -> Documented:
    """Make a public loss from ``function(input, target, weight=None, *, ..., **options: Unpack[RowOptions])``.

    With ``RegularizedOptions`` it has ``lam`` too. Its docstring needs only its own arguments, an example and the source.
    """
    (kind,) = (p.annotation for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD)
    shared = get_args(kind)[0].__annotations__
    shown = takes(large_margin_cross_entropy, shared)(takes(_prototype, shared)(function))
    known = inspect.signature(shown).parameters

    @functools.wraps(shown)
    def call(*inputs: Any, **options: Any) -> Tensor:
        _checks.check_known(shown.__name__, options, known)
        return shown(*inputs, **options)  # type: ignore[no-any-return]

    return as_one_call(cast(Documented, call))


def check_rows(input: Tensor, target: Tensor, weight: Tensor | None, *, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
    """The checks that every loss of class indices needs."""
    _checks.check_word("reduction", reduction, REDUCTIONS)
    _checks.check_indices_of(input, target, ignore_index)
    _checks.check_weight(weight, input)
    if not _checks.is_dtensor(input):
        _checks.check_plain("target", target)
        _checks.check_plain("weight", weight)


class LossRows(NamedTuple):
    """The checked rows of a loss; for a DTensor, the rows and classes that this rank has."""

    rows: dense.Rows
    weight: Tensor | None
    ignore_index: int
    reduction: Reduction
    lam: float
    local: dtensors.LocalRows | None  # of a DTensor

    @classmethod
    def of(
        cls,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        *,
        lam: float = 0.0,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
    ) -> "LossRows":
        _checks.check_number("lam", lam, low=0)
        check_rows(input, target, weight, ignore_index=ignore_index, reduction=reduction)
        if not _checks.is_dtensor(input):
            return cls(dense.Rows.of(input, target, ignore_index), weight, ignore_index, reduction, lam, None)
        local = dtensors.local_rows(input, target, weight)
        return cls(local.rows(ignore_index), local.weight, ignore_index, reduction, lam, local)

    @property
    def shard(self) -> collectives.Shard | None:
        return None if self.local is None else self.local.shard

    @property
    def logits(self) -> Tensor:
        """The logits (..., C) of the classes that are here, in at least float32."""
        return self.rows.logits.to(accumulation_dtype(self.rows.logits.dtype))

    def with_logits(self, logits: Tensor) -> "LossRows":
        return self._replace(rows=self.rows._replace(logits=logits))

    def stats(self) -> RowStats:
        return dense.stats(self.rows, None) if self.local is None else self.local.stats(self.rows, None)

    def reduce(self, losses: Tensor, stats: RowStats | None = None) -> Tensor:
        """The weighted and reduced loss, from the loss of each row. With ``lam`` it needs the statistics for the regulariser."""
        if self.lam > 0 and stats is not None:
            losses = losses + self.lam * divergence(stats)
        index = self.rows.labels.class_index
        if self.local is None:
            return reduce_rows(losses, index, self.weight, self.reduction)
        part = reduce_rows(losses, index, self.weight, "none" if self.reduction == "none" else "sum")
        return self.local.reduced(part, self.ignore_index, self.reduction)


class LossModule(nn.Module):
    """A loss with its options as attributes: ``criterion.lam = 1.0``."""

    weight: Tensor | None
    _names: ClassVar[Collection[str]]  # of the options
    __prepare_scriptable__ = refuse_script

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items() if not isinstance(value, Tensor))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...


class RowLoss(LossModule):
    """A loss of class indices as a module, with the options of its function as attributes.

    An option is a number. One without a default is a tensor with an entry for each class, and becomes a buffer, as ``weight`` does.
    The module is not an ``nn.CrossEntropyLoss``, because a softmax of its input does not give probabilities.
    """

    ignore_index: int
    reduction: Reduction
    _function: ClassVar[Callable[..., Tensor]]
    _names: ClassVar[dict[str, Any]]  # and the defaults

    def __init_subclass__(cls, function: Callable[..., Tensor] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if function is not None:
            cls._function = staticmethod(function)
            cls._names = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
            own = [p for p in inspect.signature(function).parameters.values() if p.name not in ("input", "target")]
            cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]

    def __init__(self, weight: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        _checks.check_known(type(self).__name__, options, self._names)
        options = self._names | options
        _checks.check_is_weight(weight, next(iter(options)))
        for name, value in options.items():
            if self._names[name] is inspect.Parameter.empty:
                if value is inspect.Parameter.empty:
                    raise TypeError(f"{type(self).__name__}() needs {name}, a tensor with an entry for each class; pass {name}=...")
                _checks.check_tensor(name, value)
                self.register_buffer(name, value)
                continue
            if name == "reduction":
                _checks.check_word(name, value, REDUCTIONS)
            elif name == "ignore_index":
                _checks.check_integer(name, value)
            else:
                value = _checks.check_number(name, value)
            setattr(self, name, value)
        self.register_buffer("weight", weight)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of logits ``input`` and class indices ``target``."""
        return self._function(input, target, self.weight, **self._options())
