"""Processes that start quickly: as copies of one that has imported what they need."""

import multiprocessing
import os
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

from devices import HAS_KERNELS


def context(*modules: str) -> Any:
    """As ``multiprocessing.get_context``; whoever asks first has ``modules`` imported for all. With a GPU each process imports them itself.

    A copy of a process cannot use a GPU.
    """
    if HAS_KERNELS or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    multiprocessing.set_forkserver_preload(list(modules))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # the server is not told of sys.path
        forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")


def run(code: str, *modules: str, patience: float = 120) -> None:
    """Run a script in a process of its own, which ends well; ``modules`` as for :func:`context`."""
    processes = context(*modules)
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
