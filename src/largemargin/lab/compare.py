"""``largemargin compare``: the same network under several losses and seeds on the same data; which is better, and by how much."""

import csv
import dataclasses
import io
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from . import data
from .asked import missing
from .budget import Budget
from .diverged import kept, verdict_of, who_diverged, why_diverged
from .environment import check_device, default_device, device_label
from .errors import LabError
from .executors.attempt import decoded_images
from .files import write_json, write_text
from .models import build, check_image, weights_digest
from .progress import interrupted, reading_images, run_with_progress, say_what_is_left
from .queue import default_jobs, result_of
from .recipe import BASELINE, LOSSES, OF_SOME_LOSSES, SYMBOLS, Recipe, check_image_size, check_settings, has_setting, suited_to, unread
from .records import check_complete
from .stopping import interrupts_end_at_once
from .words import counted

MARKER = "compare.json"  # tells a folder of ours from one that is not
Chosen = Mapping[tuple[str, float], float]  # the lam of a loss at a share of label noise


@dataclass(frozen=True)
class Comparison:
    """What is compared: every loss with every seed at every share of label noise."""

    data: str = "digits"
    data_root: str = "data"
    data_digest: str = ""
    image_size: int | None = None  # of an image folder; None: what suits it
    network: str = "small"
    losses: tuple[str, ...] = ("softmax", "label_smoothing", "large_margin")
    lam: tuple[float, ...] = (0.3,)  # of several one is chosen for each loss and share of noise, on a part of the training set
    validation_fraction: float = 0.2  # that part; nothing is held out where there is one lam
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int | None = None  # None: what suits the data
    label_noise: tuple[float, ...] = (0.0,)
    train_fraction: float = 1.0
    device: str = "cpu"
    overrides: dict[str, Any] = field(default_factory=dict)  # other fields of the recipes; of a loss only where it has them

    @property
    def is_folder(self) -> bool:
        return self.data not in data.NAMED

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Comparison":
        """What ``vars`` gave, also after a passage through JSON."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        if isinstance(values.get("lam"), float | int):  # as it was before there could be several
            values["lam"] = (values["lam"],)
        return cls(**values)

    @property
    def choosing(self) -> tuple[str, ...]:
        """The losses whose lam has to be chosen."""
        return tuple(loss for loss in self.losses if "lam" in LOSSES[loss]) if len(self.lam) > 1 else ()

    @property
    def num_runs(self) -> int:
        """Runs that measure themselves on the test set, when all are done."""
        return len(self.losses) * len(self.seeds) * len(self.label_noise)

    def validating_recipes(self) -> list[Recipe]:
        """The runs by which lam is chosen: each measures itself on a part of its training set and never sees the test set."""
        return [
            self._recipe(loss, seed, noise, lam=lam, validation_fraction=self.validation_fraction)
            for seed in self.seeds
            for noise in self.label_noise
            for loss in self.choosing
            for lam in self.lam
        ]

    def recipes(self, chosen: Chosen | None = None) -> list[Recipe]:
        """The runs compared, seed by seed, so that pairs are finished together; without those whose lam is not chosen yet."""
        runs = []
        for seed, noise, loss in itertools.product(self.seeds, self.label_noise, self.losses):
            recipe = self._recipe(loss, seed, noise, lam=self.lam[0])
            if self.choosing:  # the test set is read once
                recipe = dataclasses.replace(recipe, evaluate_every=recipe.epochs)
            if loss in self.choosing:
                if (loss, noise) not in (chosen or {}):
                    continue
                recipe = dataclasses.replace(recipe, lam=(chosen or {})[loss, noise])
            runs.append(recipe)
        return runs

    @property
    def example(self) -> Recipe:
        """One of its recipes, for what they share."""
        return self._recipe(self.losses[0], self.seeds[0], self.label_noise[0], lam=self.lam[0])

    def _recipe(self, loss: str, seed: int, noise: float, *, lam: float, **more: Any) -> Recipe:
        values: dict[str, Any] = {"data": self.data, "data_root": self.data_root, "data_digest": self.data_digest, "network": self.network}
        values |= {"label_noise": noise, "train_fraction": self.train_fraction, "device": self.device}
        values |= suited_to(self.data, self.image_size) | LOSSES[loss]
        if self.epochs is not None:
            values["epochs"] = self.epochs
        if "lam" in LOSSES[loss]:
            values["lam"] = lam
        values |= {name: value for name, value in self.overrides.items() if name not in OF_SOME_LOSSES or has_setting(loss, name)}
        return Recipe(loss=loss, seed=seed, **values | more)


@dataclass(frozen=True)
class Choice:
    """What the validating runs of a loss at a share of label noise said of each lam."""

    loss: str
    label_noise: float
    errors: dict[float, list[float]]  # lam: the validation errors of the seeds that did not diverge
    diverged: dict[float, int]  # lam: how many seeds did

    def _rank(self, lam: float) -> tuple[int, float]:
        """The smallest is the best: seeds that diverged count before errors."""
        return self.diverged[lam], round(statistics.fmean(self.errors[lam]), 9) if self.errors[lam] else 100.0

    @property
    def lam(self) -> float:
        """The one of fewest diverged seeds and least mean error; of equals the smallest."""
        return min(self.errors, key=lambda lam: (*self._rank(lam), lam))

    @property
    def ties(self) -> list[float]:
        """The other values of lam that were as good as the chosen one."""
        return [lam for lam in sorted(self.errors) if lam != self.lam and self._rank(lam) == self._rank(self.lam)]


def choose(records: Sequence[dict[str, Any]]) -> list[Choice]:
    """The choices that validating runs make, in the order in which losses and noise first come."""
    groups: dict[tuple[str, float], dict[float, list[dict[str, Any]]]] = {}
    for record in records:
        recipe = record["recipe"]
        group = groups.setdefault((recipe["loss"], recipe["label_noise"]), {})
        group.setdefault(recipe["lam"], []).append(record)
    choices = []
    for (loss, noise), by_lam in sorted(groups.items(), key=lambda item: item[0][1]):
        errors = {lam: [record["validation"]["error"] for record in kept(group)] for lam, group in by_lam.items()}
        choices.append(Choice(loss, noise, errors, {lam: len(group) - len(errors[lam]) for lam, group in by_lam.items()}))
    return choices


def chosen_of(choices: Sequence[Choice]) -> dict[tuple[str, float], float]:
    return {(choice.loss, choice.label_noise): choice.lam for choice in choices}


@dataclass(frozen=True)
class Difference:
    """The paired difference of test errors to the baseline, loss minus baseline, in percentage points."""

    mean: float
    low: float  # the ends of the 95% Student-t interval over seeds
    high: float

    @property
    def text(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def verdict(self) -> str:
        if self.high - self.low < 1e-9:  # every pair differs by the same few samples: there is no spread to judge by
            return "inconclusive"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "inconclusive"


@dataclass(frozen=True)
class Row:
    """One line of the table: a loss at a share of label noise, over its seeds. ``std`` is over seeds, with n - 1.

    Runs that diverged are counted and are in no mean; where all did, the means are NaN.
    """

    label: str
    loss: str
    label_noise: float
    n: int  # runs, with those that diverged
    diverged: int
    error: float
    error_std: float | None
    difference: Difference | None
    margin: float
    rho: float
    ece: float
    nll: float

    @property
    def verdict(self) -> str:
        return "n/a" if self.difference is None else verdict_of(self.difference.verdict, self.diverged)


def paired_difference(errors: dict[int, float], baseline: dict[int, float], confidence: float = 0.95) -> Difference | None:
    """The mean of ``errors - baseline`` over the seeds that both have, with its Student-t interval; None for fewer than two pairs."""
    differences = [errors[seed] - baseline[seed] for seed in errors.keys() & baseline.keys()]
    if len(differences) < 2:
        return None
    with interrupts_end_at_once():
        from scipy import stats

    mean = statistics.fmean(differences)
    half = stats.t.ppf((1 + confidence) / 2, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return Difference(mean, float(mean - half), float(mean + half))


def mean_or_nan(values: Sequence[float]) -> float:
    """The mean; NaN of none."""
    return statistics.fmean(values) if values else float("nan")


def summarise(records: Sequence[dict[str, Any]]) -> list[Row]:
    """The lines of the table, in the order in which losses and noise first come."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["recipe"]["label_noise"], record["recipe"]["loss"]), []).append(record)

    def errors_by_seed(noise: float, loss: str) -> dict[int, float]:
        return {record["recipe"]["seed"]: record["test"]["error"] for record in kept(groups.get((noise, loss), []))}

    rows = []
    for (noise, loss), group in sorted(groups.items(), key=lambda item: item[0][0]):
        errors = errors_by_seed(noise, loss)
        means = {name: mean_or_nan([record["test"][name] for record in kept(group)]) for name in ("margin", "rho", "ece", "nll")}
        rows.append(
            Row(
                label=Recipe(**group[0]["recipe"]).loss_label,
                loss=loss,
                label_noise=noise,
                n=len(group),
                diverged=len(group) - len(errors),
                error=mean_or_nan(list(errors.values())),
                error_std=statistics.stdev(errors.values()) if len(errors) > 1 else None,
                difference=None if loss == BASELINE else paired_difference(errors, errors_by_seed(noise, BASELINE)),
                **means,
            )
        )
    return rows


