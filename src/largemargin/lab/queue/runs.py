"""Many runs, a few at a time: what is finished is never done again, and what is interrupted goes on."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import LabError, NotDone, RunFailed
from ..results import Record, result_of
from ..run.planned import Note, Planned
from ..words import counted
from . import EXECUTORS, local, ray
from .attempt import Job
from .budget import Budget
from .plan import Plan

MEMORY_OF_A_RUN = 12 * 2**30  # bytes of a GPU: a guess, above the largest network for CIFAR at batch 128


def run_all(
    recipes: Sequence[Planned],
    runs: Path,
    jobs: int,
    on_epoch: Callable[[Planned, int | Note], object],
    executor: str = "local",
    *,
    on_message: Callable[[str], object] = lambda _: None,
    work: str = "largemargin.lab.run.train:train",
    budget: Budget | None = None,
    sent: bytes | None = None,
    timeout: float | None = None,
    **options_of_a_run: Any,
) -> list[Record]:
    """Do the runs that are not finished, ``jobs`` at a time; the records of all, in order.

    ``on_epoch(recipe, epoch)`` hears of every epoch that ends, ``on_message`` a line for the user; ``options_of_a_run`` are keyword
    arguments of ``work``, by name the function that does a run. A run that fails leaves its traceback in its folder, does not stop the
    others and is tried once more after them. An interrupt, or SIGTERM, ends the processes and leaves finished runs and checkpoints in
    place. With ``executor="ray"``, ``jobs`` runs share each GPU and a Ray cluster decides how many are done at a time. With a ``budget``
    the runs that it does not allow are left for another time. With ``sent``, ``work`` gets what was sent in place of a data set, and each
    run has a process of its own. A run that takes longer than ``timeout`` seconds is ended.
    """
    if executor not in EXECUTORS:
        raise LabError(f"--executor {executor}: choose one of {', '.join(EXECUTORS)}")
    waiting = list({recipe.id: recipe for recipe in recipes if result_of(recipe, runs) is None}.values())
    plan = Plan(waiting, on_message, budget)
    if waiting:
        if budget is not None:
            budget.plan(waiting, runs.resolve(), jobs, on_message)
        execute = ray.execute if executor == "ray" else local.execute
        execute(plan, Job(runs.resolve(), work, options_of_a_run, sent, alone=sent is not None, timeout=timeout), jobs, on_epoch)
    failed = [recipe for recipe in recipes if result_of(recipe, runs) is None and (budget is None or recipe.id in plan.reasons)]
    if failed:
        reason = plan.reasons.get(failed[0].id, "it left no record")
        if (text := runs / failed[0].id / "error.txt").is_file():
            reason += f" (whole text: {text})"
        kind = NotDone if all(recipe.id in plan.refused for recipe in failed) else RunFailed
        rest = (
            "The others are kept; run the same command to continue." if len(failed) < len(recipes) else "Run the same command to try again."
        )
        raise kind(
            f"{len(failed)} of {counted(len(recipes), 'run')} could not be done: {reason}. {rest}",
            {recipe.id: plan.reasons.get(recipe.id, "it left no record") for recipe in failed},
        )
    return [record for recipe in recipes if (record := result_of(recipe, runs)) is not None]


def num_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_jobs(device: str, streamed: bool, on_cpu: int) -> int:
    """How many runs to do at a time; ``on_cpu`` where the device is no GPU of CUDA.

    A run leaves a GPU idle while the host starts it, draws an epoch and writes. A run that reads image files has as many processes as
    there are cores already. Three runs need three times the memory. Runs on ``cuda`` are spread over all GPUs.
    """
    if not device.startswith("cuda"):
        return on_cpu
    free, _ = torch.cuda.mem_get_info(device)
    gpus = max(1, len(local.gpus_of(device)))
    return gpus if streamed else max(1, min(3 * gpus, num_cores() // 2, gpus * (free // MEMORY_OF_A_RUN)))


def threads_note(recipes: Sequence[Planned], jobs: int) -> str | None:
    """A line of warning where the runs of the CPU want more threads at a time than there are cores."""
    cores, threads = num_cores(), max((recipe.threads for recipe in recipes if recipe.device == "cpu"), default=0)
    jobs = min(jobs, len(recipes))
    if jobs * threads <= cores:
        return None
    return f"{counted(jobs, 'run')} at a time of {counted(threads, 'thread')} share {counted(cores, 'core')}: fewer --jobs may be faster"
