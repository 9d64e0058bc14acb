"""Claim: the loss of features and classifier takes about the time of its three matrix products, and the memory of its gradients and a tile.

Forward and backward, interleaved: three plain products, F.cross_entropy of F.linear, and ours; at one shape also torch's own chunked
F.linear_cross_entropy, where torch has it. Memory is what torch holds at most, beside inputs and gradients.
"""

import statistics
import time
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common import LAM, machine, options, peak_bytes, refuse_if_wrong, write
from largemargin import linear_large_margin_cross_entropy

SHAPES = ((1024, 256, 65536), (4096, 128, 8192), (256, 512, 262144), (512, 128, 1_000_000))  # rows, width, classes
ROUNDS = 7


def three_products(input: Tensor, linear_weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    input, linear_weight = input.detach(), linear_weight.detach()
    logits = input @ linear_weight.t()
    return logits @ linear_weight, logits.t() @ input


def with_logits(input: Tensor, linear_weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(F.cross_entropy(F.linear(input, linear_weight), target), (input, linear_weight))


def ours(input: Tensor, linear_weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(linear_large_margin_cross_entropy(input, linear_weight, target, lam=LAM), (input, linear_weight))


def chunked(input: Tensor, linear_weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    loss = F.linear_cross_entropy(input, linear_weight, target, options=torch.nn.LinearCrossEntropyOptions())
    return torch.autograd.grad(loss, (input, linear_weight))


def main() -> None:
    """Time every shape."""
    chosen = options(__doc__)
    if not chosen.quick:
        refuse_if_wrong("not triton")
        refuse_if_wrong("", file="test_linear.py")
    rows = []
    for shape in ((32, 8, 100),) if chosen.quick else SHAPES:
        num_rows, width, num_classes = shape
        generator = torch.Generator().manual_seed(0)
        input = torch.randn(num_rows, width, generator=generator).requires_grad_()
        linear_weight = (torch.randn(num_classes, width, generator=generator) * width**-0.5).requires_grad_()
        target = torch.randint(num_classes, (num_rows,), generator=generator)
        contestants = {"three products": three_products, "F.cross_entropy(F.linear)": with_logits, "ours": ours}
        seconds: dict[str, list[float]] = {name: [] for name in contestants}
        for attempt in range((2 if num_classes == 1_000_000 else ROUNDS) + 1):
            for name, step in contestants.items():
                started = time.perf_counter()
                step(input, linear_weight, target)
                if attempt:
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: round_to(statistics.median(values)) for name, values in seconds.items()}
        if shape == SHAPES[0] and hasattr(F, "linear_cross_entropy"):
            started = time.perf_counter()
            chunked(input, linear_weight, target)
            medians["F.linear_cross_entropy, chunked (once)"] = round_to(time.perf_counter() - started)
        memory = {
            name: round((peak_bytes(partial(step, input, linear_weight, target)) - input.nbytes - linear_weight.nbytes) / 2**20)
            for name, step in (("F.cross_entropy(F.linear)", with_logits), ("ours", ours))
        }
        row = {
            "shape": shape,
            "seconds": medians,
            "ours / three products": round_to(medians["ours"] / medians["three products"]),
            "MiB beside inputs and gradients": memory,
        }
        rows.append(row)
        print(row, flush=True)
    write("linear_cpu", {"claim": __doc__.splitlines()[0], "machine": machine(), "rows": rows}, chosen.out)


def round_to(value: float) -> float:
    return float(f"{value:.3g}")


if __name__ == "__main__":
    main()
