"""``largemargin report``: the report of runs that are there."""

from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

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
    from .. import reproduce

    if (out / reproduce.MARKER).is_file():
        from ..paper_report import write

        write(out, *reproduce.reopen(out), console)
        return
    from ..compare import print_and_write, reopen

    print_and_write(reopen(out), out, console)
