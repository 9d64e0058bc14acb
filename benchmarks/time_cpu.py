"""Claim: on the CPU a plain call of the loss is faster than torch's cross-entropy, which has no margin, at all but the smallest sizes.

Forward and backward as in training, through the public functions with all their checks; each contestant in turns with F.cross_entropy,
in one process. Donated logits are computed ones, and the gradient stops at them, for both sides.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common import LAM, Loss, a_row, formula, interleaved, machine, options, problem, ratio, reference, refuse_if_wrong, scaled, write
from largemargin import LargeMarginCrossEntropyLoss, large_margin_cross_entropy

SHAPES = ((32, 10), (128, 100), (4096, 10), (256, 1000), (512, 10000), (256, 128256), (4, 150, 128, 128), (8, 19, 256, 256), (64, 1000, 2))
DTYPES = (torch.float32, torch.bfloat16)
SHAPES_OF_PROBABILITIES = ((256, 1000), (2048, 8192))


def donated(input: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(input, target, lam=LAM, donate=True)


def against_torch(name: str, loss: Loss, theirs: Loss, input: Tensor, target: Tensor, repeats: int) -> dict[str, float]:
    """What the loss takes beside torch's, in turns with it."""
    pair = interleaved({"theirs": theirs, name: loss}, input, target, repeats, computed=loss is donated)
    ms = {who: round(1000 * sorted(values)[repeats // 2], 4) for who, values in pair.items()}
    return ratio(pair[name], pair["theirs"]) | {"ms": ms[name], "theirs, ms": ms["theirs"]}


def of_probabilities(quick: bool) -> list[dict[str, object]]:
    """The loss of class probabilities beside F.cross_entropy's of the same."""
    rows: list[dict[str, object]] = []
    for dtype in DTYPES:
        for shape in ((32, 10),) if quick else SHAPES_OF_PROBABILITIES:
            input, labels = problem(shape, dtype)
            probabilities = torch.randn(shape, generator=torch.Generator().manual_seed(1)).softmax(1).to(dtype)
            contestants: dict[str, Loss] = {
                "ours": partial(large_margin_cross_entropy, lam=LAM),
                "ours, lam=0": partial(large_margin_cross_entropy, lam=0),
                "ours, hard bias": partial(large_margin_cross_entropy, lam=LAM, hard_bias=1.0),
                "ours, class indices": lambda f, _, y=labels: large_margin_cross_entropy(f, y, lam=LAM),  # type: ignore[misc]
            }
            repeats = 3 if quick else max(11, 20_000_000 // input.numel())
            against = {
                name: against_torch(name, loss, F.cross_entropy, input, probabilities, repeats) for name, loss in contestants.items()
            }
            name_of_dtype = str(dtype).removeprefix("torch.")
            rows.append({"shape": shape, "dtype": name_of_dtype, "rounds": repeats, "against F.cross_entropy": against})
            print("probabilities", shape, name_of_dtype, {name: value["ratio"] for name, value in against.items()}, flush=True)
    return rows


def main() -> None:
    """Time every shape in both dtypes."""
    chosen = options(__doc__)
    if not chosen.quick:
        refuse_if_wrong()
    criterion, theirs = LargeMarginCrossEntropyLoss(lam=LAM), torch.nn.CrossEntropyLoss()
    rows = []
    for dtype in DTYPES:
        for shape in ((32, 10), (2, 5, 3, 3)) if chosen.quick else SHAPES:
            input, target = problem(shape, dtype)
            repeats = 3 if chosen.quick else max(11, min(1000, 20_000_000 // input.numel()))
            small = input.numel() < 6_000_000
            contestants: dict[str, Loss] = {
                "ours": criterion,
                "ours, loss * 0.3": scaled,
                "ours, reduction none": a_row,
                "ours, donated logits": donated,
            }
            if small:
                contestants["reference path"] = reference
                if input.dim() == 2:
                    contestants["formula under autograd"] = formula
            against = {
                name: against_torch(name, loss, theirs if loss is criterion else F.cross_entropy, input, target, repeats)
                for name, loss in contestants.items()
            }
            name_of_dtype = str(dtype).removeprefix("torch.")
            rows.append({"shape": shape, "dtype": name_of_dtype, "rounds": repeats, "against F.cross_entropy": against})
            print(shape, name_of_dtype, {name: value["ratio"] for name, value in against.items()}, flush=True)
    found: dict[str, object] = {
        "claim": __doc__.splitlines()[0],
        "machine": machine(),
        "rows": rows,
        "probabilities": of_probabilities(chosen.quick),
    }
    write("time_cpu", found, chosen.out)


if __name__ == "__main__":
    main()
