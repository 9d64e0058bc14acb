"""Claim: every public loss, for every kind of target, dtype and layout, beside its counterpart in torch: time, memory, operations.

Forward and backward through the public functions, each pair in turns in one process. Operations are those of torch that a step asks for;
a kernel of this library is none of them. Memory is the most that torch holds beside the inputs.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import LAM, WARM_UP, Loss, machine, options, peak_bytes, problem, ratio, refuse_if_wrong, write
from largemargin import (
    LargeMarginCrossEntropyLoss,
    crammer_singer_hinge,
    hard_margin_softplus,
    large_margin_cross_entropy,
    linear_large_margin_cross_entropy,
    multiclass_hinge,
    row_stats,
)
from largemargin.heads import CosineLinear, GaussianMixtureHead, LSoftmaxLinear, NoisySoftmaxLinear
from largemargin.metrics import MarginMetrics

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((128, 100), (192, 900), (8, 19, 64, 64))
LINEAR = (256, 128, 1000)  # rows, width, classes


class Pair(NamedTuple):
    name: str
    ours: Loss
    theirs: Loss
    input: Tensor
    target: Tensor


def losses() -> Iterator[Pair]:
    """The losses of logits."""
    for dtype in DTYPES:
        for shape in SHAPES if dtype == torch.float32 else SHAPES[1:2]:
            input, target = problem(shape, dtype)
            probabilities = input.detach().float().softmax(1).to(dtype)
            yield Pair("class indices", LargeMarginCrossEntropyLoss(lam=LAM), nn.CrossEntropyLoss(), input, target)
            yield Pair("probabilities", LargeMarginCrossEntropyLoss(lam=LAM), nn.CrossEntropyLoss(), input, probabilities)
    input, target = problem(SHAPES[1], torch.float32)
    weight, probabilities = torch.rand(SHAPES[1][1]), input.detach().softmax(1)
    smooth: dict[str, Any] = {"weight": weight, "label_smoothing": 0.1}
    for kind, of in (("class indices", target), ("probabilities", probabilities)):
        yield Pair(f"{kind}, lam=0", lambda f, y: large_margin_cross_entropy(f, y, lam=0), F.cross_entropy, input, of)
        ours, theirs = LargeMarginCrossEntropyLoss(**smooth), nn.CrossEntropyLoss(**smooth)
        yield Pair(f"{kind}, weight and label smoothing", ours, theirs, input, of)
    for hinge in (hard_margin_softplus, crammer_singer_hinge):
        yield Pair(hinge.__name__, hinge, F.cross_entropy, input, target)
    yield Pair("multiclass_hinge / F.multi_margin_loss", multiclass_hinge, F.multi_margin_loss, input, target)

    def of_rows(input: Tensor, target: Tensor) -> Tensor:
        return row_stats(input, target).spread.sum()

    def torchs_of_rows(input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(input, target, reduction="none").sum()

    yield Pair("row_stats", of_rows, F.cross_entropy, input, target)
    yield Pair("row_stats / F.cross_entropy(reduction='none')", of_rows, torchs_of_rows, input, target)


def layers() -> Iterator[Pair]:
    """The losses and heads of features, beside nn.Linear and F.cross_entropy."""
    rows, width, num_classes = LINEAR
    features, _ = problem((rows, width), torch.float32)
    target = problem((rows, num_classes), torch.float32)[1]
    linear = nn.Linear(width, num_classes)
    criterion = LargeMarginCrossEntropyLoss(lam=LAM)

    def theirs(input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(linear(input), target)

    def fused(input: Tensor, target: Tensor) -> Tensor:
        return linear_large_margin_cross_entropy(input, linear.weight, target, linear_bias=linear.bias)

    yield Pair("linear and loss in one", fused, theirs, features, target)
    heads = (CosineLinear, LSoftmaxLinear, GaussianMixtureHead, NoisySoftmaxLinear)
    for head in (make(width, num_classes) for make in heads):
        yield Pair(type(head).__name__, lambda x, y, head=head: criterion(head(x, y), y), theirs, features, target)  # type: ignore[misc]


def metrics() -> Iterator[Pair]:
    """A step of MarginMetrics beside an accuracy."""

    def accuracy(input: Tensor, target: Tensor) -> Tensor:
        return (input.argmax(-1) == target).float().mean()

    for shape in SHAPES[:2]:
        input, target = problem(shape, torch.float32)
        yield Pair("MarginMetrics.update / accuracy", MarginMetrics().update, accuracy, input.detach(), target)  # type: ignore[arg-type]


def operations(step: Callable[[], object]) -> int:
    """How many operations of torch a step asks for, without those that these ask for themselves."""
    with torch.profiler.profile() as profiler:
        step()
    own = [event for event in profiler.events() if event.name.startswith("aten::")]
    return sum(event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::") for event in own)


def compare(pair: Pair, repeats: int) -> dict[str, object]:
    """A row of the table."""

    def step(loss: Loss) -> Callable[[], object]:
        def run() -> None:
            pair.input.grad = None
            found = loss(pair.input, pair.target)
            if pair.input.requires_grad:
                found.backward()

        return run

    steps = {"ours": step(pair.ours), "theirs": step(pair.theirs)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + WARM_UP):
        for name, run in steps.items():
            started = time.perf_counter()
            run()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    memory = {}
    for name, run in steps.items():
        pair.input.grad = None  # freed within the step, it would make room for the new one
        memory[name] = round(peak_bytes(run) / 2**20, 3)
    return {
        "name": pair.name,
        "shape": tuple(pair.input.shape),
        "dtype": str(pair.input.dtype).removeprefix("torch."),
        "time": ratio(seconds["ours"], seconds["theirs"]),
        "MiB": memory,
        "operations": {name: operations(run) for name, run in steps.items()},
    }


def main() -> None:
    """Measure the table."""
    chosen = options(__doc__)
    if not chosen.quick:
        refuse_if_wrong()
    rows = []
    for pair in (*losses(), *layers(), *metrics()):
        rows.append(compare(pair, 3 if chosen.quick else 51))
        print(rows[-1], flush=True)
    write("surface", {"claim": __doc__.splitlines()[0], "machine": machine(), "rows": rows}, chosen.out)


if __name__ == "__main__":
    main()
