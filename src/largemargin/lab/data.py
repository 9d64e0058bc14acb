"""Data sets as tensors: uint8 images in memory, labels, and the seeded ways to make them harder."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ._torchvision import import_torchvision
from .errors import LabError
from .files import write_atomically

SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}
SPLIT_SEED = 0  # where a data set comes without a test set, this seed, the same for every run, chooses one


@dataclass(frozen=True)
class ImageSet:
    """Images (N, channels, H, W) uint8 and labels (N,) int64, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]

    def digest(self) -> str:
        """Twelve characters that change with any pixel, label or class name."""
        whole = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            whole.update(repr(tuple(part.shape)).encode())
            whole.update(part.numpy().tobytes())
        return whole.hexdigest()[:12]

    def save(self, path: Path) -> None:
        write_atomically(path, lambda file: torch.save(vars(self), file))

    @classmethod
    def saved(cls, path: Path) -> "ImageSet":
        """What :meth:`save` wrote; shared in memory by the processes that read it."""
        return cls(**torch.load(path, weights_only=True, mmap=True))


def load(data: str, data_root: str, image_size: int) -> ImageSet:
    """The data set called ``data``: digits, cifar10, cifar100 or the path of an image folder."""
    if data == "digits":
        return digits()
    if data in ("cifar10", "cifar100"):
        return cifar(data, Path(data_root).expanduser())
    return image_folder(Path(data).expanduser(), image_size)


def digits() -> ImageSet:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, one third of them held out as test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # stored as 0..16
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=bunch.target, random_state=SPLIT_SEED)
    return ImageSet(images[train], labels[train], images[test], labels[test], tuple(str(name) for name in bunch.target_names))


def cifar(name: str, root: Path) -> ImageSet:
    """CIFAR-10 or CIFAR-100 from the standard python batches under ``root``, checked against their published md5."""
    cls = import_torchvision().datasets.CIFAR10 if name == "cifar10" else import_torchvision().datasets.CIFAR100
    folder = root / cls.base_folder
    if not folder.is_dir():
        raise LabError(f"--data {name}: no folder {folder}; unpack {cls.filename} under --data-root, or point --data-root at its parent")
    try:
        train, test = (cls(root, train=is_train, download=False) for is_train in (True, False))
    except RuntimeError as error:
        raise LabError(
            f"--data {name}: a file in {folder} is missing or differs from its published md5; unpack {cls.filename} again"
        ) from error

    def images(part: object) -> Tensor:
        return torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()  # type: ignore[attr-defined]

    return ImageSet(images(train), torch.tensor(train.targets), images(test), torch.tensor(test.targets), tuple(train.classes))


def image_folder(folder: Path, image_size: int) -> ImageSet:
    """A folder of images, class per sub-folder: ``train/`` with ``test/`` or ``val/``, else a stratified fifth is held out.

    Each image is converted to RGB, its shorter side resized to ``image_size`` and its centre cropped.
    """
    if not folder.is_dir():
        raise LabError(f"--data {folder}: no such folder; give digits, cifar10, cifar100 or a folder with one sub-folder of images a class")
    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if (folder / "train").is_dir() and held_out is not None:
        classes, train_files = _list_images(folder / "train")
        test_classes, test_files = _list_images(held_out)
        if test_classes != classes:
            differing = ", ".join(sorted(set(classes) ^ set(test_classes)))
            raise LabError(f"--data {folder}: the classes of {held_out.name}/ differ from those of train/: {differing}")
    else:
        parts = sorted(entry.name for entry in folder.iterdir() if entry.name.lower() in SPLIT_NAMES)
        if parts:
            raise LabError(f"--data {folder}: {', '.join(parts)} looks like a part of a split; name the parts train/ and test/ (or val/)")
        classes, files = _list_images(folder)
        train_files, test_files = _hold_out_a_fifth(folder, files, classes)
    train_images, test_images = _decode(train_files, image_size), _decode(test_files, image_size)
    train_labels, test_labels = (torch.tensor([label for _, label in files]) for files in (train_files, test_files))
    return ImageSet(train_images, train_labels, test_images, test_labels, classes)


