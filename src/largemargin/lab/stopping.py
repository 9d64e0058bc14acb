"""A run can be told to stop, and ends after a checkpoint."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOPPED = 143  # the exit status of a run that was told to stop, as of a process ended by SIGTERM


class Stopped(SystemExit):
    """The run was told to stop, and has written a checkpoint."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


@contextlib.contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """An event that is set by SIGTERM, and by the first Ctrl-C where nobody else listens for it."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def tell(number: int, frame: FrameType | None) -> None:
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
