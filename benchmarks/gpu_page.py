"""The part of docs/performance.md that is about GPUs, from the records of ``make gpu``."""

from collections.abc import Callable
from typing import Any

import gpu_summary

from common import table, words_of_machine

Records = dict[str, dict[str, Any]]


def section(records: Records) -> str:
    """The goals with what was found, then the details of what was measured."""
    figures = gpu_summary.figures(records)
    rows = [[figure.what, figure.found or "not measured", figure.goal, gpu_summary.word(figure)] for figure in figures]
    parts = [
        "## GPU",
        ""
        if records
        else "The loss has not been timed on a GPU. The Triton kernels that compute the whole loss have run only in Triton's interpreter.",
        "`make gpu` runs the tests and benchmarks on a GPU, in 8 minutes, and keeps their records in `results/gpu/`.\n"
        "`python benchmarks/gpu_all.py --help` says what it needs.",
        table(["", "found", "goal", ""], rows) if records else "",
    ]
    details = {"kernels": kernels, "linear": linear, "training": training}
    for name, page in details.items():
        if name in records:
            parts += [of_what(records[name]), *page(records[name])]
    return "\n\n".join(filter(None, parts))


def of_what(record: dict[str, Any]) -> str:
    """The claim, and where it was looked at."""
    absent = record.get("not installed")
    return " ".join(
        [
            f"{record['claim']} {words_of_machine(record)}, commit {record['commit'][:10]}, {record['date'][:10]}.",
            *([] if record["finished"] else ["The benchmark was stopped before its end."]),
            *([f"Not installed: {', '.join(absent)}."] if absent else []),
        ]
    )


def kernels(record: dict[str, Any]) -> list[str]:
    rows = record["rows"]
    small = [row for row in rows if any("launches" in found for found in row["contestants"].values())]
    return [
        "Milliseconds of forward and backward from a cold L2, medians; in brackets the MiB that a step takes beside the logits and\n"
        "their gradient, below 0 where the gradient overwrites the logits. The memory of a graph is in a pool of its own.",
        table(["", *map(case, rows)], by_contestant(rows, milliseconds)),
        "Small logits: microseconds a step of 300 in a row, with the time to launch them, and the number of launches.",
        table(["", *map(case, small)], by_contestant(small, microseconds)),
    ]


def case(row: dict[str, Any]) -> str:
    name = f"{gpu_summary.name_of(row['shape'])} {row['dtype']}"
    return f"{name}, probabilities" if gpu_summary.has_probabilities(row) else name


def linear(record: dict[str, Any]) -> list[str]:
    rows = record["rows"]
    shapes = [gpu_summary.name_of(row["rows, width, classes"]) for row in rows]
    return [
        "Milliseconds of forward and backward in bfloat16, medians; in brackets the MiB that a step takes beside features, classifier\n"
        "and their gradients. The bound is the time of the three products and of 10 bytes a logit at the bandwidth of a copy,\n"
        f"{record['copy GB/s']:g} GB/s: the loss reads the float32 logits twice and writes their bfloat16 gradient.",
        table(["", *shapes], by_contestant(rows, milliseconds)),
    ]


def training(record: dict[str, Any]) -> list[str]:
    found = {(row["case"], row["graph"], row["at once"]): row for row in record["rows"]}
    counts = sorted({count for _, _, count in found})
    rows = []
    for case, graph in dict.fromkeys((case, graph) for case, graph, _ in found):
        rows.append([case, "graph" if graph else "eager", *(rate(found.get((case, graph, count), {})) for count in counts)])
    alone = record.get("input alone, images/s")
    parts = ["Images a second, of all runs together." + (f" The input alone gives {alone:,.0f}." if alone else "")]
    parts.append(table(["", "", *(f"{count} at once" for count in counts)], rows))
    return parts + profile(record["profile"]) if "profile" in record else parts


def profile(found: dict[str, Any]) -> list[str]:
    if "failed" in found:
        return [f"The profile failed: {found['failed']}."]
    rows = [[f"`{row['kernel']}`", f"{row['share']:.1%}", f"{row['us a step']:g}"] for row in found["top"]]
    kernels = found["kernels a step"]
    return [
        f"One run in bfloat16 with its graph: the card is busy {found['busy']:.0%} of the time, with {kernels:g} kernels a step.",
        table(["kernel", "share of their time", "us a step"], rows),
    ]


def by_contestant(rows: list[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> list[list[str]]:
    """A line for each contestant, with a cell for each row of the record."""
    names = dict.fromkeys(name for row in rows for name in row["contestants"])
    return [[name, *(cell(row["contestants"].get(name, {})) for row in rows)] for name in names]


def milliseconds(found: dict[str, Any]) -> str:
    if "ms" not in found:
        return failure(found)
    memory = found.get("MiB beside inputs and gradients")
    return f"{found['ms']:.3g}" + ("" if memory is None else f" ({memory})")


def microseconds(found: dict[str, Any]) -> str:
    return f"{found['us back to back']:.3g}, {found['launches']}" if "launches" in found else failure(found)


def rate(found: dict[str, Any]) -> str:
    return f"{found['images/s']:,.0f}" if "images/s" in found else failure(found)


def failure(found: dict[str, Any]) -> str:
    """Of an error, its type."""
    return str(found.get("failed", "–")).partition(":")[0]
