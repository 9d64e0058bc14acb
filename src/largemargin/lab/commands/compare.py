"""``largemargin compare``: the same network under several losses and seeds on the same data; which is better, and by how much."""

import dataclasses
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from .. import data
from ..arguments.options import given_fields, path_of, plain
from ..comparison import page
from ..comparison.choose import choose, chosen_of, print_choices
from ..comparison.figures import overview
from ..comparison.folder import MARKER, check_folder, device_of, finished_records, reopen
from ..comparison.plan import Comparison
from ..comparison.table import Row, print_tables, remarks, results_csv, summarise
from ..data.folders import FileSet
from ..data.images import ImageSet
from ..errors import LabError
from ..files import write_json, write_text
from ..models import build, check_image, check_name
from ..models.weights import weights_digest
from ..queue.attempt import decoded_images
from ..queue.budget import Budget
from ..queue.runs import default_jobs
from ..results import result_of
from ..run.environment import check_device, device_label
from ..run.recipe import Recipe, check_settings, unread
from ..run.rows import check_shares, sizes
from ..words import counted
from .asked import given_save, missing, what_is_kept
from .next import next_command
from .progress import given_budget, given_jobs, interrupted, reading_images, run_with_progress, say_what_is_left


def run(options: Any, console: Console) -> None:
    for name in ("losses", "lam", "seeds", "label_noise"):
        if not isinstance(options[name], list) or not options[name]:
            raise LabError(f"--{name.replace('_', '-')} needs a list of at least one value, got {options[name]!r}")
    for name in ("data", "data_root", "network", "validation_fraction", "out", "executor"):
        if options[name] is None:
            raise LabError(f"--{name.replace('_', '-')} needs a value, got none")
    check_name(options.network)
    if not isinstance(options.recipe, Namespace):
        raise LabError(f"recipe: in the --config file needs fields with their values, got {options.recipe!r}")
    names = ("data", "data_root", "image_size", "network", "validation_fraction", "epochs", "train_fraction")
    settings: dict[str, Any] = {name: options[name] for name in names}
    settings |= {name: list(dict.fromkeys(options[name])) for name in ("losses", "lam", "seeds", "label_noise")}
    settings["device"] = options.device or device_of(path_of(options.out))
    comparison = Comparison.from_dict(plain(settings) | {"overrides": given_fields(options.recipe)})
    compare(
        comparison,
        path_of(options.out),
        given_jobs(options),
        console,
        options.executor,
        given_budget(options),
        graph=not options.eager,
        tensorboard=bool(options.tensorboard),
        save=given_save(options, console),
    )


def check_network(recipe: Recipe, images: ImageSet | FileSet) -> None:
    """Refuse a network that does not take these images, or weights that are not its own."""
    in_channels, size = images.train_images.shape[1:3] if isinstance(images, ImageSet) else (3, recipe.image_size)
    check_image(recipe.network, size)
    build(recipe, in_channels, len(images.classes))


def unread_options(comparison: Comparison) -> list[str]:
    """A line for each option that was given and changes nothing."""
    lines = unread(comparison.example, comparison.overrides)
    if not comparison.choosing and comparison.validation_fraction != Comparison.validation_fraction:
        share = f"validation_fraction {comparison.validation_fraction:g}"
        lines.append(f"warning: {share} changes nothing: it is for a choice among several lam")
    return lines


