"""Write docs/performance.md and its chart from the records in results/bench/ and results/gpu/. Nothing is measured here."""

import json
from typing import Any

import matplotlib

matplotlib.use("svg")
import gpu_summary
import matplotlib.pyplot as plt
from gpu_page import section

from common import RESULTS, ROOT, table, words_of_machine
from largemargin.lab.words import listed

PAGE = ROOT / "docs" / "performance.md"
CHART = ROOT / "docs" / "performance.svg"


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def shape_of(row: dict[str, Any]) -> str:
    return "×".join(map(str, row["shape"]))


WAYS = ("ours", "ours, donated logits", "ours, loss * 0.3", "ours, reduction none")


def time_page(record: dict[str, Any]) -> str:
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        by_shape.setdefault(shape_of(row), []).append(row["against F.cross_entropy"])
    dtypes = dict.fromkeys(row["dtype"] for row in record["rows"])
    heads = [f"{dtype}, {what}" for dtype in dtypes for what in ("ours", "slowest")]
    rows = []
    for shape, of_dtypes in by_shape.items():
        cells = []
        for found in of_dtypes:
            cells += [f"{found['ours']['ratio']:.2f}", f"{max(found[name]['ratio'] for name in WAYS):.2f}"]
        references = [found["reference path"]["ratio"] for found in of_dtypes if "reference path" in found]
        rows.append([shape, *cells, f"{max(references):.1f}" if references else "–"])
    return table(["logits", *heads, "reference, slowest"], rows)


def slower_page(record: dict[str, Any]) -> str:
    plain = slower_at(record, WAYS[:1])
    others = [shape for shape in slower_at(record, WAYS) if shape not in plain]
    sentences = [
        f"A plain call is slower than torch's at {listed(plain)}, where its fixed cost weighs most." if plain else "",
        f"At least one of the other calls is slower at {listed(others)}." if others else "",
    ]
    return "\n".join(filter(None, sentences))


def slower_at(record: dict[str, Any], ways: tuple[str, ...]) -> list[str]:
    """The shapes at which one of these calls takes longer than F.cross_entropy, in some dtype."""
    rows = (row for row in record["rows"] if any(row["against F.cross_entropy"][way]["ratio"] > 1 for way in ways))
    return list(dict.fromkeys(map(shape_of, rows)))


def floor_page(record: dict[str, Any]) -> str:
    names = ("ours, ns", "times the floor", "times the floor, fresh gradient", "of F.cross_entropy")
    rows = [[shape_of(row), row["dtype"], *(f"{row[name]:.2f}" for name in names)] for row in record["rows"] if row["threads"] == 2]
    return table(["logits", "dtype", *names[:2], "fresh gradient", "times F.cross_entropy"], rows)


