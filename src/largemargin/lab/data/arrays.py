"""Arrays in a file of numpy: ``--data FILE.npz``."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LabError
from ..stopping import interrupts_end_at_once
from .images import SPLIT_SEED, ImageSet

Array = np.ndarray[Any, np.dtype[Any]]
KEYS = "train_x, train_y, test_x and test_y, or x and y with an optional split"


def image_arrays(path: Path) -> ImageSet:
    """Images of a file with the keys :data:`KEYS`; others are ignored, and nothing of the file is executed.

    Images are uint8, ``(N, H, W)`` in grey, ``(N, H, W, C)`` or ``(N, C, H, W)`` with 1 or 3 channels. Labels are integers or names.
    ``split`` has a word a sample, train or test. Without it, a stratified fifth is held out.
    """
    parts = read_parts(path)
    classes, labels = labels_of(path, parts[1], parts[3])
    images = [_images(path, name, part) for name, part in (("train_x", parts[0]), ("test_x", parts[2]))]
    if images[0].shape[1:] != images[1].shape[1:]:
        raise LabError(f"data {path}: training images are {tuple(images[0].shape[1:])}, test images {tuple(images[1].shape[1:])}")
    return ImageSet(images[0], labels[0], images[1], labels[1], classes)


def read_parts(path: Path) -> tuple[Array, Array, Array, Array]:
    """The arrays ``train_x, train_y, test_x, test_y`` of the file, whichever keys it has."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("train_x", "train_y", "test_x", "test_y", "x", "y", "split") if name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise LabError(f"data {path}: it cannot be read as an npz file without pickled objects ({error})") from error
    if {"train_x", "train_y", "test_x", "test_y"} <= found.keys():
        parts = (found["train_x"], found["train_y"], found["test_x"], found["test_y"])
    elif {"x", "y"} <= found.keys():
        _same_length(path, "y", found["y"], found["x"])
        training, testing = _split(path, found)
        parts = (found["x"][training], found["y"][training], found["x"][testing], found["y"][testing])
    else:
        raise LabError(f"data {path}: it has the keys {', '.join(sorted(found)) or 'of nothing known'}; expected {KEYS}")
    for name, labels, values in (("train_y", parts[1], parts[0]), ("test_y", parts[3], parts[2])):
        _same_length(path, name, labels, values)
        if not len(labels):
            raise LabError(f"data {path}: {name} holds no sample")
    return parts


def labels_of(path: Path, *arrays: Array) -> tuple[tuple[str, ...], list[Tensor]]:
    """The classes in order, and for each array its labels as indices; every class must have a training sample."""
    kinds = {array.dtype.kind for array in arrays}
    if not kinds <= set("iu") and not kinds <= set("US"):
        raise LabError(f"data {path}: labels must be integers or names, got {', '.join(str(array.dtype) for array in arrays)}")
    names = np.unique(np.concatenate(arrays))
    missing = np.setdiff1d(names, arrays[0])
    if len(missing):
        raise LabError(f"data {path}: class {missing[0]} has test samples and no training sample")
    if len(names) < 2:
        raise LabError(f"data {path}: found {len(names)} class, need at least 2")
    words = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    return words, [torch.from_numpy(np.searchsorted(names, array).astype(np.int64)) for array in arrays]


def _split(path: Path, found: dict[str, Array]) -> tuple[Array, Array]:
    """The indices of both parts."""
    if "split" in found:
        words = np.char.lower(found["split"].astype(str))
        _same_length(path, "split", words, found["y"])
        others = sorted(set(words.tolist()) - {"train", "test"})
        if others:
            raise LabError(f"data {path}: split holds {others[0]!r}; expected train or test for each sample")
        return np.flatnonzero(words == "train"), np.flatnonzero(words == "test")
    with interrupts_end_at_once():
        from sklearn.model_selection import train_test_split

    try:
        training, testing = train_test_split(np.arange(len(found["y"])), test_size=0.2, stratify=found["y"], random_state=SPLIT_SEED)
    except ValueError as error:
        raise LabError(f"data {path}: a fifth of every class cannot be held out ({error}); add samples, or a split") from error
    return np.sort(training), np.sort(testing)


def _same_length(path: Path, name: str, values: Array, samples: Array) -> None:
    if values.ndim != 1 or not samples.ndim or len(values) != len(samples):
        raise LabError(f"data {path}: {name} has the shape {values.shape}, expected a value for each of the {len(samples)} samples")


def _images(path: Path, name: str, pixels: Array) -> Tensor:
    shape = pixels.shape
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise LabError(f"data {path}: {name} is {pixels.dtype} {shape}; images are uint8 with 3 or 4 dimensions")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    elif shape[1] not in (1, 3):
        raise LabError(f"data {path}: {name} has the shape {shape}; expected (N, H, W, C) or (N, C, H, W) with 1 or 3 channels")
    if pixels.shape[2] != pixels.shape[3]:
        raise LabError(f"data {path}: images are {pixels.shape[2]} x {pixels.shape[3]}; the networks take square ones")
    return torch.from_numpy(np.ascontiguousarray(pixels))
