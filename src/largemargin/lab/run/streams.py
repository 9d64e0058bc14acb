"""Images read from their files while training, by worker processes: ImageNet, Places-365 and other large folders.

Every image's augmentation is drawn from the seed, the epoch and its index, so any number of workers, and an epoch that is resumed in its
middle, give the same images.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from .._torchvision import import_torchvision
from ..data.decode import read_image
from ..data.features import FeatureSet
from ..data.folders import FileSet
from ..data.samples import Samples
from ..errors import LabError
from .features import InMemoryFeatures
from .feeds import Batch, Feed, InMemory, order_of, own_rows, share_of
from .pixels import Pixels
from .recipe import Recipe
from .rows import choose_rows
from .seeds import seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training images, in [0, 1]
LIGHTING_STD = 0.1
EIGENVALUES = (0.2175, 0.0188, 0.0045)  # of the covariance of ImageNet's colours
EIGENVECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))  # its columns
WORKERS = max(1, min(16, (os.cpu_count() or 1) - 1))  # of all processes on a machine

Place = tuple[int, int]  # an epoch, and a sample's place in a dataset


class Lighting(torch.nn.Module):
    """Shifts the colour of an image along the principal axes of ImageNet's colours (Krizhevsky et al., 2012)."""

    def forward(self, image: Tensor) -> Tensor:
        strength = torch.randn(3) * LIGHTING_STD * torch.tensor(EIGENVALUES)
        return image + (torch.tensor(EIGENVECTORS) @ strength).view(3, 1, 1)


def training_transform(recipe: Recipe) -> Any:
    """From a PIL image to a normalized tensor, at random."""
    v2 = import_torchvision().transforms.v2
    if recipe.augmentation == "inception":
        colours = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
        return v2.Compose(
            [v2.RandomResizedCrop(recipe.image_size), v2.RandomHorizontalFlip(), colours, *_to_float(), Lighting(), _normalize()]
        )
    border = {"padding_mode": "reflect"} if recipe.crop_fill == "reflect" else {"fill": tuple(int(255 * mean) for mean in MEAN)}
    moved = [v2.RandomCrop(recipe.image_size, padding=recipe.crop_padding, **border)] if recipe.crop_padding else []
    return v2.Compose([*_centre(recipe), *moved, *([v2.RandomHorizontalFlip()] if recipe.flip else []), *_to_float(), _normalize()])


def evaluation_transform(recipe: Recipe) -> Any:
    """From a PIL image to a normalized tensor: its middle, 224 of 256 pixels of its shorter side."""
    return import_torchvision().transforms.v2.Compose([*_centre(recipe), *_to_float(), _normalize()])


def _centre(recipe: Recipe) -> list[Any]:
    v2 = import_torchvision().transforms.v2
    return [v2.Resize(resized(recipe)), v2.CenterCrop(recipe.image_size)]


def resized(recipe: Recipe) -> int:
    """The pixels of the shorter side before the crop."""
    return round(recipe.image_size * 256 / 224)


def pixels_of(recipe: Recipe) -> Pixels:
    """What :func:`evaluation_transform` does."""
    size = recipe.image_size
    return Pixels((size, size), resized(recipe), tuple(255 * mean for mean in MEAN), tuple(255 * std for std in STD))


def _to_float() -> list[Any]:
    v2 = import_torchvision().transforms.v2
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]


def _normalize() -> Any:
    return import_torchvision().transforms.v2.Normalize(MEAN, STD)


class ImageFiles(Dataset[Any]):
    """Item ``(epoch, place)``: an image and its label, or the error that says why there is none."""

    def __init__(
        self,
        data: FileSet,
        files: Sequence[str],
        labels: Tensor,
        indices: Tensor,
        recipe: Recipe,
        make_transform: Callable[[Recipe], Callable[[Any], Tensor]],
    ) -> None:
        self.folder, self.files, self.labels, self.indices = data.folder, files, labels, indices
        self.recipe, self.make_transform = recipe, make_transform

    @functools.cached_property
    def transform(self) -> Callable[[Any], Tensor]:
        """Each worker makes its own: to unpickle one would import torchvision past ``import_torchvision``."""
        return self.make_transform(self.recipe)

    def __getitem__(self, where: Place) -> tuple[Tensor, int] | LabError:
        epoch, place = where
        index = int(self.indices[place])
        try:
            image = read_image(self.folder / self.files[index]).image
        except LabError as error:
            return error  # raised in the training process: a worker's exception would come with its traceback as its text
        state = torch.get_rng_state()  # torchvision draws from the global generator
        torch.default_generator.manual_seed(seeded(self.recipe.seed, "augmentation", epoch, index).initial_seed())
        try:
            return self.transform(image), int(self.labels[place])
        finally:
            torch.set_rng_state(state)