def chart(record: dict[str, Any]) -> None:
    rows = [row for row in record["rows"] if row["dtype"] == "float32"]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for offset, (name, colour) in enumerate((("ours", "#1f5fa8"), ("ours, donated logits", "#7fb0e6"))):
        values = [row["against F.cross_entropy"][name]["ratio"] for row in rows]
        axes.bar([i + 0.38 * offset - 0.19 for i in range(len(rows))], values, 0.36, label=name, color=colour)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.annotate("F.cross_entropy, without a margin", (len(rows) - 0.6, 1.03), ha="right", fontsize=8)
    axes.set_xticks(range(len(rows)), [shape_of(row) for row in rows], fontsize=7, rotation=20, ha="right", rotation_mode="anchor")
    axes.set_ylabel("time, forward + backward")
    axes.set_title("Large-margin loss on a CPU, float32", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    plt.rcParams["svg.hashsalt"] = "largemargin"
    figure.savefig(CHART, metadata={"Date": None})


def memory_page(record: dict[str, Any]) -> str:
    names = ("F.cross_entropy", "ours", "ours, loss * 0.3", "ours, donated logits", "reference path")
    cells = [[row["dtype"], *(f"{row['peak, in logits'][name]:.2f}" for name in names)] for row in record["rows"]]
    return table([f"{shape_of(record['rows'][0])} logits", *names], cells)


def linear_page(record: dict[str, Any]) -> str:
    names = ("three products", "F.cross_entropy(F.linear)", "ours")
    rows = []
    for row in record["rows"]:
        memory = row["MiB beside inputs and gradients"]
        cells = [f"{row['seconds'][name]:.3g}" for name in names]
        rows.append([shape_of(row), *cells, f"{row['ours / three products']:.2f}", *(str(memory[name]) for name in names[1:])])
    heads = [*(f"{name}, s" for name in names), "ours / three products", *(f"{name}, MiB" for name in names[1:])]
    return table(["rows×width×classes", *heads], rows)


def training_page(record: dict[str, Any]) -> str:
    scripts = {name for name in record["training"] if name.startswith("the script")}
    left_out = scripts - {record["compared with"]} | {"the lab, float32, contiguous"}
    rows = [
        [name if part == "training" else f"{part}, {name}", f"{row['images per second']:,.0f}", f"{row['times the script']:.2f}"]
        for part in ("input alone", "training")
        for name, row in record[part].items()
        if name not in left_out
    ]
    return table(["", "images/s", "times the script's"], rows)


def surface_page(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        size = shape_of(row)
        if size == "128×100" or row["dtype"] not in ("float32", "float64") or "lam=0" in row["name"] or "weight" in row["name"]:
            continue
        unusual = [size] * (size not in ("192×900", "256×128")) + [row["dtype"]] * (row["dtype"] != "float32")
        memory = f"{row['MiB']['ours'] / row['MiB']['theirs']:.2f}"
        rows.append([", ".join([row["name"], *unusual]), f"{row['time']['ratio']:.2f}", memory])
    return table(["loss", "time / torch's", "memory / torch's"], rows)


def accuracy_page(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        if row["offset"] != 0 or row["lam"] != 0 or row["target"] not in ("is any class", "leads by 12 nats"):
            continue
        errors = [row[name] for name in ("cpu", "reference", "torch")]
        whats = ("loss, relative", "target gradient, relative")
        cells = [" / ".join(f"{error[what]:.1e}" for what in whats) for error in errors]
        rows.append([row["target"], *cells])
    return table(["target, λ = 0", "cpu", "reference", "F.cross_entropy"], rows)


def floor_section(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return []
    call = max(row["call, us"] for row in record["rows"])
    alone = [row["times the floor"] for row in record["rows"] if row["threads"] == 1]
    return [
        "## The floor of the CPU kernel",
        f"{record['claim']} It uses {record['isa']} here.",
        "The floor makes the three passes over a row that every kernel needs: the maximum, the exponentials with their sums, and the\n"
        "gradient. It writes each gradient to the same memory. A loss gets new memory from torch for each gradient, and the system first\n"
        'clears the pages of a large one; the column "fresh gradient" includes that. The table is for two threads. Its nanoseconds\n'
        f"per logit contain the fixed cost of a call, at most {call:.0f} us; the multiples of the floor leave it out.\n"
        f'On one thread "times the floor" is {min(alone):.2f} to {max(alone):.2f}.',
        floor_page(record),
    ]


def costs_section(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return []
    calls = []
    for name, shape in (("small call", "96×100"), ("small linear", "64×16×100")):
        parts = record[name]
        rest = parts["ours"] - sum(parts.get(part, 0) for part in ("kernel", "products", "autograd"))
        cells = [parts.get(part) for part in ("F.cross_entropy", "ours", "kernel", "products", "autograd")]
        calls.append([shape, *("–" if cell is None else f"{cell:.0f}" for cell in cells), f"{rest:.0f}"])
    heads = []
    for name, parts in record["heads"].items():
        beyond = parts["logits"] - parts["nn.Linear"]
        heads.append([name, f"{parts['logits'] / 1e3:.2f}", f"{beyond / 1e3:.2f}", f"{parts['loss'] / 1e3:.2f}"])
    return [
        "## Where the time goes",
        f"{record['claim']} Here with one thread, forward and backward, float32; of each part the fastest tenth of its turns.",
        "A small call, in microseconds. The kernel includes its call from Python. Autograd is the time of an autograd function that takes\n"
        "the same inputs and returns ready results. The rest is checks, the choice of a backend and, for a linear layer, tiles.",
        table(["logits, or rows×width×classes", "F.cross_entropy", "ours", "kernel", "products", "autograd", "the rest"], calls),
        "A head with 256 rows, 128 features and 1,000 classes, in milliseconds: its logits with the margin, how much longer they take\n"
        "than those of `nn.Linear`, and the large-margin loss of such logits.",
        table(["head", "its logits", "beyond nn.Linear", "loss"], heads),
    ]


def main() -> None:
    """Write the page."""
    names = ("time_cpu", "memory_cpu", "accuracy", "linear_cpu", "training_cpu", "surface")
    time, memory, accuracy, linear, training, surface = (load(name) for name in names)
    assert time and memory and accuracy and linear and training and surface, "run make bench first"
    records = (time, memory, accuracy, linear, training, surface)
    (machine,) = {words_of_machine(record) for record in records}
    chart(time)
    parts = [
        "# Performance",
        f"Everything but the section on GPUs comes from one machine: {machine}.\n"
        "`make bench` writes this page from the records in `results/bench/` and `results/gpu/`, which hold more cases.",
        "## Time on the CPU",
        time["claim"],
        "![Time of the large-margin loss relative to F.cross_entropy](performance.svg)",
        "Each number is a multiple of the time of `F.cross_entropy`, forward and backward: below 1 is faster. The two take turns in one\n"
        'process. "Slowest" is the largest number of four calls: plain, with `donate=True`, with `loss * 0.3` and with\n'
        '`reduction="none"`. The reference computes without the kernel.',
        time_page(time),
        slower_page(time),
        *floor_section(load("floor_cpu")),
        "## Memory",
        memory["claim"],
        "The most memory that torch holds beside the logits in forward and backward, as a multiple of their size.",
        memory_page(memory),
        "## Every public loss",
        "Lines without a size have float32 logits of 192×900, or a layer of 256 rows, width 128 and 1,000 classes. Torch's counterpart is\n"
        "`nn.CrossEntropyLoss`, with `nn.Linear` for layers, or the function named. Memory is the most that torch holds beside the\n"
        "inputs.",
        surface_page(surface),
        *costs_section(load("costs")),
        "## Linear layer and loss in one",
        linear["claim"],
        "float32, forward and backward. Memory excludes inputs and gradients.",
        linear_page(linear),
        "## Training the 13-layer network on the CPU",
        training["claim"],
        "Batches of 128 random images of CIFAR's size. The script computes the loss by the formula under autograd.",
        training_page(training),
        "## Accuracy",
        accuracy["claim"],
        "64 rows of 1,000 classes in float32: the worst relative error of a loss / of a gradient at the target.",
        accuracy_page(accuracy),
        section(gpu_summary.load(ROOT / "results" / "gpu")),
    ]
    PAGE.write_text("\n\n".join(parts) + "\n")
    print(PAGE.relative_to(ROOT), CHART.relative_to(ROOT))


if __name__ == "__main__":
    main()
