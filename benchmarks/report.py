"""Write docs/performance.md and its chart from the records in results/bench/ and results/gpu/. Nothing is measured here."""

import json
from typing import Any

import matplotlib

matplotlib.use("svg")
import gpu_summary
import matplotlib.pyplot as plt
from gpu_page import section

from common import RESULTS, ROOT, table, words_of_machine

PAGE = ROOT / "docs" / "performance.md"
CHART = ROOT / "docs" / "performance.svg"


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def shape_of(row: dict[str, Any]) -> str:
    return "×".join(map(str, row["shape"]))


def time_page(record: dict[str, Any]) -> str:
    names = ["ours", "ours, donated logits", "ours, loss * 0.3", "ours, reduction none", "reference path", "formula under autograd"]
    rows = []
    for row in record["rows"]:
        cells = []
        for name in names:
            found = row["against F.cross_entropy"].get(name)
            cells.append(f"{found['ratio']:.2f} ({found['ms']:.3g} / {found['theirs, ms']:.3g} ms)" if found else "–")
        rows.append([shape_of(row), row["dtype"], *cells])
    return table(["logits", "dtype", *names], rows)


def floor_page(record: dict[str, Any]) -> str:
    names = ("times the floor", "times the floor, fresh gradient", "of F.cross_entropy")
    rows = []
    for row in record["rows"]:
        passes = [f"{row[f'{name}, ns']:.2f}" for name in ("maximum", "gather", "scatter", "floor", "ours")]
        rows.append([shape_of(row), row["dtype"], str(row["threads"]), *passes, *(f"{row[name]:.2f}" for name in names)])
    return table(["logits", "dtype", "threads", "maximum", "gather", "scatter", "floor", "ours", *names], rows)


