"""Imports torchvision, where it is installed, for the processes of forked.py."""

import contextlib

from largemargin.lab._torchvision import import_torchvision

with contextlib.suppress(ImportError):
    import_torchvision()
