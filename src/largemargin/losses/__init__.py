"""The losses as modules. A loss that is a formula on the statistics is a function here too; :mod:`.rows` has the base of both."""

import sys
from typing import Any


def __getattr__(name: str) -> Any:
    """A public loss, which pickles of earlier versions name as ``largemargin.losses.NAME``."""
    package = sys.modules[__package__.rpartition(".")[0]]
    if name not in package.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(package, name)
