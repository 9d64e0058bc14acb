"""A digest of the source of a function: a run says by it with which version it was done."""

import functools
import hashlib
import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any


def digest_of(*functions: Callable[..., Any] | None) -> str:
    """That of the source of these functions, without what they call; of their compiled code where there is no source."""
    texts = [_text_of(function) for function in functions if function is not None]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _text_of(function: Any) -> str:
    if isinstance(function, functools.partial):
        return "\n".join([_text_of(function.func), repr(function.args), repr(sorted(function.keywords.items()))])
    function = inspect.unwrap(function)
    if not (inspect.isroutine(function) or inspect.isclass(function)):  # an object that can be called
        function = type(function)
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return _of_code(code) if code is not None else f"{function.__module__}.{function.__qualname__}"


def _of_code(code: CodeType) -> str:
    constants = [_of_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return " ".join([code.co_code.hex(), *code.co_names, *constants])
