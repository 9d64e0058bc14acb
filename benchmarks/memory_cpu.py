"""Claim: beside the logits the loss needs the memory of one gradient, whatever the upstream gradient; donated logits need none."""

import torch
import torch.nn.functional as F

from common import a_row, formula, machine, options, ours, peak_bytes, problem, reference, refuse_if_wrong, scaled, write
from largemargin import large_margin_cross_entropy


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
        peaks = {name: round(peak_bytes(loss, input, target) / input.nbytes, 3) for name, loss in contestants.items()}
        logits = input * 1
        with torch.profiler.profile(profile_memory=True) as profiler:
            torch.autograd.grad(large_margin_cross_entropy(logits, target, donate=True), logits)
        taken = sum(max(event.nbytes(), 0) for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
        peaks["ours, donated logits"] = round(taken / input.nbytes, 3)
        rows.append({"shape": shape, "dtype": str(dtype).removeprefix("torch."), "peak, in logits": peaks})
        print(rows[-1])
    write("memory_cpu", {"claim": __doc__.splitlines()[0], "machine": machine(), "rows": rows}, chosen.out)


if __name__ == "__main__":
    main()
