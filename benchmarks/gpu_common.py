"""What the benchmarks on a GPU share: the card and its stand-in, rounds in turns, and a record that grows as they go."""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from common import ROOT, machine, refuse_if_wrong
from largemargin.lab.run.cuda_graph import CudaGraph
from largemargin.lab.run.environment import commit

Step = Callable[[], object]
T = TypeVar("T")
OfBenchmark = TypeVar("OfBenchmark", bound="Work")
WARM_UP = 3
RIVALS = {"Liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "quack": "quack"}


class Kernel(NamedTuple):
    """A piece of work of the card."""

    name: str
    start: float  # microseconds
    end: float


class Card:
    """A CUDA GPU: its clock, its counters of memory and kernels, and its graphs."""

    device = "cuda"
    compiler = "inductor"

    def __init__(self) -> None:
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=self.device)

    def milliseconds(self, step: Step) -> float:
        """Of the device, from a cold L2; the launches may have been waiting for it."""
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def microseconds_back_to_back(self, step: Step, repeats: int = 300) -> float:
        """A step's share of many in a row, with all that the CPU does to launch them."""
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / repeats * 1e6

    def peak_bytes(self, step: Step) -> int:
        """The most that a step takes beside what is held before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, step: Step) -> list[Kernel]:
        """What a step launches: kernels, copies and fills."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        events = [
            event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        if not events:
            raise RuntimeError("the profiler saw no kernel; is CUPTI installed, and may this user profile?")
        return sorted(
            (Kernel(event.name, event.time_range.start, event.time_range.end) for event in events), key=lambda kernel: kernel.start
        )

    def captured(self, step: Step) -> Step:
        """The step as a graph: one launch."""
        graph = CudaGraph()
        for _ in range(WARM_UP):
            graph.warm_up(step)
        results = graph.record(step)

        def replay() -> object:
            graph.replay()
            return results  # they live in the memory of the graph

        return replay

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def release(self) -> None:
        """Give back what a contestant held; raises where the card is lost to this process."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class StandIn(Card):
    """The CPU in the place of a card: every step runs, and its numbers mean nothing."""

    device = "cpu"
    compiler = "eager"

    def __init__(self) -> None:
        pass

    def milliseconds(self, step: Step) -> float:
        step()
        return 1.0

    def microseconds_back_to_back(self, step: Step, repeats: int = 1) -> float:
        return self.milliseconds(step)

    def peak_bytes(self, step: Step) -> int:
        step()
        return 0

    def kernels(self, step: Step) -> list[Kernel]:
        step()
        return [Kernel("a kernel", 0.0, 1.0)]

    def captured(self, step: Step) -> Step:
        return step

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        gc.collect()


class Record:
    """A JSON file that is written anew whenever something was added, so that an interrupted benchmark leaves what it has."""

    def __init__(self, path: Path, claim: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "claim": claim,
            "finished": False,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "command": f"python {' '.join(sys.argv)}",
            "machine": machine()
            | {"cuda": torch.version.cuda}
            | {name: version(name) for name in ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")},
        }

    def write(self, **added: Any) -> None:
        self.content |= added
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.content, indent=1) + "\n")
        unfinished.replace(self.path)

    def finish(self) -> None:
        self.write(finished=True)
        print(self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path)


@dataclass(frozen=True)
class Work:
    """What a benchmark is to measure."""

    cases: tuple[Any, ...]  # the most valuable first
    rounds: int
    tests: tuple[str, str] | None  # of what is measured: the words that select them, and their file


def start(name: str, description: str, work: OfBenchmark, tiny: OfBenchmark) -> tuple[Card, Record, OfBenchmark]:
    """Read the command line: the card, the record and the work; with ``--self-test`` the stand-in and the tiny work."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--self-test", action="store_true", help="run every line on the CPU, with tiny work; the numbers mean nothing")
    parser.add_argument("--skip-tests", action="store_true", help="measure whether or not the tests of what is measured pass")
    parser.add_argument("--out", type=Path, default=None, help=f"the JSON file to write; default: results/gpu/{name}.json")
    arguments = parser.parse_args()
    folder = ROOT / "results" / "gpu"
    card: Card
    if arguments.self_test:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
        folder = Path(tempfile.mkdtemp())
        card, work = StandIn(), tiny
    elif torch.cuda.is_available():
        card = Card()
    else:
        sys.exit(f"{Path(sys.argv[0]).name} needs a GPU that torch can use; --self-test runs through on the CPU")
    if work.tests is not None and not arguments.skip_tests:
        refuse_if_wrong(*work.tests)
    return card, Record(arguments.out or folder / f"{name}.json", description.splitlines()[0]), work


