"""``largemargin compare``: the same network under several losses and seeds on the same data; which is better, and by how much."""

import csv
import dataclasses
import io
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import data
from .errors import LabError
from .files import write_json, write_text
from .queue import decoded_images, result_of, run_all
from .recipe import LOSSES, SYMBOLS, Recipe

BASELINE = "softmax"
MARKER = "compare.json"  # tells a folder of ours from one that is not


@dataclass(frozen=True)
class Comparison:
    """What is compared: every loss with every seed at every share of label noise."""

    data: str = "digits"
    data_root: str = "data"
    data_digest: str = ""
    image_size: int = 32
    losses: tuple[str, ...] = ("softmax", "label_smoothing", "large_margin")
    lam: float = 0.3
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    epochs: int | None = None  # None: 30 for digits, 50 elsewhere
    label_noise: tuple[float, ...] = (0.0,)
    train_fraction: float = 1.0
    device: str = "cpu"

    @property
    def is_folder(self) -> bool:
        return self.data not in ("digits", "cifar10", "cifar100")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Comparison":
        """What ``vars`` gave, also after a passage through JSON."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        return cls(**values)

    def recipes(self) -> list[Recipe]:
        """The runs, seed by seed, so that pairs are finished together."""
        shared: dict[str, Any] = {"data": self.data, "data_digest": self.data_digest, "train_fraction": self.train_fraction}
        shared["device"] = self.device
        shared["epochs"] = self.epochs if self.epochs is not None else 30 if self.data == "digits" else 50
        if self.data in ("cifar10", "cifar100"):
            shared |= {"data_root": self.data_root, "crop_padding": 4, "flip": True}
        elif self.is_folder:
            shared |= {"image_size": self.image_size, "crop_padding": self.image_size // 8, "flip": True}
        return [
            Recipe(loss=loss, seed=seed, label_noise=noise, **shared, **self.settings(loss))
            for seed in self.seeds
            for noise in self.label_noise
            for loss in self.losses
        ]

    def settings(self, loss: str) -> dict[str, Any]:
        """The numbers of a loss, as fields of its recipe."""
        return {name: self.lam if name == "lam" else value for name, value in LOSSES[loss].items()}


@dataclass(frozen=True)
class Difference:
    """The paired difference of test errors to the baseline, loss minus baseline, in percentage points."""

    mean: float
    low: float  # the ends of the 95% Student-t interval over seeds
    high: float

    @property
    def verdict(self) -> str:
        if self.high - self.low < 1e-9:  # every pair differs by the same few samples: there is no spread to judge by
            return "not told apart"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "not told apart"


@dataclass(frozen=True)
class Row:
    """One line of the table: a loss at a share of label noise, over its seeds. ``std`` is over seeds, with n - 1."""

    label: str
    loss: str
    label_noise: float
    n: int
    error: float
    error_std: float | None
    difference: Difference | None
    margin: float
    rho: float
    ece: float
    nll: float


def paired_difference(errors: dict[int, float], baseline: dict[int, float], confidence: float = 0.95) -> Difference | None:
    """The mean of ``errors - baseline`` over the seeds that both have, with its Student-t interval; None for fewer than two pairs."""
    differences = [errors[seed] - baseline[seed] for seed in errors.keys() & baseline.keys()]
    if len(differences) < 2:
        return None
    from scipy import stats

    mean = statistics.fmean(differences)
    half = stats.t.ppf((1 + confidence) / 2, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return Difference(mean, float(mean - half), float(mean + half))


def mean_or_nan(values: Sequence[float | None]) -> float:
    """The mean; NaN where a run that diverged left a null."""
    return statistics.fmean(float("nan") if value is None else value for value in values)


def summarise(records: Sequence[dict[str, Any]]) -> list[Row]:
    """The lines of the table, in the order in which losses and noise first come."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["recipe"]["label_noise"], record["recipe"]["loss"]), []).append(record)

    def errors_by_seed(noise: float, loss: str) -> dict[int, float]:
        return {record["recipe"]["seed"]: record["test"]["error"] for record in groups.get((noise, loss), [])}

    rows = []
    for (noise, loss), group in sorted(groups.items(), key=lambda item: item[0][0]):
        errors = errors_by_seed(noise, loss)
        means = {name: mean_or_nan([record["test"][name] for record in group]) for name in ("margin", "rho", "ece", "nll")}
        rows.append(
            Row(
                label=Recipe(**group[0]["recipe"]).loss_label,
                loss=loss,
                label_noise=noise,
                n=len(errors),
                error=statistics.fmean(errors.values()),
                error_std=statistics.stdev(errors.values()) if len(errors) > 1 else None,
                difference=None if loss == BASELINE else paired_difference(errors, errors_by_seed(noise, BASELINE)),
                **means,
            )
        )
    return rows


