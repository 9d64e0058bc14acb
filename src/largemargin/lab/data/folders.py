"""Folders of images, a class per sub-folder: decoded into memory, or listed to be read while training."""

import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._torchvision import import_torchvision
from ..errors import LabError
from .images import SPLIT_SEED, ImageSet, spread

SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}
STREAMED = ("imagenet", "places365")  # folders of these names under --data-root, too large for memory

Labelled = list[tuple[str, int]]  # names of files under a folder, with their labels


@dataclass(frozen=True)
class FileSet:
    """Images that stay in their files: names under ``folder`` and labels (N,) int64, for training and for testing."""

    folder: Path
    train_files: tuple[str, ...]
    train_labels: Tensor
    test_files: tuple[str, ...]
    test_labels: Tensor
    classes: tuple[str, ...]

    def digest(self) -> str:
        """Twelve characters that change with the name or the size of any file, and with any label or class name."""
        whole = hashlib.sha256(repr(self.classes).encode())
        for files, labels in ((self.train_files, self.train_labels), (self.test_files, self.test_labels)):
            for name in files:
                try:
                    size = os.stat(self.folder / name).st_size
                except OSError as error:
                    raise LabError(f"cannot read the image {self.folder / name}: {error.strerror}; mend or remove it") from error
                whole.update(f"{size} {name}\0".encode(errors="surrogateescape"))
            whole.update(labels.numpy().tobytes())
        return whole.hexdigest()[:12]

    def few(self, count: int) -> "FileSet":
        """At most ``count`` samples of each split, spread over it."""
        training, testing = spread(len(self.train_labels), count), spread(len(self.test_labels), count)
        return FileSet(
            self.folder,
            self.train_files[training],
            self.train_labels[training],
            self.test_files[testing],
            self.test_labels[testing],
            self.classes,
        )


def image_folder(folder: Path, image_size: int) -> ImageSet:
    """A folder of images, class per sub-folder: ``train/`` with ``test/`` or ``val/``, else a stratified fifth is held out.

    Each image is converted to RGB, its shorter side resized to ``image_size`` and its centre cropped.
    """
    files = listed_folder(folder)
    train, test = (_decode(files.folder, names, image_size) for names in (files.train_files, files.test_files))
    return ImageSet(train, files.train_labels, test, files.test_labels, files.classes)


def listed_folder(folder: Path) -> FileSet:
    """The same folder with its images left in their files."""
    if not folder.is_dir():
        raise LabError(
            f"data {folder}: no such folder; give digits, cifar10, cifar100, svhn, imagenet, places365 or a folder with one "
            "sub-folder of images a class"
        )
    held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and held_out is not None:
        return _split_folder(folder, held_out, _classes_of)
    parts = sorted(entry.name for entry in folder.iterdir() if entry.name.lower() in SPLIT_NAMES)
    if parts:
        raise LabError(f"data {folder}: {', '.join(parts)} looks like a part of a split; name the parts train/ and test/ (or val/)")
    classes, files = _list_images(folder, "", _classes_of)
    train, test = _hold_out_a_fifth(folder, files, classes)
    return _file_set(folder, classes, train, test)


def streamed_set(name: str, root: Path) -> FileSet:
    """ImageNet or Places-365: ``train/`` and ``val/`` in ``root/name``; classes of Places may be nested (``a/abbey``)."""
    folder = root / name
    missing = [part for part in ("train", "val") if not (folder / part).is_dir()]
    if missing:
        raise LabError(
            f"data {name}: no folder {folder / missing[0]}; unpack its images as {folder}/train/CLASS/*.jpg, {folder}/val/CLASS/*.jpg, "
            "or point --data-root at the parent (largemargin data list names its archives)"
        )
    return _split_folder(folder, "val", _nested_classes_of if name == "places365" else _classes_of)


