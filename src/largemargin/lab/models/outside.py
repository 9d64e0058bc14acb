"""Networks of torchvision and timm, taken apart into features and classifier."""

import difflib
from typing import Any

import torch
from torch import nn

from .._torchvision import import_torchvision
from ..errors import LabError, how_to_install
from .network import Network, scaled

GROUPS = 32  # of ResNeXt-50 32x4d


def resnext50(in_channels: int, num_classes: int, width: float = 1.0) -> Network:
    """Torchvision's ResNeXt-50 32x4d, with its first weights; `width` scales the 32 groups, and with them all channels."""
    model = import_torchvision().models.resnext50_32x4d(num_classes=num_classes)
    if width != 1:
        _set_groups(model, scaled(GROUPS, width))
    if in_channels != 3:
        model.conv1 = nn.Conv2d(in_channels, model.conv1.out_channels, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    classifier, model.fc = model.fc, nn.Identity()
    return Network(model, classifier, ("fc",))


def _set_groups(model: Any, groups: int) -> None:
    """Replace the layers of ResNeXt-50, whose channels are multiples of its 32 groups, by layers of the same multiples of ``groups``."""

    def of(channels: int) -> int:
        return channels // GROUPS * groups if channels % GROUPS == 0 else channels  # the images have 3

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                shape = layer.kernel_size, layer.stride, layer.padding
                own_groups = 1 if layer.groups == 1 else groups
                conv = nn.Conv2d(of(layer.in_channels), of(layer.out_channels), *shape, groups=own_groups, bias=False)  # type: ignore[arg-type]
                nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
                setattr(parent, name, conv)
            elif isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.BatchNorm2d(of(layer.num_features)))
    model.fc = nn.Linear(of(model.fc.in_features), model.fc.out_features)


def timm_network(name: str, in_channels: int, num_classes: int, dropout: float = 0.0) -> Network:
    """A model of timm with its own first weights, never with pretrained ones; `dropout` is before its classifier."""
    timm = _import_timm(name)
    try:
        model = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels, drop_rate=dropout)
    except TypeError as error:  # an encoder without a classifier
        raise LabError(f"network timm:{name} is not made for classification: {str(error).splitlines()[0]}; choose another model") from error
    paths = model.pretrained_cfg.get("classifier") or ()
    paths = (paths,) if isinstance(paths, str) else tuple(paths)
    try:
        found = model.get_submodule(paths[0]) if len(paths) == 1 else None
    except AttributeError:
        found = None
    if type(found) is nn.Linear and found.bias is not None:
        parent, _, last = paths[0].rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity())
        return Network(model, found, paths)
    # several classifiers, or one that is a convolution or holds more than a matrix
    try:
        model.reset_classifier(0)
        features = _try(model, in_channels, model.pretrained_cfg["input_size"][-1])
    except Exception as error:  # whatever that model raises
        raise LabError(f"network timm:{name} cannot be taken apart into features and a classifier; choose another model") from error
    return Network(model, nn.Linear(features.shape[1], num_classes), paths)


def timm_image_size(name: str) -> int | None:
    """The only size of images, in pixels, that a model of timm takes, or None if it takes several."""
    config = _import_timm(name).get_pretrained_cfg(name, allow_unregistered=False)
    return int(config.input_size[-1]) if config.fixed_input_size else None


def timm_takes(name: str, image_size: int) -> bool:
    """Whether a model of timm takes square images of a size, found by trying on shapes alone."""
    return _takes(_shapes(name), image_size)


def timm_smallest(name: str) -> int:
    """The smallest square images, in pixels, that a model of timm takes, found by trying on shapes alone."""
    only = timm_image_size(name)
    if only is not None:
        return only
    model = _shapes(name)
    usual = int(model.pretrained_cfg["input_size"][-1])
    too_small, size = 0, 1
    while size < usual and not _takes(model, size):
        too_small, size = size, 2 * size
    size = min(size, usual)
    while size - too_small > 1:
        middle = (too_small + size) // 2
        too_small, size = (too_small, middle) if _takes(model, middle) else (middle, size)
    return size


def _shapes(name: str) -> Any:
    timm = _import_timm(name)
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def _takes(model: Any, image_size: int) -> bool:
    try:
        _try(model, 3, image_size)
    except Exception:  # each model refuses in its own way
        return False
    return True


def _try(model: Any, in_channels: int, image_size: int) -> torch.Tensor:
    """Outputs (1, D) for one image."""
    parameter = next(model.parameters())
    model.eval()
    with torch.no_grad():
        output: torch.Tensor = model(torch.zeros(1, in_channels, image_size, image_size, device=parameter.device))
    model.train()
    if output.ndim != 2:
        raise ValueError(f"outputs of shape {tuple(output.shape)}")
    return output


def _import_timm(name: str) -> Any:
    """timm, if it knows the model."""
    try:
        import_torchvision()  # timm imports it, and it may not import by itself
        import timm
    except ImportError as error:
        raise LabError(f"network timm:{name} needs timm, which is not installed; install it with: {how_to_install('timm')}") from error
    models = timm.list_models()
    if name not in models and name not in timm.list_pretrained():
        close = difflib.get_close_matches(name.partition(".")[0], models)
        raise LabError(
            f"network timm:{name} is not a model of timm {timm.__version__}"
            + (f"; close to it: {', '.join(close)}" if close else "; timm.list_models() names them")
        )
    return timm
