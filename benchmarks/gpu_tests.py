"""Claim: the tests that take a device pass on this one.

A script, and the pytest plugin by which it selects: the kernel tests, the tests with the fixture `device`, and those that only a GPU can
run. With pytest-xdist up to eight processes share them: the time goes into compiling kernels, and a fault of the device ends one process
only.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

import pytest
from gpu_common import Record, Work, start

from common import ROOT

WORK = Work(cases=("tests", "-m", "not slow"), rounds=1, tests=None)
TINY = Work(cases=("tests/test_backends.py", "-k", "triton and awkward"), rounds=1, tests=None)
PROCESSES = min(8, (os.cpu_count() or 1) // 2)
OPTIONS = ("-q", "--tb=short", "--continue-on-collection-errors", "-p", "no:cacheprovider", "-p", "gpu_tests")
SECONDS = 5.0  # between two writings of the record


def takes_the_device(item: pytest.Item) -> bool:
    needs_gpu = any("GPU" in mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif"))
    return needs_gpu or item.path.name == "test_backends.py" or "device" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the device."""
    kept = [item for item in items if takes_the_device(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


class Listener:
    """A pytest plugin that counts outcomes and keeps the names of what fails."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.failed: dict[str, str] = {}
        self.not_collected: dict[str, str] = {}
        self.written = 0.0

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.not_collected[report.nodeid] = last_line(report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.setdefault(report.nodeid, crash(report))
            self.counts["failed"] = len(self.failed)
        elif report.when == "call" or report.skipped:
            self.counts[report.outcome] += 1
        if time.monotonic() - self.written > SECONDS:
            self.write()

    def write(self) -> None:
        self.written = time.monotonic()
        self.record.write(**self.counts, **{"failures": self.failed, "not collected": self.not_collected})


def crash(report: pytest.TestReport) -> str:
    """The first line of what a test died of."""
    found = getattr(report.longrepr, "reprcrash", None)
    return last_line(report.longreprtext) if found is None else str(found.message).splitlines()[0][:160]


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].removeprefix("E   ")[:160]


def main() -> int:
    """Run them; pytest's exit status."""
    _, record, work = start("tests", __doc__, WORK, TINY)
    os.chdir(ROOT)
    paths = [str(Path(__file__).parent), str(ROOT / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))  # of the processes of pytest-xdist
    shared = PROCESSES > 1 and importlib.util.find_spec("xdist")
    options = [*OPTIONS, "-n", str(PROCESSES), "--dist", "loadgroup"] if shared else OPTIONS
    listener = Listener(record)
    status = pytest.main([*work.cases, *options], plugins=[listener])
    listener.write()
    if status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        record.finish()
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