def _split_folder(folder: Path, held_out: str, classes_of: Any) -> FileSet:
    classes, train = _list_images(folder, "train", classes_of)
    test_classes, test = _list_images(folder, held_out, classes_of)
    if test_classes != classes:
        differing = sorted(set(classes) ^ set(test_classes))
        rest = f" and {len(differing) - 10} more" if len(differing) > 10 else ""
        raise LabError(f"data {folder}: the classes of {held_out}/ differ from those of train/: {', '.join(differing[:10])}{rest}")
    return _file_set(folder, classes, train, test)


def _file_set(folder: Path, classes: tuple[str, ...], train: Labelled, test: Labelled) -> FileSet:
    (train_files, train_labels), (test_files, test_labels) = (zip(*part, strict=True) for part in (train, test))
    return FileSet(folder, train_files, torch.tensor(train_labels), test_files, torch.tensor(test_labels), classes)


def _classes_of(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _nested_classes_of(folder: Path) -> tuple[str, ...]:
    """Every folder that itself holds images, by its path under ``folder``."""
    found = {os.path.dirname(name) for name in _images_under(folder)}
    return tuple(sorted(Path(name).as_posix() for name in found if name))


def _images_under(folder: Path) -> list[str]:
    """The images in a folder and the folders in it, hidden ones left out: their names under ``folder``, in a fixed order."""
    extensions = tuple(import_torchvision().datasets.folder.IMG_EXTENSIONS)
    found = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        prefix = os.path.relpath(place, folder)
        names = [name for name in files if name.lower().endswith(extensions) and not name.startswith(".")]
        found += names if prefix == "." else [os.path.join(prefix, name) for name in names]
    return sorted(found, key=lambda name: name.split(os.sep))


def _list_images(folder: Path, part: str, classes_of: Any) -> tuple[tuple[str, ...], Labelled]:
    """The classes of a part, and every image in it with its label, in a fixed order."""
    whole = folder / part
    classes: tuple[str, ...] = classes_of(whole)
    if len(classes) < 2:
        raise LabError(f"data {whole}: found {len(classes)} sub-folders, need at least 2: one for each class, with its images inside")
    labelled = []
    for label, name in enumerate(classes):
        images = _images_under(whole / name)
        if not images:
            extensions = " ".join(import_torchvision().datasets.folder.IMG_EXTENSIONS)
            raise LabError(f"data {whole}: the class folder {name} holds no image ({extensions})")
        labelled += [(os.path.join(part, name, image), label) for image in images]
    return classes, labelled


def _hold_out_a_fifth(folder: Path, files: Labelled, classes: tuple[str, ...]) -> tuple[Labelled, Labelled]:
    from sklearn.model_selection import train_test_split

    labels = [label for _, label in files]
    counts = Counter(labels)
    smallest = min(counts, key=counts.__getitem__)
    if counts[smallest] < 2 or math.ceil(len(files) / 5) < len(classes):
        raise LabError(
            f"data {folder}: too few images to hold out a fifth of every class ({classes[smallest]} has {counts[smallest]}); "
            "add images, or make train/ and test/ folders"
        )
    train, test = train_test_split(files, test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    return train, test


def read_image(path: Path) -> Any:
    """A PIL image in RGB."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); convert it to 8 bits")
            return image.convert("RGB")
    except Exception as error:  # PIL raises many types for a broken file
        reason = "empty file" if path.is_file() and path.stat().st_size == 0 else str(error) or type(error).__name__
        raise LabError(f"cannot read the image {path}: {reason}; mend or remove it") from error


def _decode(folder: Path, names: tuple[str, ...], image_size: int) -> Tensor:
    transforms = import_torchvision().transforms.v2
    transform = transforms.Compose([transforms.Resize(image_size), transforms.CenterCrop(image_size), transforms.PILToTensor()])
    images = torch.zeros((len(names), 3, image_size, image_size), dtype=torch.uint8)
    for slot, name in zip(images, names, strict=True):
        slot.copy_(transform(read_image(folder / name)))
    return images
