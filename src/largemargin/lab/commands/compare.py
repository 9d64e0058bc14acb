"""``largemargin compare``: the same network under several losses and seeds on the same data; which is better, and by how much."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from .. import data
from ..arguments.options import given_fields, path_of, plain
from ..comparison import page, table
from ..comparison.choose import choose, chosen_of, print_choices
from ..comparison.figures import overview
from ..comparison.folder import MARKER, check_folder, device_of, finished_records, outcomes_of, reopen
from ..comparison.plan import AUTO, FIRST_LOOK, MAX_SEEDS, Comparison
from ..comparison.recommendation import advice, is_clear
from ..comparison.table import Row, print_evidence, print_tables, remarks, results_csv, summarise
from ..data.folders import FileSet
from ..data.human_labels import human_labels
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
from ..run.methods import check_settings
from ..run.noise import HUMAN, parsed
from ..run.recipe import Recipe, unread
from ..run.rows import check_shares, sizes
from ..words import counted
from .asked import given_save, missing, what_is_kept
from .estimate import how_long
from .next import next_command
from .progress import given_budget, given_jobs, interrupted, reading_images, run_with_progress, say_what_is_left
from .screen import print_json


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
    names = ("data", "data_root", "image_size", "network", "validation_fraction", "epochs", "train_fraction", "long_tail", "labels")
    settings: dict[str, Any] = {name: options[name] for name in names} | {"unverified": bool(options.unverified)}
    settings |= {name: list(dict.fromkeys(options[name])) for name in ("losses", "lam")}
    settings["label_noise"] = list(dict.fromkeys(map(parsed, options.label_noise)))
    settings |= seeds_of(options.seeds, options.max_seeds)
    settings["device"] = options.device or device_of(path_of(options.out))
    comparison = Comparison.from_dict(plain(settings) | {"overrides": given_fields(options.recipe)})
    rows = compare(
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
    if options.json:
        out = path_of(options.out)
        print_json(as_json(reopen(out), rows, out))


def seeds_of(seeds: list[Any], max_seeds: int | None) -> dict[str, Any]:
    """The seeds of a comparison, from ``--seeds`` and ``--max-seeds``."""
    if AUTO not in seeds:
        if max_seeds is not None:
            raise LabError(f"--max-seeds {max_seeds} is for --seeds auto; leave it out, or give --seeds auto")
        for seed in seeds:
            if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
                raise LabError(f"--seeds must be whole numbers from 0 on, or auto, got {seed}")
        return {"seeds": list(dict.fromkeys(seeds))}
    if len(seeds) > 1:
        raise LabError(f"--seeds auto stands alone, got {' '.join(map(str, seeds))}")
    most = MAX_SEEDS if max_seeds is None else max_seeds
    if most < FIRST_LOOK:
        raise LabError(f"--max-seeds must be at least {FIRST_LOOK}, the pairs of the first look, got {most}")
    return {"seeds": list(range(FIRST_LOOK)), "max_seeds": most}


def as_json(comparison: Comparison, rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """The document of ``--json``: what was compared, the table, the choices, and how far the runs are."""
    validating, records = finished_records(comparison, out)
    choices = [dataclasses.asdict(choice) | {"lam": choice.lam} for choice in choose(validating)]
    return {
        "out": str(out),
        "comparison": vars(comparison),
        "runs": {"finished": len(records), "planned": comparison.num_runs},
        "rows": [table.as_json(row) for row in rows],
        "choices": choices,
        "remarks": remarks(records),
    }


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


def _without_looks(comparison: Comparison) -> Comparison:
    """The comparison before seeds are added."""
    return dataclasses.replace(comparison, seeds=()) if comparison.max_seeds else comparison


def prepared(comparison: Comparison, out: Path, console: Console, save: bool) -> tuple[Comparison, ImageSet | FileSet]:
    """The comparison with the digests of its data and weights, and the data. What is wrong with them stops here, before any run."""
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
        images = data.load_of(example, on_image)
    comparison = dataclasses.replace(comparison, data_digest=images.digest())
    check_network(comparison.example, images)
    if (out / MARKER).is_file() and _without_looks(reopen(out)) != _without_looks(comparison):
        console.print(f"{out} held a comparison with other options: its runs are kept, its table and report are replaced", markup=False)
    if HUMAN in comparison.label_noise:
        human_labels(Path(comparison.data_root).expanduser(), images.train_labels)  # it is there, and of these images
    for recipe in (comparison.example, *comparison.validating_recipes()[:1]):
        check_shares(recipe, len(images.train_labels), len(images.classes))
    console.print(sizes(comparison.example, images), markup=False, highlight=False)
    for note in [*images.notes, *unread_options(comparison)]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if len(images.classes) == 2:
        console.print("with two classes the large-margin regulariser is 0: lam changes nothing", highlight=False)
    decoded = decoded_images(comparison.example, out / "runs")
    try:
        write_json(out / MARKER, {"largemargin": "compare", "comparison": vars(comparison)})
        if comparison.is_folder and isinstance(images, ImageSet):
            images.save(decoded)
    except OSError as error:
        raise LabError(f"--out {out} cannot be written to: {error.strerror or error}; choose another folder") from error
    if save:
        console.print(what_is_kept(comparison.example, images), markup=False, highlight=False)
    return comparison, images


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
    comparison, images = prepared(comparison, out, console, bool(options.get("save")))
    runs, jobs = out / "runs", jobs or default_jobs(comparison.device, comparison.example.streamed, on_cpu=2)
    if budget is None and executor == "local" and not console.quiet:  # a budget measures by itself; a cluster may have any machines
        line = how_long(comparison.all_recipes(), images, runs, jobs, bool(options.get("graph", True)))
        if line is not None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    del images  # the runs are other processes

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
    for seeds in comparison.looks:
        if seeds > len(comparison.seeds):
            comparison = dataclasses.replace(comparison, seeds=tuple(range(seeds)))
            write_json(out / MARKER, {"largemargin": "compare", "comparison": vars(comparison)})
        recipes = comparison.recipes(chosen)
        if len(recipes) == comparison.num_runs:  # there was time for all choices
            stage(recipes, "run", **options)
        if seeds == comparison.looks[-1]:
            break
        records = finished_records(comparison, out)[1]
        if len(records) < comparison.num_runs or is_clear(summarise(records, looks=len(comparison.looks))):
            break
    decoded_images(comparison.example, runs).unlink(missing_ok=True)
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
    with console.status("pairing the predictions of the runs"):
        rows = summarise(records, outcomes_of(records, out), len(comparison.looks))
    print_tables(rows, console)
    print_evidence(rows, console)
    if len(records) < comparison.num_runs:
        of_all = f"{len(records)} of {counted(comparison.num_runs, 'run')} {'is' if len(records) == 1 else 'are'} finished"
        console.print(f"{of_all} and in the table; the command that started the comparison does the others.", highlight=False)
    for sentence in [*remarks(records), *advice(rows)]:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    try:
        write_text(out / "results.csv", results_csv(records))
        if validating:
            write_text(out / "choice.csv", results_csv(validating, "validation"))
        else:
            (out / "choice.csv").unlink(missing_ok=True)  # of another comparison
        write_text(out / "errors.svg", overview(rows, background="white"))
        html, markdown = page.render(comparison, out, records, rows, choices)
        write_text(out / "report.html", html)
        write_text(out / "report.md", markdown)
    except OSError as error:
        raise LabError(
            f"{out} cannot be written to: {error.strerror or error}; the runs are kept, largemargin report {out} goes on"
        ) from error
    return rows