class Places(Sampler[list[Place]]):
    """Batches of places, set anew before each pass, so that the workers live on."""

    def __init__(self) -> None:
        self.batches: list[list[Place]] = []

    def __iter__(self) -> Iterator[list[Place]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _collate(items: list[Any]) -> Any:
    broken = next((item for item in items if isinstance(item, LabError)), None)
    if broken is not None or not items:
        return broken
    images, labels = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels)


class Streamed:
    """Image files, read and augmented by ``workers`` processes; none: by the training process itself."""

    def __init__(
        self, recipe: Recipe, data: FileSet, device: torch.device, rank: int = 0, world: int = 1, workers: int | None = None
    ) -> None:
        self.recipe, self.device, self.rank, self.world = recipe, device, rank, world
        self.workers = max(1, WORKERS // world) if workers is None else workers
        self.classes, self.in_channels, self.image_size = data.classes, 3, recipe.image_size
        self.pixels = pixels_of(recipe)
        self.rows = choose_rows(recipe, data.train_labels, len(data.classes))
        self.split = "validation" if recipe.validation_fraction else "test"
        if self.split == "test":
            files, labels, indices = data.test_files, data.test_labels, torch.arange(len(data.test_labels))
        else:
            files, labels, indices = data.train_files, self.rows.validation_labels, self.rows.validation
        self.num_held_out = len(labels)
        training = ImageFiles(data, data.train_files, self.rows.training_labels, self.rows.training, recipe, training_transform)
        self._training = self._loader(training)
        self._held_out = self._loader(ImageFiles(data, files, labels, indices, recipe, evaluation_transform))

    def training(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order = order_of(self.recipe, len(self.rows.training), epoch)
        batches = torch.split(order, self.recipe.batch_size)[first_step:]
        own = [[(epoch, place) for place in batch[own_rows(self.rank, self.world)].tolist()] for batch in batches]
        for batch, (images, target) in zip(batches, self._read(self._training, own), strict=True):
            yield Batch(images, target, len(batch))

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        share = torch.arange(self.num_held_out)[share_of(self.num_held_out, self.rank, self.world)]
        if len(share):
            batches = torch.split(share, -(-self.recipe.batch_size // self.world))
            yield from self._read(self._held_out, [[(0, place) for place in batch.tolist()] for batch in batches])

    def _loader(self, dataset: ImageFiles) -> tuple[Places, DataLoader[Any]]:
        places = Places()
        loader = DataLoader(
            dataset,
            batch_sampler=places,
            collate_fn=_collate,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else each pass would draw from the global one
        )
        return places, loader

    def _read(self, loader: tuple[Places, DataLoader[Any]], batches: list[list[Place]]) -> Iterator[tuple[Tensor, Tensor]]:
        places, whole = loader
        places.batches = batches
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        size = self.recipe.image_size
        for item in whole:
            if isinstance(item, LabError):
                raise item
            images, target = item if item is not None else (torch.empty(0, 3, size, size), torch.empty(0, dtype=torch.int64))
            yield images.to(self.device, non_blocking=True, memory_format=layout), target.to(self.device, non_blocking=True)


def feed_of(recipe: Recipe, data: Samples, device: torch.device, rank: int = 0, world: int = 1) -> Feed:
    """The feed of a run, for process ``rank`` of ``world``."""
    if isinstance(data, FileSet):
        return Streamed(recipe, data, device, rank, world)
    if isinstance(data, FeatureSet):
        return InMemoryFeatures(recipe, data, device, rank, world)
    return InMemory(recipe, data, device, rank, world)
