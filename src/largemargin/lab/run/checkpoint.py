"""The state of a run on disk: whole or not there, read without executing code, and only by the run that wrote it."""

import io
from pathlib import Path
from typing import Any

import torch

from ..errors import LabError
from ..files import write_atomically
from .recipe import PLACES, Recipe

NAME = "checkpoint.pt"


def save(folder: Path, recipe: Recipe, state: dict[str, Any]) -> None:
    """Replace the checkpoint of ``folder``; where that fails the old one is left."""
    memory = io.BytesIO()  # torch.save ends the process where a file refuses its bytes
    torch.save({"recipe": recipe.to_dict(), **state}, memory)
    try:
        write_atomically(folder / NAME, lambda file: file.write(memory.getbuffer()))
    except OSError as error:
        raise LabError(
            f"{folder / NAME} cannot be written: {error.strerror or error}; the checkpoint before it is kept: make room, then run the "
            "same command to continue from it"
        ) from error


def load(folder: Path, recipe: Recipe, device: torch.device) -> dict[str, Any] | None:
    """What :func:`save` wrote in ``folder``, or None; refused where it is of another recipe."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        theirs = dict(state["recipe"])
    except Exception as error:  # torch.load raises many types for a broken file
        raise LabError(f"{path} is not a checkpoint that can be read, or of an older version; remove it to start this run anew") from error
    check_same(path, theirs, recipe)
    return state


def check_same(path: Path, theirs: dict[str, Any], recipe: Recipe) -> None:
    """Refuse what another recipe wrote, and say where they differ."""
    ours = recipe.to_dict()
    differing = [name for name in ours if name not in PLACES and theirs.get(name) != ours[name]]
    if differing:
        what = "; ".join(f"{name} {theirs.get(name)!r} there, {ours[name]!r} here" for name in differing)
        raise LabError(f"{path} is of another run: {what}. Give the same options, or another folder.")
