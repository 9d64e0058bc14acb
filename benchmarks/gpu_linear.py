"""Claim: on a GPU the loss of features and classifier takes about the time of its three products, and less memory than its rivals.

Forward and backward of every contestant that is installed, interleaved, timed by CUDA events with a cold L2: the three products by cuBLAS,
linear and F.cross_entropy, eager and compiled, torch's chunked F.linear_cross_entropy, Liger's and cut-cross-entropy's fused losses, which
have no margin, and ours. `--self-test` does all of it but the measuring on the CPU, with tiny shapes.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_common import Clock, compiled, gradient_step, installed, machine_and_packages, measure, options, round_to
from torch import Tensor

from common import LAM, refuse_if_wrong, write
from largemargin import large_margin_cross_entropy, linear_large_margin_cross_entropy

ARGUMENTS = options(__doc__)
DEVICE = "cpu" if ARGUMENTS.self_test else "cuda"
SHAPES = ((7, 4, 50), (5, 8, 30)) if ARGUMENTS.self_test else ((8192, 4096, 128256), (4096, 512, 1_000_000))  # rows, width, classes


def three_products(features: Tensor, classifier: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logits = features @ classifier.t()
    return logits @ classifier, logits.t() @ features


def contestants() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Losses of features, classifier and target."""

    def linear_and_cross_entropy(features: Tensor, classifier: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((features @ classifier.t()).float(), target)

    found: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": lambda features, classifier, target: linear_large_margin_cross_entropy(features, classifier, target, lam=LAM),
        "linear, then ours": lambda features, classifier, target: large_margin_cross_entropy(features @ classifier.t(), target, lam=LAM),
        "linear, then F.cross_entropy": linear_and_cross_entropy,
        "linear, then F.cross_entropy, compiled": compiled(linear_and_cross_entropy, ARGUMENTS.self_test),
    }
    if hasattr(F, "linear_cross_entropy"):
        chunks = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy, chunked"] = lambda features, classifier, target: F.linear_cross_entropy(
            features, classifier, target, options=chunks
        )
    if installed("liger_kernel") and not ARGUMENTS.self_test:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger, no margin"] = lambda features, classifier, target: liger(classifier, features, target)
    if installed("cut_cross_entropy") and not ARGUMENTS.self_test:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy, no margin"] = linear_cross_entropy
    return found


def main() -> None:
    """Test, then measure."""
    if not ARGUMENTS.self_test and not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU; --self-test runs through on the CPU")
    if not ARGUMENTS.skip_tests:
        refuse_if_wrong("half" if ARGUMENTS.self_test else "half or gpu", file="test_linear.py")
    clock, rows = Clock(ARGUMENTS.self_test), []
    for shape in SHAPES:
        torch._dynamo.reset()  # each shape is compiled for itself
        num_rows, width, num_classes = shape
        generator = torch.Generator(DEVICE).manual_seed(0)
        features = torch.randn(num_rows, width, generator=generator, device=DEVICE).bfloat16().requires_grad_()
        classifier = torch.randn(num_classes, width, generator=generator, device=DEVICE).mul_(width**-0.5).bfloat16().requires_grad_()
        target = torch.randint(num_classes, (num_rows,), generator=generator, device=DEVICE)
        leaves = (features, classifier)
        steps = {name: gradient_step(loss, leaves, target) for name, loss in contestants().items()}
        products = torch.no_grad()(lambda leaves=leaves, target=target: three_products(*leaves, target)[0])
        found = measure(steps | {"three products": products}, clock, leaves, ARGUMENTS.rounds)
        row = {"rows, width, classes": shape, "dtype": "bfloat16", "contestants": found}
        row["ours / three products"] = round_to(found["ours"].get("ms", float("nan")) / found["three products"]["ms"])
        rows.append(row)
        print(row, flush=True)
        del steps, products, leaves, features, classifier
    record = {"claim": __doc__.splitlines()[0], "machine": machine_and_packages(), "rows": rows}
    if ARGUMENTS.self_test:
        print("the self-test ran through")
    else:
        write("gpu_linear", record, ARGUMENTS.out)


if __name__ == "__main__":
    main()
