"""``largemargin inspect``: what a file of logits says."""

from typing import Any

from rich.console import Console

from ..arguments.options import path_of
from ..logits.summary import file_of, print_summary, summarise
from .screen import print_json


def run(options: Any, console: Console) -> None:
    summary = summarise(file_of(path_of(options.file)), int(options.top), options.probabilities)
    if options.json:
        print_json(summary)
    else:
        print_summary(summary, console, options.classes == "all")
