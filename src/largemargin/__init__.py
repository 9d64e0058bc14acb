"""Classification losses with a margin (Kobayashi, Large Margin In Softmax Cross-Entropy Loss, BMVC 2019).

Type checkers and this file read the public names from ``__init__.pyi``. Names load on first use, so the command line starts without torch.
"""

import re
from importlib import import_module, resources
from typing import Any

from . import _after_torch

__version__ = "0.1.0.dev0"

_LINE = re.compile(r"^from (\.[\w.]*) import (\w+) as \w+$", re.MULTILINE)
_HOME = {name: module for module, name in _LINE.findall(resources.files(__name__).joinpath("__init__.pyi").read_text("utf-8"))}

__all__ = sorted(name for name, module in _HOME.items() if module != ".")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _HOME[name]
    return import_module(f".{name}", __name__) if module == "." else getattr(import_module(module, __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def _register_operators() -> None:
    """A stored program may name the operators of this library, so they exist whenever torch does."""
    from .backends import registered as registered


_after_torch.run(_register_operators)
