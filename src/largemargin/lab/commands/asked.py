"""Files that a finished run was not asked to leave, and is asked for now: it is not trained again for them, so that is said."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.samples import Samples
from ..errors import LabError
from ..run.checkpoint import NAME
from ..run.model import NAME as MODEL
from ..run.model import has_model, kept_bytes
from ..run.recipe import Recipe
from ..words import counted

FILES = {"save": MODEL, "keep_checkpoint": NAME, "tensorboard": "events"}  # by the options of train() that leave them


def missing(folders: Iterable[Path], **options: Any) -> list[str]:
    """A line for each kind of file that finished runs in these folders lack, with the command that lets them be made."""
    folders, lines = list(folders), []
    for option, name in FILES.items():
        lacking = [folder for folder in folders if options.get(option) and not _has(folder, name)]
        if lacking:
            have = "has" if len(lacking) == 1 else "have"
            lines.append(
                f"{counted(len(lacking), 'finished run')} {have} no {name}, and finished runs are not repeated. To make it, remove what is "
                f"there and give the same command again: rm -r {shlex.join(map(str, lacking))}"
            )
    return lines


def _has(folder: Path, name: str) -> bool:
    return has_model(folder) if name == MODEL else (folder / name).exists()


def given_save(options: Any, console: Console) -> bool:
    """Whether runs keep their models."""
    if options.keep_weights and options.no_save:
        raise LabError("--keep-weights and --no-save contradict each other; leave one out")
    if options.keep_weights:
        console.print("--keep-weights is the default now: each run keeps its model", highlight=False)
    return not options.no_save


def what_is_kept(recipe: Recipe, images: Samples) -> str:
    """A line on the size of what each run leaves."""
    return (
        f"each run keeps about {size_text(kept_bytes(recipe, images))}: its model and its predictions for the test set (--no-save: neither)"
    )


def size_text(num_bytes: int) -> str:
    """``0.4 MB``, ``250 MB``."""
    megabytes = num_bytes / 1e6
    return f"{megabytes:.0f} MB" if megabytes >= 10 else f"{max(megabytes, 0.1):.1f} MB"
