"""Gloo processes, four unless a test asks for another number, that stay and run the functions of ``on_ranks``."""

import atexit
import contextlib
import datetime
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import context

WORLD = 4
PATIENCE = 120  # seconds


def each(group: Any, function: Callable[..., Any], cases: list[tuple[Any, ...]]) -> list[Any]:
    """What ``function`` returns for each of the cases; a failure names its case."""
    results = []
    for case in cases:
        try:
            results.append(function(group, *case))
        except BaseException as error:
            error.add_note(f"with {case}")
            raise
    return results


def script(group: Any, code: str) -> None:
    """Run code that is in no module."""
    exec(compile(code, "script", "exec"), {"__name__": "__main__"})


def _rank(rank: int, world: int, store: str, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, world + 1)}
    while (work := pipe.recv()) is not None:
        function, size, arguments = work
        try:
            pipe.send((True, function(groups[size], *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """The processes; started when they are first needed, and anew after a failure, which may have left them waiting for each other."""

    def __init__(self, world: int = WORLD) -> None:
        self.world = world
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def assert_on(self, size: int, function: Callable[..., Any], *arguments: Any, may_die: tuple[int, ...] = ()) -> list[Any]:
        """What ``function(group, *arguments)`` returns on the first ``size`` ranks; ``"died"`` on those that may and did.

        An assertion that fails there fails here.
        """
        if not self.processes:
            self._start()
        self._send(signal.SIGCONT)
        for pipe in self.pipes[:size]:
            pipe.send((function, size, arguments))
        failed: list[str] = []
        results = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if not failed or pipe.poll(2):
                try:
                    done, result = pipe.recv() if pipe.poll(PATIENCE) else (False, "no answer")
                except EOFError:
                    done, result = rank in may_die, "died"
                results.append(result)
                if not done:
                    failed.append(f"rank {rank}: {result}")
        if failed:
            self.stop()
            raise AssertionError("\n".join(failed))
        self._send(signal.SIGSTOP)  # gloo asks its sockets a hundred times a second, for each group that was ever made
        return results

    def assert_on_each(self, size: int, function: Callable[..., Any], cases: list[tuple[Any, ...]]) -> list[list[Any]]:
        """As :meth:`assert_on` for each of the cases, which the ranks get in one message."""
        return [list(of_case) for of_case in zip(*self.assert_on(size, each, function, cases), strict=True)]

    def _send(self, number: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):  # some tests have a rank die
                os.kill(process.pid, number)

    def _start(self) -> None:
        processes = context()
        store = Path(tempfile.mkdtemp()) / "store"
        atexit.register(self.stop)  # before multiprocessing waits for them: who sleeps does not end
        for rank in range(self.world):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=_rank, args=(rank, self.world, str(store), theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of its pipe
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        self.processes, self.pipes = [], []
