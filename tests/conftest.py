"""How the suite runs: the device, the Hypothesis profile, one thread a worker, the helper modules on the path."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

if not (torch.cuda.is_available() or torch.xpu.is_available()):
    os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run on the CPU; read when the kernels are first imported

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a job of the background, and all that it starts: tests of Ctrl-C need it back
    signal.signal(signal.SIGINT, signal.default_int_handler)

sys.path.insert(0, str(Path(__file__).parent))  # oracle, strategies and measure: import-mode=importlib puts no folder on the path

import absent
import devices
import properties  # noqa: F401 - the profiles of Hypothesis
from ranks import Ranks


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """The ``timeout`` of pyproject.toml is a known option where pytest-timeout is not installed, too."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "the seconds that a test may take, with pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(absent)  # for the doctests of src, too, to which no conftest.py of tests applies
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # convolutions on a GPU have the precision of the CPU's


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a test live. A test without it computes on the CPU."""
    return devices.DEVICE


@pytest.fixture
def rng() -> torch.Generator:
    """A generator of its own for each test, so that no test depends on which others ran.

    It is the CPU's on every machine: tests draw from it and move the numbers, so that the problems are the same on every device.
    """
    return torch.Generator().manual_seed(0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison does its runs in this process, one after another: for tests that are not about processes."""
    from largemargin.lab.queue import local
    from largemargin.lab.queue.attempt import Inputs, Job, attempt
    from largemargin.lab.queue.plan import Plan

    def execute(plan: Plan, job: Job, jobs: int, on_epoch: Callable[..., object]) -> None:
        inputs = Inputs()
        while (recipe := plan.take()) is not None:
            plan.ended(recipe, attempt(recipe, job, inputs, partial(on_epoch, recipe), partial(plan.say, recipe)))

    monkeypatch.setattr(local, "execute", execute)


@pytest.fixture(scope="module")
def forked_workers() -> Iterator[None]:
    """The queue does its runs in processes that start in no time; see forked.py."""
    import forked
    from largemargin.lab.queue import local

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "CONTEXT", forked.context())
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Gloo processes; tests that use them carry ``xdist_group("ranks")``, so that one worker has them all."""
    processes = Ranks()
    yield processes
    processes.stop()
