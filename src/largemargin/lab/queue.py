"""Many runs, a few processes: what is finished is never done again, what is interrupted goes on."""

import contextlib
import json
import multiprocessing
import queue
import signal
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import LabError
from .files import write_text
from .recipe import Recipe


def result_of(recipe: Recipe, runs: Path) -> dict[str, Any] | None:
    """The record of a finished run, or None."""
    path = runs / recipe.id / "result.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        if Recipe(**record["recipe"]).id != recipe.id or not {"test", "epochs", "environment"} <= record.keys():
            raise ValueError("it is of another run")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise LabError(f"{path} is not the record of its run ({error}); remove it to run it again") from error
    return record


def decoded_images(recipe: Recipe, runs: Path) -> Path:
    """Where the images of a slow data set are kept while its runs last."""
    return runs / f"images-{recipe.data_digest}.pt"


def run_all(recipes: Sequence[Recipe], runs: Path, jobs: int, on_epoch: Callable[[Recipe, int], object]) -> list[dict[str, Any]]:
    """Do the runs that are not finished, ``jobs`` at a time, each in a process of one thread; the records of all, in order.

    ``on_epoch(recipe, epoch)`` hears of every epoch that ends. A run that fails leaves its traceback in its folder and does not stop
    the others. An interrupt ends the processes and leaves finished runs and checkpoints in place.
    """
    waiting = [recipe for recipe in recipes if result_of(recipe, runs) is None]
    if waiting:
        _run(waiting, runs, min(jobs, len(waiting)), on_epoch)
    failed = [recipe for recipe in recipes if result_of(recipe, runs) is None]
    if failed:
        logs = [log for recipe in failed if (log := runs / recipe.id / "error.txt").is_file()]
        reason = "the processes died, perhaps for lack of memory; the same command goes on from here"
        if logs:
            reason = f"{logs[0].read_text().strip().splitlines()[-1]} (whole text: {logs[0]})"
        raise LabError(f"{len(failed)} of {len(recipes)} runs are not done: {reason}. The others are kept.")
    return [record for recipe in recipes if (record := result_of(recipe, runs)) is not None]


def _run(recipes: Sequence[Recipe], runs: Path, jobs: int, on_epoch: Callable[[Recipe, int], object]) -> None:
    # not a ProcessPoolExecutor: it cannot be stopped in the middle of a run
    context = multiprocessing.get_context("spawn")
    tasks: Any = context.Queue()
    events: Any = context.Queue()
    for recipe in recipes:
        tasks.put(recipe)
    for _ in range(jobs):
        tasks.put(None)
    workers = [context.Process(target=_work, args=(tasks, events, runs), daemon=True) for _ in range(jobs)]
    by_id = {recipe.id: recipe for recipe in recipes}
    try:
        for worker in workers:
            worker.start()
        ended = False
        while not ended:
            ended = not any(worker.is_alive() for worker in workers)  # asked first: a last event may still be on its way
            with contextlib.suppress(queue.Empty):
                while True:
                    run_id, epoch = events.get(timeout=0.2)
                    on_epoch(by_id[run_id], epoch)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
        for worker in workers:
            worker.join()


def _work(tasks: Any, events: Any, runs: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    import torch

    from . import data
    from .train import train

    torch.set_num_threads(1)
    loaded: dict[str, data.ImageSet] = {}
    while (recipe := tasks.get()) is not None:
        folder = runs / recipe.id
        (folder / "error.txt").unlink(missing_ok=True)
        try:
            if recipe.data_digest not in loaded:
                decoded = decoded_images(recipe, runs)
                loaded[recipe.data_digest] = (
                    data.ImageSet.saved(decoded) if decoded.is_file() else data.load(recipe.data, recipe.data_root, recipe.image_size)
                )

            def on_epoch(row: dict[str, Any], run_id: str = recipe.id) -> None:
                events.put((run_id, row["epoch"]))
                parent = multiprocessing.parent_process()
                if parent is not None and not parent.is_alive():
                    raise SystemExit(1)

            train(recipe, loaded[recipe.data_digest], folder, on_epoch)
        except Exception:
            write_text(folder / "error.txt", traceback.format_exc())
