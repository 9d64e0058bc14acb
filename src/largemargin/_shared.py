"""Arguments of several public functions and modules: described once, shown in every signature and docstring."""

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

Documented = TypeVar("Documented", bound=Callable[..., Any])

_SECTION = re.compile(r"^ {4}(Args|Returns|Raises|Example|Source):", re.MULTILINE)
_ENTRY = re.compile(r"^ {8}(?=[a-z_]+(?:, [a-z_]+)*:)", re.MULTILINE)  # an argument, with the lines that follow


def takes(function: Callable[..., Any], names: Iterable[str]) -> Callable[[Documented], Documented]:
    """Show the arguments ``names`` of ``function`` instead of ``**options``, or whatever its name is, in signature and docstring.

    An entry or argument that the function has itself takes precedence.
    """
    listed = {name: parameter for name, parameter in inspect.signature(function).parameters.items() if name in set(names)}

    def show(documented: Documented) -> Documented:
        signature = inspect.signature(documented)
        own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
        shared = {name: parameter for name, parameter in listed.items() if name not in signature.parameters}
        documented.__signature__ = signature.replace(parameters=[*own, *shared.values()])  # type: ignore[attr-defined]
        if documented.__doc__ and function.__doc__:
            documented.__doc__ = completed(documented.__doc__, function.__doc__, inspect.signature(documented).parameters)
        return documented

    return show


def sections(docstring: str) -> dict[str, str]:
    """Split the source of a docstring into its sections, by heading; the text before the first section has the heading ``""``."""
    head, *rest = _SECTION.split(docstring)
    return {"": head} | dict(zip(rest[::2], rest[1::2], strict=True))


def completed(docstring: str, prototype: str, parameters: Iterable[str]) -> str:
    """``docstring`` with an entry for each of ``parameters``, in their order, and with all sections; ``prototype`` has what it lacks."""
    found, texts = sections(prototype) | sections(docstring), arguments(prototype) | arguments(docstring)
    entries = dict.fromkeys(texts[name] for name in parameters if name in texts)  # an entry of several names counts once
    found["Args"] = "\n" + "".join(entries)
    return joined(found)


def joined(parts: dict[str, str]) -> str:
    """The docstring of these sections, in the order that every docstring of the library has."""
    order = ("Args", "Returns", "Raises", "Example", "Source")
    return "\n\n".join([parts[""].rstrip(), *(f"    {name}:{parts[name].rstrip()}" for name in order if name in parts)]) + "\n    "


def arguments(docstring: str) -> dict[str, str]:
    section = sections(docstring).get("Args", "").removeprefix("\n").rstrip() + "\n"
    starts = [match.start() for match in _ENTRY.finditer(section)]
    entries = [section[start:stop] for start, stop in zip(starts, [*starts[1:], len(section)], strict=False)]
    return {name: entry for entry in entries for name in entry.strip().partition(":")[0].split(", ")}
