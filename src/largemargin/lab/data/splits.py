"""Labels as they are written, and which samples are held out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LabError
from ..stopping import interrupts_end_at_once
from .images import SPLIT_SEED

Array = np.ndarray[Any, np.dtype[Any]]


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


def split_of(path: Path, labels: Array, split: Array | None = None, or_else: str = "") -> tuple[Array, Array]:
    """The indices of the training and of the test samples: by ``split``, or else with a stratified fifth held out.

    ``or_else`` is another thing that a user may mend.
    """
    if split is not None:
        words = np.char.lower(split.astype(str))
        check_length(path, "split", words, labels)
        others = sorted(set(words.tolist()) - {"train", "test"})
        if others:
            raise LabError(f"data {path}: split holds {others[0]!r}; expected train or test for each sample")
        return np.flatnonzero(words == "train"), np.flatnonzero(words == "test")
    with interrupts_end_at_once():
        from sklearn.model_selection import train_test_split

    try:
        training, testing = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    except ValueError as error:
        fix = f"add samples or a split, or mend {or_else}" if or_else else "add samples, or a split"
        raise LabError(f"data {path}: a fifth of every class cannot be held out ({error}); {fix}") from error
    return np.sort(training), np.sort(testing)


def check_length(path: Path, name: str, values: Array, samples: Array) -> None:
    """Refuse anything but a value for each sample."""
    if values.ndim != 1 or not samples.ndim or len(values) != len(samples):
        raise LabError(f"data {path}: {name} has the shape {values.shape}, expected a value for each of the {len(samples)} samples")
