"""What reads a program instead of running it: torch.fx records a loss or a head as one node; torch.jit.script is refused."""

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch.fx import Proxy, Tracer
from torch.fx._symbolic_trace import is_fx_tracing

Function = TypeVar("Function", bound=Callable[..., Any])


def is_symbolic(input: object, target: object) -> bool:
    """Whether torch.fx is tracing, so that the arguments have no values."""
    return isinstance(input, Proxy) or isinstance(target, Proxy)


def record(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """A node for this call in the graph that is being traced, as torch.fx makes one for a function of torch."""
    (proxy, *_) = (value for value in arguments.values() if isinstance(value, Proxy))
    return proxy.tracer.create_proxy("call_function", function, (), arguments)


def as_one_node(forward: Function) -> Function:
    """For the forward pass of a module: torch.fx calls the module as it is, as it does those of torch."""

    @functools.wraps(forward)
    def call(self: Any, *inputs: Any, **options: Any) -> Any:
        tracer: Any = next((value.tracer for value in (*inputs, *options.values()) if isinstance(value, Proxy)), None)
        if tracer is None and not (inputs or options):
            tracer = _tracer()
        if tracer is None:
            return forward(self, *inputs, **options)
        name = tracer.path_of_module(self)
        if not name:
            raise TypeError(f"torch.fx cannot trace a {type(self).__name__} by itself; trace a module that calls it")
        return tracer.create_proxy("call_module", name, inputs, options)

    return cast(Function, call)


def _tracer() -> Tracer | None:
    """The tracer of a torch.fx.symbolic_trace that is under way; a call without arguments shows none."""
    if torch.compiler.is_compiling() or not is_fx_tracing() or torch._C._len_torch_dispatch_stack():  # make_fx has a mode, and values
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Tracer):
            return cast(Tracer, frame.f_locals["self"])
        frame = frame.f_back
    return None


def as_one_call(function: Function) -> Function:
    """For a function: torch.fx records a call of it as it is, as it does one of torch."""

    @functools.wraps(function)
    def call(*inputs: Any, **options: Any) -> Any:
        tracer: Any = next((value.tracer for value in (*inputs, *options.values()) if isinstance(value, Proxy)), None)
        return function(*inputs, **options) if tracer is None else tracer.create_proxy("call_function", call, inputs, options)

    return cast(Function, call)


def refuse_script(*_: object) -> NoReturn:
    """What torch.jit.script calls, as ``__prepare_scriptable__`` of a function or a module, before it compiles it."""
    raise NotImplementedError("torch.jit.script, which torch has deprecated, cannot compile largemargin; use torch.export")


def no_script(function: Function) -> Function:
    """Refuse torch.jit.script of a function, or of one that calls it."""
    function.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]
    return function
