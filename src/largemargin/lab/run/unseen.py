"""Logits of images in files that are of no data set of a run."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data import SETS, duplicates
from ..data.decode import read_image
from ..data.folders import is_image, listed_folder
from ..data.skipped import walk
from ..errors import LabError
from ..words import counted
from .feeds import evaluated_at_once
from .model import Model
from .pixels import Pixels
from .rows import load_rows

READERS = 4  # threads that decode images


class Predicted(NamedTuple):
    """Logits (N, C) of the files that could be read, and a reason for each of the others."""

    files: list[Path]
    logits: NDArray[np.float64]
    broken: list[str]


def files_of(paths: Sequence[Path]) -> list[Path]:
    """The files named, and the images in the folders named and the folders in these; each once."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        images, _ = walk(path, is_image)
        if not images:
            raise LabError(f"IMAGES {path} is a folder without images; give a folder of .jpg, .png or other images, or name the files")
        found += [path / name for name in images]
    return list(dict.fromkeys(found))


def predict(
    model: Model, files: Sequence[Path], device: torch.device, on_image: Callable[[int, int], object] = lambda *_: None
) -> Predicted:
    """The logits of images, in batches. ``on_image`` hears how many of how many are done."""
    network, read, logits, broken = model.network.to(device), [], [], []
    pixels = model.pixels
    assert isinstance(pixels, Pixels)
    size = evaluated_at_once(model.recipe, max(pixels.image_size))
    with ThreadPoolExecutor(READERS) as readers, torch.inference_mode():
        for start in range(0, len(files), size):
            batch = files[start : start + size]
            inputs = []
            for done, (path, found) in enumerate(zip(batch, readers.map(lambda path: _input(pixels, path), batch), strict=True), start + 1):
                on_image(done, len(files))
                if isinstance(found, Tensor):
                    inputs.append(found)
                    read.append(path)
                else:
                    broken.append(found)
            if inputs:
                logits.append(network(torch.stack(inputs).to(device)).cpu().double().numpy())
    whole = np.concatenate(logits) if logits else np.empty((0, len(model.classes)))
    if not np.isfinite(whole).all():
        raise LabError(f"MODEL {model.path} gives logits that are not finite: its run has diverged; use another run")
    return Predicted(read, whole, broken)


def _input(pixels: Pixels, path: Path) -> Tensor | str:
    try:
        picture = read_image(path).image
    except LabError as error:
        return str(error)
    return pixels.of_picture(picture)


def labelled_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The images in the class folders of ``folder``, with their labels."""
    if not folder.is_dir():
        raise LabError(f"--calibrate {folder} is no folder; give one with a sub-folder of images for each class")
    known = {name.split("/")[0] for name in classes}
    unknown = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name not in known and entry.name[0] != ".")
    if unknown:
        raise LabError(
            f"--calibrate {folder} has the sub-folder {unknown[0]}, and the run has no such class ({len(unknown)} are unknown); give a "
            f"folder with sub-folders of its classes: {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
        )
    files, labels = [], []
    for label, name in enumerate(classes):
        of_class = walk(folder / name, is_image)[0] if (folder / name).is_dir() else []
        files += [folder / name / image for image in of_class]
        labels += [label] * len(of_class)
    if not files:
        raise LabError(f"--calibrate {folder} holds no images; give a folder with a sub-folder of images for each class")
    return files, labels


def trained_on(model: Model, files: Sequence[Path]) -> int | None:
    """How many of these files a run was trained on, by their bytes; None where that cannot be told, as its data are not here."""
    if model.recipe.data in SETS:
        return None
    rows = model.path.parent / "training_set.npz"
    try:
        data = listed_folder(Path(model.recipe.data).expanduser())
        used = load_rows(rows).training.tolist() if rows.is_file() else range(len(data.train_files))
        names = [data.train_files[i] for i in used]
        return duplicates.files_in_both(data.folder, names, [str(path.resolve()) for path in files])
    except (LabError, OSError, ValueError, KeyError, IndexError):  # the data are gone, or others now
        return None


def check_not_trained_on(model: Model, files: Sequence[Path]) -> str:
    """Raises LabError where the run was trained on some of the files; a warning where that cannot be told, else an empty string."""
    count = trained_on(model, files)
    if count:
        raise LabError(
            f"--calibrate: the run was trained on {count} of {counted(len(files), 'image')}, on which it is too sure; give labelled images "
            "that it has not seen"
        )
    if count is None:
        return (
            f"warning: --calibrate: whether the run was trained on these images cannot be told, because its data ({model.recipe.data}) "
            "are no folder here, or have changed; make sure that it was not"
        )
    return ""