COLUMNS = ("loss", "test error %", "minus softmax [95%]", "verdict", "margin", "rho-hat", "ECE %", "NLL")
NOTE = (
    "Test error at the last epoch, mean ± std (n-1) over seeds. The interval is of the paired difference over seeds (Student t): "
    "it covers the seeds, not the choice of test samples. One seed has no interval. Runs that diverged are in no mean and no pair."
)


def spread(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a row as text, under COLUMNS."""
    difference = "n/a" if row.difference is None else row.difference.text
    verdict = row.verdict
    if row.loss == BASELINE:
        difference, verdict = "–", "–"
    error = error_text(row)
    if row.diverged == row.n:
        return (row.label, error, difference, verdict, *["n/a"] * 4)
    return (row.label, error, difference, verdict, f"{row.margin:.2f}", f"{row.rho:.2f}", f"{row.ece:.2f}", f"{row.nll:.3f}")


def error_text(row: Row) -> str:
    """Mean and spread, and how many runs diverged."""
    if row.diverged == row.n:
        return "diverged"
    return spread(row.error, row.error_std) + (f" ({row.diverged} diverged)" if row.diverged else "")


def remarks(records: Sequence[dict[str, Any]]) -> list[str]:
    """What explains a table that says less than was hoped for."""
    losses = dict.fromkeys(record["recipe"]["loss"] for record in records)
    sentences = []
    if BASELINE not in losses:
        sentences.append(f"{BASELINE} is not among the losses, so there is nothing to measure differences from; add it to --losses.")
    if len(records[0]["classes"]) == 2 and any("lam" in LOSSES[loss] for loss in losses):
        sentences.append("With two classes the large-margin regulariser is 0: lam changes nothing.")
    return sentences + who_diverged(records)


CHOICE_COLUMNS = ("loss", "label noise", "lam", "validation error %", "")


def choice_note(comparison: Comparison) -> str:
    return (
        f"lam was chosen by the error on a part of the training set ({100 * comparison.validation_fraction:g}%, held out from these runs), "
        "mean ± std (n-1) over seeds; its labels are as noisy as the others. The test set had no part in it: it is measured once, after "
        "the last epoch of the runs with the chosen lam, which train on the whole training set."
    )


def ties(choices: Sequence[Choice]) -> list[str]:
    """A sentence for each choice that could as well have been another."""
    sentences = []
    for choice in choices:
        if choice.ties:
            *first, last = [f"{lam:g}" for lam in sorted([choice.lam, *choice.ties])]
            noise = f" at label noise {choice.label_noise:g}" if choice.label_noise else ""
            name = choice.loss.replace("_", " ")
            sentences.append(
                f"lam {', '.join(first)} and {last} are equally good for {name}{noise}: the smallest was taken, and the validation error "
                "does not say that it is the best."
            )
    return sentences


def choice_cells(choices: Sequence[Choice]) -> list[tuple[str, ...]]:
    """The lines of the table of choices as text, under CHOICE_COLUMNS."""
    lines: list[tuple[str, ...]] = []
    for choice in choices:
        for lam, errors in choice.errors.items():
            error = spread(statistics.fmean(errors), statistics.stdev(errors) if len(errors) > 1 else None) if errors else "diverged"
            if errors and choice.diverged[lam]:
                error += f" ({choice.diverged[lam]} diverged)"
            name = choice.loss.replace("_", " ")
            mark = "chosen" if lam == choice.lam else "as good" if lam in choice.ties else ""
            lines.append((name, f"{choice.label_noise:g}", f"{lam:g}", error, mark))
    return lines


def print_choices(comparison: Comparison, choices: Sequence[Choice], console: Console) -> None:
    """What was chosen, and by what."""
    if not choices:
        return
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(CHOICE_COLUMNS):
        result.add_column(column, justify="left" if i in (0, 4) else "right", no_wrap=True)
    for line in choice_cells(choices):
        result.add_row(*line)
    console.print("\nthe choice of lam", style="bold", highlight=False)
    console.print(result)
    for sentence in ties(choices):
        console.print(sentence, markup=False, highlight=False)
    console.print(choice_note(comparison), style="dim")


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """A table for each share of label noise; in two parts where the terminal is narrow."""
    for noise in dict.fromkeys(row.label_noise for row in rows):
        group = [row for row in rows if row.label_noise == noise]
        seeds = sorted({row.n for row in group})
        title = counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds; some runs are missing"
        console.print(f"\nlabel noise {noise:g}, {title}", style="bold", highlight=False)
        unbounded = console.options.update(width=10_000)
        layouts = ([table(group, range(8))], [table(group, (0, 1, 2, 3)), table(group, (0, 4, 5, 6, 7))])
        for tables in layouts:
            if all(Measurement.get(console, unbounded, part).maximum <= console.width for part in tables):
                console.print(*tables)
                break
        else:  # narrower still: no number is ever cut
            for row in group:
                console.print(
                    f"{row.label}:",
                    *(f"{name} {text}," for name, text in zip(COLUMNS[1:], cells(row)[1:], strict=True)),
                    soft_wrap=True,
                    highlight=False,
                    markup=False,
                )
    console.print(NOTE, style="dim")


def table(rows: Sequence[Row], columns: Sequence[int]) -> Table:
    """These columns of the rows."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i in columns:
        width = max(len(COLUMNS[i]), *(len(cells(row)[i]) for row in rows))
        result.add_column(COLUMNS[i], justify="left" if i in (0, 3) else "right", no_wrap=True, min_width=width)
    for row in rows:
        result.add_row(*(cells(row)[i] for i in columns))
    return result


def results_csv(records: Sequence[dict[str, Any]], split: str = "test") -> str:
    """One line a run."""
    text = io.StringIO()
    names = ("data", "network", "loss", *SYMBOLS, "label_noise", "train_fraction", "seed", "epochs")
    numbers = ("error", "margin", "rho", "ece", "nll")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *(f"{split}_{name}" for name in numbers), "seconds", "diverged"])
    for record in records:
        values = [record["recipe"].get(name) for name in names] + [record[split][name] for name in numbers]
        values += [round(record["seconds"], 2), why_diverged(record)]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()


