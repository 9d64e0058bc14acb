"""What the training loop is fed: normalized batches, each the same function of seed, epoch and step."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..data import STREAMED
from ..data.crops import Moves, apply_moves, draw_moves
from ..data.images import ImageSet, channel_moments
from ..errors import LabError
from .pixels import Pixels
from .recipe import Recipe
from .rows import Rows, choose_rows
from .seeds import seeded
from .standard import Standard

EVALUATED_AT_ONCE = 500  # images of up to 32x32 pixels
PIXELS_AT_ONCE = EVALUATED_AT_ONCE * 32 * 32


class Batch(NamedTuple):
    """One process's share of a training batch."""

    images: Tensor  # (n, channels, H, W), or features (n, D); normalized float32
    target: Tensor  # (n,) int64
    size: int  # of the whole batch, of all processes


class Feed(Protocol):
    """The data of one run, for process ``rank`` of ``world``."""

    classes: tuple[str, ...]
    in_channels: int  # or features
    rows: Rows
    split: str  # what held_out() is of: "test", or "validation" where the recipe holds a part out
    num_held_out: int  # samples of that split, of all processes

    @property
    def image_size(self) -> int | None:
        """In pixels; None where samples are features."""

    @property
    def pixels(self) -> Pixels | Standard:
        """How a sample of the held-out set becomes an input of the network."""

    def training(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``first_step`` on; row ``i`` of a batch goes to process ``i % world``."""

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and targets of this process's contiguous share of the split, in order; all shares but the last are of equal size."""


def order_of(recipe: Recipe, num_samples: int, epoch: int) -> Tensor:
    """The order of the training samples in an epoch, the same in every process."""
    order = torch.randperm(num_samples, generator=seeded(recipe.seed, "order", epoch))
    return order[: samples_of_an_epoch(recipe, num_samples)]


def samples_of_an_epoch(recipe: Recipe, num_samples: int) -> int:
    """All, but where the last batch would be a single sample, which batch norm cannot normalise: it has its turn in other epochs."""
    alone = num_samples > recipe.batch_size > 1 and num_samples % recipe.batch_size == 1
    return num_samples - alone


def share_of(num_samples: int, rank: int, world: int) -> slice:
    """The contiguous share of one process."""
    size = -(-num_samples // world)
    return slice(min(rank * size, num_samples), min((rank + 1) * size, num_samples))


def own_rows(rank: int, world: int) -> slice:
    """The rows of a training batch of one process."""
    return slice(rank, None, world)


def evaluated_at_once(recipe: Recipe, image_size: int, world: int = 1) -> int:
    """Images in a forward pass of an evaluation: as many as a training batch of a process has where they are large, but never more than
    EVALUATED_AT_ONCE.
    """
    of_a_batch = -(-recipe.batch_size // world)
    return min(EVALUATED_AT_ONCE, max(of_a_batch, PIXELS_AT_ONCE // image_size**2))


class InMemory:
    """A data set of uint8 images, whole on the device and augmented there in batches."""

    def __init__(self, recipe: Recipe, data: ImageSet, device: torch.device, rank: int = 0, world: int = 1) -> None:
        if recipe.augmentation != "shift":
            raise LabError(
                f"augmentation {recipe.augmentation} is for image folders and {' and '.join(STREAMED)}; "
                f"{recipe.data} is augmented by shift (crop_padding, flip)"
            )
        self.recipe, self.device, self.rank, self.world = recipe, device, rank, world
        self.classes, self.in_channels = data.classes, data.train_images.shape[1]
        self.image_size = min(data.train_images.shape[2:])
        self.rows = choose_rows(recipe, data.train_labels, len(data.classes))
        self.split = "validation" if recipe.validation_fraction else "test"
        mean, std = channel_moments(data.train_images)
        height, width = data.train_images.shape[2:]
        self.pixels = Pixels((height, width), self.image_size, tuple(mean.tolist()), tuple(std.tolist()))
        self.mean, self.std = mean.to(device).view(1, -1, 1, 1), std.to(device).view(1, -1, 1, 1)
        self.fill = mean.to(device) if recipe.crop_fill == "mean" else None
        every = len(self.rows.training) == len(data.train_labels)  # then they are in their old order, and no copy is made
        self.images = (data.train_images if every else data.train_images[self.rows.training]).to(device)
        self.labels = self.rows.training_labels.to(device)
        if self.split == "test":
            held_out, target = data.test_images, data.test_labels
        else:
            held_out, target = data.train_images[self.rows.validation], self.rows.validation_labels
        self.num_held_out = len(target)
        self._ahead: dict[tuple[int, int], Tensor] = {}  # plans of epochs to come
        share = share_of(len(target), rank, world)
        self.held_out_images, self.held_out_labels = held_out[share].to(device), target[share].to(device)

    def training(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        recipe, own = self.recipe, own_rows(self.rank, self.world)
        if first_step * recipe.batch_size >= samples_of_an_epoch(recipe, len(self.labels)):
            return  # the epoch was done but for its evaluation
        plan = self._ahead.pop((epoch, first_step), None)
        plan = self.plan(epoch, first_step) if plan is None else plan
        for rows, *moves in zip(*(part.split(recipe.batch_size) for part in plan), strict=True):
            mine = rows[own]
            images = apply_moves(self.images.index_select(0, mine), Moves(*moves).of(own), recipe.crop_padding, self.fill)
            yield Batch(self.normalize(images), self.labels[mine], len(rows))
        if not self.labels.is_cpu and epoch + 1 < recipe.epochs:  # while the device is busy with the last of these batches
            self._ahead[epoch + 1, 0] = self.plan(epoch + 1)

    def plan(self, epoch: int, first_step: int = 0) -> Tensor:
        """The rows of an epoch's batches from ``first_step`` on, in order, and their :class:`Moves`: int64 (4, rows), on the device.

        All are drawn and copied at once: with a copy for each batch the device would wait for the host.
        """
        recipe = self.recipe
        batches = torch.split(order_of(recipe, len(self.labels), epoch), recipe.batch_size)[first_step:]
        # drawn for all rows of a batch, so that each row's move does not depend on how many processes share the batch
        moves = [
            torch.stack(draw_moves(len(batch), recipe.crop_padding, recipe.flip, seeded(recipe.seed, "augmentation", epoch, step)))
            for step, batch in enumerate(batches, first_step)
        ]
        plan = torch.cat([torch.cat(batches).unsqueeze(0), torch.cat(moves, dim=1)])
        return plan.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else plan.to(self.device)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = evaluated_at_once(self.recipe, self.image_size, self.world)
        for start in range(0, len(self.held_out_labels), size):
            part = slice(start, start + size)
            yield self.normalize(self.held_out_images[part]), self.held_out_labels[part]

    def normalize(self, images: Tensor) -> Tensor:
        """Float images with the mean 0 and the standard deviation 1 of each channel of the training set."""
        result = images.float().sub_(self.mean).div_(self.std)
        return result.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else result
