"""Claim: on a GPU the loss of features and classifier takes about the time of its three products, and less memory than its rivals.

Forward and backward of every contestant that is installed, in turns, timed by CUDA events from a cold L2: the three products by cuBLAS,
linear and F.cross_entropy, eager and compiled, torch's chunked F.linear_cross_entropy, Liger's and cut-cross-entropy's fused losses, which
have no margin, and ours. The bound by bytes is the time of the three products and, at the bandwidth of a plain copy, of the touches of the
logits that no product makes: the loss reads their float32 tile twice and writes its bfloat16 gradient, 10 bytes a logit.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import Card, Step, Work, copy_of, gradient_step, installed, measure, missing_rivals, rounded, start
from torch import Tensor

from common import LAM
from largemargin import large_margin_cross_entropy, linear_large_margin_cross_entropy

WORK = Work(
    cases=((8192, 4096, 128256), (4096, 512, 1_000_000)),  # rows, width, classes
    rounds=10,
    tests=("half or gpu", "test_linear.py"),
)
TINY = Work(cases=((7, 4, 50), (5, 8, 30)), rounds=2, tests=("half and ignored", "test_linear.py"))
BYTES_OF_A_LOGIT = 4 + 4 + 2  # read, read, written by the loss
COPIED = 2**28  # numbers of the copy at most

LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(features: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
    return linear_large_margin_cross_entropy(features, classifier, target, lam=LAM)


def linear_then_ours(features: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(features @ classifier.t(), target, lam=LAM)


def linear_then_cross_entropy(features: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((features @ classifier.t()).float(), target)


def three_products(features: Tensor, classifier: Tensor) -> Step:
    """The products of a linear layer's forward and backward passes, with the logits as their own gradient."""
    features, classifier = features.detach(), classifier.detach()

    def step() -> object:
        logits = features @ classifier.t()
        return logits @ classifier, logits.t() @ features

    return step


def chunked() -> LinearLoss:
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda features, classifier, target: F.linear_cross_entropy(features, classifier, target, options=options)


def liger() -> LinearLoss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda features, classifier, target: loss(classifier, features, target)


def cut() -> LinearLoss:
    from cut_cross_entropy import linear_cross_entropy

    found: LinearLoss = linear_cross_entropy
    return found


def contestants(features: Tensor, classifier: Tensor, target: Tensor, card: Card) -> dict[str, Callable[[], Step]]:
    makers: dict[str, Callable[[], LinearLoss]] = {
        "ours": lambda: ours,
        "linear, then ours": lambda: linear_then_ours,
        "linear, then F.cross_entropy": lambda: linear_then_cross_entropy,
    }
    if hasattr(F, "linear_cross_entropy"):
        makers["F.linear_cross_entropy, chunked"] = chunked
    if installed("liger_kernel"):
        makers["Liger"] = liger
    if installed("cut_cross_entropy"):
        makers["cut-cross-entropy"] = cut
    compiled = torch.compile(linear_then_cross_entropy, backend=card.compiler, dynamic=False)
    makers["linear, then F.cross_entropy, compiled"] = lambda: compiled
    found: dict[str, Callable[[], Step]] = {"three products": lambda: three_products(features, classifier)}
    for name, make in makers.items():
        found[name] = lambda make=make: gradient_step(make(), (features, classifier), target)  # type: ignore[misc]
    return found


def shares(row: dict[str, Any], copy_bandwidth: float) -> dict[str, float]:
    """Ours beside the three products, and beside the bound by bytes."""
    rows, _, classes = row["rows, width, classes"]
    products, taken = (row["contestants"][name].get("ms") for name in ("three products", "ours"))
    if not (products and taken):
        return {}
    bound = products + BYTES_OF_A_LOGIT * rows * classes / copy_bandwidth
    return {
        "ours / three products": rounded(taken / products),
        "bound by bytes, ms": rounded(bound),
        "bound / ours": rounded(bound / taken),
    }


def measured_copy(card: Card, work: Work) -> float:
    """Bytes a millisecond, of which half are read and half written."""
    source = torch.empty(min(COPIED, max(rows * classes for rows, _, classes in work.cases)), dtype=torch.bfloat16, device=card.device)
    taken: float = measure({"copy": lambda: copy_of(source)}, card, work.rounds)["copy"]["ms"]
    return 2 * source.nbytes / taken


def main() -> None:
    """Measure every shape."""
    card, record, work = start("linear", __doc__, WORK, TINY)
    rows: list[dict[str, Any]] = []
    copy_bandwidth = measured_copy(card, work)
    card.release()
    for shape in work.cases:
        torch._dynamo.reset()  # each shape is compiled for itself
        num_rows, width, num_classes = shape
        generator = torch.Generator(card.device).manual_seed(0)
        features = torch.randn(num_rows, width, generator=generator, device=card.device).bfloat16().requires_grad_()
        classifier = torch.randn(num_classes, width, generator=generator, device=card.device).mul_(width**-0.5).bfloat16().requires_grad_()
        target = torch.randint(num_classes, (num_rows,), generator=generator, device=card.device)
        row: dict[str, Any] = {"rows, width, classes": shape, "dtype": "bfloat16"}
        row["contestants"] = measure(
            contestants(features, classifier, target, card), card, work.rounds, features.nbytes + classifier.nbytes
        )
        rows.append(row | shares(row, copy_bandwidth))
        record.write(
            rows=rows, **{"copy GB/s": rounded(copy_bandwidth / 1e6), "not installed": missing_rivals("Liger", "cut-cross-entropy")}
        )
        print(rows[-1], flush=True)
        del features, classifier, target
        card.release()
    record.finish()


if __name__ == "__main__":
    main()
