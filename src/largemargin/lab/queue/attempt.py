"""One attempt at one run, in the process that does it."""

import contextlib
import datetime
import faulthandler
import importlib
import os
import platform
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import data
from ..data.images import ImageSet
from ..errors import LabError
from ..files import write_text
from ..run.planned import Planned
from ..run.recipe import Recipe

REASON_LENGTH = 400  # characters; the whole text is in error.txt
TIMED_OUT = "Timeout ("  # as faulthandler begins
inside = threading.Event()  # set in a process that does runs for another


@dataclass(frozen=True)
class Job:
    """What all runs of a queue share."""

    runs: Path  # absolute
    work: str  # "module:function", called as train() is
    options: dict[str, Any] = field(default_factory=dict)  # its keyword arguments
    sent: bytes | None = None  # what it works on, by cloudpickle; None: the data set of its recipe
    alone: bool = False  # whether each run has a process of its own
    timeout: float | None = None  # seconds of a run


class Outcome(NamedTuple):
    """How an attempt ended."""

    kind: Literal["done", "failed", "refused", "held"]  # refused: the user must mend something; held: another process does this run
    reason: str = ""


def decoded_images(recipe: Recipe, runs: Path) -> Path:
    """Where the images of a slow data set are kept while its runs last."""
    return runs / f"images-{recipe.data_digest}.pt"


class Inputs:
    """What the runs of a process work on, each loaded once: data sets, checked against the digest of their recipes, or what was sent."""

    def __init__(self) -> None:
        self._loaded: dict[Hashable, Any] = {}

    def of(self, recipe: Planned, job: Job) -> Any:
        if job.sent is not None:
            return received(job.sent)
        assert isinstance(recipe, Recipe)
        return self.data_set(recipe, job.runs)

    def data_set(self, recipe: Recipe, runs: Path) -> Any:
        key = (
            recipe.data,
            recipe.data_root,
            recipe.image_size,
            recipe.data_digest,
            recipe.streamed,
            recipe.labels,
            recipe.unverified,
            recipe.target,
        )
        if key not in self._loaded:
            decoded = decoded_images(recipe, runs)
            found: Any
            if decoded.is_file():
                found = ImageSet.saved(decoded)
            else:
                found = data.load_of(recipe)
            if recipe.data_digest and (digest := found.digest()) != recipe.data_digest:
                raise LabError(
                    f"data {recipe.data} has the digest {digest}, the run was planned for {recipe.data_digest}: the data changed or "
                    "differ on this machine; restore them, or start the comparison anew"
                )
            self._loaded[key] = found
        return self._loaded[key]


def received(sent: bytes) -> Any:
    """What :class:`Job` carries, in the process of a run."""
    import cloudpickle

    try:
        return cloudpickle.loads(sent)
    except Exception as error:
        raise LabError(
            f"the process of a run cannot load the training function or a loss ({type(error).__name__}: {error}); the modules that it "
            "imports must be installed, or stand in a folder of PYTHONPATH"
        ) from error


def attempt(recipe: Planned, job: Job, inputs: Inputs, on_epoch: Callable[[int], object], on_message: Callable[[str], object]) -> Outcome:
    """Do the run in its folder. A failure is an outcome: its traceback is ``error.txt``, all that was printed is in ``log.txt``."""
    folder = job.runs / recipe.id
    try:
        with printed_into(folder / "log.txt"):
            (folder / "error.txt").unlink(missing_ok=True)
            try:
                with ended_after(job.timeout, folder / "error.txt"):
                    module, _, function = job.work.partition(":")
                    train = getattr(importlib.import_module(module), function)
                    train(
                        recipe,
                        inputs.of(recipe, job),
                        folder,
                        on_epoch=lambda row: on_epoch(row["epoch"]),
                        on_message=on_message,
                        **job.options,
                    )
                return Outcome("done")
            except Exception:
                traceback.print_exc()
                write_text(folder / "error.txt", traceback.format_exc())
                raise
    except Exception as error:
        if isinstance(error, LabError):
            return Outcome("refused", str(error))
        reason = traceback.format_exception_only(error)[-1]
        return Outcome("failed", textwrap.shorten(reason, REASON_LENGTH, placeholder=" ..."))


@contextlib.contextmanager
def ended_after(seconds: float | None, place: Path) -> Iterator[None]:
    """End the process if what follows takes longer; the file ``place`` then says where it was. It needs no turn of the interpreter."""
    if seconds is None:
        yield
        return
    with place.open("w", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(seconds, file=file, exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            place.unlink(missing_ok=True)


@contextlib.contextmanager
def printed_into(log: Path) -> Iterator[None]:
    """Append to ``log``, under a time stamp, what the process prints meanwhile, from C as well; nothing where it prints nothing."""
    log.parent.mkdir(parents=True, exist_ok=True)
    stamp = stamped(f"process {os.getpid()} on {platform.node()}").encode()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    before = os.fstat(file).st_size
    _flush()
    own = [os.dup(stream) for stream in (1, 2)]
    try:
        os.write(file, stamp)
        for stream in (1, 2):
            os.dup2(file, stream)
        yield
    finally:
        _flush()
        for stream, old in zip((1, 2), own, strict=True):
            os.dup2(old, stream)
            os.close(old)
        if os.fstat(file).st_size == before + len(stamp):
            os.ftruncate(file, before)
            if not before:
                log.unlink(missing_ok=True)
        os.close(file)


def died(recipe: Planned, job: Job, how: str) -> Outcome:
    """The outcome of an attempt whose process is gone, said in its folder too."""
    folder = job.runs / recipe.id
    if job.timeout is not None and _begins_with(folder / "error.txt", TIMED_OUT):
        return Outcome("refused", f"the run took longer than the timeout of {job.timeout:g} s; give more time, or mend what hangs")
    with contextlib.suppress(OSError):  # a full disk, say: the reason is reported all the same
        write_text(folder / "error.txt", how + "\n")
        with (folder / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(stamped(how))
    return Outcome("failed", how)


def _begins_with(path: Path, text: str) -> bool:
    try:
        return path.read_text(encoding="utf-8", errors="replace").startswith(text)
    except OSError:
        return False


def stamped(text: str) -> str:
    return f"--- {datetime.datetime.now().astimezone().isoformat(timespec='seconds')} {text}\n"


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # a process may have none, or a closed one
            stream.flush()
