"""The model that a run leaves: its network, and what is needed to use it on new images. Nothing of a file is executed.

A ``model.safetensors`` holds the tensors of the network, and as metadata, each in JSON, the recipe, the classes in the order of the logits
and how an image becomes an input. The ``network.safetensors`` of an earlier version holds tensors alone: the rest is in the folder of its
run and, for the moments of the pixels, in the run's data.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import __version__
from .. import data, predictions
from ..data.features import Column, FeatureSet
from ..data.images import ImageSet, channel_moments
from ..data.samples import Samples
from ..errors import LabError
from ..files import write_atomically
from ..models import build
from .environment import commit
from .feeds import Feed
from .method import Method
from .methods import LOSSES
from .pixels import Pixels
from .recipe import Recipe
from .standard import Standard
from .streams import pixels_of

NAME, OLD_NAME = "model.safetensors", "network.safetensors"
LARGEST_IMAGE = 4096  # pixels of a side; a file that asks for more is broken


class Model(NamedTuple):
    """A trained network and what belongs to it."""

    network: nn.Module  # in eval mode, on the CPU
    pixels: Pixels | Standard  # from a PIL image, or from features, to an input
    classes: tuple[str, ...]  # in the order of the logits
    recipe: Recipe
    path: Path


class _Known(NamedTuple):
    """What a file, or a folder, says of a network."""

    recipe: Recipe
    classes: tuple[str, ...]
    pixels: Pixels | Standard


def load(model: str | Path) -> Model:
    """The model of a run; ``model`` is the run's folder, or the file in it."""
    path = file_of(Path(model).expanduser())
    tensors, metadata = _read(path)
    known = _known(path, metadata) if "recipe" in metadata else _known_of_folder(path)
    return Model(_network(path, known, tensors), known.pixels, known.classes, known.recipe, path)


def file_of(model: Path) -> Path:
    """The file of a model that is given by its folder or by itself."""
    if model.is_file():
        return model
    if not model.is_dir():
        raise LabError(f"MODEL {model} is not there; give the folder of a run, or its {NAME}")
    found = next((model / name for name in (NAME, OLD_NAME) if (model / name).is_file()), None)
    if found is not None:
        return found
    if (model / "runs").is_dir():
        raise LabError(f"MODEL {model} holds several runs; give the folder of one, {model / 'runs' / 'NAME'}")
    if (model / "result.json").is_file():
        raise LabError(
            f"MODEL {model} is a run that kept no model (--no-save, reproduce and runs that choose lam keep none); to have one, remove the "
            "folder and give the run's command again without --no-save"
        )
    raise LabError(f"MODEL {model} holds no {NAME}; give the folder of a finished run")


def has_model(folder: Path) -> bool:
    """Whether a run has left one, in this version or an earlier one."""
    return (folder / NAME).is_file() or (folder / OLD_NAME).is_file()


