"""What the commands share: parsers, types of options, and every field of a recipe as an option."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import ClosedUnitInterval as Share
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

from ..errors import LabError
from ..run.recipe import AUGMENTATIONS, PRECISIONS, SCHEDULES, Recipe

PositiveShare = restricted_number_type("PositiveShare", float, [(">", 0), ("<=", 1)])
NonNegativeNumber = restricted_number_type("NonNegativeNumber", float, [(">=", 0), ("<", math.inf)])
PositiveNumber = restricted_number_type("PositiveNumber", float, [(">", 0), ("<", math.inf)])
FiniteNumber = restricted_number_type("FiniteNumber", float, [(">", -math.inf), ("<", math.inf)])
ShareBelow1 = restricted_number_type("ShareBelow1", float, [(">=", 0), ("<", 1)])
Multiplier = restricted_number_type("Multiplier", int, [(">=", 1), ("<=", 4)])
Pixels = restricted_number_type("Pixels", int, [(">=", 8), ("<=", 1024)])


# what the parser's messages call a type, and what is to be given
KINDS = {
    "PositiveInt": "a whole number from 1 on",
    "NonNegativeInt": "a whole number from 0 on",
    "Multiplier": "a whole number from 1 to 4",
    "Pixels": "a whole number of pixels from 8 to 1024",
    "PositiveShare": "a share above 0 and up to 1",
    "ClosedUnitInterval": "a share from 0 to 1",
    "OpenUnitInterval": "a share above 0 and below 1",
    "ShareBelow1": "a share from 0 to below 1",
    "NonNegativeNumber": "a finite number from 0 on",
    "PositiveNumber": "a finite number above 0",
    "FiniteNumber": "a finite number",
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
    kind = f"one of {', '.join(choices)}" if choices else KINDS.get(found["kind"] or found["other"])
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


# what a field of a recipe may be; a field that is not here is taken as its type says
CHECKED: dict[str, Any] = {
    "image_size": Pixels,
    "train_fraction": PositiveShare,
    "label_noise": Share,
    "validation_fraction": ShareBelow1,
    "augmentation": typing.Literal[AUGMENTATIONS],
    "crop_padding": NonNegativeInt,
    "crop_fill": typing.Literal["mean", "reflect"],
    "width": PositiveNumber,
    "dropout": ShareBelow1,
    "epochs": PositiveInt,
    "batch_size": PositiveInt,
    "learning_rate": PositiveNumber,
    "schedule": typing.Literal[SCHEDULES],
    "final_factor": PositiveShare,
    "step_factor": PositiveShare,
    "momentum": Share,
    "weight_decay": NonNegativeNumber,
    "clip_norm": PositiveNumber,
    "evaluate_every": PositiveInt,
    "lam": NonNegativeNumber,
    "hard_bias": FiniteNumber,
    "label_smoothing": Share,
    "divergence": typing.Literal["symmetric", "kl_qu", "kl_uq"],
    "margin": FiniteNumber,
    "angular_multiplier": Multiplier,
    "alpha": NonNegativeNumber,
    "alpha_squared": NonNegativeNumber,
    "likelihood": NonNegativeNumber,
    "scale": PositiveNumber,
    "center": NonNegativeNumber,
    "symmetry": NonNegativeNumber,
    "threads": PositiveInt,
    "precision": typing.Literal[PRECISIONS],
}
BY_DATA = ("image_size", "epochs", "batch_size", "schedule", "milestones", "augmentation", "crop_padding", "flip")  # what suited_to() sets
COMPUTED = ("data_digest", "weights_digest", "processes")  # what a run finds out itself


def add_recipe_fields(parser: ArgumentParser, prefix: str = "", leave_out: Sequence[str] = ()) -> None:
    """Every field of a recipe as an option; None stands for what the command chooses."""
    hints = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name not in (*leave_out, *COMPUTED):
            kind = CHECKED.get(field.name, hints[field.name])
            name = f"--{prefix}{field.name}" if prefix else f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, type=kind, default=None, help=help_of(field), metavar="VALUE")


def plain_default(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value or "none"


def help_of(field: "dataclasses.Field[Any]") -> str:
    """What ``--help`` says of a field of a recipe, with its default; where another is usual for some data, that too."""
    text = str(field.metadata["help"]).replace("%", "%%")
    if field.name in BY_DATA:
        return f"{text}; default: what suits the data, else {plain_default(field.default)}"
    return text if field.default in (dataclasses.MISSING, None, "") else f"{text}; default: {field.default}"


DEVICE_HELP = "cpu, cuda, cuda:1, mps, ...; default: that of the runs in DIR, else cuda where torch sees a GPU, else cpu"


def add_budget(parser: ArgumentParser) -> None:
    """What a command with many runs may take."""
    parser.add_argument(
        "--minutes",
        type=PositiveNumber,
        default=None,
        metavar="M",
        help="start only runs that can finish within M minutes, all losses of a seed or none; repeat the command for the rest",
    )
    parser.add_argument("--eager", action="store_true", help="on a GPU, do not replay training steps as CUDA graphs: slower, for debugging")


def given_fields(options: Any) -> dict[str, Any]:
    """The fields that were given, as plain numbers and strings."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    return {name: plain(value) for name, value in vars(options).items() if name in names and value is not None}


def plain(value: Any) -> Any:
    """The value through JSON: the parser's own restricted types cannot be sent to another process."""
    return json.loads(json.dumps(value))
