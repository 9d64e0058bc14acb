"""``largemargin reproduce``: the tables and figures of the paper."""

from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from rich.console import Console

from ..errors import LabError
from ..executors import EXECUTORS
from ..paper import SCALES, TARGETS
from ..recipe import OF_SOME_LOSSES, Recipe
from ..stopping import interrupts_end_at_once
from .options import (
    DEVICE_HELP,
    add_budget,
    add_recipe_fields,
    check_network_name,
    given_budget,
    given_fields,
    given_jobs,
    new_parser,
    path_of,
    plain,
)

HELP = "compute a table or a figure of the paper"
FIGURES = ("fig1", "fig2", "fig4")  # computed at once, without runs
# what the cells are made of
OF_CELLS = ("loss", "seed", "data", "data_root", "train_fraction", "label_noise", "validation_fraction", "weights", *OF_SOME_LOSSES)


def parser() -> ArgumentParser:
    reproduce = new_parser(
        "Compute a table or a figure of the paper and write it beside the paper's numbers. The cells of a table are runs; finished runs "
        "are kept, and shared by all tables of the same folder."
    )
    reproduce.add_argument("target", nargs="?", choices=[*FIGURES, *TARGETS], metavar="TARGET", help=" ".join([*FIGURES, *TARGETS]))
    reproduce.add_argument(
        "--cells",
        nargs="+",
        type=str,
        default=None,
        metavar="NAME",
        help="compute only these cells of the table: names that --list prints, or patterns, '*softmax*' say",
    )
    reproduce.add_argument(
        "--seeds",
        nargs="+",
        type=NonNegativeInt,
        default=None,
        metavar="SEED",
        help="the seeds of each cell; default: 0 1 2, and 0 for ImageNet and Places-365",
    )
    reproduce.add_argument(
        "--jobs",
        type=PositiveInt,
        default=None,
        metavar="N",
        help="runs at a time, each a process; default: 1 on the CPU, up to 3 on a GPU",
    )
    reproduce.add_argument(
        "--scale",
        choices=list(SCALES),
        default=None,
        metavar="SCALE",
        help="full (the paper's) or reduced; default: full, reduced for study",
    )
    reproduce.add_argument("--dry-run", action="store_true", help="print the runs and about how long they take; write nothing")
    reproduce.add_argument("--list", action="store_true", help="print the names of the cells, with the paper's numbers")
    reproduce.add_argument("--data-root", type=str, default="data", metavar="DIR", help="where the data sets are")
    reproduce.add_argument(
        "--out",
        type=str,
        default=None,
        metavar="DIR",
        help="runs and report are kept here; default: runs/paper, runs/figures for fig1 fig2 fig4",
    )
    reproduce.add_argument("--device", type=str, default=None, help=DEVICE_HELP)
    add_budget(reproduce)
    reproduce.add_argument("--executor", choices=EXECUTORS, default="local", metavar="WHERE", help="local or ray")
    add_recipe_fields(reproduce, "recipe.", leave_out=(*OF_CELLS, "device"))
    return reproduce


def of_runs(options: Any) -> list[str]:
    """The options given that only a target with runs has."""
    usual = parser().get_defaults()
    names = [name for name in vars(options) if name not in ("target", "out", "recipe") and options[name] != usual[name]]
    return [f"--{name.replace('_', '-')}" for name in names] + [f"--recipe.{name}" for name in given_fields(options.recipe)]


def run(options: Any, console: Console) -> None:
    if options.target is None:
        raise LabError(f"TARGET is missing: say which of {' '.join([*FIGURES, *TARGETS])}, as in largemargin reproduce table2 --list")
    if options.target in FIGURES:
        if ignored := of_runs(options):
            raise LabError(f"{ignored[0]} does not apply to {options.target}, which is computed at once, without runs; leave it out")
        with interrupts_end_at_once():
            from ..figures import reproduce as draw

        draw(options.target, path_of(options.out or "runs/figures"), console)
        return
    if options.recipe.network is not None:
        check_network_name(options.recipe.network)
    with interrupts_end_at_once():
        from ..reproduce import Reproduction, device_of, dry_run, list_cells, reproduce

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
