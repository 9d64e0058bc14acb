"""Data sets, the seeded ways to make them harder, and what the training loop is fed of them."""

from pathlib import Path

import torch

from ..recipe import Recipe
from ..words import counted
from .archives import ARCHIVED, archived
from .decode import OnImage
from .degrade import Rows, check_shares, choose_rows, load_rows, pollute_labels, samples_used, save_rows, subsample
from .feeds import Batch, Feed, InMemory
from .folders import STREAMED, FileSet, image_folder, streamed_folder, streamed_set
from .images import ImageSet, channel_moments, digits
from .streams import Streamed

__all__ = [
    "NAMED",
    "Batch",
    "Feed",
    "FileSet",
    "ImageSet",
    "InMemory",
    "Rows",
    "Streamed",
    "channel_moments",
    "check_shares",
    "choose_rows",
    "digits",
    "feed_of",
    "image_folder",
    "load",
    "load_rows",
    "pollute_labels",
    "save_rows",
    "sizes",
    "subsample",
]

NAMED = ("digits", *ARCHIVED, *STREAMED)  # what --data can be beside a folder


def load(data: str, data_root: str, image_size: int, streamed: bool = False, on_image: OnImage = lambda *_: None) -> ImageSet | FileSet:
    """The data set called ``data``, one of :data:`NAMED` or the path of an image folder, which ``streamed`` leaves in its files.

    ``on_image`` hears how many images of how many are decoded.
    """
    if data == "digits":
        return digits()
    if data in ARCHIVED:
        return archived(data, Path(data_root).expanduser())
    if data in STREAMED:
        return streamed_set(data, Path(data_root).expanduser())
    folder = Path(data).expanduser()
    return streamed_folder(folder) if streamed else image_folder(folder, image_size, on_image)


def sizes(recipe: Recipe, images: ImageSet | FileSet) -> str:
    """How many images a run has, in words."""
    whole = len(images.train_labels)
    used = samples_used(whole, recipe.train_fraction)
    training = str(whole) if used == whole else f"{used} of {whole}"
    return f"{recipe.data}: {training} training and {counted(len(images.test_labels), 'test image')} of {len(images.classes)} classes"


def feed_of(recipe: Recipe, data: ImageSet | FileSet, device: torch.device, rank: int = 0, world: int = 1) -> Feed:
    """The feed of a run, for process ``rank`` of ``world``."""
    if isinstance(data, FileSet):
        return Streamed(recipe, data, device, rank, world)
    return InMemory(recipe, data, device, rank, world)
