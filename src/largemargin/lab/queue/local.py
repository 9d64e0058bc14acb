"""Runs in processes of this machine, each doing run after run."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import connection, resource_tracker
from typing import Any

from ..run.recipe import Recipe
from ..stopping import GRACE_SECONDS, interrupted_by_sigterm
from .attempt import DataSets, Job, Outcome, attempt, died
from .locks import Lock
from .plan import Plan

CONTEXT = multiprocessing.get_context("spawn")


def execute(plan: Plan, job: Job, jobs: int, on_epoch: Callable[[Recipe, int], object]) -> None:
    """Empty the plan, ``jobs`` runs at a time. An interrupt lets the processes write their checkpoints before they are ended."""
    workers: list[_Worker] = []
    with interrupted_by_sigterm():
        try:
            while plan.unfinished:
                while sum(worker.recipe is not None for worker in workers) < jobs and (recipe := plan.take()) is not None:
                    idle = next((worker for worker in workers if worker.recipe is None), None)
                    if idle is None:
                        workers.append(idle := _Worker(job))
                    idle.give(recipe)
                connection.wait([worker.pipe for worker in workers], timeout=0.5)
                for worker in list(workers):
                    alive = worker.process.is_alive()  # asked first: a last message may still be in the pipe
                    for recipe, message in worker.messages():
                        if isinstance(message, int):
                            plan.epoch(recipe, message)
                            on_epoch(recipe, message)
                        elif isinstance(message, str):
                            plan.say(recipe, message)
                        else:
                            plan.ended(recipe, message)
                    if not alive:
                        workers.remove(worker)
                        if worker.recipe is not None:
                            plan.ended(worker.recipe, died(worker.recipe, job.runs, worker.end()))
        finally:
            _stop(workers)


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

    def __init__(self, job: Job) -> None:
        self.recipe: Recipe | None = None
        self.pipe, other = CONTEXT.Pipe()
        # not daemonic: it may have loader processes of its own
        self.process = CONTEXT.Process(target=_work, args=(other, job))
        resource_tracker.ensure_running()  # which would lift the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: Ctrl-C in a terminal reaches the parent alone
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            other.close()

    def give(self, recipe: Recipe) -> None:
        self.recipe = recipe
        with contextlib.suppress(OSError):  # it has just died, which is noticed soon
            self.pipe.send(recipe)

    def messages(self) -> list[tuple[Recipe, int | str | Outcome]]:
        """What it has said of its run: epochs, lines for the user, and at last how it ended."""
        said: list[tuple[Recipe, int | str | Outcome]] = []
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


def _work(pipe: Any, job: Job) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    data_sets = DataSets()

    def say(message: int | str | Outcome) -> None:
        with contextlib.suppress(OSError):  # the parent is gone: _end_with_parent sees to it
            pipe.send(message)

    while True:
        try:
            recipe: Recipe = pipe.recv()
        except (EOFError, OSError):
            return
        outcome = _locked_attempt(recipe, job, data_sets, say)
        say(outcome)
        if outcome.kind == "failed" and recipe.device != "cpu":
            return  # an accelerator may be of no more use to a process that met an error on it


def _locked_attempt(recipe: Recipe, job: Job, data_sets: DataSets, say: Callable[[int | str | Outcome], None]) -> Outcome:
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
        return attempt(recipe, job, data_sets, say, say)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)
