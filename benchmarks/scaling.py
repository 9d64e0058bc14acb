"""Claim: memory grows with the classifier, not with the logits, and over ranks it is divided.

The most that a process holds in forward and backward of a linear classifier and its loss, with features, classifier and gradients, against
the number of classes: F.cross_entropy of F.linear, ours, and ours over 2 and 4 ranks (gloo). Then what goes over the wire in one step.
"""

import datetime
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor

from common import ROOT, machine, options, peak_bytes, refuse_if_wrong, write
from largemargin import linear_large_margin_cross_entropy, sharded_linear_large_margin_cross_entropy

ROWS, WIDTH = 512, 128
CLASSES = tuple(2**i for i in range(13, 21))
RANKS = (2, 4)
CLUSTERS = ((8, 8192, 1_000_000), (64, 8192, 10_000_000))  # GPUs, rows, classes
CLUSTER_WIDTH = 512


def step(loss: Any, features: Tensor, classifier: Tensor, target: Tensor) -> None:
    torch.autograd.grad(loss(features, classifier, target), (features, classifier))


def held(loss: Any, num_classes: int, of: slice = slice(None)) -> float:
    """MiB of features, some classes of the classifier, and all that a step takes."""
    features = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).requires_grad_()
    classifier = torch.empty(len(range(num_classes)[of]), WIDTH).uniform_(-0.1, 0.1).requires_grad_()
    target = torch.randint(num_classes, (ROWS,), generator=torch.Generator().manual_seed(0))
    return (peak_bytes(partial(step, loss, features, classifier, target)) + features.nbytes + classifier.nbytes) / 2**20


def with_logits(features: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, classifier), target)


def on_a_rank(rank: int, world: int, classes: tuple[int, ...], folder: str) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    found = []
    for num_classes in classes:
        share = num_classes // world
        of = slice(rank * share, (rank + 1) * share)
        found.append(held(partial(sharded_linear_large_margin_cross_entropy, group=dist.group.WORLD), num_classes, of))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def over_ranks(world: int, classes: tuple[int, ...]) -> list[float]:
    """The most that any of the ranks holds."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_a_rank, (world, classes, folder), world)
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(world)]
    return [max(values) for values in zip(*found, strict=True)]


def traffic(ranks: int, rows: int, classes: int) -> dict[str, object]:
    """What one rank sends in a step by ring algorithms, float32; and what it would to train one classifier on every rank."""
    others = (ranks - 1) / ranks
    gathered, reduced = ranks * rows * 6 * 4 * others, 2 * rows * CLUSTER_WIDTH * 4 * others
    return {
        "ranks, rows, classes": (ranks, rows, classes),
        "statistics, all-gather, MB": round(gathered / 1e6, 2),
        "gradient of the features, all-reduce, MB": round(reduced / 1e6, 1),
        "the classifier's gradient, all-reduce, MB": round(2 * classes * CLUSTER_WIDTH * 4 * others / 1e6),
        "classifier and gradient a rank, GB": round(2 * classes / ranks * CLUSTER_WIDTH * 4 / 1e9, 2),
    }


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
        **{f"ours, {world} ranks": over_ranks(world, classes) for world in RANKS},
        "classifier and its gradient": [2 * c * WIDTH * 4 / 2**20 for c in classes],
    }
    rounded = {name: [round(value, 1) for value in values] for name, values in lines.items()}
    for name, values in rounded.items():
        print(f"{name:30}", *values)
    on_the_wire = [traffic(*cluster) for cluster in CLUSTERS]
    for row in on_the_wire:
        print(row)
    record: dict[str, object] = {
        "claim": __doc__.splitlines()[0],
        "machine": machine(),
        "rows, width": (ROWS, WIDTH),
        "classes": classes,
        "MiB a process": rounded,
        "traffic of a step": on_the_wire,
    }
    write("scaling", record, chosen.out)
    if not chosen.quick:
        chart(classes, lines, ROOT / "docs" / "scaling.svg")


if __name__ == "__main__":
    main()