def save(path: Path, network: nn.Module, recipe: Recipe, feed: Feed) -> None:
    """Write the model of a run that was trained with this feed."""
    from safetensors.torch import save as safetensors_bytes

    metadata = {
        "largemargin": __version__,
        "commit": commit(),
        "recipe": recipe.to_dict(),
        "classes": feed.classes,
        "in_channels": feed.pixels.in_channels,
        **dataclasses.asdict(feed.pixels),
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    content = safetensors_bytes(tensors, {name: json.dumps(value) for name, value in metadata.items()})
    write_atomically(path, lambda file: file.write(content))


def input_of(recipe: Recipe, images: Samples) -> tuple[int, int | None]:
    """The channels and the size in pixels of a network's input; the number of features and None."""
    if isinstance(images, FeatureSet):
        return images.num_features, None
    return (images.train_images.shape[1], images.train_images.shape[2]) if isinstance(images, ImageSet) else (3, recipe.image_size)


def kept_bytes(recipe: Recipe, images: Samples) -> int:
    """About what the model and the predictions of a run take on disk."""
    shapes = _shapes(recipe, input_of(recipe, images)[0], len(images.classes))
    model = sum(value.numel() * value.element_size() for value in shapes.values())
    return model + predictions.bytes_of(len(images.test_labels), len(images.classes))


def _shapes(recipe: Recipe, in_channels: int, num_classes: int) -> dict[str, Tensor]:
    """The state of the recipe's network, without memory for it."""
    with torch.device("meta"):
        return build(dataclasses.replace(recipe, weights=""), in_channels, num_classes).state_dict()


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (OSError, SafetensorError, ValueError) as error:
        raise LabError(f"MODEL {path} is no whole file of safetensors ({error}); give the folder of a run, or its {NAME}") from error


def _known(path: Path, metadata: Mapping[str, str]) -> _Known:
    try:
        values = {name: json.loads(text) for name, text in metadata.items() if name != "format"}
        if "fill" in values:
            return _Known(_recipe(values["recipe"]), _classes(values["classes"]), _standard(values))
        size, resize = tuple(values["image_size"]), values["resize"]
        mean, std = (tuple(map(float, values[name])) for name in ("mean", "std"))
        if len(size) != 2 or not all(isinstance(side, int) and 1 <= side <= LARGEST_IMAGE for side in (*size, resize)):
            raise ValueError(f"an image_size of {size} and a resize of {resize}")
        if not len(mean) == len(std) == values["in_channels"] or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError(f"a mean of {mean} and a std of {std} for {values['in_channels']} channels")
        return _Known(_recipe(values["recipe"]), _classes(values["classes"]), Pixels(size, resize, mean, std))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise LabError(f"MODEL {path} has metadata that no run of this version writes ({error}); give the model of a run") from error


def _standard(values: Mapping[str, Any]) -> Standard:
    fill, mean, std = (tuple(map(float, values[name])) for name in ("fill", "mean", "std"))
    if not len(fill) == len(mean) == len(std) == values["in_channels"] or not all(map(math.isfinite, (*fill, *mean, *std))) or min(std) < 0:
        raise ValueError(f"moments of {len(mean)} features for {values['in_channels']}")
    columns = tuple(Column(name, None if words is None else tuple(words)) for name, words in values["columns"])
    if columns and sum(column.size for column in columns) != len(mean):
        raise ValueError(f"columns of {sum(column.size for column in columns)} features for {len(mean)}")
    return Standard(fill, mean, std, columns)


def _known_of_folder(path: Path) -> _Known:
    """Of the network of an earlier version: from the record of its run, and from the data for the moments of the pixels."""
    record = path.parent / "result.json"
    try:
        values = json.loads(record.read_text())
        recipe, classes = _recipe(values["recipe"]), _classes(values["classes"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise LabError(
            f"MODEL {path} says nothing of its network, and {record}, which would, cannot be read ({error}); leave it in the folder of its "
            "run"
        ) from error
    if recipe.streamed:
        return _Known(recipe, classes, pixels_of(recipe))
    try:
        images = data.load_of(recipe)
    except LabError as error:
        raise LabError(f"MODEL {path} is of an earlier version, which needs its data for mean and std of the pixels: {error}") from error
    if recipe.data_digest not in ("", images.digest()) or not isinstance(images, ImageSet):
        raise LabError(
            f"MODEL {path} is of an earlier version, which needs its data for mean and std of the pixels, and {recipe.data} has changed; "
            "restore it, or train again"
        )
    mean, std = channel_moments(images.train_images)
    height, width = images.train_images.shape[2:]
    return _Known(recipe, classes, Pixels((height, width), min(height, width), tuple(mean.tolist()), tuple(std.tolist())))


def _recipe(values: Any) -> Recipe:
    recipe = Recipe(**values)
    if recipe.loss not in LOSSES:
        raise ValueError(f"the loss {recipe.loss}")
    return recipe


def _classes(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise ValueError(f"classes {names!r:.80}")
    return tuple(names)


def _network(path: Path, known: _Known, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The recipe's network with these tensors, in eval mode; the global random numbers stay as they are."""
    recipe, in_channels, num_classes = dataclasses.replace(known.recipe, weights=""), known.pixels.in_channels, len(known.classes)
    try:
        # shapes first: a file cannot make us take more memory than it takes itself
        for name, value in _shapes(recipe, in_channels, num_classes).items():
            if name.startswith("features.") and (name not in tensors or tensors[name].shape != value.shape):
                raise ValueError(f"{name} is {list(tensors[name].shape) if name in tensors else 'missing'}, not {list(value.shape)}")
        with torch.random.fork_rng(devices=[]):
            network = Method(recipe, build(recipe, in_channels, num_classes), 1).network
        network.load_state_dict(dict(tensors))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise LabError(f"MODEL {path} does not hold the network of its recipe ({str(error)[:300]}); give the model of a run") from error
    return network.eval()
