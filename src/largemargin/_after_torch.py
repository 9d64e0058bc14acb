"""Run code when this library and torch are both imported, in either order, without importing torch."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def run(action: Callable[[], None]) -> None:
    """Run ``action`` now if torch is imported, else as soon as it is."""
    if "torch" in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterTorch(action))


class _AfterTorch(MetaPathFinder):
    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_run(module: ModuleType) -> None:
            load(module)
            run(self.action)

        spec.loader.exec_module = load_and_run  # type: ignore[method-assign]
        return spec
