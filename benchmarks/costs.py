"""Claim: a small call spends most of its time on checks and autograd, and a head on the logits with their margin.

One thread, forward and backward; of each part the fastest tenth of its turns, because other programs on the machine can only add to it.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import LAM, WARM_UP, machine, options, problem, refuse_if_wrong, write
from largemargin import LargeMarginCrossEntropyLoss, large_margin_cross_entropy, linear_large_margin_cross_entropy
from largemargin.backends import cpu
from largemargin.heads import CosineLinear, GaussianMixtureHead, LSoftmaxLinear, NoisySoftmaxLinear
from largemargin.loss import LossOptions

SMALL, LINEAR, HEAD = (96, 100), (64, 16, 100), (256, 128, 1000)  # rows, width, classes
Step = Callable[[], object]


def microseconds(steps: dict[str, Step], repeats: int) -> dict[str, float]:
    """Of each step, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + WARM_UP):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    return {name: round(sorted(each)[len(each) // 10] * 1e6, 1) for name, each in seconds.items()}


class Nothing(torch.autograd.Function):
    """What autograd takes for one operation of ``inputs`` whose result and gradients are there already."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs)
        return result.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.gradients


def passes(loss: Callable[[], Tensor], *leaves: Tensor) -> Step:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        loss().backward()

    return step


def kernel_step(logits: Tensor, target: Tensor) -> Step:
    detached, choice = logits.detach(), LossOptions(lam=LAM)
    return lambda: cpu.loss(detached, target, None, choice, torch.empty_like(detached))


def small_call(repeats: int) -> dict[str, float]:
    input, target = problem(SMALL, torch.float32)
    gradient, scalar = torch.empty_like(input), torch.zeros(())
    steps = {
        "F.cross_entropy": passes(lambda: F.cross_entropy(input, target), input),
        "ours": passes(lambda: large_margin_cross_entropy(input, target, lam=LAM), input),
        "kernel": kernel_step(input, target),
        "autograd": passes(lambda: Nothing.apply(scalar, (gradient,), input), input),  # type: ignore[no-untyped-call]
    }
    return microseconds(steps, repeats)


def small_linear(repeats: int) -> dict[str, float]:
    rows, width, num_classes = LINEAR
    features, _ = problem((rows, width), torch.float32)
    logits, target = problem((rows, num_classes), torch.float32)
    weight, plain, of_logits = torch.randn(num_classes, width, requires_grad=True), features.detach(), logits.detach()
    gradients, scalar = (torch.empty_like(features), torch.empty_like(weight)), torch.zeros(())

    def products() -> None:
        with torch.no_grad():
            plain @ weight.t(), of_logits @ weight, of_logits.t() @ plain

    steps = {
        "F.cross_entropy": passes(lambda: F.cross_entropy(F.linear(features, weight), target), features, weight),
        "ours": passes(lambda: linear_large_margin_cross_entropy(features, weight, target, lam=LAM), features, weight),
        "kernel": kernel_step(logits, target),
        "products": products,
        "autograd": passes(lambda: Nothing.apply(scalar, gradients, features, weight), features, weight),  # type: ignore[no-untyped-call]
    }
    return microseconds(steps, repeats)


def heads(repeats: int) -> dict[str, dict[str, float]]:
    """Logits of a head with their target, forward and backward from a given gradient, and the loss of such logits."""
    rows, width, num_classes = HEAD
    features, _ = problem((rows, width), torch.float32)
    logits, target = problem((rows, num_classes), torch.float32)
    upstream, criterion = torch.randn(rows, num_classes), LargeMarginCrossEntropyLoss(lam=LAM)

    def of(layer: nn.Module, *inputs: Tensor) -> Step:
        leaves = (features, *layer.parameters())

        def step() -> None:
            for leaf in leaves:
                leaf.grad = None
            layer(*inputs).backward(upstream)

        return step

    made = [make(width, num_classes) for make in (CosineLinear, LSoftmaxLinear, GaussianMixtureHead, NoisySoftmaxLinear)]
    steps = {
        "nn.Linear": of(nn.Linear(width, num_classes), features),
        "loss": passes(lambda: criterion(logits, target), logits),
        **{type(head).__name__: of(head, features, target) for head in made},
    }
    found = microseconds(steps, repeats)
    return {name: {"logits": found[name], "loss": found["loss"], "nn.Linear": found["nn.Linear"]} for name in steps if name != "loss"}


def main() -> None:
    """Measure the parts."""
    chosen = options(__doc__)
    if not chosen.quick:
        refuse_if_wrong()
    torch.set_num_threads(1)
    repeats = 20 if chosen.quick else 2000
    record: dict[str, object] = {
        "claim": __doc__.splitlines()[0],
        "machine": machine(),
        "small call": small_call(repeats),
        "small linear": small_linear(repeats),
        "heads": heads(20 if chosen.quick else 200),
    }
    print(record)
    write("costs", record, chosen.out)


if __name__ == "__main__":
    main()
