"""The networks of the lab: each is features, a module from images to (N, D), and classifier, a linear layer from there to logits."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import LabError
from ..recipe import Recipe
from .layer13 import layer13, layer13_mean_teacher
from .mobilenet import mobilenet
from .network import Network
from .outside import resnext50, timm_image_size, timm_network, timm_smallest, timm_takes
from .small import small
from .vgg import vgg16, vgg16_mod
from .weights import load_weights, weights_digest
from .wide_resnet import wrn28_10

__all__ = ["NETWORKS", "Network", "build", "check_image", "load_weights", "smallest_image", "weights_digest"]

TIMM = "timm:"


@dataclass(frozen=True)
class Named:
    """A network that has a name here."""

    make: Callable[..., Network]  # of in_channels and num_classes
    smallest: int  # pixels of the smallest square images it takes
    settings: tuple[str, ...] = ()  # the fields of a recipe that it reads


NETWORKS = {
    "small": Named(small, 4),
    "layer13": Named(layer13, 12, ("width",)),
    "layer13_mean_teacher": Named(layer13_mean_teacher, 12),
    "wrn28_10": Named(wrn28_10, 1, ("dropout",)),
    "vgg16": Named(vgg16, 32),
    "vgg16_mod": Named(vgg16_mod, 16),
    "mobilenet": Named(mobilenet, 1),
    "resnext50": Named(resnext50, 1),
}


def build(recipe: Recipe, in_channels: int, num_classes: int) -> Network:
    """The recipe's network, with first weights from torch's global random numbers or, where it names a file, from there."""
    name = recipe.network
    reads = ("dropout",) if name.startswith(TIMM) else _named(name).settings
    for setting, unset in (("width", 1.0), ("dropout", 0.0)):
        if getattr(recipe, setting) != unset and setting not in reads:
            raise LabError(f"{setting} {getattr(recipe, setting):g} does not apply to the network {name}; leave it out")
    if not recipe.width > 0:
        raise LabError(f"width {recipe.width:g} must be above 0; 1 is the full network")
    if not 0 <= recipe.dropout < 1:
        raise LabError(f"dropout {recipe.dropout:g} must be from 0 to below 1; it is the share of features set to zero")
    settings = {setting: getattr(recipe, setting) for setting in reads}
    if name.startswith(TIMM):
        network = timm_network(name.removeprefix(TIMM), in_channels, num_classes, **settings)
    else:
        network = _named(name).make(in_channels, num_classes, **settings)
    if recipe.weights:
        load_weights(network, recipe.weights)
    return network


def smallest_image(name: str) -> int:
    """The smallest square images that a network takes, in pixels."""
    return timm_smallest(name.removeprefix(TIMM)) if name.startswith(TIMM) else _named(name).smallest


def check_image(name: str, image_size: int) -> None:
    """Raises LabError if a network does not take square images of this size."""
    if name.startswith(TIMM):
        if timm_takes(name.removeprefix(TIMM), image_size):
            return
    elif image_size >= smallest_image(name):
        return
    only = timm_image_size(name.removeprefix(TIMM)) if name.startswith(TIMM) else None
    taken = f"only images of {only} pixels" if only else f"images from {smallest_image(name)} pixels"
    raise LabError(f"network {name} takes {taken}, and these have {image_size}; choose another network or other images")


def _named(name: str) -> Named:
    if name not in NETWORKS:
        close = difflib.get_close_matches(name, NETWORKS, n=1)
        raise LabError(f"network {name} is not one of {', '.join(NETWORKS)}, {TIMM}NAME" + (f"; did you mean {close[0]}?" if close else ""))
    return NETWORKS[name]
