"""``largemargin doctor``: as ``python -m largemargin.lab.doctor``, which needs torch alone."""

from typing import Any

from rich.console import Console

from ..doctor import main


def run(options: Any, console: Console) -> None:
    raise SystemExit(main())
