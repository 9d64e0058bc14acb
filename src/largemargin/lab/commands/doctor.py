"""``largemargin doctor``: as ``python -m largemargin.lab.doctor``, which needs torch alone."""

from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from .options import new_parser

HELP = "say which backends are here, and whether they compute rightly"


def parser() -> ArgumentParser:
    return new_parser("Say which backends are here, and whether they compute rightly; without options.")


def run(options: Any, console: Console) -> None:
    from ..doctor import main

    raise SystemExit(main())
