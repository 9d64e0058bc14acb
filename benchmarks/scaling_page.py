"""Write the tables of docs/scaling.md and the figure of its predictions, from results/bench/scaling.json and the cost model."""

import json
import re
from typing import Any

import matplotlib

matplotlib.use("svg")
import cost_model
import matplotlib.pyplot as plt
from cost_model import H100, H100_BYTES, Cluster, Problem

from common import RESULTS, ROOT, table, words_of_machine

PAGE = ROOT / "docs" / "scaling.md"
FIGURE = ROOT / "docs" / "predictions.svg"
ROWS_A_RANK, WIDTH = 64, 512
CLASSES = (10**7, 10**8, 10**9)
RANKS = (8, 64, 512, 4096)
LARGE_TILE = 2**30
BLOCK = re.compile(r"(<!-- (\w+), by benchmarks/scaling_page.py -->\n).*?(\n<!-- end -->)", re.DOTALL)


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / "scaling.json").read_text())
    return found


def measured(found: dict[str, Any]) -> str:
    lines = found["MiB a process"]
    rows = [
        [f"{classes:,}", *(f"{values[i]:,.0f}" for values in lines.values())]
        for i, classes in enumerate(found["classes"])
        if i in (0, 3, 5, 7)
    ]
    rows_width = "{} rows of width {}".format(*found["rows, width"])
    return f"{table(['MiB for classes', *lines], rows)}\n\n{rows_width}, float32; {words_of_machine(found)}."


def check_of_seconds(found: dict[str, Any]) -> str:
    """The rates of the machine that measured, and how far the model is from its steps."""
    timed, (num_rows, width) = found["one thread a process"], found["rows, width"]
    rates = timed["a second"]
    here = Cluster(rates["FLOP"], rates["memory, bytes"], rates["link, bytes"], rates["link, bytes"])
    ratios = [
        sum(cost_model.seconds(Problem(num_rows, width, classes, int(ranks)), here).values()) / measured
        for ranks, seconds in timed["seconds a step"].items()
        for classes, measured in zip(timed["classes"], seconds, strict=True)
    ]
    return (
        f"One thread reaches {here.flop / 1e9:.3g} GFLOP/s in products, {here.memory / 1e9:.3g} GB/s in the loss of a tile, and "
        f"{here.inside / 1e9:.3g} GB/s between two processes.\n"
        f"From these rates the model predicts {len(ratios)} steps of one and two ranks. "
        f"It gives {min(ratios):.2f} to {max(ratios):.2f} times their measured time."
    )


def most_classes(ranks: int, fused: bool, split: bool) -> int:
    """The most classes, of two significant digits, that fit on any mesh."""

    def fits(classes: int) -> bool:
        problems = cost_model.meshes(ROWS_A_RANK, WIDTH, classes, ranks, fused=fused)
        return any(cost_model.held_in_training(problem) <= H100_BYTES for problem in (problems if split else problems[:1]))

    rounded = [int(f"{digits}{'0' * power}") for power in range(5, 10) for digits in range(10, 100)]
    return max(filter(fits, rounded))


def where_memory_ends() -> str:
    kinds = {
        "dense: F.cross_entropy(F.linear)": (False, False),
        "fused": (True, False),
        "classes split, with logits": (False, True),
        "classes split, fused": (True, True),
    }
    rows = [[name, *(f"{most_classes(ranks, *kind) / 1e6:,g}" for ranks in RANKS)] for name, kind in kinds.items()]
    return table(["millions of classes, at most", *(f"{ranks:,} GPUs" for ranks in RANKS)], rows)


def milliseconds(value: float) -> str:
    return f"{1000 * value:.3g}" if value < 1 else f"{1000 * value:,.0f}"


def longest_part(problem: Problem) -> str:
    parts = cost_model.seconds_in_training(problem, H100)
    by_memory = cost_model.moved_by_products(problem) / H100.memory > cost_model.flop(problem) / H100.flop
    named = {
        "memory" if by_memory else "FLOP": parts["products"],
        "loss": parts["loss"],
        "exchange": exchange_seconds(parts),
        "AdamW": parts["AdamW"],
    }
    return max(named, key=lambda name: named[name])


def exchange_seconds(parts: dict[str, float]) -> float:
    return parts["classes"] + parts["data"]


def steps_rows(classes: int, ranks: int) -> list[list[str]]:
    """The line of a size and a cluster, if any mesh holds it."""
    problems = cost_model.meshes(ROWS_A_RANK, WIDTH, classes, ranks)
    best = cost_model.best(problems, H100, H100_BYTES)
    larger = cost_model.best(cost_model.meshes(ROWS_A_RANK, WIDTH, classes, ranks, tile=LARGE_TILE), H100, H100_BYTES)
    if best is None or larger is None:
        return []
    parts = cost_model.seconds_in_training(best, H100)
    return [
        [
            f"{classes:,}",
            f"{ranks:,}",
            f"{best.class_ranks:,}×{best.data_ranks:,}",
            milliseconds(sum(parts.values())),
            longest_part(best),
            milliseconds(sum(cost_model.seconds_in_training(larger, H100).values())),
        ]
    ]


def best_meshes() -> str:
    head = ["classes", "GPUs", "best mesh", "step, ms", "longest part", "tiles of 2³⁰, ms"]
    return table(head, [row for classes in CLASSES for ranks in RANKS for row in steps_rows(classes, ranks)])


def page(text: str) -> str:
    """The text of the page with its tables as they are now."""
    found = record()
    tables = {
        "memory": measured(found),
        "rates": check_of_seconds(found),
        "limits": where_memory_ends(),
        "steps": best_meshes(),
    }
    return BLOCK.sub(lambda block: f"{block[1]}\n{tables[block[2]]}\n{block[3]}", text)


def chart() -> None:
    """Memory and time of 4,096 GPUs against the number of them that share the classes."""
    plt.rcParams["svg.hashsalt"] = "largemargin"  # the same file for the same numbers
    figure, (memory, time) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    for classes, colour in zip(CLASSES, ("#7fb0e6", "#1f5fa8", "#0b2545"), strict=True):
        problems = cost_model.meshes(ROWS_A_RANK, WIDTH, classes, RANKS[-1])
        sizes = [problem.class_ranks for problem in problems]
        gigabytes = [cost_model.held_in_training(problem) / 1e9 for problem in problems]
        milliseconds = [1000 * sum(cost_model.seconds_in_training(problem, H100).values()) for problem in problems]
        fits = [value <= H100_BYTES / 1e9 for value in gigabytes]
        name = f"10{'⁷⁸⁹'[CLASSES.index(classes)]} classes"
        memory.plot(sizes, gigabytes, "o-", label=name, color=colour, markersize=3)
        time.plot(sizes, milliseconds, ":", color=colour)
        shown = [value if fit else float("nan") for value, fit in zip(milliseconds, fits, strict=True)]
        time.plot(sizes, shown, "o-", label=name, color=colour, markersize=3)
    memory.axhline(H100_BYTES / 1e9, color="black", linewidth=0.8)
    memory.annotate("80 GB", (2**10, 95), fontsize=8)
    memory.set_ylabel("GB a GPU")
    time.set_ylabel("ms a step (dotted: does not fit)")
    for axes in (memory, time):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("GPUs that share the classes, of 4,096")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    time.legend(frameon=False, fontsize=8)
    figure.suptitle("Predicted, not measured", fontsize=10)
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    """Write both."""
    chart()
    PAGE.write_text(page(PAGE.read_text()))
    print(PAGE.relative_to(ROOT), FIGURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
