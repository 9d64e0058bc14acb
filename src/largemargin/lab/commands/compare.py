"""``largemargin compare``: the same network under several losses and seeds on the same data; which is better, and by how much."""

import dataclasses
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from rich.console import Console

from .. import data
from ..arguments.options import given_fields, path_of, plain
from ..comparison.folder import check_folder, device_of, finished_records, reopen, write_marker
from ..comparison.plan import Comparison
from ..comparison.table import Row
from ..data.features import FeatureSet
from ..data.human_labels import human_labels
from ..data.images import ImageSet
from ..data.samples import Samples, noun_of
from ..errors import LabError
from ..models import DEFAULT, DEFAULT_OF_FEATURES, OF_FEATURES, build, check_input, check_name
from ..models.weights import weights_digest
from ..queue.attempt import decoded_images
from ..queue.budget import Budget
from ..queue.runs import default_jobs
from ..run.environment import check_device
from ..run.features import check_features
from ..run.methods import check_settings
from ..run.model import input_of
from ..run.noise import HUMAN, parsed
from ..run.recipe import Recipe, unread
from ..run.rows import check_shares, sizes
from . import own
from .asked import given_save, what_is_kept
from .comparing import as_json, do_runs, print_and_write, say_if_other
from .estimate import how_long
from .next import next_command
from .progress import given_budget, given_jobs, reading_images
from .screen import print_json
from .seeds import seeds_of


def run(options: Any, console: Console) -> None:
    if options.train is not None:
        own.run(options, console)
        return
    if options.reuse:
        raise LabError("--reuse is for --train; leave it out: the runs on images are kept as it is")
    for name in ("losses", "lam", "seeds", "label_noise"):
        if not isinstance(options[name], list) or not options[name]:
            raise LabError(f"--{name.replace('_', '-')} needs a list of at least one value, got {options[name]!r}")
    for name in ("data", "data_root", "validation_fraction", "out", "executor"):
        if options[name] is None:
            raise LabError(f"--{name.replace('_', '-')} needs a value, got none")
    network = options.network or default_network(options.data)
    check_name(network)
    if not isinstance(options.recipe, Namespace):
        raise LabError(f"recipe: in the --config file needs fields with their values, got {options.recipe!r}")
    names = ("data", "data_root", "image_size", "validation_fraction", "epochs", "train_fraction", "long_tail", "labels", "target")
    settings: dict[str, Any] = {name: options[name] for name in names} | {"unverified": bool(options.unverified), "network": network}
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
        **({"timeout": float(options.timeout)} if options.timeout is not None else {}),
    )
    if options.json:
        out = path_of(options.out)
        print_json(as_json(reopen(out), rows, out))


def default_network(name: str) -> str:
    """That of a data set; the network of features is another than that of images."""
    return DEFAULT_OF_FEATURES if data.holds_features(name) else DEFAULT


def check_network(recipe: Recipe, images: Samples) -> None:
    """Refuse a network that does not take these samples, weights that are not its own, and settings of images for features."""
    in_channels, size = input_of(recipe, images)
    check_input(recipe.network, size)
    if isinstance(images, FeatureSet):
        check_features(recipe)
    build(recipe, in_channels, len(images.classes))


def unread_options(comparison: Comparison) -> list[str]:
    """A line for each option that was given and changes nothing."""
    lines = unread(comparison.example, comparison.overrides)
    if not comparison.choosing and comparison.validation_fraction != Comparison.validation_fraction:
        share = f"validation_fraction {comparison.validation_fraction:g}"
        lines.append(f"warning: {share} changes nothing: it is for a choice among several lam")
    return lines


def prepared(comparison: Comparison, out: Path, console: Console, save: bool) -> tuple[Comparison, Samples]:
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
    say_if_other(comparison, out, console)
    if HUMAN in comparison.label_noise:
        human_labels(Path(comparison.data_root).expanduser(), images.train_labels)  # it is there, and of these images
    for recipe in (comparison.example, *comparison.validating_recipes()[:1]):
        check_shares(recipe, len(images.train_labels), len(images.classes), noun_of(images))
    console.print(sizes(comparison.example, images), markup=False, highlight=False)
    if isinstance(images, FeatureSet):
        console.print(f"network: {comparison.network} ({' or '.join(OF_FEATURES)})", markup=False, highlight=False)
    for note in [*images.notes, *unread_options(comparison)]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if len(images.classes) == 2:
        console.print("with two classes the large-margin regulariser is 0: lam changes nothing", highlight=False)
    decoded = decoded_images(comparison.example, out / "runs")
    try:
        write_marker(comparison, out)
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

    ``jobs`` runs at a time, None: as many as suit the device; with a ``budget``, only what it allows. ``options`` are ``timeout`` and those
    of :func:`~largemargin.lab.run.train.train`.
    """
    comparison, images = prepared(comparison, out, console, bool(options.get("save")))
    jobs = jobs or default_jobs(comparison.device, comparison.example.streamed, on_cpu=2)
    if budget is None and executor == "local" and not console.quiet:  # a budget measures by itself; a cluster may have any machines
        line = how_long(comparison.all_recipes(), images, out / "runs", jobs, bool(options.get("graph", True)))
        if line is not None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    del images  # the runs are other processes
    try:
        comparison, failed = do_runs(comparison, out, jobs, console, executor, budget, **options)
    finally:
        decoded_images(comparison.example, out / "runs").unlink(missing_ok=True)
    rows = print_and_write(comparison, out, console, choices_too=False, failed=failed)
    console.print(
        f"{out / 'report.html'}  this table with figures; results.csv has a line for each run, runs/ a record",
        markup=False,
        highlight=False,
    )
    for line in next_command(rows, finished_records(comparison, out)[1], out / "runs"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for error in failed:
        raise error
    return rows
