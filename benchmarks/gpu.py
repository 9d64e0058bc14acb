"""Claim: on a GPU the loss costs three touches of the logits: it takes less time and memory than F.cross_entropy, eager or compiled.

First the whole kernel test file runs on the GPU. Then, at each shape and dtype, forward and backward of every contestant that is
installed, interleaved, timed by CUDA events with a cold L2, beside the bandwidth of a plain copy on the same device. `--self-test` does
all of it but the measuring on the CPU, with tiny shapes and the Triton interpreter.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--self-test", action="store_true", help="run through on the CPU; times mean nothing")
parser.add_argument("--skip-tests", action="store_true", help="after they have passed in another call")
parser.add_argument("--rounds", type=int, default=30)
parser.add_argument("--out", type=Path, default=None, help="the JSON file to write; default results/bench/gpu.json")
ARGUMENTS = parser.parse_args()
if ARGUMENTS.self_test:
    os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402  # reads the environment
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from common import LAM, formula, machine, problem, refuse_if_wrong, write  # noqa: E402
from largemargin import large_margin_cross_entropy  # noqa: E402

DEVICE = "cpu" if ARGUMENTS.self_test else "cuda"
SHAPES = ((4, 50), (3, 70)) if ARGUMENTS.self_test else ((8192, 32000), (8192, 128256), (4096, 1000), (128, 100))
DTYPES = (torch.bfloat16, torch.float32)
Step = Callable[[], Tensor]


def ours(input: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(input, target, lam=LAM, backend="triton")


def compiled(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(loss, backend="eager" if ARGUMENTS.self_test else "inductor", dynamic=False)


def contestants() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Losses of logits and target."""
    return {
        "F.cross_entropy": F.cross_entropy,
        "F.cross_entropy, compiled": compiled(lambda input, target: F.cross_entropy(input, target)),
        "formula under autograd": formula,
        "formula, compiled": compiled(lambda input, target: formula(input, target)),
        "ours": ours,
        "ours, lam=0": lambda input, target: large_margin_cross_entropy(input, target, lam=0.0, backend="triton"),
    }


def linear_contestants() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Losses of features, classifier and target, where cut-cross-entropy is installed: it has no logits to compare on."""
    if not importlib.util.find_spec("cut_cross_entropy") or ARGUMENTS.self_test:
        return {}
    from cut_cross_entropy import linear_cross_entropy

    return {
        "cut-cross-entropy, no margin": linear_cross_entropy,
        "linear, then ours": lambda features, classifier, target: ours(features @ classifier.t(), target),
        "linear, then F.cross_entropy": lambda features, classifier, target: F.cross_entropy((features @ classifier.t()).float(), target),
    }


class Clock:
    """Milliseconds on the device, each step from a cold L2."""

    def __init__(self) -> None:
        self.flush = torch.empty(0 if ARGUMENTS.self_test else 256 << 20, dtype=torch.uint8, device=DEVICE)

    def ms(self, step: Step) -> float:
        self.flush.zero_()
        if ARGUMENTS.self_test:
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


def graph_replay(loss: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor) -> Step:
    """Forward and backward captured once and replayed: no launch is waited for."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(input, target), input)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(input, target)
        gradient = torch.autograd.grad(value, input)

    def step(keep: object = gradient) -> Tensor:
        graph.replay()
        return value

    return step


def measure(steps: dict[str, Step], clock: Clock, leaves: tuple[Tensor, ...]) -> dict[str, dict[str, float]]:
    """Medians and quartiles of interleaved rounds, and the peak of each one's memory."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    failed: dict[str, str] = {}
    rounds = 1 if ARGUMENTS.self_test else ARGUMENTS.rounds
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
        if not ARGUMENTS.self_test and name != "copy" and "replay" not in name:
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


def main() -> None:
    """Test, then measure."""
    if not ARGUMENTS.self_test and not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU; --self-test runs through on the CPU")
    if not ARGUMENTS.skip_tests:
        selection = "triton and awkward and float32" if ARGUMENTS.self_test else "triton or gpu or device or captured"
        refuse_if_wrong(selection, TRITON_INTERPRET="1" if ARGUMENTS.self_test else "0")
    clock, rows = Clock(), []
    for dtype in DTYPES:
        for shape in SHAPES:
            torch._dynamo.reset()  # each shape is compiled for itself
            input, target = problem(shape, dtype, DEVICE)
            size = input.numel() * input.element_size()
            steps = {name: gradient_step(loss, (input,), target) for name, loss in contestants().items()}
            if importlib.util.find_spec("liger_kernel") and not ARGUMENTS.self_test:
                from liger_kernel.transformers import LigerCrossEntropyLoss

                own = input.detach().clone().requires_grad_()  # it overwrites its logits
                steps["Liger, no margin"] = gradient_step(LigerCrossEntropyLoss(), (own,), target)
            other = torch.empty_like(input)
            steps["copy"] = lambda a=other, b=input: a.copy_(b.detach())
            if not ARGUMENTS.self_test:
                for name, loss in (("ours, graph replay", ours), ("F.cross_entropy, graph replay", F.cross_entropy)):
                    try:
                        steps[name] = graph_replay(loss, input, target)
                    except torch.OutOfMemoryError:
                        torch.cuda.empty_cache()
            row = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "logits MiB": round_to(size / 2**20)}
            row["contestants"] = measure(steps, clock, (input,))
            copied, took = row["contestants"]["copy"]["ms"], row["contestants"]["ours"].get("ms", float("nan"))
            row["copy GB/s"] = round_to(2 * size / copied / 1e6)
            row["ours GB/s, of 3 touches"] = round_to(3 * size / took / 1e6)
            rows.append(row)
            print(row, flush=True)
            del steps, other, input
    linear = []
    if found := linear_contestants():
        rows_, width, num_classes = shape = (8192, 2304, 128256)
        leaves = tuple(torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for n in (rows_, num_classes))
        target = torch.randint(num_classes, (rows_,), device=DEVICE)
        steps = {name: gradient_step(loss, leaves, target) for name, loss in found.items()}
        linear.append({"features, width, classes": shape, "dtype": "bfloat16", "contestants": measure(steps, clock, leaves)})
        print(linear[-1], flush=True)
    packages = [name for name in ("triton", "liger-kernel", "cut-cross-entropy") if importlib.util.find_spec(name.replace("-", "_"))]
    versions = {name: importlib.metadata.version(name) for name in packages} | {"cuda": torch.version.cuda}
    record = {"claim": __doc__.splitlines()[0], "machine": machine() | versions, "rows": rows, "linear": linear}
    if ARGUMENTS.self_test:
        print("the self-test ran through")
    else:
        write("gpu", record, ARGUMENTS.out)


if __name__ == "__main__":
    main()
