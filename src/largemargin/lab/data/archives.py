"""CIFAR-10, CIFAR-100 and SVHN: read from their published files, every one checked against its md5 first."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._torchvision import import_torchvision
from ..errors import LabError
from ..stopping import interrupts_end_at_once
from .images import ImageSet

SIDE = 32  # pixels


@dataclass(frozen=True)
class Archive:
    """A file as it is published, and the files it becomes."""

    name: str
    url: str
    md5: str
    members: tuple[tuple[str, str], ...]  # names under the data root, and their md5
    is_tar: bool  # else it is its one member


def archives_of(data: str) -> tuple[Archive, ...]:
    """The archives of CIFAR-10, CIFAR-100 or SVHN; names and sums are torchvision's."""
    cls = _class_of(data)
    if data == "svhn":
        parts = (cls.split_list[part] for part in ("train", "test"))
        return tuple(Archive(name, url, md5, ((f"{data}/{name}", md5),), is_tar=False) for url, name, md5 in parts)
    members = [*cls.train_list, *cls.test_list, (cls.meta["filename"], cls.meta["md5"])]
    named = tuple((f"{cls.base_folder}/{name}", md5) for name, md5 in members)
    return (Archive(cls.filename, cls.url, cls.tgz_md5, named, is_tar=True),)


def archives_by_hand(name: str) -> list[tuple[str, str]]:
    """The archives of a set that is given out under terms of use, and their md5."""
    datasets = import_torchvision().datasets
    if name == "imagenet":
        return [datasets.imagenet.ARCHIVE_META[part] for part in ("train", "val")]
    return [datasets.Places365._IMAGES_META[part, True] for part in ("train-standard", "val")]


def state_of(archive: Archive, root: Path) -> dict[str, str]:
    """Every member's name with ``ok``, ``missing`` or ``wrong md5``."""
    check = import_torchvision().datasets.utils.check_integrity

    def state(name: str, md5: str) -> str:
        return "missing" if not (root / name).is_file() else "ok" if check(root / name, md5) else "wrong md5"

    return {name: state(name, md5) for name, md5 in archive.members}


def archived(data: str, root: Path, unverified: bool = False) -> ImageSet:
    """CIFAR-10, CIFAR-100 or SVHN from their files under ``root``.

    With ``unverified``, other files of SVHN are read too, also from ``svhn-first``. Those of CIFAR are pickles, which may execute code.
    """
    if unverified:
        return _unverified_svhn(data, root)
    again = f"largemargin data fetch {data} --data-root {root}"
    states = {name: state for archive in archives_of(data) for name, state in state_of(archive, root).items()}
    if set(states.values()) == {"missing"}:
        raise LabError(f"data {data}: no {root / next(iter(states))}; point --data-root at its files, or get them: {again}")
    wrong = next((name for name, state in states.items() if state != "ok"), None)
    if wrong is not None:
        raise LabError(f"data {data}: {root / wrong} is missing or differs from its published md5 ({states[wrong]}); get it again: {again}")
    try:
        train, test, classes = _cifar(data, root) if data != "svhn" else _svhn(root)
        parts = [_checked(images, labels, len(classes)) for images, labels in (train, test)]
    except Exception as error:  # pickle and scipy raise many types for a broken file
        reason = str(error) or type(error).__name__
        raise LabError(f"data {data}: its files under {root} are not what {data} is: {reason}; get them again: {again}") from error
    return ImageSet(*parts[0], *parts[1], classes)


def _class_of(data: str) -> Any:
    datasets = import_torchvision().datasets
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "svhn": datasets.SVHN}[data]


def _cifar(data: str, root: Path) -> Any:
    train, test = (_class_of(data)(root, train=is_train, download=False) for is_train in (True, False))
    parts = ((torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in (train, test))
    return *parts, tuple(train.classes)


def _svhn(root: Path) -> Any:
    sets = (_class_of("svhn")(root / "svhn", split=part, download=False) for part in ("train", "test"))
    parts = ((torch.from_numpy(part.data).contiguous(), torch.from_numpy(part.labels).reshape(-1)) for part in sets)
    return *parts, tuple(str(digit) for digit in range(10))


def _unverified_svhn(data: str, root: Path) -> ImageSet:
    """Files in the format of SVHN, of whatever sum; a note names those that are not the published ones."""
    if data != "svhn":
        raise LabError(
            f"--unverified is for svhn alone: the files of {data} are pickles, which may execute code; get the published ones with "
            f"largemargin data fetch {data}"
        )
    names = [archive.members[0][0] for archive in archives_of(data)]
    folder = next((root / place for place in ("svhn", "svhn-first") if all((root / place / Path(n).name).is_file() for n in names)), None)
    if folder is None:
        raise LabError(f"data svhn: neither {root / 'svhn'} nor {root / 'svhn-first'} holds {' and '.join(Path(n).name for n in names)}")
    with interrupts_end_at_once():
        from scipy.io import loadmat
    parts = []
    for name in names:
        path = folder / Path(name).name
        try:
            content = loadmat(path, variable_names=["X", "y"])
            labels = torch.from_numpy(content["y"].astype("int64")).reshape(-1) % 10  # 10 is the digit 0
            parts.append(_checked(torch.from_numpy(content["X"].transpose(3, 2, 0, 1).copy()), labels, 10))
        except Exception as error:  # scipy raises many types for a broken file
            raise LabError(f"data svhn: {path} is not a file in the format of SVHN: {error}") from error
    published = all(state == "ok" for archive in archives_of(data) for state in state_of(archive, root).values())
    note = f"warning: the files of {folder} are not the published ones of SVHN: their md5 differs"
    return ImageSet(*parts[0], *parts[1], tuple(str(digit) for digit in range(10)), () if published and folder.name == "svhn" else (note,))


def _checked(images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected uint8 (N, 3, {SIDE}, {SIDE})")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(labels)} labels for {len(images)} images")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(f"label {int(outside[0])} is outside 0..{num_classes - 1}")
    return images, labels.long()
