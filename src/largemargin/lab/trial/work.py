"""The work of one run: call the training function, look at what it returns, and write its record."""

import dataclasses
import numbers
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import LabError
from ..files import remove_unfinished, write_json
from ..predictions import NAME as PREDICTIONS
from ..run.environment import check_device, environment_of
from ..run.planned import Note
from ..stopping import Stopped
from .run import Run
from .trial import Trial

WORK = f"{__name__}:do"  # as a queue names it


@dataclass(frozen=True)
class Sent:
    """What travels to the process of a run."""

    train: Callable[[Run], Any]
    factories: Mapping[str, Callable[[], Any]]  # of the losses that are no words
    digests: Mapping[str, str]  # of the source, by the loss


def do(
    trial: Trial,
    sent: Sent,
    folder: Path,
    on_epoch: Callable[[dict[str, Any]], object] = lambda _: None,
    on_message: Callable[[str], object] = lambda _: None,
) -> dict[str, Any]:
    """Do a run, write ``result.json`` into ``folder`` and return what it holds."""
    check_device(trial.device)
    torch.set_num_threads(trial.threads)
    if trial.device.startswith("cuda:"):
        torch.cuda.set_device(trial.device)
    remove_unfinished(folder)
    run = Run(trial, sent.factories.get(trial.loss), folder, lambda line: on_message(Note(line)))
    began = time.monotonic()
    returned = _called(sent.train, run)
    scores = scores_of(returned)
    if trial.validation_fraction and not run.asked_to_hold_out:
        raise LabError(
            "with several lam, train must leave out a part of the training set and return the scores on it: ask run.split(n) which "
            "samples, or run.validation how many; or give one lam"
        )
    measured = run.measured
    record = {
        "trial": trial.to_dict(),
        "scores": scores,
        "digest": sent.digests[trial.loss],
        "measured": None if measured is None else dataclasses.asdict(measured),
        "asked_to_hold_out": run.asked_to_hold_out,
        "num_test": 0 if run.predictions is None else len(run.predictions.labels),
        "num_classes": 0 if run.predictions is None else run.predictions.logits.shape[1],
        "seconds": time.monotonic() - began,
        "environment": environment_of(trial.device, trial.threads),
        "log": run.logged,
    }
    if run.predictions is not None:
        run.predictions.save(folder / PREDICTIONS)
    write_json(folder / "result.json", record)
    on_epoch({"epoch": 1})
    return record


def _called(train: Callable[[Run], Any], run: Run) -> Any:
    """What the function returns, in the process and in the folder in which it was called."""
    process, folder = os.getpid(), Path.cwd()
    try:
        return train(run)
    except Stopped:
        raise
    except SystemExit as error:
        raise LabError(f"train called sys.exit({'' if error.code is None else error.code!r}); let it return its scores") from error
    except Exception:
        raise
    except BaseException as error:  # nobody interrupts the process of a run by an exception
        raise LabError(f"train raised {type(error).__name__}, which ends a process; let it raise an ordinary error") from error
    finally:
        if os.getpid() != process:  # a process that train has forked, and that came back from it too
            os._exit(1)
        os.chdir(folder)


def scores_of(returned: Any) -> dict[str, float]:
    """The numbers that the function returned by their names; raises LabError for anything else."""
    asked = 'return run.score(logits, target), or a dictionary of numbers, {"error": 12.3, "f1": 0.71} say'
    if not isinstance(returned, Mapping):
        what = "nothing" if returned is None else f"{type(returned).__name__} {returned!r:.60}"
        raise LabError(f"train returned {what}; {asked}")
    if not returned:
        raise LabError(f"train returned an empty dictionary; {asked}")
    return {_named(name): _number(name, value, asked) for name, value in returned.items()}


def _named(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise LabError(f"train returned a number under {name!r}; names must be text")
    return name


def _number(name: str, value: Any, asked: str) -> float:
    if getattr(value, "ndim", None) == 0 or getattr(value, "shape", None) == ():  # of numpy or torch
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise LabError(f"train returned {value!r:.60} as {name}, which is no number; {asked}")
    return float(value)
