"""``largemargin reproduce``: the tables of the paper, cell by cell, as runs that are shared between them."""

import dataclasses
import fnmatch
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import data, paper
from .budget import Budget, Pace, measured_pace
from .environment import check_device, default_device, device_label
from .errors import LabError
from .files import write_json
from .paper import Cell, Entry, Scale
from .paper_lines import number_text, recipe_options
from .progress import interrupted, run_with_progress, say_what_is_left
from .queue import default_jobs, num_finished, result_of
from .recipe import Recipe
from .stopping import interrupts_end_at_once
from .words import counted, hours

MARKER = "reproduce.json"  # tells a folder of ours from one that is not
PROBE_SECONDS = 3.0  # of one measured step in a dry run, about


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
        return paper.default_scale(self.target) if self.scale is None else paper.SCALES[self.scale]

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
        left = [cell for cell in paper.cells(self.target) if cell.baseline and cell not in chosen and not cell.lacks(self.of_scale)]
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
    cells = paper.cells(target)
    for pattern in patterns:
        if not fnmatch.filter([cell.name for cell in cells], pattern):
            raise LabError(f"--cells {pattern}: {target} has no such cell; its cells are {' '.join(cell.name for cell in cells)}")
    matching = [cell for cell in cells if matches(cell, patterns)]
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


def reproduce(
    reproduction: Reproduction,
    out: Path,
    jobs: int | None,
    executor: str,
    console: Console,
    budget: Budget | None = None,
    **options: Any,
) -> None:
    """Do what is left of the runs, and write the report into ``out``.

    ``jobs`` runs at a time, None: as many as suit the device; with a ``budget``, only what it allows. ``options`` are those of
    :func:`~largemargin.lab.train.train`.
    """
    plan = reproduction.plan()
    example = plan[0][1][0]
    jobs = jobs or default_jobs(example.device, example.streamed, on_cpu=1)
    check_device(example.device)
    check_folder(out)
    digests = {name: digest_of(name, reproduction.data_root, plan) for name in dict.fromkeys(cell.settings["data"] for cell, _ in plan)}
    plan = reproduction.plan(digests)
    recipes, runs, command = unique_recipes(plan), out / "runs", reproduction.command(out)
    try:
        write_json(out / MARKER, {"largemargin": "reproduce", **vars(reproduction), "digests": digests, "command": command})
    except OSError as error:
        raise LabError(f"--out {out} cannot be written to: {error.strerror or error}; choose another folder") from error
    say_what_is_left_out(reproduction, console)
    done = num_finished(recipes, runs)
    console.print(
        f"{counted(len(plan), 'cell')}, {counted(len(recipes), 'run')}, {jobs} at a time on {device_label(example.device)}, into {out}"
        + (f"; {done} already done" if done else ""),
        markup=False,
        highlight=False,
    )
    failure: LabError | None = None
    try:
        run_with_progress(recipes, runs, jobs, console, executor, budget=budget, **options)
    except LabError as error:
        failure = error
    except KeyboardInterrupt:
        raise interrupted(recipes, runs) from None
    entries = entries_of(reproduction, digests, out)
    if any(entry.records for entry in entries):
        with interrupts_end_at_once():
            from . import paper_report  # matplotlib is slow to import: not before the runs

        paper_report.write(out, entries, reproduction.of_scale, command, console)
    if budget is not None and failure is None:
        say_what_is_left(recipes, runs, budget, console)
    if failure is not None:
        raise failure


def device_of(out: Path) -> str:
    """The device of the reproduction in a folder, whose runs can only go on there; where there is none, the default of this machine."""
    try:
        return str(read_marker(out)["overrides"].get("device", Recipe.device))
    except LabError:  # there is no marker, or one that says nothing and is written anew
        return default_device()


def digest_of(name: str, data_root: str, plan: Sequence[tuple[Cell, list[Recipe]]]) -> str:
    """Of the data set; bad data stops here, before anything is written."""
    image_size = next(recipes[0].image_size for cell, recipes in plan if cell.settings["data"] == name)
    return data.load(name, data_root, image_size).digest()


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


# without training