def gradient_step(loss: Callable[..., Tensor], leaves: tuple[Tensor, ...], *target: Tensor) -> Step:
    """Forward and backward; the gradients of the step before have been freed."""

    def step() -> object:
        value = loss(*leaves, *target)
        return value, torch.autograd.grad(value, leaves)

    return step


def measure(
    makers: dict[str, Callable[[], Step]], card: Card, rounds: int, gradients: int = 0, small: bool = False
) -> dict[str, dict[str, Any]]:
    """Every contestant's median and quartiles over rounds in turns, and its peak of memory without the bytes of its ``gradients``.

    Of one that fails, the error. Of ``small`` steps, which are over before the next is launched, also the time of many in a row, and their
    kernels. A graph has its memory in a pool of its own, and a copy makes no gradient: of these the memory is not told.
    """
    contestants = Contestants(makers, card)
    for _ in range(WARM_UP):
        contestants.each(lambda step: step())
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, elapsed in contestants.each(card.milliseconds).items():
            times[name].append(elapsed)
    peaks = contestants.each(card.peak_bytes)
    in_a_row = contestants.each(card.microseconds_back_to_back) if small else {}
    kernels = contestants.each(card.kernels) if small else {}
    found: dict[str, dict[str, Any]] = {name: {"failed": contestants.failed[name]} if name in contestants.failed else {} for name in makers}
    for name, row in found.items():
        if len(times[name]) == rounds:
            low, _, high = statistics.quantiles(times[name], n=4)
            row |= {"ms": rounded(statistics.median(times[name])), "low": rounded(low), "high": rounded(high)}
        if name in peaks and name != "copy" and not name.endswith("graph"):
            row["MiB beside inputs and gradients"] = round((peaks[name] - gradients) / 2**20)
        if name in in_a_row:
            row["us back to back"] = rounded(in_a_row[name])
        if name in kernels:
            row |= {"launches": len(kernels[name]), "kernels": [kernel.name for kernel in kernels[name]]}
    return found


class Contestants:
    """Steps by name. One that fails is left out from then on, and its error is kept."""

    def __init__(self, makers: dict[str, Callable[[], Step]], card: Card) -> None:
        self.card = card
        self.failed: dict[str, str] = {}
        self.steps: dict[str, Step] = {}
        for name, make in makers.items():
            self._attempt(name, lambda name=name, make=make: self.steps.update({name: make()}))  # type: ignore[misc]

    def each(self, what: Callable[[Step], T]) -> dict[str, T]:
        """``what`` of every step that still works."""
        found: dict[str, T] = {}
        for name, step in list(self.steps.items()):
            self._attempt(name, lambda name=name, step=step: found.update({name: what(step)}))  # type: ignore[misc]
        return found

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever befalls a rival, the others are measured
            self.failed[name] = summary(error)
            print(f"{name}: {self.failed[name]}", file=sys.stderr)
        if name in self.failed:
            self.steps.pop(name, None)
            self.card.release()


def summary(error: BaseException) -> str:
    """The type of an error and its first line, of a length for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:160]


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def copy_of(tensor: Tensor) -> Step:
    """A copy on the device, whose bandwidth the others are compared with: it touches each byte twice."""
    other = torch.empty_like(tensor)
    return lambda: other.copy_(tensor.detach())


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing_rivals(*names: str) -> list[str]:
    """Those of ``RIVALS`` that are not installed here."""
    return [name for name in names if not installed(RIVALS[name])]


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
