"""What the benchmarks share: contestants, interleaved timing, memory, the machine, and the refusal to report what is wrong."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import largemargin
from largemargin import large_margin_cross_entropy
from largemargin.lab.run.environment import processor

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results" / "bench"
LAM = 0.3
WARM_UP = 3

Loss = Callable[[Tensor, Tensor], Tensor]


def formula(input: Tensor, target: Tensor) -> Tensor:
    """Equation (11) as one would first write it, for logits (N, C): what the margin costs under autograd."""
    is_target = F.one_hot(target, input.shape[1]).bool()
    log_q = input.masked_fill(is_target, -1e6).log_softmax(1)
    difference = (log_q.exp() - 1 / (input.shape[1] - 1)) * log_q
    return F.cross_entropy(input, target) + LAM / 2 * difference.masked_fill(is_target, 0.0).sum(1).mean()


def ours(input: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(input, target, lam=LAM)


def reference(input: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(input, target, lam=LAM, backend="reference")


def scaled(input: Tensor, target: Tensor) -> Tensor:
    """An upstream gradient that is no power of two."""
    return ours(input, target) * 0.3


def a_row(input: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(input, target, lam=LAM, reduction="none").mean()


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    return input, torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator).to(device)


def step_seconds(loss: Loss, input: Tensor, target: Tensor, computed: bool = False) -> float:
    """Forward and backward, as in training: the gradient of the last step has been freed."""
    input.grad = None
    if computed:  # logits that somebody computed, as donation needs them; up to them only
        logits = input * 1
        started = time.perf_counter()
        torch.autograd.grad(loss(logits, target), logits)
        return time.perf_counter() - started
    started = time.perf_counter()
    loss(input, target).backward()
    return time.perf_counter() - started


def interleaved(
    contestants: dict[str, Loss], input: Tensor, target: Tensor, repeats: int, computed: bool = False
) -> dict[str, list[float]]:
    """The seconds of every step of every contestant, one after the other in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + WARM_UP):
        for name, loss in contestants.items():
            elapsed = step_seconds(loss, input, target, computed)
            if turn >= WARM_UP:
                seconds[name].append(elapsed)
    return seconds


def ratio(seconds: list[float], baseline: list[float]) -> dict[str, float]:
    """Of the medians, and the quartiles of the ratios of each round."""
    ratios = sorted(a / b for a, b in zip(seconds, baseline, strict=True))
    low, high = (round(ratios[len(ratios) * i // 4], 3) for i in (1, 3))
    return {"ratio": round(statistics.median(seconds) / statistics.median(baseline), 3), "low": low, "high": high}


def peak_bytes(step: Callable[[], object]) -> int:
    """The most memory that torch takes during a step (CPU)."""
    held = peak = 0
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def machine() -> dict[str, object]:
    found: dict[str, object] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "largemargin": largemargin.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def refuse_if_wrong(selection: str = "not triton", file: str = "test_backends.py", **environment: str) -> None:
    """Run the correctness tests of what is about to be timed; a benchmark of a wrong result is none."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{file}", "-k", selection]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
    print(done.stdout.strip().splitlines()[-1])
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\nnothing is reported: the tests of what was to be timed fail")


def write(name: str, record: dict[str, object], path: Path | None = None) -> Path:
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
    return path


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown."""
    first, *others = (f"| {' | '.join(cells)} |" for cells in [head, *rows])
    return "\n".join([first, "|---" * len(head) + "|", *others])


def words_of_machine(record: dict[str, Any]) -> str:
    found = record["machine"]
    return f"{found.get('gpu', found['processor'])}, {found['threads']} CPU threads, torch {found['torch']}, Python {found['python']}"


def options(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: to see that the script works")
    parser.add_argument("--out", type=Path, default=None, help="the JSON file to write")
    return parser.parse_args()
