"""Hypothesis, where it is installed. Without it the tests of properties are skipped, and the other tests of their files run."""

from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING or find_spec("hypothesis"):
    from hypothesis import assume, given, settings
    from hypothesis import strategies as st

    # derandomize: a run is the same everywhere; deadline None: the first call of a torch operator is slow
    settings.register_profile("suite", deadline=None, derandomize=True, max_examples=50)
    settings.register_profile("thorough", deadline=None, max_examples=2000)  # pytest --hypothesis-profile=thorough
    settings.load_profile("suite")
else:

    class Unused:
        """Stands for the strategies of tests that are skipped."""

        def __getattr__(self, name):
            return self

        def __call__(self, *args, **options):
            return self

        __or__ = __getitem__ = __call__

    assume = st = Unused()

    def given(*positional, **named):
        return pytest.mark.skip(reason="needs hypothesis, which is not installed")


__all__ = ["assume", "given", "st"]
