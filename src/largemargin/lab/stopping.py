"""A run can be told to stop, and ends after a checkpoint; a command that has not begun its work ends at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

GRACE_SECONDS = 20.0  # for the checkpoints of interrupted runs
INTERRUPTED = 128 + signal.SIGINT  # the exit status of what Ctrl-C ended, as in a shell


class Stopped(SystemExit):
    """The run was told to stop, and has written a checkpoint; its exit status is that of a process ended by the signal."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(128 + number)


class Told(threading.Event):
    """Set when the run is told to stop, and by which signal."""

    number: int = signal.SIGTERM


@contextlib.contextmanager
def told_to_stop() -> Iterator[Told]:
    """An event that is set by SIGTERM, and by the first Ctrl-C where nobody else listens for it."""
    told = Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def tell(number: int, frame: FrameType | None) -> None:
        told.number = number
        told.set()
        signal.signal(number, before[signal.Signals(number)])  # the second time is meant

    listened = [signal.SIGTERM] + [signal.SIGINT] * (signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in listened}
    for number in listened:
        signal.signal(number, tell)
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interrupts_end_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process meanwhile, without an exception. For imports: one that an exception cuts short leaves modules half made,
    which fail later, with errors of their own.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os.write(2, b"largemargin: interrupted\n")
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def by_interrupt(error: BaseException) -> bool:
    """Whether an interrupt is behind it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, KeyboardInterrupt):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt meanwhile, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
