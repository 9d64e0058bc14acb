"""Runs as tasks of a Ray cluster. Its nodes need not share a disk with this machine, nor be alike."""

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import LabError, how_to_install
from ..files import write_atomically
from ..run.planned import Note, Planned
from ..stopping import GRACE_SECONDS, interrupted_by_sigterm
from .attempt import Inputs, Job, Outcome, attempt, died, inside
from .locks import Lock
from .plan import Plan

_inputs = Inputs()  # of a process of the cluster, which does task after task


def execute(plan: Plan, job: Job, jobs: int, on_epoch: Callable[[Planned, int | Note], object]) -> None:
    """Empty the plan: Ray decides how many tasks run at a time, ``jobs`` of them share a GPU."""
    ray = _imported()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_connected(ray))
        stack.enter_context(interrupted_by_sigterm())  # after ray.init, which has a handler of its own
        from ray.util.queue import Queue

        events = Queue(actor_options={"num_cpus": 0})
        stack.callback(events.shutdown, force=True)
        token = stack.enter_context(_token(job.runs))
        # a task that has its process alone ends it
        task = ray.remote(max_calls=1 if job.alone else 0)(_task)
        tasks: dict[Any, tuple[Planned, Lock]] = {}
        recipes: dict[str, Planned] = {}

        def hear() -> None:
            with contextlib.suppress(ray.exceptions.RayError):  # progress is not worth a run
                for run_id, message in events.get_nowait_batch(events.qsize()):
                    if isinstance(message, str) and not isinstance(message, Note):
                        plan.say(recipes[run_id], message)
                    else:
                        on_epoch(recipes[run_id], message)

        try:
            while plan.unfinished:
                while (recipe := plan.take()) is not None:
                    wanted = _resources(ray, recipe, jobs)
                    # held here, not on the node, whose disk may be another
                    if (lock := Lock.take(job.runs / recipe.id)) is None:
                        plan.ended(recipe, Outcome("held"))
                    elif (job.runs / recipe.id / "result.json").is_file():  # another process has done it meanwhile
                        with lock:
                            on_epoch(recipe, recipe.epochs)
                            plan.ended(recipe, Outcome("done"))
                    else:
                        recipes[recipe.id] = recipe
                        tasks[task.options(**wanted).remote(recipe, job, token, events)] = recipe, lock
                if not tasks:
                    time.sleep(0.5)
                    continue
                ended, _ = ray.wait(list(tasks), timeout=0.5)
                hear()
                for reference in ended:
                    recipe, lock = tasks.pop(reference)
                    with lock:
                        plan.ended(recipe, _outcome(ray, reference, recipe, job))
            hear()
        finally:
            _cancel(ray, tasks)


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # tasks of the CPU are left alone, and not warned of
    try:
        import ray
    except ImportError as error:
        raise LabError(f"--executor ray needs Ray, which is not installed; install it with: {how_to_install('ray')}") from error
    return ray


@contextlib.contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """The connection there is, or the cluster of RAY_ADDRESS, or one on this machine, or a new one of this machine alone."""
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS", "this machine")
        raise LabError(f"--executor ray: no connection to the cluster of {where}: {str(error).splitlines()[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _token(runs: Path) -> Iterator[str]:
    """The name of a file in ``runs``: a node that sees it shares the folder."""
    name = f"shared-{uuid.uuid4().hex}"
    runs.mkdir(parents=True, exist_ok=True)
    (runs / name).touch()
    try:
        yield name
    finally:
        (runs / name).unlink(missing_ok=True)


def _resources(ray: Any, recipe: Planned, jobs: int) -> dict[str, Any]:
    """What a task asks of a node; a task that no node can ever do would wait for ever."""
    kind, _, index = recipe.device.partition(":")
    if index:
        raise LabError(f"device {recipe.device}: with --executor ray the cluster chooses the GPU; give {kind}")
    gpus = int(1e4 / jobs) / 1e4 if kind == "cuda" else 0  # ray counts in ten-thousandths
    if not any(
        node["Alive"] and node["Resources"].get("CPU", 0) >= recipe.threads and node["Resources"].get("GPU", 0) >= gpus
        for node in ray.nodes()
    ):
        raise LabError(f"--executor ray: no node of the cluster has {recipe.threads} CPUs and {gpus:g} of a GPU, as a run needs")
    return {"num_cpus": recipe.threads, "num_gpus": gpus, "max_retries": 0, "scheduling_strategy": "SPREAD"}


def _task(recipe: Planned, job: Job, token: str, events: Any) -> tuple[Outcome, dict[str, bytes]]:
    """One attempt on a node: in the queue's own folder where it is seen from here, else in a temporary one whose files are returned."""
    # ray cancels by what looks like Ctrl-C; the training loop writes its checkpoint on SIGTERM
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    inside.set()

    def say(message: int | str) -> None:
        with contextlib.suppress(Exception):
            events.put_nowait((recipe.id, message))

    if (job.runs / token).is_file() and os.access(job.runs, os.W_OK):
        return attempt(recipe, job, _inputs, say, say), {}
    runs = Path(tempfile.mkdtemp(prefix="largemargin-"))
    try:
        outcome = attempt(recipe, dataclasses.replace(job, runs=runs), _inputs, say, say)
        folder = runs / recipe.id
        paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "checkpoint.pt")
        return outcome, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    finally:
        shutil.rmtree(runs, ignore_errors=True)


def _outcome(ray: Any, reference: Any, recipe: Planned, job: Job) -> Outcome:
    """How a task ended; the files it returned are in the run's folder then, the record last."""
    outcome: Outcome
    files: dict[str, bytes]
    try:
        outcome, files = ray.get(reference)
    except ray.exceptions.RayError as error:  # its process or its node is gone
        return died(recipe, job, f"the task of this run died: {type(error).__name__}: {' '.join(str(error).split())}")
    folder = job.runs / recipe.id
    if files or outcome.kind == "done":
        (folder / "error.txt").unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == "result.json"):
        text = files[name]
        if name == "log.txt" and (folder / name).is_file():
            text = (folder / name).read_bytes() + text
        write_atomically(folder / name, lambda file, text=text: file.write(text))  # type: ignore[misc]
    return outcome


def _cancel(ray: Any, tasks: dict[Any, tuple[Planned, Lock]]) -> None:
    try:
        for reference in tasks:
            ray.cancel(reference)
        if tasks:
            ray.wait(list(tasks), num_returns=len(tasks), timeout=GRACE_SECONDS)
        for reference in tasks:
            ray.cancel(reference, force=True)
    finally:
        for _, lock in tasks.values():
            with lock:
                pass
