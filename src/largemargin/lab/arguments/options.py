"""What the commands share: parsers, types of options, and the fields of a dataclass as options."""

import argparse
import dataclasses
import functools
import json
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import restricted_number_type

from ..data import SETS, suited_to
from ..errors import LabError
from ..options import KINDS, POSITIVE, Kind, Option, options_of
from ..run.recipe import Recipe

ASKED_FOR = {kind.name: kind.words for kind in KINDS} | {  # by what the parser's messages call a type
    "<class 'bool'>": "true or false",
    "<class 'int'>": "a whole number",
    "<class 'tuple'>": "a list, [2, 4] say",
}
PARSER_SAYS = (
    r"Parser key \"(?P<key>[^\"]+)\"(?: element \d+)?: (?:Not of type (?P<kind>\w+): "
    r"(?:.*: '(?P<text>.*)'|(?P<number>\S+) does not conform to restriction .*)|Expected a (?P<other>.*?)\. Got value: (?P<value>.*))"
)


def reworded(message: str) -> str:
    """What the parser says of a value, with the option as it is typed, what came and what is to be given."""
    if required := re.fullmatch(r"the following arguments are required: \w+\.(\w+)", message):
        return f"{required[1].upper()} is missing; --help after the command says what it may be"
    found = re.fullmatch(PARSER_SAYS, message, re.DOTALL)
    if found is None:
        return message
    key, choices = found["key"], re.findall(r"'(\w+)'", found["other"]) if (found["other"] or "").startswith("typing.Literal") else []
    kind = f"one of {', '.join(choices)}" if choices else ASKED_FOR.get(found["kind"] or found["other"])
    got = next(text for text in (found["text"], found["number"], found["value"]) if text is not None)
    option = key if key.startswith("recipe.") else key.replace("_", "-")
    return f"--{option} must be {kind}, got {got}" if kind else message


def new_parser(description: str, **settings: Any) -> ArgumentParser:
    return ArgumentParser(description=description, formatter_class=DefaultHelpFormatter, exit_on_error=False, **settings)


def path_of(text: str) -> Path:
    """A path as a shell would read it."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # there is no such user
        raise LabError(f"{text}: {error}") from error


# where what suits the data takes the place of the default
BY_DATA = tuple(dict.fromkeys(name for data in (*SETS, "a folder") for name in suited_to(data)))


@functools.cache
def number_type(kind: Kind) -> Any:
    return restricted_number_type(kind.name, kind.of, list(kind.bounds))


def type_of(option: Option, annotation: Any) -> Any:
    """What the parser checks the value of an option by."""
    if isinstance(option.type, Kind):
        return number_type(option.type)
    if isinstance(option.type, tuple):
        return typing.Literal[option.type]
    return annotation if option.type is None else option.type


def add_fields(
    parser: ArgumentParser, cls: Any, prefix: str = "", leave_out: Sequence[str] = (), everything: bool = True, unset: bool = True
) -> None:
    """The fields of a dataclass as options. ``unset``: None stands for what the command chooses, else their defaults.

    Without ``everything``, ``--help`` shows what most people set.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        option, default = options_of(cls).get(field.name), typing.cast("Any", field.default)
        if option is None or option.computed or field.name in leave_out:
            continue
        text = (help_of(field.name, option, default) if unset else option.help).replace("%", "%%")
        settings: dict[str, Any] = {"help": text if everything or option.usual else argparse.SUPPRESS, "metavar": option.metavar}
        settings["default"] = None if unset else list(default) if option.many else default
        if option.many and isinstance(option.type, tuple):
            settings |= {"nargs": "+", "choices": list(option.type)}
        else:
            settings |= {"type": type_of(option, hints[field.name])} | ({"nargs": "+"} if option.many else {})
        if hints[field.name] is bool and not unset:
            settings = {"action": "store_true", "help": settings["help"]}
        name = f"--{prefix}{field.name}" if prefix else f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, **settings)


def help_of(name: str, option: Option, default: Any) -> str:
    """What ``--help`` says of a field of a recipe, with its default; where another is usual for some data, that too."""
    if name in BY_DATA:
        plain = str(default).lower() if isinstance(default, bool) else default or "none"
        return f"{option.help}; default: what suits the data, else {plain}"
    return option.help if default in (dataclasses.MISSING, None, "") else f"{option.help}; default: {default}"


DEVICE_HELP = "cpu, cuda, cuda:1, mps, ...; default: that of the runs in DIR, else cuda where torch sees a GPU, else cpu"


def add_budget(parser: ArgumentParser, everything: bool) -> None:
    """What a command with many runs may take."""
    parser.add_argument(
        "--minutes",
        type=number_type(POSITIVE),
        default=None,
        metavar="M",
        help="start only runs that can end within M minutes, all losses of a seed or none; repeat for the rest",
    )
    add_eager(parser, everything)


def add_eager(parser: ArgumentParser, everything: bool) -> None:
    text = "on a GPU, do not replay training steps as CUDA graphs: slower, for debugging"
    parser.add_argument("--eager", action="store_true", help=text if everything else argparse.SUPPRESS)


def add_quiet(parser: ArgumentParser, levels: bool = False) -> None:
    """What every command takes; ``--help-all`` where ``--help`` does not show all."""
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    if levels:
        parser.add_argument("--help-all", action="store_true", help="show every option, and exit")


def add_json(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("--json", action="store_true", help=f"print {what} as one JSON document, and all else to standard error")


def given_fields(options: Any) -> dict[str, Any]:
    """The fields that were given, as plain numbers and strings."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    return {name: plain(value) for name, value in vars(options).items() if name in names and value is not None}


def plain(value: Any) -> Any:
    """The value through JSON: the parser's own restricted types cannot be sent to another process."""
    return json.loads(json.dumps(value))
