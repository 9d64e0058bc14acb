"""The networks, each an entry of :data:`NETWORKS`: features from images to (N, D), and a linear classifier from there to logits.

Nothing heavy is imported until one is made.
"""

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import LabError

if TYPE_CHECKING:
    from .network import Network

TIMM = "timm:"


@dataclass(frozen=True)
class Named:
    """A network that has a name here."""

    make: str  # "file:function" of this room, called with in_channels, num_classes and the settings
    smallest: int  # pixels of the smallest square images it takes
    settings: tuple[str, ...] = ()  # the fields of a recipe that it reads


NETWORKS = {
    "small": Named("small:small", 4),
    "layer13": Named("layer13:layer13", 12, ("width",)),
    "layer13_mean_teacher": Named("layer13:layer13_mean_teacher", 12),
    "wrn28_10": Named("wide_resnet:wrn28_10", 1, ("width", "dropout")),
    "vgg16": Named("vgg:vgg16", 32, ("width",)),
    "vgg16_mod": Named("vgg:vgg16_mod", 16, ("width",)),
    "mobilenet": Named("mobilenet:mobilenet", 1, ("width",)),
    "resnext50": Named("outside:resnext50", 1, ("width",)),
}
NAMES = (*NETWORKS, f"{TIMM}NAME")  # what --network may be


class Wanted(Protocol):
    """What is read of a recipe."""

    @property
    def network(self) -> str: ...
    @property
    def width(self) -> float: ...
    @property
    def dropout(self) -> float: ...
    @property
    def weights(self) -> str: ...


def build(recipe: Wanted, in_channels: int, num_classes: int) -> "Network":
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
        network: Network = _function("outside:timm_network")(name.removeprefix(TIMM), in_channels, num_classes, **settings)
    else:
        network = _function(_named(name).make)(in_channels, num_classes, **settings)
    if recipe.weights:
        _function("weights:load_weights")(network, recipe.weights)
    return network


def _function(name: str) -> Any:
    file, _, function = name.partition(":")
    return getattr(importlib.import_module(f".{file}", __package__), function)


def smallest_image(name: str) -> int:
    """The smallest square images that a network takes, in pixels."""
    if name.startswith(TIMM):
        return int(_function("outside:timm_smallest")(name.removeprefix(TIMM)))
    return _named(name).smallest


def check_image(name: str, image_size: int) -> None:
    """Raises LabError if a network does not take square images of this size."""
    of_timm = name.startswith(TIMM)
    if _function("outside:timm_takes")(name.removeprefix(TIMM), image_size) if of_timm else image_size >= smallest_image(name):
        return
    only = _function("outside:timm_image_size")(name.removeprefix(TIMM)) if of_timm else None
    taken = f"only images of {only} pixels" if only else f"images from {smallest_image(name)} pixels"
    raise LabError(f"network {name} takes {taken}, and these have {image_size}; choose another network or other images")


def check_name(name: str) -> None:
    """Raises LabError if it is not one of :data:`NAMES`; whether timm has it is seen when it is built."""
    if name not in NETWORKS and not (name.startswith(TIMM) and name != TIMM):
        raise LabError(f"network {name} is none; choose one of {', '.join(NAMES)}")


def _named(name: str) -> Named:
    if name not in NETWORKS:
        close = difflib.get_close_matches(name, NETWORKS, n=1)
        raise LabError(f"network {name} is not one of {', '.join(NAMES)}" + (f"; did you mean {close[0]}?" if close else ""))
    return NETWORKS[name]