def _list_images(folder: Path) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """The classes, and every image with its label, in a fixed order."""
    extensions = import_torchvision().datasets.folder.IMG_EXTENSIONS
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if len(classes) < 2:
        raise LabError(f"--data {folder}: found {len(classes)} sub-folders, need at least 2: one for each class, with its images inside")
    files = []
    for label, name in enumerate(classes):
        found = sorted(
            path
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in extensions
            and not path.is_dir()
            and not any(part.startswith(".") for part in path.parts[len(folder.parts) :])
        )
        if not found:
            raise LabError(f"--data {folder}: the class folder {name} holds no image ({' '.join(extensions)})")
        files += [(path, label) for path in found]
    return classes, files


def _hold_out_a_fifth(
    folder: Path, files: list[tuple[Path, int]], classes: tuple[str, ...]
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    from sklearn.model_selection import train_test_split

    labels = [label for _, label in files]
    smallest = min(range(len(classes)), key=labels.count)
    if labels.count(smallest) < 2 or math.ceil(len(files) / 5) < len(classes):
        raise LabError(
            f"--data {folder}: too few images to hold out a fifth of every class ({classes[smallest]} has {labels.count(smallest)}); "
            "add images, or make train/ and test/ folders"
        )
    train, test = train_test_split(files, test_size=0.2, stratify=labels, random_state=SPLIT_SEED)
    return train, test


def _decode(files: list[tuple[Path, int]], image_size: int) -> Tensor:
    from PIL import Image

    transforms = import_torchvision().transforms.v2
    transform = transforms.Compose([transforms.Resize(image_size), transforms.CenterCrop(image_size), transforms.PILToTensor()])
    images = torch.zeros((len(files), 3, image_size, image_size), dtype=torch.uint8)
    for slot, (path, _) in zip(images, files, strict=True):
        try:
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); convert it to 8 bits")
                slot.copy_(transform(image.convert("RGB")))
        except Exception as error:  # PIL raises many types for a broken file
            reason = "empty file" if path.is_file() and path.stat().st_size == 0 else str(error) or type(error).__name__
            raise LabError(f"cannot read the image {path}: {reason}; mend or remove it") from error
    return images


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation (channels,) of the pixels of each channel."""
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256) / channel.numel()  # no float copy of the data set
        means.append((share * values).sum())
        stds.append((share * (values - means[-1]) ** 2).sum().sqrt())
    return torch.stack(means).float(), torch.stack(stds).float().clamp(min=1)


def subsample(num_samples: int, fraction: float, generator: torch.Generator) -> Tensor:
    """The indices of ``round(fraction * num_samples)`` samples, at least one, drawn without replacement; in their old order."""
    count = max(1, round(fraction * num_samples))
    return torch.randperm(num_samples, generator=generator)[:count].sort().values


def pollute_labels(labels: Tensor, noise: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """A copy in which exactly ``round(noise * len(labels))`` labels are moved, each uniformly to one of the other classes."""
    count = round(noise * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    moved = labels.clone()
    shift = torch.randint(1, num_classes, (count,), generator=generator)
    moved[chosen] = (labels[chosen] + shift) % num_classes
    return moved


def augment(images: Tensor, crop_padding: int, flip: bool, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to ``crop_padding`` pixels, with ``fill`` (channels,) at the border, and mirrored half the time."""
    n, channels, height, width = images.shape
    if crop_padding:
        padded = (
            fill.to(images.dtype).view(1, channels, 1, 1).expand(n, channels, height + 2 * crop_padding, width + 2 * crop_padding).clone()
        )
        padded[:, :, crop_padding : crop_padding + height, crop_padding : crop_padding + width] = images
        top, left = torch.randint(0, 2 * crop_padding + 1, (2, n, 1), generator=generator).to(images.device)
        rows = top + torch.arange(height, device=images.device)  # (n, height)
        columns = left + torch.arange(width, device=images.device)
        batch, channel = (
            torch.arange(n, device=images.device).view(n, 1, 1, 1),
            torch.arange(channels, device=images.device).view(1, channels, 1, 1),
        )
        images = padded[batch, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]
    if flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored.view(n, 1, 1, 1), images.flip(-1), images)
    return images
