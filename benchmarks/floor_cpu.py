"""Claim: the CPU kernel takes less than twice the time of the passes over memory and the exponentials that any such kernel needs.

floor_cpu.cpp has these passes, compiled with the flags of the kernel: the maximum of a row, e^z with three sums, and a gradient of the
shape of ours. Row by row, one after the other, they are the floor. The loss goes through the public function, with all its checks.
"""

import ctypes
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common import ROOT, machine, options, ours, problem, refuse_if_wrong, step_seconds, write
from largemargin.backends import cpu

SHAPES = ((192, 1000), (32, 12000), (384, 12000), (160, 151936))
DTYPES = (torch.float32, torch.bfloat16)
PASSES = ("copy", "maximum", "e^z alone", "gather", "scatter", "floor")
SMALL = (8, 16)  # its time is that of a call: checks, autograd and memory, whatever the size


def probe(isa: str) -> ctypes.CDLL:
    """The passes, compiled for an instruction set."""
    found = re.search(rf"add_isa\({isa}(.*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found, isa
    library = Path(tempfile.mkdtemp()) / "floor.so"
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC", *found[1].split()]
    subprocess.run(["c++", *flags, str(ROOT / "benchmarks" / "floor_cpu.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


class Floor:
    """The passes over some logits."""

    def __init__(self, library: ctypes.CDLL, logits: Tensor) -> None:
        self.library, self.logits = library, logits
        threads, (num_rows, num_classes) = torch.get_num_threads(), logits.shape
        self.gradient, self.results = torch.zeros_like(logits), torch.empty(num_rows)
        self.scratch = torch.zeros(threads, num_classes)
        self.sizes = num_rows, num_classes, threads

    def seconds(self, name: str, fresh: bool = False) -> float:
        """What a pass takes. ``fresh``: its gradient lies where torch puts it, often in pages that were never touched."""
        started = time.perf_counter()
        gradient = torch.empty_like(self.logits) if fresh else self.gradient
        if fresh:
            self.library.ask_for_huge_pages(ctypes.c_void_p(gradient.data_ptr()), ctypes.c_int64(gradient.nbytes))
        pointers = (ctypes.c_void_p(x.data_ptr()) for x in (self.logits, gradient, self.scratch, self.results))
        numbers = PASSES.index(name), self.logits.dtype == torch.bfloat16
        self.library.run_pass(*map(ctypes.c_int64, numbers), *pointers, *map(ctypes.c_int64, self.sizes))
        return time.perf_counter() - started


def measure(library: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Nanoseconds per logit of every pass, and the loss beside them, all in turns, each from the same state of the caches."""
    input, target = problem(shape, dtype)
    small = problem(SMALL, dtype)
    floor = Floor(library, input.detach())
    contestants: dict[str, Callable[[], float]] = {name: lambda name=name: floor.seconds(name) for name in PASSES}  # type: ignore[misc]
    contestants |= {
        "floor, fresh gradient": lambda: floor.seconds("floor", fresh=True),
        "ours": lambda: step_seconds(ours, input, target),
        "call": lambda: step_seconds(ours, *small),
        "F.cross_entropy": lambda: step_seconds(F.cross_entropy, input, target),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            step_seconds(F.cross_entropy, input, target)  # the same work before each, so that the caches are in the same state
            run()
            seconds[name].append(run())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    call = medians.pop("call")
    without_call = medians["ours"] - call
    return {f"{name}, ns": round(value / input.numel() * 1e9, 3) for name, value in medians.items()} | {
        "call, us": round(call * 1e6, 1),
        "times the floor": round(without_call / medians["floor"], 2),
        "times the floor, fresh gradient": round(without_call / medians["floor, fresh gradient"], 2),
        "of F.cross_entropy": round(medians["ours"] / medians["F.cross_entropy"], 2),
    }


def main() -> None:
    """Measure every shape and dtype with one thread and with all."""
    chosen = options(__doc__)
    kernel = cpu.kernel_for()
    if isinstance(kernel, str):
        sys.exit(kernel)
    if not chosen.quick:
        refuse_if_wrong()
    library, rows, available = probe(kernel.isa), [], torch.get_num_threads()
    for threads in dict.fromkeys((1, available)):
        torch.set_num_threads(threads)
        for dtype in DTYPES:
            for shape in ((8, 1000),) if chosen.quick else SHAPES:
                found = measure(library, shape, dtype, 5 if chosen.quick else max(9, min(300, 100_000_000 // (shape[0] * shape[1]))))
                rows.append({"shape": shape, "dtype": str(dtype).removeprefix("torch."), "threads": threads, **found})
                print(rows[-1], flush=True)
    torch.set_num_threads(available)
    write("floor_cpu", {"claim": __doc__.splitlines()[0], "machine": machine(), "isa": kernel.isa, "rows": rows}, chosen.out)


if __name__ == "__main__":
    main()