COLUMNS = ("loss", "test error %", "minus softmax [95%]", "verdict", "margin", "rho-hat", "ECE %", "NLL")
NOTE = (
    "Test error at the last epoch, mean ± std (n-1) over seeds. The interval is of the paired difference over seeds (Student t): "
    "it covers the seeds, not the choice of test samples. One seed has no interval."
)


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a row as text, under COLUMNS."""
    error = f"{row.error:.2f}" + (f" ± {row.error_std:.2f}" if row.error_std is not None else "")
    difference, verdict = "n/a", "n/a"
    if row.loss == BASELINE:
        difference, verdict = "–", "–"
    elif row.difference is not None:
        d = row.difference
        difference, verdict = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]", d.verdict
    return (row.label, error, difference, verdict, f"{row.margin:.2f}", f"{row.rho:.2f}", f"{row.ece:.2f}", f"{row.nll:.3f}")


def print_tables(rows: Sequence[Row], console: Console) -> None:
    """A table for each share of label noise; in two parts where the terminal is narrow."""
    for noise in dict.fromkeys(row.label_noise for row in rows):
        group = [row for row in rows if row.label_noise == noise]
        seeds = sorted({row.n for row in group})
        title = f"{'-'.join(map(str, seeds))} seed{'s' if seeds != [1] else ''}" + ("; some runs are missing" if len(seeds) > 1 else "")
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


def results_csv(records: Sequence[dict[str, Any]]) -> str:
    """One line a run."""
    text = io.StringIO()
    names = ("data", "loss", *SYMBOLS, "label_noise", "train_fraction", "seed", "epochs")
    measured = ("error", "margin", "rho", "ece", "nll")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *(f"test_{name}" for name in measured), "seconds"])
    for record in records:
        values = [record["recipe"][name] for name in names] + [record["test"][name] for name in measured] + [round(record["seconds"], 2)]
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


def check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it was not built for
        raise LabError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def compare(comparison: Comparison, out: Path, jobs: int, console: Console) -> list[Row]:
    """Do what is left of the comparison, print its table, and write ``results.csv`` and ``report.html`` into ``out``."""
    check_device(comparison.device)
    check_folder(out)
    if comparison.is_folder and Path(comparison.data).expanduser().resolve() in out.resolve().parents:
        raise LabError(f"--out {out} is inside --data {comparison.data}: its runs would be taken for a class; choose a folder outside")
    images = data.load(comparison.data, comparison.data_root, comparison.image_size)  # bad data stops here, before anything is written
    comparison = dataclasses.replace(comparison, data_digest=images.digest())
    if (out / MARKER).is_file() and reopen(out) != comparison:
        console.print(f"{out} held a comparison with other options: its runs are kept, its table and report are replaced", markup=False)
    found = (
        f"{comparison.data}: {len(images.train_labels)} training and {len(images.test_labels)} test images of {len(images.classes)} classes"
    )
    console.print(found, markup=False, highlight=False)
    if len(images.classes) == 2:
        console.print("with two classes the large-margin regulariser is 0: lam changes nothing", highlight=False)
    recipes, runs = comparison.recipes(), out / "runs"
    decoded = decoded_images(recipes[0], runs)
    try:
        write_json(out / MARKER, {"largemargin": "compare", "comparison": vars(comparison)})
        if comparison.is_folder:
            images.save(decoded)
    except OSError as error:
        raise LabError(f"--out {out} cannot be written to: {error.strerror or error}; choose another folder") from error
    del images
    done = sum(result_of(recipe, runs) is not None for recipe in recipes)
    console.print(
        f"{len(recipes)} runs of {recipes[0].epochs} epochs on {comparison.data}, {jobs} at a time, into {out}"
        + (f"; {done} already done" if done else ""),
        markup=False,
    )
    try:
        records = _run_with_progress(recipes, runs, jobs, console)
    except KeyboardInterrupt:
        done = sum(result_of(recipe, runs) is not None for recipe in recipes)
        raise LabError(
            f"interrupted; {done} of {len(recipes)} runs are done and kept in {out}. The same command goes on from here."
        ) from None
    decoded.unlink(missing_ok=True)
    rows = summarise(records)
    print_tables(rows, console)
    write_results(out, comparison, records, rows)
    console.print(
        f"{out / 'report.html'}  the same with figures; results.csv has a line for each run, runs/ a record", markup=False, highlight=False
    )
    return rows


def write_results(out: Path, comparison: Comparison, records: Sequence[dict[str, Any]], rows: Sequence[Row]) -> None:
    """``results.csv``, ``report.html``, and the first figure of the report alone, ``errors.svg``."""
    from . import report  # matplotlib is slow to import: not before the runs

    try:
        write_text(out / "results.csv", results_csv(records))
        write_text(out / "errors.svg", report.overview(rows, background="white"))
        write_text(out / "report.html", report.render(comparison, records, rows))
    except OSError as error:
        raise LabError(
            f"{out} cannot be written to: {error.strerror or error}; the runs are kept, largemargin report {out} goes on"
        ) from error


def _run_with_progress(recipes: Sequence[Recipe], runs: Path, jobs: int, console: Console) -> list[dict[str, Any]]:
    """A live display on a terminal; elsewhere a line for each finished run, and one a minute."""
    finished = {recipe.id for recipe in recipes if result_of(recipe, runs) is not None}
    if not console.is_terminal:
        last = time.monotonic()
        epochs, total_epochs = 0, sum(recipe.epochs for recipe in recipes if recipe.id not in finished)

        def on_epoch(recipe: Recipe, epoch: int) -> None:
            nonlocal last, epochs
            epochs += 1
            if time.monotonic() - last > 60:
                last = time.monotonic()
                console.print(f"{epochs} of {total_epochs} epochs of all runs", markup=False, highlight=False)
            if epoch == recipe.epochs:
                finished.add(recipe.id)
                console.print(
                    f"[{len(finished)}/{len(recipes)}] {recipe.loss_label}, label noise {recipe.label_noise:g}, seed {recipe.seed}",
                    markup=False,
                )

        return run_all(recipes, runs, jobs, on_epoch)

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        total = progress.add_task("epochs of all runs", total=sum(recipe.epochs for recipe in recipes if recipe.id not in finished))
        bars: dict[str, Any] = {}
        seen: dict[str, int] = {}

        def on_epoch(recipe: Recipe, epoch: int) -> None:
            if recipe.id not in bars:
                label = f"{recipe.loss_label}, noise {recipe.label_noise:g}, seed {recipe.seed}"
                bars[recipe.id] = progress.add_task(label, total=recipe.epochs)
            progress.update(bars[recipe.id], completed=epoch)
            progress.update(total, advance=epoch - seen.get(recipe.id, 0))
            seen[recipe.id] = epoch
            if epoch == recipe.epochs:
                progress.remove_task(bars[recipe.id])

        return run_all(recipes, runs, jobs, on_epoch)


def reopen(out: Path) -> Comparison:
    """The comparison of a folder."""
    try:
        marker = json.loads((out / MARKER).read_text())
        if marker["largemargin"] != "compare":
            raise ValueError("it is of something else")
        return Comparison.from_dict(marker["comparison"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LabError(f"{out} is not the folder of a comparison: it has no readable {MARKER}") from error


def finished_records(comparison: Comparison, out: Path) -> list[dict[str, Any]]:
    """The records of the comparison's runs that are finished."""
    return [record for recipe in comparison.recipes() if (record := result_of(recipe, out / "runs")) is not None]
