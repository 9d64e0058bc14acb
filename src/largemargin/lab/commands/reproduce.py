"""``largemargin reproduce``: the tables and figures of the paper."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .. import data
from ..arguments.options import given_fields, path_of, plain
from ..arguments.parsers import FIGURES, reproduce_parser
from ..data.human_labels import human_labels
from ..errors import LabError
from ..files import write_json
from ..models import check_name
from ..paper import formulas, page
from ..paper.cells import SCALES, TARGETS, Cell
from ..paper.lines import number_text
from ..paper.plan import MARKER, Reproduction, check_folder, device_of, entries_of, matching_cells, say_what_is_left_out, unique_recipes
from ..queue.budget import Budget
from ..queue.runs import default_jobs
from ..results import num_finished
from ..run.environment import check_device, device_label
from ..run.noise import HUMAN
from ..run.recipe import Recipe
from ..words import counted
from .dry_run import dry_run
from .progress import given_budget, given_jobs, interrupted, run_with_progress, say_what_is_left


def of_runs(options: Any) -> list[str]:
    """The options given that only a target with runs has."""
    usual = reproduce_parser().get_defaults()
    names = [name for name in vars(options) if name not in ("target", "out", "recipe", "quiet") and options[name] != usual[name]]
    return [f"--{name.replace('_', '-')}" for name in names] + [f"--recipe.{name}" for name in given_fields(options.recipe)]


def run(options: Any, console: Console) -> None:
    if options.target is None:
        raise LabError(f"TARGET is missing: say which of {' '.join([*FIGURES, *TARGETS])}, as in largemargin reproduce table2 --list")
    if options.target in FIGURES:
        if ignored := of_runs(options):
            raise LabError(f"{ignored[0]} does not apply to {options.target}, which is computed at once, without runs; leave it out")
        formulas.draw(options.target, path_of(options.out or "runs/figures"), console)
        return
    if options.recipe.network is not None:
        check_name(options.recipe.network)
    out = path_of(options.out or "runs/paper")
    device = options.device or device_of(out)
    given = given_fields(options.recipe) | ({"device": device} if device != Recipe.device else {})
    reproduction = Reproduction(
        options.target,
        tuple(options.cells or ()),
        None if options.seeds is None else tuple(dict.fromkeys(plain(options.seeds))),
        options.scale,
        given,
        options.data_root,
    )
    if options.list:
        list_cells(reproduction, console)
    elif options.dry_run:
        if options.minutes is not None:
            console.print("The dry run lists all runs. --minutes decides how many of them a run of this command starts.")
        dry_run(reproduction, console)
    else:
        reproduce(reproduction, out, given_jobs(options), options.executor, console, given_budget(options), graph=not options.eager)


def reproduce(
    reproduction: Reproduction, out: Path, jobs: int | None, executor: str, console: Console, budget: Budget | None = None, **options: Any
) -> None:
    """Do what is left of the runs, and write the report into ``out``.

    ``jobs`` runs at a time, None: as many as suit the device; with a ``budget``, only what it allows. ``options`` are those of
    :func:`~largemargin.lab.run.train.train`.
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
        page.write(out, entries, reproduction.of_scale, command, console)
    if budget is not None and failure is None:
        say_what_is_left(recipes, runs, budget, console)
    if failure is not None:
        raise failure


def digest_of(name: str, data_root: str, plan: Sequence[tuple[Cell, list[Recipe]]]) -> str:
    """Of the data set; bad data stops here, before anything is written."""
    image_size = next(recipes[0].image_size for cell, recipes in plan if cell.settings["data"] == name)
    images = data.load(name, data_root, image_size)
    if any(recipe.noise == HUMAN for cell, recipes in plan for recipe in recipes if cell.settings["data"] == name):
        human_labels(Path(data_root).expanduser(), images.train_labels)  # they are there, and of these images
    return images.digest()


def list_cells(reproduction: Reproduction, console: Console) -> None:
    """Print the names of the cells with what was printed in them."""
    table = Table("cell", "paper %", "port %", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for cell in matching_cells(reproduction.target, reproduction.cells, SCALES["full"]):
        table.add_row(cell.name, number_text(cell.paper), number_text(cell.port), cell.note)
    console.print(table, highlight=False)
