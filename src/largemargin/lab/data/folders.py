"""Folders of images, a class per sub-folder: decoded into memory, or listed to be read while training."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._torchvision import import_torchvision
from ..errors import LabError
from ..files import lost_link
from ..stopping import interrupts_end_at_once
from ..words import counted
from . import duplicates, skipped
from .decode import OnImage, broken_files, decode
from .images import SPLIT_SEED, ImageSet, spread
from .second_labels import second_labels

SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}

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
    notes: tuple[str, ...] = ()  # what the user should know of the files

    def digest(self) -> str:
        """Twelve characters that change with the name or the size of any file, and with any label or class name."""
        whole, broken = hashlib.sha256(repr(self.classes).encode()), []
        for files, labels in ((self.train_files, self.train_labels), (self.test_files, self.test_labels)):
            for name in files:
                try:
                    size = os.stat(self.folder / name).st_size
                except OSError as error:
                    broken.append(f"{self.folder / name}: {error.strerror}")
                    continue
                whole.update(f"{size} {name}\0".encode(errors="surrogateescape"))
            whole.update(labels.numpy().tobytes())
        if broken:
            raise broken_files(broken, len(self.train_files) + len(self.test_files))
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


def image_folder(folder: Path, image_size: int, on_image: OnImage = lambda *_: None, labels: str = "") -> ImageSet:
    """A folder of images, class per sub-folder: ``train/`` with ``test/`` or ``val/``, else a stratified fifth is held out.

    Each image is decoded to RGB as a viewer shows it, its shorter side resized to ``image_size`` and its centre cropped. ``labels`` is a
    file with other training labels.
    """
    files = listed_folder(folder, labels)
    decoded = decode(files.folder, files.train_files + files.test_files, image_size, on_image)
    at = len(files.train_files)
    notes = list(files.notes)
    if decoded.turned:
        notes.append(f"{counted(decoded.turned, 'image')} turned upright, as the EXIF orientation says")
    if decoded.transparent:
        notes.append(f"{counted(decoded.transparent, 'image')} with transparency laid on white")
    if decoded.cut:
        notes.append(f"{counted(decoded.cut, 'file')} of several frames or pages: only the first was read")
    notes += duplicates.warning(duplicates.in_both(decoded.digests[:at], decoded.digests[at:]), len(files.test_files))
    return ImageSet(
        decoded.images[:at], files.train_labels, decoded.images[at:], files.test_labels, files.classes, tuple(notes), files.test_files
    )


def streamed_folder(folder: Path, labels: str = "") -> FileSet:
    """The same folder with its images left in their files."""
    files = listed_folder(folder, labels)
    try:
        found = duplicates.files_in_both(folder, files.train_files, files.test_files)
    except OSError:
        return files  # a file that cannot be read: digest() names all of them
    return replace(files, notes=(*files.notes, *duplicates.warning(found, len(files.test_files))))


def listed_folder(folder: Path, labels: str = "") -> FileSet:
    """The files of such a folder, with notes on what it holds beside them."""
    files = _listed(folder)
    if not labels:
        return files
    new = second_labels(Path(labels).expanduser(), folder, files.classes, files.train_files, files.test_files)
    changed = int((new != files.train_labels).sum())
    note = f"{changed} of {counted(len(new), 'training label')} differ from the folders ({100 * changed / len(new):.1f}%), as {labels} says"
    return replace(files, train_labels=new, notes=(*files.notes, note))


def _listed(folder: Path) -> FileSet:
    if not folder.is_dir():
        raise LabError(
            f"data {folder}: {lost_link(folder) or 'no such folder'}; give a name that --help lists, or a folder with one sub-folder "
            "of images a class"
        )
    held_out = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and held_out is not None:
        return _split_folder(folder, held_out, _classes_of)
    parts = sorted(entry.name for entry in folder.iterdir() if entry.name.lower() in SPLIT_NAMES)
    if parts:
        raise LabError(f"data {folder}: {', '.join(parts)} looks like a part of a split; name the parts train/ and test/ (or val/)")
    classes, files, notes = _list_images(folder, "", _classes_of)
    train, test = _hold_out_a_fifth(folder, files, classes)
    return _file_set(folder, classes, train, test, notes)


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
    classes, train, notes = _list_images(folder, "train", classes_of)
    test_classes, test, test_notes = _list_images(folder, held_out, classes_of)
    if test_classes != classes:
        differing = sorted(set(classes) ^ set(test_classes))
        rest = f" and {len(differing) - 10} more" if len(differing) > 10 else ""
        raise LabError(f"data {folder}: the classes of {held_out}/ differ from those of train/: {', '.join(differing[:10])}{rest}")
    ignored = skipped.beside(folder, ("train", held_out))
    if ignored:
        notes = [f"{ignored} not read: training images are those of train/, test images those of {held_out}/", *notes]
    return _file_set(folder, classes, train, test, notes + test_notes)


def _file_set(folder: Path, classes: tuple[str, ...], train: Labelled, test: Labelled, notes: list[str]) -> FileSet:
    (train_files, train_labels), (test_files, test_labels) = (zip(*part, strict=True) for part in (train, test))
    return FileSet(folder, train_files, torch.tensor(train_labels), test_files, torch.tensor(test_labels), classes, tuple(notes))


def _classes_of(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _nested_classes_of(folder: Path) -> tuple[str, ...]:
    """Every folder that itself holds images, by its path under ``folder``."""
    found = {os.path.dirname(name) for name in skipped.walk(folder, is_image)[0]}
    return tuple(sorted(Path(name).as_posix() for name in found if name))


def is_image(name: str) -> bool:
    """Whether the suffix of a file is one of those that are read."""
    return name.lower().endswith(tuple(import_torchvision().datasets.folder.IMG_EXTENSIONS))


def _list_images(folder: Path, part: str, classes_of: Any) -> tuple[tuple[str, ...], Labelled, list[str]]:
    """The classes of a part, every image in it with its label, in a fixed order, and what is left out."""
    whole = folder / part
    classes: tuple[str, ...] = classes_of(whole)
    if len(classes) < 2:
        raise LabError(
            f"data {whole}: found {counted(len(classes), 'sub-folder')}, need at least 2: one for each class, with its images inside"
        )
    labelled, left_out, read, inside = [], {}, {}, {}
    for label, name in enumerate(classes):
        images, others = skipped.walk(whole / name, is_image)
        if not images:
            extensions = " ".join(import_torchvision().datasets.folder.IMG_EXTENSIONS)
            there = f", but {skipped.amounts(others)}" if others else ""
            raise LabError(f"data {whole}: the class folder {name} holds no image ({extensions}){there}")
        labelled += [(os.path.join(part, name, image), label) for image in images]
        place = os.path.join(part, name)
        left_out[place], read[place] = others, len(images)
        inside[place] = {os.path.basename(os.path.dirname(image)) for image in images} - {""}
    notes = _of_a_wrong_level(inside) + skipped.lines_of(left_out, read)
    unused = skipped.beside(whole, {name.split("/")[0] for name in classes})  # those of Places are nested
    if unused:
        notes.append(f"{unused} beside the class folders{f' of {part}/' if part else ''} not read")
    return classes, labelled, notes


def _of_a_wrong_level(inside: Mapping[str, Collection[str]]) -> list[str]:
    """A warning where folders in class folders have the same names, ``seg_train/cat`` and ``seg_test/cat`` say: they may be the classes."""
    known = Counter(name for names in inside.values() for name in names)
    shared = sorted(name for name, count in known.items() if count > 1)
    nested = [place for place, names in inside.items() if len(set(names).intersection(shared)) > 1]
    if len(nested) < 2:
        return []
    return [
        f"warning: {_few(nested)} are taken for classes, and hold folders of the same names ({_few(shared)}): if those are the classes, "
        "give the folder that holds them, or name the parts of the data set train/ and test/"
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _hold_out_a_fifth(folder: Path, files: Labelled, classes: tuple[str, ...]) -> tuple[Labelled, Labelled]:
    with interrupts_end_at_once():
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
