"""Stands in for ``train`` in the tests of the queue: ``work="lab_work:..."``."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from largemargin.lab.errors import LabError
from largemargin.lab.files import write_json


def finish(recipe, data, folder, on_epoch, on_message=None, **options):
    for epoch in range(1, recipe.epochs + 1):
        on_epoch({"epoch": epoch})
    with (folder.parent / f"times-{recipe.id}").open("a") as times:
        times.write("done\n")
    record = {
        "recipe": recipe.to_dict(),
        "test": {"error": float(recipe.seed)},
        "epochs": [],
        "environment": {"process": os.getpid(), "options": options},
    }
    write_json(folder / "result.json", record | {"num_train": len(data.train_labels)})


def sees(recipe, data, folder, on_epoch, on_message=None):
    """Lasts until as many runs have started as there are GPUs; the record says which GPU it sees."""
    (folder.parent / f"started-{recipe.seed}").touch()
    while len(list(folder.parent.glob("started-*"))) < 2:
        time.sleep(0.02)
    record = {"recipe": recipe.to_dict(), "test": {"error": 0.0}, "epochs": []}
    write_json(folder / "result.json", record | {"environment": {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}})


def _attempt(recipe, folder):
    count = folder.parent / f"attempts-{recipe.id}"
    with count.open("a") as file:
        file.write(f"{time.monotonic()}\n")
    return len(count.read_text().splitlines())


def fails_once(recipe, data, folder, on_epoch, on_message=None, **options):
    if recipe.seed == 0 and _attempt(recipe, folder) == 1:
        print("said before")
        os.system("echo said by a child")
        raise ValueError("the first time")
    finish(recipe, data, folder, on_epoch)


def fails(recipe, data, folder, on_epoch, on_message=None):
    if recipe.seed == 0:
        _attempt(recipe, folder)
        raise ValueError("every time")
    finish(recipe, data, folder, on_epoch)


def refuses(recipe, data, folder, on_epoch, on_message=None):
    _attempt(recipe, folder)
    raise LabError("--lam 3: mend it")


def says_much(recipe, data, folder, on_epoch, on_message=None):
    raise ValueError("the first line\n and the second line " + 1000 * "word ")


def is_killed(recipe, data, folder, on_epoch, on_message=None, times=1):
    if recipe.seed == 0 and _attempt(recipe, folder) <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(recipe, data, folder, on_epoch)


def segfaults(recipe, data, folder, on_epoch, on_message=None):
    _attempt(recipe, folder)
    os.kill(os.getpid(), signal.SIGSEGV)


def lasts(recipe, data, folder, on_epoch, on_message=None):
    """Until ``runs/go`` is there; leaves a checkpoint on SIGTERM, as the training loop does."""

    def leave(*_):
        (folder / "checkpoint.pt").write_text("a step")
        sys.exit(143)

    if (folder / "checkpoint.pt").is_file():
        return finish(recipe, data, folder, on_epoch)
    before = signal.signal(signal.SIGTERM, leave)
    (folder / "started").write_text(json.dumps(os.getpid()))
    on_epoch({"epoch": 1})
    while not (folder.parent / "go").exists():
        time.sleep(0.02)
    signal.signal(signal.SIGTERM, before)
    finish(recipe, data, folder, on_epoch)


def on_node(recipe, data, folder, on_epoch, attempts, shared, on_message=None):
    """Fails once for seed 0 in all of the cluster; the record names the node."""
    import ray

    count = Path(attempts) / recipe.id
    with count.open("a") as file:
        file.write("attempt\n")
    if recipe.seed == 0 and len(count.read_text().splitlines()) == 1:
        raise ValueError("the first time")
    time.sleep(0.3)
    on_epoch({"epoch": 1})
    (folder / "metrics.csv").write_text("epoch\n1\n")
    record = {"recipe": recipe.to_dict(), "test": {"error": float(recipe.seed)}, "epochs": []}
    node = ray.get_runtime_context().get_node_id()
    write_json(folder / "result.json", record | {"environment": {"node": node, "folder": str(folder)}})
