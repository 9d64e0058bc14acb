"""torchvision, imported for processes that begin as copies (forked.py); it may be absent."""

import contextlib

from largemargin.lab._torchvision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()
