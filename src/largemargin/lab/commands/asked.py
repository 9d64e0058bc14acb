"""Files that a finished run was not asked to leave, and is asked for now: it is not trained again for them, so that is said."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..run.checkpoint import NAME
from ..run.train import WEIGHTS
from ..words import counted

FILES = {"keep_weights": WEIGHTS, "keep_checkpoint": NAME, "tensorboard": "events"}  # by the options of train() that leave them


def missing(folders: Iterable[Path], **options: Any) -> list[str]:
    """A line for each kind of file that finished runs in these folders lack, with the command that lets them be made."""
    folders, lines = list(folders), []
    for option, name in FILES.items():
        lacking = [folder for folder in folders if options.get(option) and not (folder / name).exists()]
        if lacking:
            have = "has" if len(lacking) == 1 else "have"
            lines.append(
                f"{counted(len(lacking), 'finished run')} {have} no {name}, and finished runs are not repeated. To make it, remove what is "
                f"there and give the same command again: rm -r {shlex.join(map(str, lacking))}"
            )
    return lines
