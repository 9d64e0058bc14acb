"""Arrays in a file of numpy: ``--data FILE.npz``."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LabError
from ..words import listed
from .features import FeatureSet, of_arrays
from .images import ImageSet
from .splits import check_length, labels_of, split_of

Array = np.ndarray[Any, np.dtype[Any]]
KEYS = "train_x, train_y, test_x and test_y, or x and y with an optional split"
KEYS_SHOWN = 5  # in a message


def array_set(path: Path) -> ImageSet | FeatureSet:
    """Images or features of a file with the keys :data:`KEYS`; others are ignored, and nothing of the file is executed.

    Images are uint8, ``(N, H, W)`` in grey, ``(N, H, W, C)`` or ``(N, C, H, W)`` with 1 or 3 channels. Numbers with 2 dimensions are
    features. Labels are integers or names. ``split`` has a word a sample, train or test. Without it, a stratified fifth is held out.
    """
    parts = read_parts(path)
    if parts[0].ndim == parts[2].ndim == 2:
        return of_arrays(path, *parts)
    classes, labels = labels_of(path, parts[1], parts[3])
    images = [_images(path, name, part) for name, part in (("train_x", parts[0]), ("test_x", parts[2]))]
    if images[0].shape[1:] != images[1].shape[1:]:
        raise LabError(f"data {path}: training images are {tuple(images[0].shape[1:])}, test images {tuple(images[1].shape[1:])}")
    return ImageSet(images[0], labels[0], images[1], labels[1], classes)


def dimensions(path: Path) -> int | None:
    """Those of the samples, from the head of their array alone; None for a file that is none of these."""
    try:
        with zipfile.ZipFile(path) as file:
            name = next(name for name in ("train_x.npy", "x.npy") if name in file.namelist())
            with file.open(name) as array:
                version = np.lib.format.read_magic(array)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                return len(read(array)[0])
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile):
        return None


def read_parts(path: Path) -> tuple[Array, Array, Array, Array]:
    """The arrays ``train_x, train_y, test_x, test_y`` of the file, whichever keys it has."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            found = {name: file[name] for name in ("train_x", "train_y", "test_x", "test_y", "x", "y", "split") if name in names}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise LabError(f"data {path}: it cannot be read as an npz file without pickled objects ({error})") from error
    if {"train_x", "train_y", "test_x", "test_y"} <= found.keys():
        parts = (found["train_x"], found["train_y"], found["test_x"], found["test_y"])
    elif {"x", "y"} <= found.keys():
        check_length(path, "y", found["y"], found["x"])
        training, testing = split_of(path, found["y"], found.get("split"))
        parts = (found["x"][training], found["y"][training], found["x"][testing], found["y"][testing])
    else:
        raise LabError(f"data {path}: it has {_keys(names)}; expected {KEYS}")
    for name, labels, values in (("train_y", parts[1], parts[0]), ("test_y", parts[3], parts[2])):
        check_length(path, name, labels, values)
        if not len(labels):
            raise LabError(f"data {path}: {name} holds no sample")
    return parts


def _keys(names: Sequence[str]) -> str:
    """How a message calls the keys of a file."""
    if not names:
        return "no arrays"
    shown = sorted(names)[:KEYS_SHOWN]
    if len(names) > KEYS_SHOWN:
        return f"the keys {', '.join(shown)} and {len(names) - KEYS_SHOWN} more"
    return f"the {'key' if len(names) == 1 else 'keys'} {listed(shown)}"


def unlabelled(path: Path) -> Array:
    """Features (N, D) under the key ``x``, or ``test_x``, of a file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            name = next((name for name in ("x", "test_x") if name in file.files), None)
            found: Array | None = None if name is None else file[name]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise LabError(
            f"{path} cannot be read as an npz file without pickled objects ({error}); give the features under the key x"
        ) from error
    if found is None or found.ndim != 2 or found.dtype.kind not in "iufb":
        what = "no key x" if found is None else f"{name} is {found.dtype} {found.shape}"
        raise LabError(f"{path}: {what}; expected numbers with 2 dimensions, (N, D), under the key x")
    return found


def _images(path: Path, name: str, pixels: Array) -> Tensor:
    shape = pixels.shape
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4):
        raise LabError(f"data {path}: {name} is {pixels.dtype} {shape}; images are uint8 with 3 or 4 dimensions, features numbers with 2")
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif shape[3] in (1, 3):
        pixels = pixels.transpose(0, 3, 1, 2)
    elif shape[1] not in (1, 3):
        raise LabError(f"data {path}: {name} has the shape {shape}; expected (N, H, W, C) or (N, C, H, W) with 1 or 3 channels")
    if pixels.shape[2] != pixels.shape[3]:
        raise LabError(f"data {path}: images are {pixels.shape[2]} x {pixels.shape[3]}; the networks take square ones")
    return torch.from_numpy(np.ascontiguousarray(pixels))
