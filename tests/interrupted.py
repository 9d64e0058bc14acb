"""A run that is ended at chosen points, again and again, until it is done: a script, because it forks before torch starts threads.

    python tests/interrupted.py kill|stop|full FOLDER [KILLS [SEED]]

``kill``: SIGKILL at KILLS points inside steps, writes and evaluations; ``stop``: SIGTERM at eight of them; ``full``: a disk that refuses a
checkpoint. The undisturbed run goes into FOLDER/whole, the other into FOLDER/broken; what happened is printed as JSON.
"""

import dataclasses
import json
import os
import random
import resource
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from largemargin.lab import files
from largemargin.lab.data import images
from largemargin.lab.errors import LabError
from largemargin.lab.run import checkpoint, train, trainer
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.recipe import Recipe

RECIPE = Recipe(
    loss="center_large_margin",
    seed=3,
    epochs=16,
    batch_size=32,
    crop_padding=1,
    flip=True,
    label_noise=0.2,
    **LOSSES["center_large_margin"],
)
PLACES = ("step", "evaluation", "half a checkpoint", "before the replacement", "after the replacement", "metrics.csv")
STOPPED_AT = ("step", "evaluation", "step", "before the replacement", "step", "metrics.csv", "step", "after the replacement")


def digits():
    whole = images.digits()
    return dataclasses.replace(
        whole,
        train_images=whole.train_images[:200],
        train_labels=whole.train_labels[:200],
        test_images=whole.test_images[:80],
        test_labels=whole.test_labels[:80],
    )


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


def main(how, folder, kills=20, seed=0):
    images, draw = digits(), random.Random(seed)
    happened: list[Any] = []

    def go(where, every=0.0):
        trainer.CHECKPOINT_SECONDS = every  # seconds; 0 is after every step
        train.train(RECIPE, images, folder / where, keep_checkpoint=True)

    def ending(place, count, sent, every=0.0):
        end_at(place, count, sent)
        go("broken", every)

    def without_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        go("broken")

    assert ended(child(lambda: go("whole", every=60.0))) == 0
    while not (folder / "broken" / "result.json").is_file():
        turn = len(happened)
        assert turn < 100, happened
        if how == "kill" and turn < kills:
            place = PLACES[turn % len(PLACES)]
            count = 1 if place in ("evaluation", "metrics.csv") else draw.randint(1, 6)  # those come once an epoch
            happened.append([place, count, ended(child(lambda place=place, count=count: ending(place, count, signal.SIGKILL)))])
        elif how == "stop" and turn < 8:
            place = STOPPED_AT[turn % len(STOPPED_AT)]
            count = draw.randint(1, 20) if place == "step" else 1  # of 112
            happened.append([place, count, ended(child(lambda place=place, count=count: ending(place, count, signal.SIGTERM, every=60.0)))])
        elif how == "full" and turn == 0:
            happened.append(["step", 9, ended(child(lambda: ending("step", 9, signal.SIGKILL)))])
        elif how == "full" and turn < 3:
            happened.append(["no room", 0, ended(child(without_room))])
        else:
            happened.append(["undisturbed", 0, ended(child(lambda: go("broken", every=60.0)))])
    print(json.dumps(happened))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
