"""Other labels for the training images of a folder: ``--labels FILE.csv``."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LabError
from ..words import counted


def second_labels(path: Path, folder: Path, classes: Sequence[str], train_files: Sequence[str], test_files: Sequence[str]) -> Tensor:
    """The labels (N,) that a CSV file with the columns ``image`` and ``label`` gives to ``train_files``.

    Images are named as their files lie under the folder, or under its ``train/``. Labels are names of classes.
    """
    given = _read(path)
    index = {name: i for i, name in enumerate(classes)}
    labels, missing = [], []
    for name in train_files:
        posix = Path(name).as_posix()
        label = given.pop(posix, None) or given.pop(posix.removeprefix("train/"), None)
        if label is None:
            missing.append(posix)
        elif label not in index:
            raise LabError(f"--labels {path}: {posix} has the label {label!r}, which is no class of {folder}")
        else:
            labels.append(index[label])
    if missing:
        raise LabError(f"--labels {path}: it has no label for {counted(len(missing), 'training image')}, {missing[0]} say")
    unknown = sorted(given.keys() - {Path(name).as_posix() for name in test_files})
    if unknown:
        raise LabError(f"--labels {path}: {unknown[0]} is no training image of {folder}")
    return torch.tensor(labels)


def _read(path: Path) -> dict[str, str]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"image", "label"} <= set(rows.fieldnames or ()):
                raise LabError(
                    f"--labels {path}: it has the columns {', '.join(rows.fieldnames or ()) or 'none'}; expected image and label"
                )
            found: dict[str, str] = {}
            for row in rows:
                image, label = (row["image"] or "").strip().removeprefix("./"), (row["label"] or "").strip()
                if not image or not label:
                    raise LabError(f"--labels {path}: line {rows.line_num} has no image or no label")
                if image in found:
                    raise LabError(f"--labels {path}: line {rows.line_num} names {image} a second time")
                found[image] = label
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise LabError(f"--labels {path} cannot be read as CSV: {error}") from error
    return found
