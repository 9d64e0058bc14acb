"""A digest of a function: a run says by it with which version it was done."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

PLAIN = (int, float, complex, str, bytes, type(None))


def digest_of(*functions: Callable[..., Any] | None) -> str:
    """That of the source of these functions, of the values that they carry with them, and of what they name of their own module."""
    texts = [_text_of(function, set()) for function in functions if function is not None]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


def _text_of(function: Any, seen: set[int]) -> str:
    if isinstance(function, functools.partial):
        return "\n".join([_text_of(function.func, seen), _of_value([function.args, function.keywords], seen)])
    function = inspect.unwrap(function)
    if not (inspect.isroutine(function) or inspect.isclass(function)):  # an object that can be called
        return "\n".join([_source_of(type(function)), _of_value(vars(function), seen) if hasattr(function, "__dict__") else ""])
    carried = [getattr(function, name, None) for name in ("__defaults__", "__kwdefaults__", "__self__")]
    carried += [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_set(cell)]
    named = getattr(function, "__globals__", {})
    carried += [named[name] for name in sorted(_names_of(function)) if name in named and _is_near(named[name], function)]
    return "\n".join([_source_of(function), *(_of_value(value, seen) for value in carried)])


def _names_of(function: Any) -> set[str]:
    """The names that its code, and the functions inside of it, may look up in the module."""
    found, codes = set(), [code] if (code := getattr(function, "__code__", None)) else []
    while codes:
        code = codes.pop()
        found.update(code.co_names)
        codes += [one for one in code.co_consts if isinstance(one, CodeType)]
    return found


def _is_near(value: Any, function: Any) -> bool:
    """Whether it belongs to the module of the function: a value, or a function or class that is defined there."""
    if isinstance(value, (*PLAIN, list, tuple, dict, set, frozenset, np.ndarray, Tensor)):
        return True
    return getattr(value, "__module__", None) == function.__module__ and (inspect.isfunction(value) or inspect.isclass(value))


def _is_set(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:  # a name that is bound later
        return False
    return True


def _of_value(value: Any, seen: set[int]) -> str:
    """A text that has no address in it, so that it is the same in every process."""
    if isinstance(value, PLAIN):
        return repr(value)
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if id(value) in seen:
        return name
    seen.add(id(value))
    if isinstance(value, np.ndarray | Tensor):
        return f"{name} {value.dtype} {tuple(value.shape)} {_of_numbers(value)}"
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, Mapping):
        return f"{name} {sorted((str(key), _of_value(item, seen)) for key, item in value.items())}"
    if isinstance(value, list | tuple | set | frozenset):
        texts = [_of_value(item, seen) for item in value]
        return f"{name} {sorted(texts) if isinstance(value, set | frozenset) else texts}"
    if inspect.isclass(value):
        methods = [one for one in vars(value).values() if inspect.isfunction(one)]
        return "\n".join([_source_of(value), *(_text_of(one, seen) for one in methods)])
    if callable(value):
        return _text_of(value, seen)
    return f"{name} {_of_value(vars(value), seen) if hasattr(value, '__dict__') else ''}"


def _of_numbers(value: Any) -> str:
    """A digest of the numbers of an array or a tensor; nothing where they are not at hand."""
    try:
        dense = value.detach().cpu().contiguous().reshape(-1) if isinstance(value, Tensor) else np.ascontiguousarray(value)
        numbers = dense.view(torch.uint8).numpy() if isinstance(dense, Tensor) else dense.reshape(-1).view(np.uint8)
    except (RuntimeError, TypeError):  # a tensor of another layout or without data, an array of objects
        return ""
    return hashlib.sha256(numbers.data).hexdigest()


def _source_of(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return _of_code(code) if code is not None else f"{function.__module__}.{function.__qualname__}"


def _of_code(code: CodeType) -> str:
    constants = [_of_code(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
    return " ".join([code.co_code.hex(), *code.co_names, *constants])
