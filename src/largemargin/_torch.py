"""Every private function of torch that the library calls, because torch has no public equivalent.

If a new version of torch renames one, only this module breaks. ``tests/test_private_names.py`` tests the behaviour of each.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.nn import Module, Parameter
from torch.nn.modules import module as _module


def is_transformed() -> bool:
    """Whether a functorch transform (``torch.func``, ``vmap``) is active."""
    return torch._C._are_functorch_transforms_active()


def is_dispatched() -> bool:
    """Whether a dispatch mode sees every operation, such as FakeTensorMode."""
    return bool(torch._C._len_torch_dispatch_stack())


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` records the operations."""
    return torch._C._get_tracing_state() is not None


def is_symbolic() -> bool:
    """Whether ``torch.fx.symbolic_trace``, or code with its tracer, is active."""
    return bool(_symbolic_trace._is_fx_tracing_flag)  # is_fx_tracing() logs a warning


def is_recording() -> bool:
    """Whether torch records a program to store: torch.jit.trace, torch.export and torch.onnx.export."""
    return is_traced() or torch.compiler.is_exporting()


def is_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def is_unwatched() -> bool:
    """Whether torch runs operations directly: no functorch transform, forward mode, dispatch mode or tracing."""
    # the four questions above, written out: this is asked several times in every call
    return (
        forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether the memory of a tensor holds its numbers: no subclass, no other layout, no lazy negation."""
    return (type(tensor) is Tensor or type(tensor) is Parameter) and tensor.layout is torch.strided and not tensor.is_neg()


def is_zero_tensor(tensor: Tensor) -> bool:
    """Whether a tensor is a zero without memory, as in forward mode."""
    return tensor._is_zerotensor()


def is_plain_gradient(upstream: Tensor) -> bool:
    """Whether this backward pass will not be differentiated or batched, and its upstream gradient has its own memory."""
    return (
        not torch.is_grad_enabled()
        and is_unwatched()
        and is_plain(upstream)
        and torch._C._has_storage(upstream)  # a batch of gradients (is_grads_batched) has none
        and not upstream._is_zerotensor()
    )


def has_saved_tensor_hooks() -> bool:
    """Whether hooks on saved tensors are set, as by activation checkpointing and offloading; then nothing else may be kept."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def forward_mode_enabled() -> Any:
    """For the body of a jvp: torch calls it with forward mode off, which drops the tangents of an outer jvp (pytorch/pytorch#197867)."""
    return forward_ad._set_fwd_grad_enabled(True)


def backward_pass() -> int:
    """The number of the backward pass that runs on this thread, or -1."""
    return torch._C._current_graph_task_id()


def asking_node() -> Any:
    """The node that the backward pass runs now; None under compiled autograd."""
    return torch._C._current_autograd_node()


def number_of(node: Any) -> int:
    """Each thread numbers its nodes in order of creation."""
    return int(node._sequence_nr())


def next_number() -> int:
    return torch._C._autograd._get_sequence_nr()


def function_modes() -> list[Any]:
    """The active modes that intercept functions of torch, such as ``with torch.device(...)``."""
    return torch.overrides._get_current_function_mode_stack() if torch._C._len_torch_function_stack() else []


_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
CALL = ("__call__", "_call_impl", "_slow_forward")  # methods of a module between its call and its forward


def hooks(module: Module) -> dict[str, list[Any]]:
    """The hooks of a module, and the global ones of all modules, by kind."""
    own = {kind: list(getattr(module, name).values()) for name, kind in _HOOKS.items()}
    return own | {f"global {kind}": list(getattr(_module, f"_global{name}").values()) for name, kind in _HOOKS.items()}


def is_compiled(module: Module) -> bool:
    """Whether ``module.compile()`` has replaced its call."""
    return module._compiled_call_impl is not None


def has_buffer(module: Module, name: str) -> bool:
    """Whether a buffer of the module itself has this name; compiled code can trace it."""
    return name in module._buffers


# torch's own F.linear; a patched F.linear is another object
LINEAR = torch._C._nn.linear


def direct_apply(function: type[torch.autograd.Function]) -> Any:
    """``function.apply`` without its branch for functorch transforms, which the caller has ruled out. It takes time in every small call."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def version(tensor: Tensor) -> int:
    """The number of in-place writes to a tensor; 0 for one made in inference mode, which does not count them."""
    return 0 if tensor.is_inference() else tensor._version


def base(tensor: Tensor) -> Tensor | None:
    """The base of a view, else None."""
    return tensor._base if tensor._is_view() else None


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory, as in an expanded tensor."""
    return torch._debug_has_internal_overlap(tensor) != 0
