"""Images in memory: uint8 tensors with labels."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically
from ..stopping import interrupts_end_at_once

SPLIT_SEED = 0  # where a data set comes without a test set, this seed, the same for every run, chooses one


@dataclass(frozen=True)
class ImageSet:
    """Images (N, channels, H, W) uint8 and labels (N,) int64, for training and for testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what the user should know of the files
    test_files: tuple[str, ...] = ()  # names of the test images under their folder; none where they come from no files

    def digest(self) -> str:
        """Twelve characters that change with any pixel, label or class name."""
        whole = hashlib.sha256(repr(self.classes).encode())
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            whole.update(repr(tuple(part.shape)).encode())
            whole.update(part.reshape(-1).numpy().data)  # not a copy of the images
        return whole.hexdigest()[:12]

    def few(self, count: int) -> "ImageSet":
        """At most ``count`` samples of each split, spread over it."""
        training, testing = spread(len(self.train_labels), count), spread(len(self.test_labels), count)
        return ImageSet(
            self.train_images[training], self.train_labels[training], self.test_images[testing], self.test_labels[testing], self.classes
        )

    def save(self, path: Path) -> None:
        write_atomically(path, lambda file: torch.save(vars(self), file))

    @classmethod
    def saved(cls, path: Path) -> "ImageSet":
        """What :meth:`save` wrote; shared in memory by the processes that read it."""
        return cls(**torch.load(path, weights_only=True, mmap=True))


def spread(num_samples: int, count: int) -> slice:
    """At most ``count`` of so many samples, evenly spaced: data sets may be sorted by class."""
    return slice(0, None, max(1, -(-num_samples // count)))


def digits(*_: object) -> ImageSet:
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, one third of them held out as test; read from no folder."""
    with interrupts_end_at_once():
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)  # stored as 0..16
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=1 / 3, stratify=bunch.target, random_state=SPLIT_SEED)
    return ImageSet(images[train], labels[train], images[test], labels[test], tuple(str(name) for name in bunch.target_names))


def channel_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation (channels,) of the pixels of each channel."""
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in images.unbind(1):
        counts = torch.zeros(256, dtype=torch.int64)
        for start in range(0, len(channel), 100):  # part by part: no other copy of the data set
            counts += torch.bincount(channel[start : start + 100].flatten(), minlength=256)
        share = counts / channel.numel()
        means.append((share * values).sum())
        stds.append((share * (values - means[-1]) ** 2).sum().sqrt())
    return torch.stack(means).float(), torch.stack(stds).float().clamp(min=1)
