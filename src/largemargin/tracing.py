"""What reads a program instead of running it: torch.fx records a loss or a head as one node; torch.jit.script is refused."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, cast

from torch.fx import Proxy

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
        tracers: list[Any] = [value.tracer for value in (*inputs, *options.values()) if isinstance(value, Proxy)]
        if not tracers:
            return forward(self, *inputs, **options)
        name = tracers[0].path_of_module(self)
        if not name:
            raise TypeError(f"torch.fx cannot trace a {type(self).__name__} by itself; trace a module that calls it")
        return tracers[0].create_proxy("call_module", name, inputs, options)

    return cast(Function, call)


def refuse_script(*_: object) -> NoReturn:
    """What torch.jit.script calls, as ``__prepare_scriptable__`` of a function or a module, before it compiles it."""
    raise NotImplementedError("torch.jit.script, which torch has deprecated, cannot compile largemargin; use torch.export")


def no_script(function: Function) -> Function:
    """Refuse torch.jit.script of a function, or of one that calls it."""
    function.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]
    return function
