"""Runs that are ended at chosen points, again and again, until they are done: a script, because it forks before torch starts threads.

    python tests/interrupted.py FOLDER HOW=TIMES ...

``kill``: SIGKILL at TIMES points inside steps, writes and evaluations; ``stop``: SIGTERM at TIMES of them; ``full``: a disk that refuses a
checkpoint TIMES times. The undisturbed run goes into FOLDER/whole, the others into FOLDER/HOW; what happened is printed as JSON, by HOW.
"""

import dataclasses
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # which the first optimiser of a process imports: once here, and not in every child

from largemargin.lab import files
from largemargin.lab.errors import LabError
from largemargin.lab.run import checkpoint, train, trainer
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.recipe import Recipe
from processes import noise

RECIPE = Recipe(
    loss="center_large_margin",
    seed=3,
    epochs=8,
    batch_size=32,
    crop_padding=1,
    flip=True,
    label_noise=0.2,
    **LOSSES["center_large_margin"],
)
PLACES = ("step", "evaluation", "half a checkpoint", "before the replacement", "after the replacement", "metrics.csv")
STOPPED_AT = ("step", "evaluation", "step", "before the replacement", "step", "metrics.csv", "step", "after the replacement")


def end_at(place, count, sent=signal.SIGKILL):
    """Let this process be sent a signal where it comes to ``place`` for the ``count``-th time."""
    seen = 0

    def here():
        nonlocal seen
        seen += 1
        if seen == count:
            os.kill(os.getpid(), sent)

    def before(function):
        return lambda *args, **kwargs: (here(), function(*args, **kwargs))[1]

    def after(function):
        return lambda *args, **kwargs: (function(*args, **kwargs), here())[0]

    def half(save):
        def saving(folder, recipe, state):
            nonlocal seen
            seen += 1
            if seen < count:
                return save(folder, recipe, state)

            def write(file, content):
                file.write(bytes(content)[: len(content) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            with mock.patch.object(
                checkpoint, "write_atomically", lambda path, _: files.write_atomically(path, lambda file: write(file, bytes(10_000)))
            ):
                return save(folder, recipe, state)

        return saving

    target, name, how = {
        "step": (torch.optim.SGD, "step", before),
        "evaluation": (trainer, "evaluate", before),
        "half a checkpoint": (checkpoint, "save", half),
        "before the replacement": (os, "replace", before),
        "after the replacement": (os, "replace", after),
        "metrics.csv": (trainer, "write_text", before),
    }[place]
    setattr(target, name, how(getattr(target, name)))


def child(work):
    """A process of its own that does ``work``; its exit status is that of the command line."""
    pid = os.fork()
    if pid == 0:
        status: int | str | None = 1
        try:
            work()
            status = 0
        except SystemExit as stop:
            status = stop.code
        except LabError as error:
            print(error, file=sys.stderr)
            status = 2
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pid


def ended(pid):
    """The exit status of a process, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def endings(how, times):
    """What ends the runs of one kind in turn: where, and from which time on that a run comes there."""
    draw = random.Random(0)
    for turn in range(times):
        if how == "kill":
            place = PLACES[turn % len(PLACES)]
            yield place, 1 if place in ("evaluation", "metrics.csv") else draw.randint(1, 6)  # those come once an epoch
        elif how == "stop":
            place = STOPPED_AT[turn % len(STOPPED_AT)]
            yield place, draw.randint(1, 10) if place == "step" else 1  # of 7 steps an epoch
        else:
            yield "no room", 0


def main(folder, times):
    images, recipe = noise(), dataclasses.replace(RECIPE, epochs=max(8, *times.values()))

    def go(where, every=60.0):
        trainer.CHECKPOINT_SECONDS = every  # seconds; 0 is after every step
        train.train(recipe, images, folder / where, keep_checkpoint=True)

    def ending(how, place, count):
        if place == "no room":
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        else:
            end_at(place, count, signal.SIGTERM if how == "stop" else signal.SIGKILL)
        go(how, 60.0 if how == "stop" else 0.0)

    assert ended(child(lambda: go("whole"))) == 0
    happened = {}
    for how, count in times.items():
        turns = [("step", 9)] if how == "full" else []  # with the checkpoint that a full disk must not harm
        turns += endings(how, count)
        happened[how] = [[*turn, ended(child(lambda how=how, turn=turn: ending(how, *turn)))] for turn in turns]
        assert not (folder / how / "result.json").exists(), happened
        assert ended(child(lambda how=how: go(how))) == 0, happened
    print(json.dumps(happened))


if __name__ == "__main__":
    main(Path(sys.argv[1]), {how: int(times) for how, times in (word.split("=") for word in sys.argv[2:])})