def check_folder(out: Path) -> None:
    """Say why ``out`` cannot be ours, before anything is written."""
    try:
        if out.exists() and any(out.iterdir()):
            reopen(out)
    except OSError as error:
        raise LabError(f"--out {out} cannot be used: {error.strerror or error}; choose another folder") from error
    except LabError as error:
        raise LabError(f"--out {out} holds files that are not of a comparison; choose a new or empty folder") from error


def check_network(recipe: Recipe, images: data.ImageSet | data.FileSet) -> None:
    """Refuse a network that does not take these images, or weights that are not its own."""
    in_channels, size = images.train_images.shape[1:3] if isinstance(images, data.ImageSet) else (3, recipe.image_size)
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
    :func:`~largemargin.lab.train.train`.
    """
    check_settings(comparison.losses, [*comparison.overrides, *(["lam"] if comparison.lam != Comparison.lam else [])])
    check_image_size(comparison.data, comparison.image_size)
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
        data.check_shares(recipe, len(images.train_labels), len(images.classes))
    console.print(data.sizes(comparison.example, images), markup=False, highlight=False)
    for note in [*images.notes, *unread_options(comparison)]:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if len(images.classes) == 2:
        console.print("with two classes the large-margin regulariser is 0: lam changes nothing", highlight=False)
    runs, jobs = out / "runs", jobs or default_jobs(comparison.device, comparison.example.streamed, on_cpu=2)
    decoded = decoded_images(comparison.example, runs)
    try:
        write_json(out / MARKER, {"largemargin": "compare", "comparison": vars(comparison)})
        if comparison.is_folder and isinstance(images, data.ImageSet):
            images.save(decoded)
    except OSError as error:
        raise LabError(f"--out {out} cannot be written to: {error.strerror or error}; choose another folder") from error
    del images

    def stage(recipes: list[Recipe], what: str) -> None:
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
        stage(comparison.validating_recipes(), "validating run")
        print_choices(comparison, choose(finished_records(comparison, out)[0]), console)
    chosen = chosen_of(choose(finished_records(comparison, out)[0]))
    recipes = comparison.recipes(chosen)
    if len(recipes) == comparison.num_runs:  # there was time for all choices
        stage(recipes, "run")
    decoded.unlink(missing_ok=True)
    if budget is not None:
        say_what_is_left([*(comparison.validating_recipes() if comparison.choosing else []), *recipes], runs, budget, console)
    rows = print_and_write(comparison, out, console, choices_too=False)
    console.print(
        f"{out / 'report.html'}  the same with figures; results.csv has a line for each run, runs/ a record", markup=False, highlight=False
    )
    return rows


def print_and_write(comparison: Comparison, out: Path, console: Console, choices_too: bool = True) -> list[Row]:
    """The tables, and the files of the report, of the runs that are finished."""
    with interrupts_end_at_once():
        from . import report  # matplotlib is slow to import: not before the runs

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
        write_text(out / "errors.svg", report.overview(rows, background="white"))
        write_text(out / "report.html", report.render(comparison, records, rows, choices))
    except OSError as error:
        raise LabError(
            f"{out} cannot be written to: {error.strerror or error}; the runs are kept, largemargin report {out} goes on"
        ) from error
    return rows


def device_of(out: Path) -> str:
    """The device of the comparison in a folder, whose runs can only go on there; where there is none, the default of this machine."""
    return reopen(out).device if (out / MARKER).is_file() else default_device()


def reopen(out: Path) -> Comparison:
    """The comparison of a folder."""
    try:
        marker = json.loads((out / MARKER).read_text())
        if marker["largemargin"] != "compare":
            raise ValueError("it is of something else")
        return Comparison.from_dict(marker["comparison"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(
            f"{out} is not the folder of a comparison or a reproduction: it has no readable {MARKER} or reproduce.json"
        ) from error


def finished_records(comparison: Comparison, out: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The records of the comparison's finished runs: of the validating ones, and of those compared.

    A lam is chosen when all of its validating runs are finished; runs with it are counted from then on.
    """
    validating = [(recipe, complete_record(recipe, out / "runs")) for recipe in comparison.validating_recipes()]
    unfinished = {(recipe.loss, recipe.label_noise) for recipe, record in validating if record is None}
    complete = [record for recipe, record in validating if record is not None and (recipe.loss, recipe.label_noise) not in unfinished]
    recipes = comparison.recipes(chosen_of(choose(complete)))
    return complete, [record for recipe in recipes if (record := complete_record(recipe, out / "runs")) is not None]


def complete_record(recipe: Recipe, runs: Path) -> dict[str, Any] | None:
    """The record of a finished run with all that a report needs, or None."""
    record = result_of(recipe, runs)
    if record is not None:
        try:
            check_complete(record)
        except ValueError as error:
            raise LabError(f"{runs / recipe.id / 'result.json'} is not a whole record ({error}); remove it to run it again") from error
    return record
