"""What a reproduction is made of, and the folder that holds it: cells as runs that tables share."""

import dataclasses
import fnmatch
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import LabError
from ..results import result_of
from ..run.environment import default_device
from ..run.recipe import Recipe
from .cells import SCALES, Cell, Scale, cells, default_scale
from .lines import Entry, recipe_options

MARKER = "reproduce.json"  # tells a folder of ours from one that is not


@dataclass(frozen=True)
class Reproduction:
    """What is to be computed: cells of a target, with seeds, at a scale, and what differs from their recipes."""

    target: str
    cells: tuple[str, ...] = ()  # names or shell patterns; none: all that have the scale
    seeds: tuple[int, ...] | None = None  # None: those of each cell
    scale: str | None = None  # None: that of the target
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of Recipe
    data_root: str = "data"

    @property
    def of_scale(self) -> Scale:
        return default_scale(self.target) if self.scale is None else SCALES[self.scale]

    def chosen(self) -> list[Cell]:
        """The cells, in the order of the paper."""
        return matching_cells(self.target, self.cells, self.of_scale)

    def plan(self, digests: dict[str, str] | None = None) -> list[tuple[Cell, list[Recipe]]]:
        """The runs of every cell; ``digests`` are of the data sets, which their names stand for where none is known."""
        fixed = {"data_root": self.data_root, **self.overrides}
        digests = digests or {}
        return [
            (cell, cell.recipes(self.seeds, self.of_scale, data_digest=digests.get(cell.settings["data"], cell.settings["data"]), **fixed))
            for cell in self.chosen()
        ]

    def baselines(self, digests: dict[str, str]) -> list[tuple[Cell, list[Recipe]]]:
        """The baselines of the target that are not among its chosen cells."""
        chosen = self.chosen()
        left = [cell for cell in cells(self.target) if cell.baseline and cell not in chosen and not cell.lacks(self.of_scale)]
        return dataclasses.replace(self, cells=tuple(cell.name for cell in left)).plan(digests) if left else []

    def command(self, out: Path) -> str:
        """The command that computes this."""
        words = ["largemargin", "reproduce", self.target]
        words += ["--cells", *self.cells] if self.cells else []
        words += ["--seeds", *map(str, self.seeds)] if self.seeds is not None else []
        words += ["--scale", self.of_scale.name, "--data-root", self.data_root, "--out", str(out)]
        device = [] if "device" in self.overrides else ["--device", Recipe.device]  # left out, it would depend on the machine
        return shlex.join(words + recipe_options(self.overrides) + device)


def matching_cells(target: str, patterns: Sequence[str], scale: Scale) -> list[Cell]:
    """The cells of a target whose names match any pattern, or all, without those that lack the scale; a cell that is named stays."""
    of_target = cells(target)
    for pattern in patterns:
        if not fnmatch.filter([cell.name for cell in of_target], pattern):
            raise LabError(f"--cells {pattern}: {target} has no such cell; its cells are {' '.join(cell.name for cell in of_target)}")
    matching = [cell for cell in of_target if matches(cell, patterns)]
    having = [cell for cell in matching if cell.name in patterns or not cell.lacks(scale)]
    if not having:
        raise LabError(
            f"--scale {scale.name}: no cell of --cells {' '.join(patterns)} has it, {matching[0].lacks(scale)}; use --scale full"
        )
    return having


def matches(cell: Cell, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(cell.name, pattern) for pattern in patterns)


def unique_recipes(plan: Sequence[tuple[Cell, list[Recipe]]]) -> list[Recipe]:
    """Each run once, seed by seed, so that pairs are finished together."""
    unique = {recipe.id: recipe for _, recipes in plan for recipe in recipes}
    return sorted(unique.values(), key=lambda recipe: recipe.seed)


def entries_of(reproduction: Reproduction, digests: dict[str, str], out: Path) -> list[Entry]:
    """The cells with the records of their finished runs, and before them the baselines that other cells of the folder have left there."""

    def entry(cell: Cell, recipes: list[Recipe]) -> Entry:
        return Entry(cell, recipes, [record for recipe in recipes if (record := result_of(recipe, out / "runs")) is not None])

    chosen = [entry(*planned) for planned in reproduction.plan(digests)]
    settings = {baseline_key(of_cell.cell) for of_cell in chosen}
    left = [entry(*planned) for planned in reproduction.baselines(digests)]
    return [of_cell for of_cell in left if of_cell.records and baseline_key(of_cell.cell) in settings] + chosen


def baseline_key(cell: Cell) -> tuple[str, str]:
    """Cells with the same key have the same baseline; Table 1 has one for all."""
    return cell.table, "" if cell.table == "table1" else cell.column


def device_of(out: Path) -> str:
    """The device of the reproduction in a folder, whose runs can only go on there; where there is none, the default of this machine."""
    try:
        return str(read_marker(out)["overrides"].get("device", Recipe.device))
    except LabError:  # there is no marker, or one that says nothing and is written anew
        return default_device()


def check_folder(out: Path) -> None:
    """Say why ``out`` cannot be ours, before anything is written."""
    try:
        foreign = out.exists() and any(out.iterdir()) and not (out / MARKER).is_file()
    except OSError as error:
        raise LabError(f"--out {out} cannot be used: {error.strerror or error}; choose another folder") from error
    if foreign:
        raise LabError(f"--out {out} holds files that are not of a reproduction; choose a new or empty folder")


def reopen(out: Path) -> tuple[list[Entry], Scale, str]:
    """The cells of a folder with what is finished of them, their scale, and the command that computes them."""
    try:
        marker = read_marker(out)
        values = {name.name: marker[name.name] for name in dataclasses.fields(Reproduction)}
        values |= {"cells": tuple(values["cells"]), "seeds": None if values["seeds"] is None else tuple(values["seeds"])}
        reproduction = Reproduction(**values)
        entries, command = entries_of(reproduction, marker["digests"], out), str(marker["command"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(f"{out} is not the folder of a reproduction: it has no readable {MARKER}") from error
    return entries, reproduction.of_scale, command


def read_marker(out: Path) -> dict[str, Any]:
    """What :func:`reproduce` wrote of itself."""
    try:
        marker: dict[str, Any] = json.loads((out / MARKER).read_text())
        if marker["largemargin"] != "reproduce" or not isinstance(marker["overrides"], dict):
            raise ValueError("it is of something else")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LabError(f"{out} is not the folder of a reproduction: it has no readable {MARKER}") from error
    return marker


def say_what_is_left_out(reproduction: Reproduction, console: Console) -> None:
    scale = reproduction.of_scale
    console.print(f"scale {scale.name}: {scale.description}", markup=False, highlight=False)
    for cell in cells(reproduction.target):
        if matches(cell, reproduction.cells) and (reason := cell.lacks(scale)):
            console.print(f"{cell.name} is left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    for name, value in reproduction.overrides.items():
        console.print(f"differs from the recipe of the cells: {name} {value}", markup=False, highlight=False)
