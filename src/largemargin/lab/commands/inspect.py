"""``largemargin inspect``: what a file of logits says."""

from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from rich.console import Console

from ..stopping import interrupts_end_at_once
from .options import new_parser, path_of

HELP = "say what a file of logits says about a classifier"


def parser() -> ArgumentParser:
    inspect = new_parser("Say what a file of logits says about a classifier: overall, class by class, and its worst rows.")
    inspect.add_argument(
        "file",
        type=str,
        metavar="FILE",
        help=".npz with arrays logits (N, C) and labels (N,), or .csv with a column label and a column of logits for each class",
    )
    inspect.add_argument(
        "--probabilities", action="store_true", help="the numbers are probabilities, not logits: their logarithms are taken"
    )
    inspect.add_argument("--top", type=PositiveInt, default=10, metavar="N", help="how many rows to list")
    inspect.add_argument("--json", action="store_true", help="print JSON: shares in [0, 1] and nats")
    return inspect


def run(options: Any, console: Console) -> None:
    with interrupts_end_at_once():
        from ..inspect import inspect

    inspect(path_of(options.file), int(options.top), options.json, console, options.probabilities)
