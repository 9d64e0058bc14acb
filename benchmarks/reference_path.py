"""How much the reference path costs beside torch's own cross-entropy.

Forward and backward through the modules, interleaved in one process; medians, and the ratio of each pair. Writes JSON to stdout.

    python benchmarks/reference_path.py
"""

import json
import platform
import statistics
import time

import torch
from torch import nn

from largemargin import LargeMarginCrossEntropyLoss

SHAPES = ((128, 100), (256, 1000), (512, 10000), (4, 19, 128, 128))
REPEATS = 20


def step_ms(criterion: nn.Module, input: torch.Tensor, target: torch.Tensor) -> float:
    input.grad = None
    started = time.perf_counter()
    criterion(input, target).backward()
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Time every shape."""
    contestants = {"F.cross_entropy": nn.CrossEntropyLoss(), "large_margin_cross_entropy": LargeMarginCrossEntropyLoss()}
    rows = []
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(0)
        input = torch.randn(shape, generator=generator).requires_grad_()
        target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for repeat in range(REPEATS + 3):
            for name, criterion in contestants.items():
                elapsed = step_ms(criterion, input, target)
                if repeat >= 3:  # warm-up
                    times[name].append(elapsed)
        baseline, ours = times.values()
        ratios = sorted(b / a for a, b in zip(baseline, ours, strict=True))
        rows.append(
            {
                "shape": shape,
                "median_ms": {name: round(statistics.median(values), 3) for name, values in times.items()},
                "ratio": {
                    "median": round(statistics.median(ratios), 2),
                    "quartiles": [round(ratios[REPEATS // 4], 2), round(ratios[3 * REPEATS // 4], 2)],
                },
            }
        )
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({"machine": machine, "dtype": "float32", "repeats": REPEATS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
