"""Processes that start in no time: a server imports what they need and forks them. A new interpreter takes seconds to import torch.

Users have ``spawn``. A test of how a process starts, or of what a signal does to it, has it too: it runs a command. All tests have it where
a fork is unsafe: with a GPU, and on any system but Linux.
"""

import multiprocessing
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest

from devices import HAS_KERNELS

IMPORTED = [
    *("largemargin.lab.queue.local", "largemargin.lab.queue.budget", "largemargin.lab.run.train", "largemargin.lab.trial.work"),
    *("accelerate", "sklearn.model_selection", "sklearn.datasets", "torch._dynamo"),  # a run imports these on its way
    *("on_ranks", "on_ranks_dtensors", "plain_on_ranks", "metrics_on_ranks", "torch.distributed.checkpoint", "vision"),
]


if sys.platform == "linux":
    from multiprocessing import forkserver
    from multiprocessing.context import ForkServerContext, ForkServerProcess

    class _Process(ForkServerProcess):
        """As a new interpreter: it has the environment of the process that starts it, and random numbers of its own."""

        _environment: dict[str, str]

        def start(self) -> None:
            self._environment = dict(os.environ)
            super().start()

        def run(self) -> None:
            os.environ.clear()
            os.environ.update(self._environment)
            if (numpy := sys.modules.get("numpy")) is not None:
                numpy.random.seed()  # Python's own generator sees to itself, and torch's begins alike in every process
            super().run()

    class _Context(ForkServerContext):
        Process = _Process


def context() -> Any:
    """The context of :mod:`multiprocessing` whose processes start fastest here."""
    if HAS_KERNELS or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # the server is not told of sys.path
        forkserver.ensure_running()
    return _Context()


def assert_runs(code: str, patience: float = 120) -> None:
    """Run a script in a process of its own; fail where it raises, dies or takes longer than ``patience`` seconds."""
    processes = context()
    ours, theirs = processes.Pipe(duplex=False)
    process = processes.Process(target=_run, args=(code, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        said = ours.recv() if ours.poll(patience) else f"no answer in {patience} s"
    except EOFError:
        said = "the process died"
    finally:
        process.kill()
        process.join()
        ours.close()
    assert not said, said


def _run(code: str, pipe: Any) -> None:
    try:
        exec(compile(code, "script", "exec"), {"__name__": "__main__"})
    except BaseException:
        pipe.send(traceback.format_exc())
    else:
        pipe.send("")
