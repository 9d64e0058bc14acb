"""``largemargin inspect``: what a file of logits says."""

from typing import Any

from rich.console import Console

from ..arguments.options import path_of
from ..logits.summary import inspect


def run(options: Any, console: Console) -> None:
    inspect(path_of(options.file), int(options.top), options.json, console, options.probabilities, options.classes == "all")
