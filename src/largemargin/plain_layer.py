"""Whether a linear layer only multiplies and adds.

A loss fused with its layer reads weight and bias, and does not call the layer. Hooks, adapters, pruning, quantisation and offloading act in
the call. If a layer has any of these, the loss calls it and takes its logits.
"""

import functools
import sys
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, _torch
from .functional import large_margin_cross_entropy
from .tracing import as_one_call

# torch's own; None, which equals no forward, if nn.Linear has been patched before this import
_FORWARD = nn.Linear.forward if nn.Linear.forward.__globals__ is vars(nn.modules.linear) else None

# the module and name of each class that replaces a plain tensor while torch traces a program
_STAND_INS = {
    "torch._subclasses.fake_tensor": "FakeTensor",
    "torch._subclasses.functional_tensor": "FunctionalTensor",
    "torch.fx.proxy": "Proxy",
}


def weight_and_bias(layer: nn.Module, forward: Any = _FORWARD) -> tuple[Tensor, Tensor | None] | str:
    """The weight and bias of ``layer``, or in words why its call does more than multiply and add.

    ``forward`` belongs to the class that the caller expects. The weight is read once, as in a call: a parametrisation may count that.
    """
    reason = own_forward(layer, forward) or hook_of(layer)
    return reason or _parameters(layer)


def own_forward(layer: Any, forward: Any = _FORWARD, *, moved: bool = False) -> str | None:
    """In words, why ``layer.forward`` is not ``forward``; None if it is. This ignores hooks.

    ``moved`` accepts a forward that accelerate has replaced to move tensors between devices, for a caller that calls the layer.
    """
    kind = type(layer)
    if getattr(kind, "forward", None) is not forward or any(getattr(kind, name) is not getattr(nn.Module, name) for name in _torch.CALL):
        return f"is a {kind.__module__}.{kind.__qualname__}, which has a forward of its own"
    if "forward" in vars(layer) and not (moved and _only_moves(layer, forward)):
        return f"has had its forward replaced{' by accelerate' if hasattr(layer, '_hf_hook') else ''}"
    if any(name in vars(layer) for name in _torch.CALL):
        return "has had its call replaced"
    if _torch.is_compiled(layer):
        return "has been compiled by itself"
    if F.linear is not _torch.LINEAR:
        return "calls an F.linear that has been replaced"
    return _mode()


def _mode() -> str | None:
    """In words, a function mode that may change F.linear. torch's own mode only places new tensors on a device."""
    if torch.compiler.is_compiling():
        return None
    modes = (type(mode) for mode in _torch.function_modes())
    return next((f"is called under a {mode.__qualname__}" for mode in modes if mode.__module__ != "torch.utils._device"), None)


def _only_moves(layer: Any, forward: Any) -> bool:
    """Whether accelerate has replaced the forward of ``layer`` by ``forward`` with hooks that only move tensors."""
    hooks, replaced = _hooks_of_accelerate(layer), vars(layer)["forward"]
    return (
        {type(hook).__name__ for hook in hooks} <= {"AlignDevicesHook", "ModelHook"}
        and isinstance(replaced, functools.partial)
        and replaced.func.__module__ == "accelerate.hooks"
        and getattr(layer._old_forward, "__func__", None) is forward
    )


def is_offloaded(layer: nn.Module) -> bool:
    """Whether accelerate takes the weights of ``layer`` away after its forward pass."""
    return any(getattr(hook, "offload", False) for hook in _hooks_of_accelerate(layer))


def _hooks_of_accelerate(layer: nn.Module) -> list[Any]:
    hook = getattr(layer, "_hf_hook", None)
    return list(getattr(hook, "hooks", [] if hook is None else [hook]))


def odd_parameter(layer: nn.Module) -> str | None:
    """In words, why weight or bias of ``layer`` is not a plain tensor; None if both are."""
    found = _parameters(layer)
    return found if isinstance(found, str) else None


def hook_of(layer: nn.Module, *, called: bool = False, but: Collection[Any] = ()) -> str | None:
    """In words, a hook on the inputs, outputs or gradients of the layer, except those in ``but``; None if there is none.

    With ``called`` the caller calls the layer without rows, and sees the changes that its forward hooks make.
    """
    seen = ("forward pre-hook", "forward hook", "global forward pre-hook") if called else ()
    for kind, hooks in _torch.hooks(layer).items():
        for hook in hooks:
            if kind not in seen and hook not in but:
                whose = "is called under" if kind.startswith("global") else "has"
                return f"{whose} a {kind}, {getattr(hook, '__qualname__', type(hook).__name__)}"
    return None


def _parameters(layer: Any) -> tuple[Tensor, Tensor | None] | str:
    weight, bias = layer.weight, layer.bias
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and not _is_plain(parameter):
            layout = str(parameter.layout).removeprefix("torch.")
            return f"has a {name} that is a {type(parameter).__module__}.{type(parameter).__qualname__} ({layout})"
    return weight, bias


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is strided and not a subclass, except the subclasses of torch's tracing."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor.layout is torch.strided
    return any(name in sys.modules and isinstance(tensor, getattr(sys.modules[name], kind)) for name, kind in _STAND_INS.items())


@as_one_call
def loss_of_logits(
    logits: Tensor, target: Tensor | None, weight: Tensor | None, out_features: tuple[int, ...] = (), **options: Any
) -> Tensor:
    """The loss of logits (..., C) with the classes last, as a layer gives them, and class indices (...) or probabilities (..., C).

    With ``out_features`` (d1, ...), the layer gives (N, C d1 ...), and ``target`` has the shape (N, d1, ...) or (N, C, d1, ...).
    """
    _checks.check_tensor("logits", logits)
    _checks.check_tensor("target", target)
    assert target is not None
    if out_features and logits.dim() == 2:
        logits = logits.unflatten(1, (-1, *out_features))
        indices = (len(logits), *out_features)
    elif out_features:
        raise ValueError(
            f"input must have shape (N, D), because out_features is {out_features}, but its logits are {_checks.describe(logits)}"
        )
    else:
        indices = tuple(logits.shape[:-1])
    if target.shape != indices and target.shape != logits.shape:
        raise ValueError(
            f"target must be int64 class indices of shape {indices} for logits of shape {tuple(logits.shape)}, got shape "
            f"{tuple(target.shape)}; class probabilities have the shape of the logits"
        )
    if not out_features:
        flat = logits.reshape(-1, logits.shape[-1])
        target = target.reshape(-1) if target.shape == indices else target.reshape(flat.shape)
        logits = flat
    loss = large_margin_cross_entropy(logits, target, weight, **options)
    return loss.reshape(indices) if options.get("reduction") == "none" else loss
