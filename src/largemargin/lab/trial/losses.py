"""The losses of a comparison of a training function: words, pairs of a name and a module factory, dictionaries of settings."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import LabError
from ..options import Kind, options_of
from ..run.methods import LOSSES, METHODS, Settings, has_setting

FORMS = (
    'each loss is a word ("large_margin"), a pair of a name and what makes the module (("mine", MyLoss)), or a dictionary '
    '({"loss": "large_margin", "lam": 1.0}, and "name" if you like)'
)


@dataclass(frozen=True)
class Given:
    """One loss of the comparison."""

    name: str  # names its row
    word: str = ""  # of METHODS
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # that were given with the word
    named: bool = False  # whether the user gave the name
    factory: Callable[[], Any] | None = None  # of a loss of the user's own


def given_losses(losses: Iterable[Any]) -> list[Given]:
    """The losses in order; raises LabError for what is none, and for two of one name."""
    if isinstance(losses, str | Mapping) or not isinstance(losses, Iterable):
        raise LabError(f"losses must be a list, got {losses!r}; {FORMS}")
    found = [_given(one) for one in losses]
    if not found:
        raise LabError(f"losses is empty; {FORMS}")
    names = [one.name for one in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise LabError(f'losses: two have the name "{twice}", and each needs its own; rename one')
    return found


def _given(one: Any) -> Given:
    if isinstance(one, str):
        _check_word(one)
        return Given(one, word=one)
    if isinstance(one, Mapping):
        return _of_dictionary(dict(one))
    if isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[0], str) and one[0].strip() and callable(one[1]):
        _check_factory(*one)
        return Given(one[0], named=True, factory=one[1])
    raise LabError(f"losses has {one!r}; {FORMS}")


def _check_factory(name: str, make: Callable[..., Any]) -> None:
    """Refuse a loss in the place of what makes it."""
    if isinstance(make, nn.Module):
        made = type(make).__name__
        raise LabError(
            f'losses: the loss "{name}" is a module, {made}, and each run makes its own: write ("{name}", lambda: {made}(...)), with your '
            "arguments"
        )
    try:
        signature = inspect.signature(make)
    except ValueError:  # of a callable without a signature
        return
    try:
        signature.bind()
    except TypeError as error:
        called = getattr(make, "__name__", type(make).__name__)
        loss = f"{called}(...)" if inspect.isclass(make) else called
        raise LabError(
            f'losses: what makes the loss "{name}" is called without arguments, and {called} takes some ({error}): write ("{name}", '
            f"lambda: {loss})"
        ) from error


def _of_dictionary(given: dict[str, Any]) -> Given:
    word, name = given.pop("loss", None), given.pop("name", None)
    if not isinstance(word, str):
        raise LabError(f'a dictionary of losses needs "loss", a word, got {word!r} beside {given!r}')
    _check_word(word)
    for setting, value in given.items():
        if not has_setting(word, setting):
            having = ", ".join([*LOSSES[word], *(["divergence"] if "lam" in LOSSES[word] else [])]) or "none"
            raise LabError(f"{setting} is not a setting of {word}, which has {having}")
        _check_value(word, setting, value)
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise LabError(f'"name" of the loss {word} must be a text, got {name!r}')
    plain = " ".join([word, *(f"{setting}={value}" for setting, value in given.items())])
    return Given(name or plain, word, given, named=name is not None)


def _check_word(word: str) -> None:
    if word not in METHODS:
        raise LabError(f'losses has "{word}", which is no loss of largemargin; it has {", ".join(METHODS)}. A loss of your own is a pair')


def _check_value(word: str, setting: str, value: Any) -> None:
    kind = options_of(Settings)[setting].type
    if isinstance(kind, Kind):
        number = isinstance(value, int) if kind.of is int else isinstance(value, int | float)
        compared = {">": lambda bound: value > bound, ">=": lambda bound: value >= bound}
        compared |= {"<": lambda bound: value < bound, "<=": lambda bound: value <= bound}
        if isinstance(value, bool) or not number or not all(compared[sign](bound) for sign, bound in kind.bounds):
            raise LabError(f"{setting} of the loss {word} must be {kind.words}, got {value!r}")
    elif value not in kind:
        raise LabError(f"{setting} of the loss {word} must be one of {', '.join(kind)}, got {value!r}")
