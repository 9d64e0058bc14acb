"""Support for tools that read a program: torch.fx records a loss or a head as one node, and torch.jit.script raises an error."""

import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch.fx import Proxy, Tracer

from . import _torch

Function = TypeVar("Function", bound=Callable[..., Any])


def as_one_node(forward: Function) -> Function:
    """For the forward pass of a module: torch.fx records one call of the module, as for modules of torch."""

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
    """The active tracer of torch.fx.symbolic_trace, for a call that has no arguments, and so no proxy."""
    if torch.compiler.is_compiling() or not _torch.is_symbolic() or _torch.is_dispatched():  # make_fx has a dispatch mode, and values
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), Tracer):
            return cast(Tracer, frame.f_locals["self"])
        frame = frame.f_back
    return None


def record(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Add a call of this function, with all arguments by name, to the graph that torch.fx traces."""
    (proxy, *_) = (value for value in arguments.values() if isinstance(value, Proxy))
    return proxy.tracer.create_proxy("call_function", function, (), dict(arguments))


def no_script(function: Function) -> Function:
    """Refuse torch.jit.script of a function, or of its callers."""
    function.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]
    return function


def as_one_call(function: Function) -> Function:
    """For a function: torch.fx records one call of it, as for functions of torch; torch.jit.script refuses it."""

    @no_script
    @functools.wraps(function)
    def call(*inputs: Any, **options: Any) -> Any:
        for value in (*inputs, *options.values()):
            if isinstance(value, Proxy):
                given = inspect.signature(call).bind(*inputs, **options)
                given.apply_defaults()
                named = dict(zip(given.signature.parameters, given.args, strict=False)) | given.kwargs
                return record(call, named)
        return function(*inputs, **options)

    return cast(Function, call)


def refuse_script(*_: object) -> NoReturn:
    """The ``__prepare_scriptable__`` of functions and modules, which torch.jit.script calls before it compiles them."""
    raise NotImplementedError("torch.jit.script, which torch has deprecated, cannot compile largemargin; use torch.export")
