"""Claim: on a GPU the loss costs three touches of the logits: it takes less time and memory than F.cross_entropy, eager or compiled.

First the whole kernel test file runs on the GPU. Then, at each shape and dtype, forward and backward of every contestant that is
installed, interleaved, timed by CUDA events with a cold L2, beside the bandwidth of a plain copy on the same device. `--self-test` does
all of it but the measuring on the CPU, with tiny shapes and the Triton interpreter.
"""

import os
import sys
from collections.abc import Callable

from gpu_common import Clock, Step, compiled, gradient_step, installed, machine_and_packages, measure, options, round_to

ARGUMENTS = options(__doc__)
if ARGUMENTS.self_test:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from common import LAM, formula, problem, refuse_if_wrong, write  # noqa: E402
from largemargin import large_margin_cross_entropy  # noqa: E402

DEVICE = "cpu" if ARGUMENTS.self_test else "cuda"
SHAPES = ((4, 50), (3, 70)) if ARGUMENTS.self_test else ((8192, 32000), (8192, 128256), (4096, 1000), (128, 100))
DTYPES = (torch.bfloat16, torch.float32)


def ours(input: Tensor, target: Tensor) -> Tensor:
    return large_margin_cross_entropy(input, target, lam=LAM, backend="triton")


def contestants() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Losses of logits and target."""
    return {
        "F.cross_entropy": F.cross_entropy,
        "F.cross_entropy, compiled": compiled(lambda input, target: F.cross_entropy(input, target), ARGUMENTS.self_test),
        "formula under autograd": formula,
        "formula, compiled": compiled(lambda input, target: formula(input, target), ARGUMENTS.self_test),
        "ours": ours,
        "ours, lam=0": lambda input, target: large_margin_cross_entropy(input, target, lam=0.0, backend="triton"),
    }


def graph_replay(loss: Callable[[Tensor, Tensor], Tensor], input: Tensor, target: Tensor) -> Step:
    """Forward and backward captured once and replayed: no launch is waited for."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(input, target), input)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(input, target)
        gradient = torch.autograd.grad(value, input)

    def step(keep: object = gradient) -> Tensor:
        graph.replay()
        return value

    return step


def main() -> None:
    """Test, then measure."""
    if not ARGUMENTS.self_test and not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU; --self-test runs through on the CPU")
    if not ARGUMENTS.skip_tests:
        selection = "triton and awkward and float32" if ARGUMENTS.self_test else "triton or gpu or device or captured"
        refuse_if_wrong(selection, TRITON_INTERPRET="1" if ARGUMENTS.self_test else "0")
    clock, rows = Clock(ARGUMENTS.self_test), []
    for dtype in DTYPES:
        for shape in SHAPES:
            torch._dynamo.reset()  # each shape is compiled for itself
            input, target = problem(shape, dtype, DEVICE)
            size = input.numel() * input.element_size()
            steps = {name: gradient_step(loss, (input,), target) for name, loss in contestants().items()}
            if installed("liger_kernel") and not ARGUMENTS.self_test:
                from liger_kernel.transformers import LigerCrossEntropyLoss

                own = input.detach().clone().requires_grad_()  # it overwrites its logits
                steps["Liger, no margin"] = gradient_step(LigerCrossEntropyLoss(), (own,), target)
            other = torch.empty_like(input)
            steps["copy"] = lambda a=other, b=input: a.copy_(b.detach())
            if not ARGUMENTS.self_test:
                for name, loss in (("ours, graph replay", ours), ("F.cross_entropy, graph replay", F.cross_entropy)):
                    try:
                        steps[name] = graph_replay(loss, input, target)
                    except torch.OutOfMemoryError:
                        torch.cuda.empty_cache()
            row = {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "logits MiB": round_to(size / 2**20)}
            row["contestants"] = measure(steps, clock, (input,), ARGUMENTS.rounds)
            copied, took = row["contestants"]["copy"]["ms"], row["contestants"]["ours"].get("ms", float("nan"))
            row["copy GB/s"] = round_to(2 * size / copied / 1e6)
            row["ours GB/s, of 3 touches"] = round_to(3 * size / took / 1e6)
            rows.append(row)
            print(row, flush=True)
            del steps, other, input
    record = {"claim": __doc__.splitlines()[0], "machine": machine_and_packages(), "rows": rows}
    if ARGUMENTS.self_test:
        print("the self-test ran through")
    else:
        write("gpu", record, ARGUMENTS.out)


if __name__ == "__main__":
    main()
