"""``largemargin report``: the report of runs that are there."""

from typing import Any

from rich.console import Console

from ..arguments.options import path_of
from ..comparison.folder import reopen
from ..paper import page, plan
from .comparing import as_json, print_and_write
from .screen import print_json


def run(options: Any, console: Console) -> None:
    out = path_of(options.out)
    if (out / plan.MARKER).is_file():
        lines = page.write(out, *plan.reopen(out), console)
        document = {"out": str(out), "lines": [page.as_json(line) for line in lines]}
    else:
        comparison = reopen(out)
        document = as_json(comparison, print_and_write(comparison, out, console), out)
    if options.json:
        print_json(document)
