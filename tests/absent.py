"""What needs an optional package that is not installed is skipped and names it: files, and tests that import it only when they run.

Machines with a GPU often have torch and little else.
"""

import sys
from collections.abc import Generator
from importlib.util import find_spec

import pytest

# what pyproject.toml lists beside torch, and what comes with it, under the names of their modules
OPTIONAL = frozenset(
    "PIL accelerate hypothesis jinja2 jsonargparse lightning markdown_it matplotlib mkdocs mpmath numpy pytorch_metric_learning ray rich "
    "safetensors scipy sklearn skorch tensorboard timm torchmetrics torchvision transformers triton".split()
)


def absent_package(error: BaseException | None) -> str | None:
    """The optional package for whose absence an import failed."""
    while error is not None:
        package = (getattr(error, "name", None) or "").partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and package in OPTIONAL and find_spec(package) is None:
            return package
        error = error.__cause__ or error.__context__
    return None


def reason(package: str) -> str:
    return f"Skipped: needs {package}, which is not installed"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    call: pytest.CallInfo[object] | None = getattr(report, "call", None)
    if report.outcome != "failed" or call is None or call.excinfo is None or not isinstance(collector, pytest.File):
        return report
    package = absent_package(call.excinfo.value)
    if package is not None:
        # pytest leaves a module whose import failed where others would find it half made
        for name in [name for name, module in sys.modules.items() if getattr(module, "__file__", None) == str(collector.path)]:
            del sys.modules[name]
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 1, reason(package))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.outcome == "failed" and call.excinfo is not None and isinstance(call.excinfo.value, ImportError):
        package = absent_package(call.excinfo.value)
        if package is not None:
            report.outcome = "skipped"
            report.longrepr = (str(item.path), (item.location[1] or 0) + 1, reason(package))
    return report
