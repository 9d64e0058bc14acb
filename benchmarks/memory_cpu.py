"""Claim: the loss needs the memory of one gradient beside the logits, two to scale it in half precision, none if they are donated."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common import Loss, a_row, formula, machine, options, ours, peak_bytes, problem, reference, refuse_if_wrong, scaled, write
from largemargin import large_margin_cross_entropy


def step(loss: Loss, input: Tensor, target: Tensor) -> None:
    loss(input, target).backward()


def donated(logits: Tensor, target: Tensor) -> None:
    torch.autograd.grad(large_margin_cross_entropy(logits, target, donate=True), logits)


def main() -> None:
    """Measure every contestant in both dtypes."""
    chosen = options(__doc__)
    if not chosen.quick:
        refuse_if_wrong()
    shape = (64, 1000) if chosen.quick else (1024, 10000)
    contestants = {
        "F.cross_entropy": F.cross_entropy,
        "ours": ours,
        "ours, loss * 0.3": scaled,
        "ours, reduction none": a_row,
        "reference path": reference,
        "formula under autograd": formula,
    }
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        input, target = problem(shape, dtype)
        peaks = {}
        for name, loss in contestants.items():
            input.grad = None
            peaks[name] = round(peak_bytes(partial(step, loss, input, target)) / input.nbytes, 3)
        logits = input * 1
        peaks["ours, donated logits"] = round(peak_bytes(partial(donated, logits, target)) / input.nbytes, 3)
        rows.append({"shape": shape, "dtype": str(dtype).removeprefix("torch."), "peak, in logits": peaks})
        print(rows[-1])
    write("memory_cpu", {"claim": __doc__.splitlines()[0], "machine": machine(), "rows": rows}, chosen.out)


if __name__ == "__main__":
    main()
