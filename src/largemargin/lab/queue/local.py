"""Runs in processes of this machine, each doing run after run."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any

import torch

from ..run.planned import Note, Planned
from ..stopping import GRACE_SECONDS, interrupted_by_sigterm
from .attempt import Inputs, Job, Outcome, attempt, died, inside
from .locks import Lock
from .plan import Plan

CONTEXT = multiprocessing.get_context("spawn")


def execute(plan: Plan, job: Job, jobs: int, on_epoch: Callable[[Planned, int | Note], object]) -> None:
    """Empty the plan, ``jobs`` runs at a time. An interrupt lets the processes write their checkpoints before they are ended."""
    workers: list[_Worker] = []
    leaving: list[_Worker] = []
    with interrupted_by_sigterm():
        try:
            while plan.unfinished:
                while sum(worker.recipe is not None for worker in workers) < jobs and (recipe := plan.take()) is not None:
                    idle = next((worker for worker in workers if worker.recipe is None), None)
                    if idle is None:
                        workers.append(idle := _Worker(job, least_used(gpus_of(recipe.device), [worker.gpu for worker in workers])))
                    idle.give(recipe)
                connection.wait([worker.pipe for worker in workers], timeout=0.5)
                for worker in list(workers):
                    alive = worker.process.is_alive()  # asked first: a last message may still be in the pipe
                    for recipe, message in worker.messages():
                        if isinstance(message, Outcome):
                            plan.ended(recipe, message)
                        elif isinstance(message, Note):
                            on_epoch(recipe, message)
                        elif isinstance(message, str):
                            plan.say(recipe, message)
                        else:
                            plan.epoch(recipe, message)
                            on_epoch(recipe, message)
                    if not alive:
                        workers.remove(worker)
                        if worker.recipe is not None:
                            plan.ended(worker.recipe, died(worker.recipe, job, worker.end()))
                    elif job.alone and worker.recipe is None:
                        workers.remove(worker)
                        leaving.append(worker)
        finally:
            _stop(workers)
            _see_off(leaving)


def _see_off(leaving: "list[_Worker]") -> None:
    """Wait for processes that have done their run; one that a thread of its own keeps from ending is killed."""
    deadline = time.monotonic() + GRACE_SECONDS
    for worker in leaving:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        worker.process.kill()
        worker.process.join()


def _stop(workers: "list[_Worker]") -> None:
    for worker in workers:
        worker.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
    finally:  # of a second interrupt too
        for worker in workers:
            worker.process.kill()
            worker.process.join()


class _Worker:
    """A process, the pipe to it, and the run it has."""

    def __init__(self, job: Job, gpu: str | None = None) -> None:
        self.recipe: Planned | None = None
        self.gpu = gpu  # the only one that it sees; None: all
        self.pipe, other = CONTEXT.Pipe()
        # not daemonic: it may have loader processes of its own
        self.process = CONTEXT.Process(target=_work, args=(other, job))
        resource_tracker.ensure_running()  # which would lift the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C in a terminal reaches the parent alone
        try:
            with _without_main(), _seeing(gpu):
                self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            other.close()

    def give(self, recipe: Planned) -> None:
        self.recipe = recipe
        with contextlib.suppress(OSError):  # it has just died, which is noticed soon
            self.pipe.send(recipe)

    def messages(self) -> list[tuple[Planned, int | str | Outcome]]:
        """What it has said of its run: epochs, lines for the user, and at last how it ended."""
        said: list[tuple[Planned, int | str | Outcome]] = []
        with contextlib.suppress(EOFError, OSError):
            while self.recipe is not None and self.pipe.poll():
                message: int | str | Outcome = self.pipe.recv()
                said.append((self.recipe, message))
                if isinstance(message, Outcome):
                    self.recipe = None
        return said

    def end(self) -> str:
        self.process.join()
        status = self.process.exitcode or 0
        if status == -signal.SIGKILL:
            return "the process of this run was killed (SIGKILL), perhaps for lack of memory"
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"the process of this run died ({how})"


def gpus_of(device: str) -> list[str]:
    """The GPUs over which runs on ``cuda`` are spread, as ``CUDA_VISIBLE_DEVICES`` names them; none where the device says which."""
    if device != "cuda":
        return []
    count, names = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (names.split(",") if names else list(map(str, range(count))))[:count]


def least_used(gpus: Sequence[str], used: Sequence[str | None]) -> str | None:
    """The GPU that the fewest processes have; None where there is no choice."""
    return min(gpus, key=used.count) if len(gpus) > 1 else None


@contextlib.contextmanager
def _seeing(gpu: str | None) -> Iterator[None]:
    """Let a process start that sees one GPU."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        elif gpu is not None:
            del os.environ["CUDA_VISIBLE_DEVICES"]


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let a process start without importing the script of this one, which then needs no ``if __name__ == "__main__"``."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(pipe: Any, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    inside.set()
    inputs = Inputs()

    def say(message: int | str | Outcome) -> None:
        with contextlib.suppress(OSError):  # the parent is gone: _end_with_parent sees to it
            pipe.send(message)

    while True:
        try:
            recipe: Planned = pipe.recv()
        except (EOFError, OSError):
            return
        outcome = _locked_attempt(recipe, job, inputs, say)
        say(outcome)
        if job.alone:
            return
        if outcome.kind == "failed" and recipe.device != "cpu":
            return  # an accelerator may be of no more use to a process that met an error on it


def _locked_attempt(recipe: Planned, job: Job, inputs: Inputs, say: Callable[[int | str | Outcome], None]) -> Outcome:
    folder = job.runs / recipe.id
    try:
        lock = Lock.take(folder)
    except OSError as error:
        return Outcome("failed", f"{type(error).__name__}: {error}")
    if lock is None:
        return Outcome("held")
    with lock:
        if (folder / "result.json").is_file():  # another process has done it meanwhile
            say(recipe.epochs)
            return Outcome("done")
        return attempt(recipe, job, inputs, say, say)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)
