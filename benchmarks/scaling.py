"""Claim: memory grows with the classifier, not with the logits, and over ranks it is divided.

The most that a process holds in forward and backward of a linear classifier and its loss, with features, classifier and gradients, against
the number of classes: F.cross_entropy of F.linear, ours, and ours over 2 and 4 ranks (gloo). Then, with one thread a process, the three
rates that cost_model.py needs, and the times of steps to compare with those of the model. scaling_page.py writes docs/scaling.md.
"""

import datetime
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

from common import ROOT, machine, options, ours, peak_bytes, problem, refuse_if_wrong, write
from largemargin import (
    linear_large_margin_cross_entropy,
    sharded_large_margin_cross_entropy,
    sharded_linear_large_margin_cross_entropy,
)
from largemargin.rows import collectives, tiles

ROWS, WIDTH = 512, 128
CLASSES = tuple(2**i for i in range(13, 21))
RANKS = (2, 4)
TIMED = (2**16, 2**17)  # classes
REPEATS = 7
EXCHANGED = 2**22  # numbers


def with_logits(features: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, classifier), target)


def fused_over_ranks(features: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
    return sharded_linear_large_margin_cross_entropy(features, classifier, target, group=dist.group.WORLD)


def logits_over_ranks(features: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
    return sharded_large_margin_cross_entropy(F.linear(features, classifier), target, group=dist.group.WORLD)


def step_of(loss: Any, num_classes: int, here: slice = slice(None)) -> tuple[Callable[[], object], int]:
    """A step with the classes ``here`` of the classifier, and the bytes of its features and classifier."""
    features = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    classifier = torch.empty(len(range(num_classes)[here]), WIDTH).uniform_(-0.1, 0.1).requires_grad_()
    target = torch.randint(num_classes, (ROWS,), generator=torch.Generator().manual_seed(0))
    leaves = features, classifier
    return (lambda: torch.autograd.grad(loss(*leaves, target), leaves)), features.nbytes + classifier.nbytes


def held(loss: Any, num_classes: int, here: slice = slice(None)) -> float:
    """MiB of features, some classes of the classifier, and all that a step takes."""
    step, leaves = step_of(loss, num_classes, here)
    return (peak_bytes(step) + leaves) / 2**20


def best_seconds(step: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Of the fastest repeat, by default of the processor: other work on the machine counts least there."""
    found = []
    for _ in range(REPEATS):
        started = clock()
        step()
        found.append(clock() - started)
    return min(found)


def step_seconds(loss: Any, num_classes: int, here: slice = slice(None)) -> float:
    return best_seconds(step_of(loss, num_classes, here)[0])


def on_a_rank(rank: int, world: int, measure: Any, loss: Any, classes: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    found = []
    for num_classes in classes:
        share = num_classes // world
        found.append(measure(loss, num_classes, slice(rank * share, (rank + 1) * share)))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def over_ranks(world: int, measure: Any, loss: Any, classes: tuple[int, ...]) -> list[float]:
    """The most that any of the ranks measures."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_a_rank, (world, measure, loss, classes, folder), world)
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]
    return [max(values) for values in zip(*found, strict=True)]


def exchange_seconds(_loss: Any, numbers: int, _here: slice) -> float:
    """Of the sum of so many numbers over the ranks."""
    values, group = torch.zeros(numbers), dist.group.WORLD
    assert group is not None
    return best_seconds(lambda: collectives.all_reduce(values, group), time.perf_counter)  # the processor waits for the link


def rates() -> dict[str, float]:
    """FLOP and bytes a second of products, of the loss of a tile, and of a link; one thread a process."""
    num_classes = TIMED[0]
    rows = tiles.TILE // num_classes
    features, classifier = torch.randn(rows, WIDTH), torch.randn(num_classes, WIDTH)
    logits, target = problem((rows, num_classes), torch.float32)
    tile = torch.empty_like(logits)  # there is one for all products of a step
    product = best_seconds(lambda: torch.mm(features, classifier.t(), out=tile))
    loss = best_seconds(lambda: torch.autograd.grad(ours(logits, target), logits))
    (exchange,) = over_ranks(2, exchange_seconds, None, (EXCHANGED,))
    return {
        "FLOP": 2 * rows * WIDTH * num_classes / product,
        "memory, bytes": 12 * logits.numel() / loss,  # read, read, written
        "link, bytes": 4 * EXCHANGED / exchange,  # of two ranks, each sends as many as there are
    }


def times(classes: tuple[int, ...]) -> dict[str, object]:
    """The rates, and the seconds of steps on one and on two ranks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, object] = {
        "a second": {name: float(f"{rate:.3g}") for name, rate in rates().items()},
        "classes": classes,
        "seconds a step": {
            "1": [round(step_seconds(linear_large_margin_cross_entropy, c), 3) for c in classes],
            "2": [round(value, 3) for value in over_ranks(2, step_seconds, fused_over_ranks, classes)],
        },
    }
    torch.set_num_threads(threads)
    return found


def chart(classes: tuple[int, ...], lines: dict[str, list[float]], path: Path) -> None:
    plt.rcParams["svg.hashsalt"] = "largemargin"  # the same file for the same numbers
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, values in lines.items():
        axes.plot(classes, values, "--" if name.startswith("classifier") else "o-", label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("classes")
    axes.set_ylabel("MiB a process")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, draw."""
    chosen = options(__doc__)
    classes = CLASSES[:3] if chosen.quick else CLASSES
    if not chosen.quick:
        refuse_if_wrong("", file="test_sharded.py")
    lines = {
        "F.cross_entropy(F.linear)": [held(with_logits, c) for c in classes],
        "ours": [held(linear_large_margin_cross_entropy, c) for c in classes],
        **{f"ours, {world} ranks": over_ranks(world, held, fused_over_ranks, classes) for world in RANKS},
        "ours of logits, 2 ranks": over_ranks(2, held, logits_over_ranks, classes),
        "classifier and its gradient": [2 * c * WIDTH * 4 / 2**20 for c in classes],
    }
    rounded = {name: [round(value, 1) for value in values] for name, values in lines.items()}
    for name, values in rounded.items():
        print(f"{name:30}", *values)
    timed = times(TIMED[:1] if chosen.quick else TIMED)
    print(timed)
    record: dict[str, object] = {
        "claim": __doc__.splitlines()[0],
        "machine": machine(),
        "rows, width": (ROWS, WIDTH),
        "classes": classes,
        "MiB a process": rounded,
        "one thread a process": timed,
    }
    write("scaling", record, chosen.out)
    if not chosen.quick:
        chart(classes, lines, ROOT / "docs" / "scaling.svg")


if __name__ == "__main__":
    main()
