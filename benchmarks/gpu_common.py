"""What the benchmarks on a GPU share: arguments, a clock, interleaved rounds with the memory of each contestant."""

import argparse
import gc
import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from common import machine

Step = Callable[[], Tensor]


def options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--self-test", action="store_true", help="run through on the CPU; times mean nothing")
    parser.add_argument("--skip-tests", action="store_true", help="after they have passed in another call")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=None, help="the JSON file to write; default in results/bench")
    return parser.parse_args()


def compiled(loss: Callable[..., Tensor], self_test: bool) -> Callable[..., Tensor]:
    return torch.compile(loss, backend="eager" if self_test else "inductor", dynamic=False)


class Clock:
    """Milliseconds on the device, each step from a cold L2."""

    def __init__(self, self_test: bool) -> None:
        self.self_test = self_test
        self.flush = torch.empty(0 if self_test else 256 << 20, dtype=torch.uint8, device="cpu" if self_test else "cuda")

    def ms(self, step: Step) -> float:
        self.flush.zero_()
        if self.self_test:
            step()
            return 1.0
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def gradient_step(loss: Callable[..., Tensor], leaves: tuple[Tensor, ...], target: Tensor) -> Step:
    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        value = loss(*leaves, target)
        value.backward()
        return value

    return step


def measure(steps: dict[str, Step], clock: Clock, leaves: tuple[Tensor, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Medians and quartiles of interleaved rounds, and the peak of each one's memory."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    rounds = 1 if clock.self_test else rounds
    for round in range(rounds + 3):
        for name, step in steps.items():
            if name in failed:
                continue
            try:
                elapsed = clock.ms(step)
            except torch.OutOfMemoryError:
                failed[name] = "out of memory"
                gc.collect()
                torch.cuda.empty_cache()
                continue
            if round >= 3:
                times[name].append(elapsed)
    found: dict[str, dict[str, float]] = {}
    for name, values in times.items():
        if name in failed or not values:
            found[name] = {"failed": failed.get(name, "no time")}  # type: ignore[dict-item]
            continue
        low, *_, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0], values[0])
        found[name] = {"ms": round_to(statistics.median(values)), "low": round_to(low), "high": round_to(high)}
        if not clock.self_test and name != "copy" and "replay" not in name:
            for leaf in leaves:
                leaf.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            steps[name]()
            torch.cuda.synchronize()
            found[name]["peak MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    return found


def round_to(value: float) -> float:
    return float(f"{value:.4g}")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def machine_and_packages() -> dict[str, object]:
    packages = [name for name in ("triton", "liger-kernel", "cut-cross-entropy") if installed(name.replace("-", "_"))]
    return machine() | {name: importlib.metadata.version(name) for name in packages} | {"cuda": torch.version.cuda}