def chart(record: dict[str, Any]) -> None:
    rows = [row for row in record["rows"] if row["dtype"] == "float32"]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for offset, (name, colour) in enumerate((("ours", "#1f5fa8"), ("ours, donated logits", "#7fb0e6"))):
        values = [row["against F.cross_entropy"][name]["ratio"] for row in rows]
        axes.bar([i + 0.38 * offset - 0.19 for i in range(len(rows))], values, 0.36, label=name, color=colour)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.annotate("F.cross_entropy, without a margin", (len(rows) - 0.6, 1.03), ha="right", fontsize=8)
    axes.set_xticks(range(len(rows)), [shape_of(row) for row in rows], fontsize=7)
    axes.set_ylabel("time, forward + backward")
    axes.set_title("Large-margin loss on a CPU, float32", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "largemargin"
    figure.savefig(CHART, metadata={"Date": None})


def one_thread_page(record: dict[str, Any]) -> str:
    return table(
        ["logits, float32", "time / F.cross_entropy"],
        [[shape.replace("x", "×"), f"{found:.2f}"] for shape, found in record["ratio"].items()],
    )


def memory_page(record: dict[str, Any]) -> str:
    names = list(record["rows"][0]["peak, in logits"])
    return table(
        ["logits", "dtype", *names],
        [[shape_of(row), row["dtype"], *(f"{row['peak, in logits'][name]:.2f}" for name in names)] for row in record["rows"]],
    )


def linear_page(record: dict[str, Any]) -> str:
    names = list(dict.fromkeys(name for row in record["rows"] for name in row["seconds"]))
    rows = []
    for row in record["rows"]:
        memory = row["MiB beside inputs and gradients"]
        cells = [f"{row['seconds'][name]:.3g}" if name in row["seconds"] else "–" for name in names]
        rows.append([shape_of(row), *cells, f"{row['ours / three products']:.2f}", *(str(memory[name]) for name in memory)])
    of_memory = [f"{name}: MiB" for name in record["rows"][0]["MiB beside inputs and gradients"]]
    return table(["rows×width×classes", *(f"{name}, s" for name in names), "ours / three products", *of_memory], rows)


def training_page(record: dict[str, Any]) -> str:
    rows = []
    for part in ("input alone", "training"):
        for name, row in record[part].items():
            rows.append([part, name, f"{row['images per second']:g}", f"{row['times the script']:.2f}"])
    return table(["", "", "images/s", "times the script's method"], rows)


def surface_page(record: dict[str, Any]) -> str:
    rows = [
        [row["name"], shape_of(row), row["dtype"], f"{row['time']['ratio']:.2f}"]
        + [f"{row[what]['ours']:g} / {row[what]['theirs']:g}" for what in ("MiB", "operations")]
        for row in record["rows"]
    ]
    return table(["loss", "input", "dtype", "time / torch's", "MiB, ours / torch's", "operations, ours / torch's"], rows)


def accuracy_page(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        if row["target"] not in ("is any class", "leads by 0 nats", "leads by 12 nats", "leads by 16 nats", "leads by 50 nats"):
            continue
        if row["offset"] not in (0, 1e4):
            continue
        errors = [row[name] for name in ("cpu", "reference", "torch") if name in row]
        whats = ("loss, relative", "target gradient, relative", "gradient, in eps")
        cells = [" / ".join(f"{error[what]:.1e}" for what in whats) for error in errors]
        rows.append([f"{row['lam']:g}", row["target"], f"{row['offset']:g}", *cells, *["–"] * (3 - len(cells))])
    return table(["λ", "target", "common offset", "cpu", "reference", "F.cross_entropy"], rows)


def floor_section(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return []
    call = max(row["call, us"] for row in record["rows"])
    return [
        "## The floor of the CPU kernel",
        f"{record['claim']} {words_of_machine(record)}, {record['isa']}.",
        "Nanoseconds per logit, forward and backward. The floor makes three passes over each row: its maximum, e^z with three sums, and\n"
        "the gradient. Nothing else is needed, and nothing less will do. A fresh gradient lies where torch puts it, often in pages that\n"
        f"nobody has touched. The multiples of the floor leave out what a call takes at any size, here {call:.0f} us at most.",
        floor_page(record),
    ]


def main() -> None:
    """Write the page."""
    names = ("time_cpu", "memory_cpu", "accuracy", "one_thread", "linear_cpu", "training_cpu", "surface")
    time, memory, accuracy, one_thread, linear, training, surface = (load(name) for name in names)
    assert time and memory and accuracy and one_thread and linear and training and surface, "run make bench first"
    chart(time)
    parts = [
        "# Performance",
        "Written by `make bench` from the records in `results/bench/` and `results/gpu/`: do not edit. Each script for the CPU refuses to\n"
        "report when the correctness tests of what it times fail.",
        "## Time on the CPU",
        f"{time['claim']} {words_of_machine(time)}.",
        "![Time of the large-margin loss relative to F.cross_entropy](performance.svg)",
        "Times are multiples of `F.cross_entropy`'s, which has no margin: below 1 is faster. Forward and backward through the public\n"
        "functions with all their checks, each in turns with `F.cross_entropy` in one process: ratio of the medians, and both medians.\n"
        '`loss * 0.3` multiplies the gradient afterwards, or in bfloat16 computes it anew; with `reduction="none"` it is computed in the\n'
        "backward pass. The formula under autograd is equation (11) as one would first write it in torch.",
        time_page(time),
        "- Where we lose: batches of a few thousand logits.\n"
        "- `F.cross_entropy` took three to six times as long in some of its turns as in others at 256×1000 and 512×10000 (the second time\n"
        "  in a cell is its), and the ratios follow.",
        "On one thread, the best of 20, which continuous integration checks (a shape may take twice as much):",
        one_thread_page(one_thread),
        *floor_section(load("floor_cpu")),
        "## Memory",
        f"{memory['claim']} {words_of_machine(memory)}.",
        "The most that torch holds in forward and backward beside the logits, in units of the logits. The kernel's own scratch is a few\n"
        "rows, or a tile of 65,536 logits, a thread.",
        memory_page(memory),
        "## Every public loss",
        f"{surface['claim']} {words_of_machine(surface)}.",
        "Forward and backward through the public functions. A time below 1 is faster than torch's counterpart: `nn.CrossEntropyLoss` with\n"
        "the same arguments, `nn.Linear` with it for layers (256 rows, 1,000 classes), or the function named. Operations are those of\n"
        "torch that a step asks for; a kernel of this library is none of them. Memory is the most that torch holds beside the inputs.",
        surface_page(surface),
        "## Linear layer and loss in one",
        f"{linear['claim']} {words_of_machine(linear)}.",
        "float32, forward and backward, medians; memory is what torch holds beside inputs and gradients. The three products are plain\n"
        "ones, with no loss between them. At a million classes a tile has 15 rows.",
        linear_page(linear),
        "## Training the 13-layer network on the CPU",
        f"{training['claim']} {words_of_machine(training)}.",
        "Batches of 128 random images of CIFAR's size; every contestant in turns in one process: medians, and the median over rounds\n"
        f"of the ratio to {training['compared with']}, the faster of its settings. The loss of the script is the formula under autograd.",
        training_page(training),
        "## Accuracy",
        f"{accuracy['claim']} {words_of_machine(accuracy)}.",
        "64 rows of 1,000 classes, float32 against float64: the worst relative error of a loss / of a gradient at the target / the worst\n"
        "error of the gradient in eps = 1.2e-7. Where the target leads by 16 nats `F.cross_entropy` has lost the row.",
        accuracy_page(accuracy),
        section(gpu_summary.load(ROOT / "results" / "gpu")),
    ]
    PAGE.write_text("\n\n".join(parts) + "\n")
    print(PAGE.relative_to(ROOT), CHART.relative_to(ROOT))


if __name__ == "__main__":
    main()
