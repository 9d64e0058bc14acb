"""``largemargin report``: the report of runs that are there."""

from typing import Any

from rich.console import Console

from ..arguments.options import path_of
from ..comparison.folder import reopen
from ..paper import page, plan
from .compare import print_and_write


def run(options: Any, console: Console) -> None:
    out = path_of(options.out)
    if (out / plan.MARKER).is_file():
        page.write(out, *plan.reopen(out), console)
    else:
        print_and_write(reopen(out), out, console)
