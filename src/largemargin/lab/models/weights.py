"""Weights of a local file into a network."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LabError
from .network import Network


def weights_digest(path: str | Path) -> str:
    """Twelve hexadecimal digits of the file's SHA-256."""
    try:
        with open(Path(path).expanduser(), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:12]
    except OSError as error:
        raise LabError(f"weights {path} cannot be read: {error.strerror or error}; give a .safetensors, .pt or .pth file") from error


def load_weights(network: Network, path: str | Path) -> None:
    """Loads a state dict of this network, or of the model of torchvision or timm that its features come from.

    A classifier of another shape is left out, and so is a missing one: that of the network stays as it is. All else must fit.
    """
    own = network.state_dict()
    state = _in_own_names(network, own, _read(path))
    classifier = {key: own[key] for key in ("classifier.weight", "classifier.bias")}
    if any(key not in state or state[key].shape != tensor.shape for key, tensor in classifier.items()):
        state = {key: tensor for key, tensor in state.items() if not key.startswith("classifier.")} | classifier
    # files from before torch 0.4.1 lack these counters
    state = {key: tensor for key, tensor in own.items() if key.endswith("num_batches_tracked")} | state
    missing, unexpected = [key for key in own if key not in state], [key for key in state if key not in own]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in own if key in state and state[key].shape != own[key].shape
    ]
    wrong = [
        f"{what} {_first(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if keys
    ]
    if wrong:
        raise LabError(f"weights {path} does not fit the network: {'; '.join(wrong)}; give the file of the same network")
    network.load_state_dict(state)


def _read(path: str | Path) -> dict[str, Tensor]:
    path = Path(path).expanduser()
    if not path.is_file():
        raise LabError(f"weights {path} is not a file; give a .safetensors, .pt or .pth file")
    loaded: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        elif path.suffix in (".pt", ".pth"):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise LabError(f"weights {path} ends in {path.suffix or 'nothing'}; give a .safetensors, .pt or .pth file")
    except LabError:
        raise
    except ImportError as error:
        raise LabError(f"weights {path} needs safetensors, which is not installed: pip install safetensors") from error
    except Exception as error:  # a broken pickle raises anything
        raise LabError(f"weights {path} cannot be read as a file of weights: it is broken or holds more than tensors") from error
    for key in ("state_dict", "model", "network"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise LabError(f"weights {path} holds no state dict; save network.state_dict() in it")
    return {str(key): value for key, value in loaded.items()}


def _in_own_names(network: Network, own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state by the network's own names, if it is of the network or of the model outside."""
    for prefix in ("module.", "_orig_mod."):  # of DistributedDataParallel and torch.compile
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    if not network.outside:
        return state
    renamed = {}
    for key, tensor in state.items():
        parent, _, last = key.rpartition(".")
        if parent not in network.outside:
            renamed[f"features.{key}"] = tensor
        elif len(network.outside) == 1:  # of several, none is that of this network
            renamed[f"classifier.{last}"] = tensor.flatten(1) if last == "weight" else tensor  # it may be a 1x1 convolution
    # a model outside may have a part called features too: the names that fit more often are the right ones
    return max(state, renamed, key=lambda names: sum(key in own for key in names))


def _first(keys: list[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")
