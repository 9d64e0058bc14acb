"""The parts that every loss of class indices shares: checks, weights, ignored rows, DTensors, and a module.

CONTRIBUTING.md shows how to write such a loss from beginning to end.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypedDict, cast

from torch import Tensor, nn

from .. import _checks
from .._reduce import REDUCTIONS, Reduction, reduce_rows
from .._shared import Documented, completed, takes
from ..functional import large_margin_cross_entropy
from ..rows import collectives, dense, dtensors
from ..rowstats import RowStats
from ..tracing import as_one_call, refuse_script


class RowOptions(TypedDict, total=False):
    """The options that every loss of class indices has; :func:`.large_margin_cross_entropy` describes them."""

    ignore_index: int
    reduction: Reduction


def _prototype(input: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
    """The arguments of every loss of class indices.

    Args:
        input, target, weight: as in :func:`large_margin_cross_entropy`; no probabilities.

    Returns:
        A scalar, or with ``reduction="none"`` the loss of each row.

    Raises:
        TypeError, ValueError, RuntimeError, IndexError: as :func:`large_margin_cross_entropy`; RuntimeError for probabilities.

    """


def row_loss(function: Documented) -> Documented:
    """Make a public loss from ``function(input, target, weight=None, *, ..., **options: Unpack[RowOptions])``.

    Its docstring needs only its own arguments, an example and the source.
    """
    if function.__doc__ and _prototype.__doc__:
        function.__doc__ = completed(function.__doc__, _prototype.__doc__, inspect.signature(function).parameters)
    shown = takes(large_margin_cross_entropy, RowOptions.__annotations__)(function)
    known = inspect.signature(shown).parameters

    @functools.wraps(shown)
    def call(*inputs: Any, **options: Any) -> Tensor:
        check_known(shown.__name__, options, known)
        return shown(*inputs, **options)  # type: ignore[no-any-return]

    return as_one_call(cast(Documented, call))


def check_known(function: str, options: Iterable[str], known: Collection[str]) -> None:
    """Raise TypeError, in the name of ``function``, for an option that is not known."""
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")


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
    of_dtensor: tuple[dtensors.LocalRows, dtensors.Whole] | None

    @classmethod
    def of(
        cls, input: Tensor, target: Tensor, weight: Tensor | None, *, ignore_index: int = -100, reduction: Reduction = "mean"
    ) -> "LossRows":
        check_rows(input, target, weight, ignore_index=ignore_index, reduction=reduction)
        if not _checks.is_dtensor(input):
            return cls(dense.Rows.of(input, target, ignore_index), weight, ignore_index, reduction, None)
        local, rows, whole_of = dtensors.rows_of(input, target, weight, ignore_index)
        return cls(rows, local.weight, ignore_index, reduction, (local, whole_of))

    @property
    def shard(self) -> collectives.Shard | None:
        return None if self.of_dtensor is None else self.of_dtensor[0].shard

    def stats(self) -> RowStats:
        return dense.stats(self.rows, None) if self.of_dtensor is None else dtensors.stats(self.of_dtensor[0], self.rows, None)

    def reduce(self, losses: Tensor) -> Tensor:
        """The weighted and reduced loss, from the loss of each row."""
        index = self.rows.labels.class_index
        if self.of_dtensor is None:
            return reduce_rows(losses, index, self.weight, self.reduction)
        local, whole_of = self.of_dtensor
        part = reduce_rows(losses, index, self.weight, "none" if self.reduction == "none" else "sum")
        return dtensors.reduced(part, local, self.ignore_index, self.reduction, whole_of)


class LossModule(nn.Module):
    """A loss with its options as attributes: ``criterion.lam = 1.0``."""

    weight: Tensor | None
    _names: ClassVar[Collection[str]]  # of the options
    __prepare_scriptable__ = refuse_script

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def __call__(self, input: Tensor, target: Tensor) -> Tensor: ...


class RowLoss(LossModule):
    """A loss of class indices as a module, with the options of its function as attributes.

    It is not an ``nn.CrossEntropyLoss``, because a softmax of its input does not give probabilities.
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
        check_known(type(self).__name__, options, self._names)
        options = self._names | options
        _checks.check_given_first(weight, next(iter(options)))
        for name, value in options.items():
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
