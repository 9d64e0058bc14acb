"""Seeded ways to make a training set harder: exact shares of it, exact numbers of wrong labels, and which samples a run uses."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.features import FeatureSet
from ..data.human_labels import human_labels
from ..data.samples import Samples, noun_of
from ..errors import LabError
from ..files import write_atomically
from ..words import counted
from . import noise
from .recipe import Recipe
from .seeds import seeded


def samples_used(num_samples: int, fraction: float) -> int:
    """How many samples a share is: at least one."""
    return max(1, round(fraction * num_samples))


def sizes(recipe: Recipe, images: Samples) -> str:
    """How many samples a run has, in words."""
    whole = len(images.train_labels)
    used = samples_used(whole, recipe.train_fraction)
    training = str(whole) if used == whole else f"{used} of {whole}"
    test = counted(len(images.test_labels), f"test {noun_of(images)}")
    width = f", {counted(images.num_features, 'feature')}" if isinstance(images, FeatureSet) else ""
    return f"{recipe.data}: {training} training and {test} of {len(images.classes)} classes{width}"


def subsample(num_samples: int, fraction: float, generator: torch.Generator) -> Tensor:
    """The indices of ``round(fraction * num_samples)`` samples, at least one, drawn without replacement; in their old order."""
    return torch.randperm(num_samples, generator=generator)[: samples_used(num_samples, fraction)].sort().values


def pollute_labels(labels: Tensor, share: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """A copy in which exactly ``round(share * len(labels))`` labels are moved, each uniformly to one of the other classes."""
    count = round(share * len(labels))
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    moved = labels.clone()
    shift = torch.randint(1, num_classes, (count,), generator=generator)
    moved[chosen] = (labels[chosen] + shift) % num_classes
    return moved


def move_to_the_next_class(labels: Tensor, share: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """A copy in which exactly ``round(share * len(labels))`` labels are moved, each to the class after its own, the last to the first."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    moved = labels.clone()
    moved[chosen] = (labels[chosen] + 1) % num_classes
    return moved


def long_tail(labels: Tensor, ratio: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """The indices of a training set with exponential class sizes, in their old order (Cui et al., 2019).

    Class ``c`` keeps ``largest * ratio ** (-c / (C - 1))`` samples, at least one and at most those that it has, drawn without replacement.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    largest = int(counts.max())
    order = torch.randperm(len(labels), generator=generator)
    kept = []
    for c in range(num_classes):
        wanted = max(1, round(largest * ratio ** (-c / max(num_classes - 1, 1))))
        kept.append(order[labels[order] == c][:wanted])
    return torch.cat(kept).sort().values


def believed_labels(recipe: Recipe, labels: Tensor, chosen: Tensor, num_classes: int) -> Tensor:
    """The labels of the chosen samples as training sees them."""
    generator = seeded(recipe.seed, "noise")
    match recipe.noise_kind:
        case None:
            return pollute_labels(labels[chosen], recipe.label_noise, num_classes, generator)
        case noise.ASYMMETRIC:
            return move_to_the_next_class(labels[chosen], recipe.label_noise, num_classes, generator)
        case noise.HUMAN:
            return human_labels(Path(recipe.data_root).expanduser(), labels)[chosen]
    raise LabError(f"noise_kind must be uniform, asymmetric or human, got {recipe.noise_kind!r}")


class Rows(NamedTuple):
    """Which samples of the training set a run uses, and the labels it believes: int64 tensors."""

    training: Tensor  # indices into the training set
    training_labels: Tensor
    validation: Tensor  # indices held out; none where the recipe holds out nothing
    validation_labels: Tensor


def choose_rows(recipe: Recipe, labels: Tensor, num_classes: int) -> Rows:
    """The subset of the recipe, with its noise, and the part of it that is held out: validation labels are as wrong as the others."""
    chosen = subsample(len(labels), recipe.train_fraction, seeded(recipe.seed, "subset"))
    if recipe.long_tail is not None:
        chosen = chosen[long_tail(labels[chosen], recipe.long_tail, num_classes, seeded(recipe.seed, "long tail"))]
    believed = believed_labels(recipe, labels, chosen, num_classes)
    held_out = torch.zeros(len(chosen), dtype=torch.bool)
    if recipe.validation_fraction:
        held_out[subsample(len(chosen), recipe.validation_fraction, seeded(recipe.seed, "validation"))] = True
        if held_out.all():
            raise LabError(
                f"validation_fraction {recipe.validation_fraction:g} of {len(chosen)} samples leaves none to train on; give less"
            )
    return Rows(chosen[~held_out], believed[~held_out], chosen[held_out], believed[held_out])


def check_shares(recipe: Recipe, num_samples: int, num_classes: int, noun: str = "image") -> None:
    """Raises LabError where the shares of the recipe leave fewer training samples than there are classes."""
    used = samples_used(num_samples, recipe.train_fraction)
    left = used - samples_used(used, recipe.validation_fraction) if recipe.validation_fraction else used
    if left < num_classes and left < num_samples:
        shares = f"train_fraction {recipe.train_fraction:g}"
        fix = "give a larger train_fraction"
        if recipe.validation_fraction:
            shares += f" less validation_fraction {recipe.validation_fraction:g}"
            fix += " or a smaller validation_fraction"
        raise LabError(
            f"{shares} of {counted(num_samples, f'training {noun}')} leaves {left}, and {num_classes} classes need at least {num_classes}; "
            f"{fix}, or add {noun}s"
        )


def save_rows(rows: Rows, path: Path) -> None:
    """``training_set.npz``: the arrays of :class:`Rows` by their names."""
    arrays = {name: part.numpy() for name, part in rows._asdict().items()}
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def load_rows(path: Path) -> Rows:
    """What :func:`save_rows` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return Rows(**{name: torch.from_numpy(arrays[name]) for name in Rows._fields})
