"""Processes that start at once: a server that has imported what they need forks them. A new interpreter imports torch for seconds.

Users have ``spawn``. A test of how a process starts, or of what a signal does to it, uses that too: it runs a command.
"""

import multiprocessing
import os
import traceback
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from devices import HAS_KERNELS

IMPORTED = [
    *("largemargin.lab.queue.local", "largemargin.lab.queue.budget", "largemargin.lab.run.train", "largemargin.lab.trial.work"),
    *("accelerate", "sklearn.model_selection", "sklearn.datasets", "torch._dynamo"),  # a run imports these on its way
    *("on_ranks", "on_ranks_dtensors", "plain_on_ranks", "metrics_on_ranks", "torch.distributed.checkpoint", "vision"),
]


class _Process(ForkServerProcess):
    """Has the environment of the process that starts it, not that of the server."""

    _environment: dict[str, str]

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class _Context(ForkServerContext):
    Process = _Process


def context() -> Any:
    """As ``multiprocessing.get_context``. With a GPU each process imports all it needs itself: a copy of a process cannot use a GPU."""
    if HAS_KERNELS or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # the server is not told of sys.path
        forkserver.ensure_running()
    return _Context()


def run(code: str, patience: float = 120) -> None:
    """Run a script in a process of its own, which ends well."""
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
