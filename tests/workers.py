"""Worker processes that start at once: a server that has imported torch forks them. A new interpreter imports torch for seconds.

Users have ``spawn``. A test of how a process starts, or of what a signal does to it, uses that too: it runs a command.
"""

import multiprocessing
import os
from multiprocessing.context import ForkServerContext, ForkServerProcess

IMPORTED = [
    *("largemargin.lab.queue.local", "largemargin.lab.queue.budget", "largemargin.lab.run.train"),
    *("accelerate", "sklearn.model_selection", "sklearn.datasets", "torch._dynamo"),  # a run imports these on its way
]


class Process(ForkServerProcess):
    """Has the environment of the process that starts it, not that of the server."""

    _environment: dict[str, str]

    def start(self) -> None:
        self._environment = dict(os.environ)
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class Context(ForkServerContext):
    Process = Process


CONTEXT = Context()
multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
