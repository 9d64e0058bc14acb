"""Forked processes are as good as new ones, and machines without them have new ones."""

import multiprocessing
import runpy
from concurrent.futures import ProcessPoolExecutor

import pytest

import forked

pytestmark = pytest.mark.xdist_group("recipes")  # they need the same server


def first_number() -> float:
    import numpy

    return float(numpy.random.random())


def test_processes_draw_numbers_of_their_own():
    numbers = set()
    for _ in range(2):
        with ProcessPoolExecutor(1, forked.context()) as process:
            numbers.add(process.submit(first_number).result())
    assert len(numbers) == 2


def test_a_script_that_raises_or_dies_fails():
    forked.assert_runs("assert True")
    with pytest.raises(AssertionError, match="ValueError: as it should"):
        forked.assert_runs("raise ValueError('as it should')")
    with pytest.raises(AssertionError, match="the process died"):
        forked.assert_runs("import os; os._exit(0)")


def test_a_machine_without_forks_starts_new_interpreters(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    for name in ("ForkServerContext", "ForkServerProcess"):
        monkeypatch.delattr(multiprocessing.context, name)
    assert runpy.run_path(forked.__file__)["context"]().get_start_method() == "spawn"