def compare(
    comparison: Comparison,
    out: Path,
    jobs: int | None,
    console: Console,
    executor: str = "local",
    budget: Budget | None = None,
    **options: Any,
) -> list[Row]:
    """Do what is left of the comparison, print its table, and write ``results.csv`` and ``report.html`` into ``out``.

    ``jobs`` runs at a time, None: as many as suit the device; with a ``budget``, only what it allows. ``options`` are those of
    :func:`~largemargin.lab.run.train.train`.
    """
    check_settings(comparison.losses, [*comparison.overrides, *(["lam"] if comparison.lam != Comparison.lam else [])])
    data.check_image_size(comparison.data, comparison.image_size)
    check_device(comparison.device)
    check_folder(out)
    if comparison.is_folder and Path(comparison.data).expanduser().resolve() in out.resolve().parents:
        raise LabError(f"--out {out} is inside --data {comparison.data}: its runs would be taken for a class; choose a folder outside")
    if "weights" in comparison.overrides:
        digest = weights_digest(comparison.overrides["weights"])
        comparison = dataclasses.replace(comparison, overrides=comparison.overrides | {"weights_digest": digest})
    # bad data and weights stop here, before anything is written
    example = comparison.example
    with reading_images(console) as on_image:
        images = data.load(comparison.data, comparison.data_root, example.image_size, example.streamed, on_image)
    comparison = dataclasses.replace(comparison, data_digest=images.digest())
    check_network(comparison.example, images)
    if (out / MARKER).is_file() and reopen(out) != comparison:
        console.print(f"{out} held a comparison with other options: its runs are kept, its table and report are replaced", markup=False)
    for recipe in (comparison.example, *comparison.validating_recipes()[:1]):
        check_shares(recipe, len(images.train_labels), len(images.classes))
    console.print(sizes(comparison.example, images), markup=False, highlight=False)
    for note in [*images.notes, *unread_options(comparison)]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if len(images.classes) == 2:
        console.print("with two classes the large-margin regulariser is 0: lam changes nothing", highlight=False)
    runs, jobs = out / "runs", jobs or default_jobs(comparison.device, comparison.example.streamed, on_cpu=2)
    decoded = decoded_images(comparison.example, runs)
    try:
        write_json(out / MARKER, {"largemargin": "compare", "comparison": vars(comparison)})
        if comparison.is_folder and isinstance(images, ImageSet):
            images.save(decoded)
    except OSError as error:
        raise LabError(f"--out {out} cannot be written to: {error.strerror or error}; choose another folder") from error
    if options.get("save"):
        console.print(what_is_kept(comparison.example, images), markup=False, highlight=False)
    del images

    def stage(recipes: list[Recipe], what: str, **options: Any) -> None:
        finished = [runs / recipe.id for recipe in recipes if result_of(recipe, runs) is not None]
        done = len(finished)
        console.print(
            f"{counted(len(recipes), what)} of {counted(recipes[0].epochs, 'epoch')} on {comparison.data}, {jobs} at a time on "
            f"{device_label(comparison.device)}, into {out}" + (f"; {done} already done" if done else ""),
            markup=False,
            highlight=False,
        )
        for line in missing(finished, **options):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        try:
            run_with_progress(recipes, runs, jobs, console, executor, budget=budget, **options)
        except KeyboardInterrupt:
            raise interrupted(recipes, runs) from None

    if comparison.choosing:
        stage(comparison.validating_recipes(), "validating run", **options | {"save": False})
        print_choices(comparison, choose(finished_records(comparison, out)[0]), console)
    chosen = chosen_of(choose(finished_records(comparison, out)[0]))
    recipes = comparison.recipes(chosen)
    if len(recipes) == comparison.num_runs:  # there was time for all choices
        stage(recipes, "run", **options)
    decoded.unlink(missing_ok=True)
    if budget is not None:
        say_what_is_left([*(comparison.validating_recipes() if comparison.choosing else []), *recipes], runs, budget, console)
    rows = print_and_write(comparison, out, console, choices_too=False)
    console.print(
        f"{out / 'report.html'}  the same with figures; results.csv has a line for each run, runs/ a record", markup=False, highlight=False
    )
    for line in next_command(rows, finished_records(comparison, out)[1], runs):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return rows


def print_and_write(comparison: Comparison, out: Path, console: Console, choices_too: bool = True) -> list[Row]:
    """The tables, and the files of the report, of the runs that are finished."""
    validating, records = finished_records(comparison, out)
    choices = choose(validating)
    if choices_too:
        print_choices(comparison, choices, console)
    if not records:
        raise LabError(f"{out}: no run of its last comparison is finished yet; give that command again")
    rows = summarise(records)
    print_tables(rows, console)
    if len(records) < comparison.num_runs:
        of_all = f"{len(records)} of {counted(comparison.num_runs, 'run')} {'is' if len(records) == 1 else 'are'} finished"
        console.print(f"{of_all} and in the table; the command that started the comparison does the others.", highlight=False)
    for sentence in remarks(records):
        console.print(sentence, highlight=False, markup=False)
    try:
        write_text(out / "results.csv", results_csv(records))
        if validating:
            write_text(out / "choice.csv", results_csv(validating, "validation"))
        else:
            (out / "choice.csv").unlink(missing_ok=True)  # of another comparison
        write_text(out / "errors.svg", overview(rows, background="white"))
        write_text(out / "report.html", page.render(comparison, records, rows, choices))
    except OSError as error:
        raise LabError(
            f"{out} cannot be written to: {error.strerror or error}; the runs are kept, largemargin report {out} goes on"
        ) from error
    return rows
