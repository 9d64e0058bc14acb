"""Processes for runs that start at once: each is forked from a server that has imported torch, which takes a new interpreter seconds.

They are processes of their own all the same. What a test says of the start of a process, it must say of ``spawn``, as users have it.
"""

import multiprocessing
import os
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

IMPORTED = [
    *("largemargin.lab.queue.local", "largemargin.lab.queue.budget", "largemargin.lab.run.train"),
    *("accelerate", "sklearn.model_selection", "sklearn.datasets", "torch._dynamo"),  # which a run imports on its way
]


class Process(ForkServerProcess):
    """In the environment of the process that starts it, and not in that of the server."""

    _environment: dict[str, str]

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class Context(ForkServerContext):
    Process: Any = Process


CONTEXT = Context()
multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
