"""Claim: on a GPU the loss costs three touches of the logits: it takes less time and memory than F.cross_entropy, eager or compiled.

Forward and backward of every contestant that is installed, in turns, timed by CUDA events from a cold L2, beside a plain copy on the
same device. Small logits are also timed by the host, many steps in a row, with their launches counted: there the launches are the cost.
First all shapes without torch.compile, then all with it, which takes the most time: the rounds of the two are not the same. Liger, quack
and F.cross_entropy have no margin. The last rows have class probabilities as targets, as mixup and distillation do.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import Card, Step, Work, copy_of, gradient_step, installed, measure, missing_rivals, rounded, start
from torch import Tensor

from common import LAM, Loss, formula
from largemargin import large_margin_cross_entropy

WORK = Work(
    cases=(
        *(
            (shape, dtype, "indices")
            for dtype in (torch.bfloat16, torch.float32)
            for shape in ((8192, 128256), (8192, 32000), (4096, 1000), (128, 100))
        ),
        *((shape, dtype, "probabilities") for dtype in (torch.bfloat16, torch.float32) for shape in ((8192, 32000), (4096, 1000))),
    ),
    rounds=30,
    tests=("triton or gpu or device or captured", "test_backends.py"),
)
TINY = Work(
    cases=(((4, 50), torch.bfloat16, "indices"), ((3, 70), torch.float32, "indices"), ((3, 60), torch.bfloat16, "probabilities")),
    rounds=2,
    tests=("triton and awkward", "test_backends.py"),
)
SMALL = 2**23  # logits
Makers = dict[str, Callable[[], Step]]


def cross_entropy(input: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input, target)


def ours(input: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(input, target, lam=LAM, backend="triton")


def without_margin(input: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(input, target, lam=0.0, backend="triton")


def reference(input: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(input, target, lam=LAM, backend="reference")


def eager(input: Tensor, target: Tensor, card: Card) -> Makers:
    """What is measured first: a copy, the losses as they are, and as graphs."""
    losses: dict[str, Loss] = {"ours": ours, "ours, lam=0": without_margin, "F.cross_entropy": cross_entropy}
    steps = {name: gradient_step(loss, (input,), target) for name, loss in losses.items()}
    makers: Makers = {"copy": lambda: copy_of(input)}
    makers |= {name: lambda step=step: step for name, step in steps.items()}  # type: ignore[misc]
    makers |= {f"{name}, graph": lambda step=steps[name]: card.captured(step) for name in ("ours", "F.cross_entropy")}  # type: ignore[misc]
    if target.is_floating_point():  # the rivals and the formula take class indices
        return makers | {"reference": lambda: gradient_step(reference, (input,), target)}
    makers["formula under autograd"] = lambda: gradient_step(formula, (input,), target)
    if installed("liger_kernel"):
        makers["Liger"] = lambda: liger(input, target)
    if installed("quack"):
        makers["quack, gradient in backward"] = lambda: quack(input, target)
        makers["quack, gradient in forward"] = lambda: quack_forward(input, target)
    return makers


def compiled(input: Tensor, target: Tensor, card: Card) -> Makers:
    """The losses through torch.compile, and the fastest way of torch's own as a graph."""

    def step(loss: Loss) -> Step:
        return gradient_step(torch.compile(loss, backend=card.compiler, dynamic=False), (input,), target)

    makers: Makers = {
        "F.cross_entropy, compiled": lambda: step(cross_entropy),
        "F.cross_entropy, compiled, graph": lambda: card.captured(step(cross_entropy)),
        "ours, compiled": lambda: step(reference if target.is_floating_point() else ours),  # which has no kernel of probabilities
    }
    return makers if target.is_floating_point() else makers | {"formula, compiled": lambda: step(formula)}


def liger(input: Tensor, target: Tensor) -> Step:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    own = input.detach().clone().requires_grad_()  # it overwrites its logits
    return gradient_step(LigerCrossEntropyLoss(), (own,), target)


def quack(input: Tensor, target: Tensor) -> Step:
    from quack.cross_entropy import cross_entropy

    return gradient_step(cross_entropy, (input,), target)


def quack_forward(input: Tensor, target: Tensor) -> Step:
    from quack.cross_entropy import cross_entropy_fwd

    logits = input.detach()
    return lambda: cross_entropy_fwd(logits, target, return_dx=True)


def problem(shape: tuple[int, int], dtype: torch.dtype, target: str, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    input = torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()
    if target == "probabilities":
        return input, torch.randn(shape, generator=generator, device=device, dtype=dtype).softmax(1)
    return input, torch.randint(shape[1], shape[:1], generator=generator, device=device)


def shares(row: dict[str, Any]) -> dict[str, float]:
    """The bandwidth of the copy, which touches the logits twice, and the share of it that ours reaches.

    Ours touches the logits three times; probabilities are read in both passes too.
    """
    touches = 5 if row["target"] == "probabilities" else 3
    times = {name: row["contestants"][name].get("ms") for name in ("copy", "ours")}
    found = {"copy GB/s": rounded(2 * row["logits MiB"] * 2**20 / times["copy"] / 1e6)} if times["copy"] else {}
    if times["copy"] and times["ours"]:
        found["ours / copy bandwidth"] = rounded(touches * times["copy"] / (2 * times["ours"]))
    return found


def main() -> None:
    """Measure every shape without torch.compile, then every shape with it."""
    card, record, work = start("kernels", __doc__, WORK, TINY)
    rows: list[dict[str, Any]] = []
    for shape, dtype, kind in work.cases:
        case = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "target": kind}
        rows.append({**case, "logits MiB": rounded(shape[0] * shape[1] * dtype.itemsize / 2**20), "contestants": {}})
    for contestants in (eager, compiled):
        for row, (shape, dtype, kind) in zip(rows, work.cases, strict=True):
            torch._dynamo.reset()  # each shape is compiled for itself
            input, target = problem(shape, dtype, kind, card.device)
            row["contestants"] |= measure(contestants(input, target, card), card, work.rounds, input.nbytes, small=input.numel() < SMALL)
            row |= shares(row)
            record.write(rows=rows, **{"not installed": missing_rivals("Liger", "quack")})
            print({**row, "contestants": {name: value.get("ms", "failed") for name, value in row["contestants"].items()}}, flush=True)
            del input, target
            card.release()
    record.finish()


if __name__ == "__main__":
    main()
