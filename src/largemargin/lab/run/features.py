"""The feed of a run on features: missing numbers are filled and features standardised by the run's own training samples."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..data.features import FeatureSet
from ..errors import LabError
from .feeds import Batch, order_of, own_rows, samples_of_an_epoch, share_of
from .recipe import Recipe
from .rows import choose_rows
from .standard import AT_ONCE, standard_of

OF_IMAGES = ("augmentation", "crop_padding", "crop_fill", "flip", "channels_last")  # fields of a recipe


def check_features(recipe: Recipe) -> None:
    """Raises LabError for settings that are for images alone."""
    for name in OF_IMAGES:
        value = getattr(recipe, name)
        if value != getattr(Recipe, name):
            raise LabError(f"{name} {str(value).lower()} is for images, and {recipe.data} holds features; leave it out")


class InMemoryFeatures:
    """A data set of features, whole on the device."""

    image_size = None

    def __init__(self, recipe: Recipe, data: FeatureSet, device: torch.device, rank: int = 0, world: int = 1) -> None:
        check_features(recipe)
        self.recipe, self.device, self.rank, self.world = recipe, device, rank, world
        self.classes, self.in_channels = data.classes, data.num_features
        self.rows = choose_rows(recipe, data.train_labels, len(data.classes))
        self.split = "validation" if recipe.validation_fraction else "test"
        training = data.train_features[self.rows.training]
        if self.split == "test":
            held_out, target = data.test_features, data.test_labels
        else:
            held_out, target = data.train_features[self.rows.validation], self.rows.validation_labels
        self.pixels = standard_of(training.numpy(), held_out.numpy(), data.columns)
        self.features, self.labels = self.pixels(training).to(device), self.rows.training_labels.to(device)
        self.num_held_out = len(target)
        share = share_of(len(target), rank, world)
        self.held_out_features, self.held_out_labels = self.pixels(held_out[share]).to(device), target[share].to(device)

    def training(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        recipe, own = self.recipe, own_rows(self.rank, self.world)
        if first_step * recipe.batch_size >= samples_of_an_epoch(recipe, len(self.labels)):
            return  # the epoch was done but for its evaluation
        order = order_of(recipe, len(self.labels), epoch).to(self.device)
        for rows in torch.split(order, recipe.batch_size)[first_step:]:
            mine = rows[own]
            yield Batch(self.features.index_select(0, mine), self.labels[mine], len(rows))

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.held_out_features.split(AT_ONCE), self.held_out_labels.split(AT_ONCE), strict=True)
