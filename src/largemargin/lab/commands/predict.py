"""``largemargin predict``: what the model of a run sees in new images."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from ..arguments.options import path_of
from ..errors import LabError
from ..files import write_text
from ..logits import temperature
from ..run.environment import check_device, default_device
from ..run.model import Model, load
from ..run.standard import Standard
from ..run.unseen import check_not_trained_on, files_of, labelled_files, predict
from ..run.unseen_features import predict_features
from ..words import counted
from .progress import reading_images
from .screen import Screen


def run(options: Any, console: Console) -> None:
    device = options.device or default_device()
    check_device(device)
    paths = [path_of(text) for text in options.images]
    model = load(path_of(options.model))
    if isinstance(model.pixels, Standard):
        of_features(model, model.pixels, paths, torch.device(device), options, console)
        return
    files = files_of(paths)
    said = Screen(stderr=True)  # the predictions alone are on the standard output
    scale = 1.0 if options.calibrate is None else calibrated(model, path_of(options.calibrate), torch.device(device), said)
    with reading_images(said) as on_image:
        predicted = predict(model, files, torch.device(device), on_image)
    lines = table_of(model.classes, list(map(str, predicted.files)), temperature.probabilities(predicted.logits, scale), int(options.top))
    hand_out(lines, options, f"{counted(len(predicted.files), 'image')} of {len(files)}", console)
    for reason in predicted.broken:
        said.print(reason, markup=False, highlight=False, soft_wrap=True)
    if predicted.broken:
        raise LabError(f"{len(predicted.broken)} of {counted(len(files), 'image')} could not be read; the others are predicted")


def of_features(model: Model, standard: Standard, paths: list[Path], device: torch.device, options: Any, console: Console) -> None:
    """The predictions for the samples of one file."""
    if options.calibrate is not None:
        raise LabError("--calibrate is for runs on images, and this one is on features; leave it out")
    if len(paths) != 1:
        raise LabError(f"a run on features predicts one file at a time, got {len(paths)}; give one table, or one .npz file")
    names, logits = predict_features(model, standard, paths[0], device)
    lines = table_of(model.classes, names, temperature.probabilities(logits, 1.0), int(options.top), "sample")
    hand_out(lines, options, counted(len(names), "sample"), console)


def hand_out(lines: list[list[str]], options: Any, what: str, console: Console) -> None:
    """The predictions on the terminal, or in the file of ``--out``."""
    if options.out is None:
        print_lines(lines, console)
        return
    out = path_of(options.out)
    try:
        write_text(out, csv_of(lines))
    except OSError as error:
        raise LabError(f"--out {out} cannot be written: {error.strerror or error}; choose another file") from error
    console.print(f"{out}: {what}", markup=False, highlight=False)


def calibrated(model: Model, folder: Path, device: torch.device, said: Console) -> float:
    """The temperature that labelled images ask for."""
    files, labels = labelled_files(folder, model.classes)
    if warning := check_not_trained_on(model, files):
        said.print(warning, markup=False, highlight=False, soft_wrap=True)
    with reading_images(said) as on_image:
        predicted = predict(model, files, device, on_image)
    if predicted.broken:
        raise LabError(f"--calibrate: {predicted.broken[0]}" + f" ({len(predicted.broken)} are broken)" * (len(predicted.broken) > 1))
    fitted = temperature.fit(predicted.logits, np.array(labels))
    said.print(
        f"temperature {fitted.temperature:.3f}, fitted on {counted(len(files), 'image')}: NLL {fitted.nll_before:.4f} before, "
        f"{fitted.nll_after:.4f} with it",
        markup=False,
        highlight=False,
    )
    return fitted.temperature


def table_of(
    classes: tuple[str, ...], names: list[str], probabilities: NDArray[np.float64], top: int, what: str = "file"
) -> list[list[str]]:
    """The names of the columns, then a line for each sample."""
    top = min(top, len(classes))
    columns = [what, "prediction", "probability"]
    columns += [f"{name}_{rank}" for rank in range(2, top + 1) for name in ("class", "probability")]
    best = np.argsort(-probabilities, axis=1, kind="stable")[:, :top]
    lines = [
        [name, *(text for c in order for text in (classes[c], f"{row[c]:.6g}"))]
        for name, order, row in zip(names, best, probabilities, strict=True)
    ]
    return [columns, *lines]


def csv_of(lines: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def print_lines(lines: list[list[str]], console: Console) -> None:
    columns, *rows = lines
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name.startswith("probability") else "left", overflow="fold")
    for row in rows:
        table.add_row(*(console.render_str(cell, markup=False, highlight=False, emoji=False) for cell in row))
    console.print(table)
