"""What reads a program instead of running it: torch.fx records a public function as one node; torch.jit.script is refused."""

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from torch.fx import Proxy

Function = TypeVar("Function", bound=Callable[..., Any])


def is_symbolic(input: object, target: object) -> bool:
    """Whether torch.fx is tracing, so that the arguments have no values."""
    return isinstance(input, Proxy) or isinstance(target, Proxy)


def record(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """A node for this call in the graph that is being traced, as torch.fx makes one for a function of torch."""
    (proxy, *_) = (value for value in arguments.values() if isinstance(value, Proxy))
    return proxy.tracer.create_proxy("call_function", function, (), arguments)


def refuse_script(*_: object) -> NoReturn:
    """What torch.jit.script calls, as ``__prepare_scriptable__`` of a function or a module, before it compiles it."""
    raise NotImplementedError("torch.jit.script, which torch has deprecated, cannot compile the losses of largemargin; use torch.export")


def no_script(function: Function) -> Function:
    """Refuse torch.jit.script of a function, or of one that calls it."""
    function.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]
    return function
