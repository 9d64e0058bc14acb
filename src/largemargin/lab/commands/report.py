"""``largemargin report``: the report of runs that are there."""

from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from ..stopping import interrupts_end_at_once
from .options import new_parser, path_of

HELP = "print and write the report of a comparison or a reproduction again"


def parser() -> ArgumentParser:
    report = new_parser(
        "Print the table of a comparison or a reproduction again and write its report anew, from the runs that are finished."
    )
    report.add_argument("out", nargs="?", default="runs/compare", metavar="DIR", help="the folder given as --out")
    return report


def run(options: Any, console: Console) -> None:
    out = path_of(options.out)
    with interrupts_end_at_once():
        from .. import reproduce
        from ..compare import print_and_write, reopen
        from ..paper_report import write

    if (out / reproduce.MARKER).is_file():
        write(out, *reproduce.reopen(out), console)
        return
    print_and_write(reopen(out), out, console)