def list_cells(reproduction: Reproduction, console: Console) -> None:
    """Print the names of the cells with what was printed in them."""
    table = Table("cell", "paper %", "port %", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for cell in matching_cells(reproduction.target, reproduction.cells, paper.SCALES["full"]):
        table.add_row(cell.name, number_text(cell.paper), number_text(cell.port), cell.note)
    console.print(table, highlight=False)


def say_what_is_left_out(reproduction: Reproduction, console: Console) -> None:
    scale = reproduction.of_scale
    console.print(f"scale {scale.name}: {scale.description}", markup=False, highlight=False)
    for cell in paper.cells(reproduction.target):
        if matches(cell, reproduction.cells) and (reason := cell.lacks(scale)):
            console.print(f"{cell.name} is left out: {reason}", markup=False, highlight=False, soft_wrap=True)
    for name, value in reproduction.overrides.items():
        console.print(f"differs from the recipe of the cells: {name} {value}", markup=False, highlight=False)


class Size(NamedTuple):
    """Of a data set that is not there yet."""

    training: int
    test: int
    classes: int
    pixels: int


SIZES = {
    "cifar10": Size(50_000, 10_000, 10, 32),
    "cifar100": Size(50_000, 10_000, 100, 32),
    "svhn": Size(73_257, 26_032, 10, 32),
    "imagenet": Size(1_281_167, 50_000, 1000, 224),
    "places365": Size(1_803_460, 36_500, 365, 224),
}


def dry_run(reproduction: Reproduction, console: Console) -> None:
    """Print every run and about how long it takes here; writes nothing, and needs no data."""
    plan = reproduction.plan()
    check_device(plan[0][1][0].device)
    say_what_is_left_out(reproduction, console)
    measured: dict[tuple[Any, ...], Pace] = {}
    seconds: dict[str, float] = {}
    table = Table("cell", "seed", "network", "data", "images", "epochs", "about", box=box.SIMPLE_HEAD, pad_edge=False)
    for cell, recipes in plan:
        for recipe in recipes:
            key = step_of(recipe)
            if key not in measured:
                measured[key] = pace_of(recipe)
            size = SIZES[recipe.data]
            images, evaluations = round(size.training * recipe.train_fraction), -(-recipe.epochs // recipe.evaluate_every)
            pace = measured[key]
            seconds[recipe.id] = pace.training * images * recipe.epochs + pace.evaluation * size.test * evaluations
            table.add_row(
                cell.name, str(recipe.seed), recipe.network, recipe.data, f"{images:,}", str(recipe.epochs), hours(seconds[recipe.id])
            )
    console.print(table, highlight=False)
    total, device = hours(sum(seconds.values())), plan[0][1][0].device
    console.print(
        f"{counted(len(seconds), 'run')}, about {total} one after another: an estimate from a training step and an evaluation of each "
        f"network on {device} with made-up images, without the reading of data; runs that are finished count too. Nothing was written.",
        highlight=False,
        soft_wrap=True,
    )


def step_of(recipe: Recipe) -> tuple[Any, ...]:
    """What the time of a training step depends on, near enough."""
    return (recipe.network, recipe.width, recipe.precision, recipe.channels_last, recipe.batch_size, recipe.data, recipe.device)


def pace_of(recipe: Recipe) -> Pace:
    """Measured with made-up images; slow networks are given fewer of them."""
    threads = torch.get_num_threads()
    alone = dataclasses.replace(recipe, train_fraction=1.0, augmentation="shift", milestones=())
    try:
        first = measured_pace(alone, made_up(recipe, 2), graph=False)
        count = int(min(recipe.batch_size, max(2, PROBE_SECONDS / first.training)))
        return measured_pace(alone, made_up(recipe, count), graph=False)
    finally:
        torch.set_num_threads(threads)


def made_up(recipe: Recipe, count: int) -> data.ImageSet:
    """So many images of noise for training and for testing, of the size and the classes of the data set."""
    size = SIZES[recipe.data]
    images = torch.randint(0, 256, (count, 3, size.pixels, size.pixels), dtype=torch.uint8)
    labels = torch.arange(count) % size.classes
    return data.ImageSet(images, labels, images, labels, tuple(map(str, range(size.classes))))
