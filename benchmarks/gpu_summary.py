"""What the records of a GPU say, beside the goals: the table at the end of ``make gpu`` and the one of docs/performance.md."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

COPY_SHARE = 0.85  # of the bandwidth of a plain copy, large logits in bfloat16
PRODUCTS = 1.1  # times the three products of a linear layer
MICROSECONDS = 60.0  # of an eager step, small logits
LAUNCHES = 4  # of an eager step with class probabilities
IMAGES = 60_000.0  # a second, one run of the 13-layer network
RECORDS = ("tests", "kernels", "linear", "training")
MILLION = (4096, 512, 1_000_000)  # rows, width, classes


class Figure(NamedTuple):
    """One line: what was measured, what came, the goal and whether it is reached; None where one of them is not there."""

    what: str
    found: str | None = None
    goal: str = ""
    reached: bool | None = None


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The records by name, those that are there."""
    return {name: json.loads(path.read_text()) for name in RECORDS if (path := folder / f"{name}.json").is_file()}


def figures(records: dict[str, dict[str, Any]]) -> list[Figure]:
    """The key figures, whether they were measured or not."""
    parts: dict[str, Callable[[dict[str, Any]], Iterator[Figure]]] = {
        "tests": of_tests,
        "kernels": of_kernels,
        "linear": of_linear,
        "training": of_training,
    }
    return [figure for name, part in parts.items() for figure in part(records.get(name, {"rows": []}))]


def of_tests(record: dict[str, Any]) -> Iterator[Figure]:
    found, reached = None, None
    if "passed" in record:
        wrong = record["failed"] + len(record["not collected"])
        found = f"{record['passed']} passed, {wrong} failed" + ("" if record["finished"] else " so far")
        reached = wrong == 0 and record["finished"]
    yield Figure("tests of the device", found, "none fails", reached)


def of_kernels(record: dict[str, Any]) -> Iterator[Figure]:
    rows = {(*row["shape"], row["dtype"]): row for row in record["rows"] if not has_probabilities(row)}
    for shape in ((8192, 32000), (8192, 128256)):
        share = rows.get((*shape, "bfloat16"), {}).get("ours / copy bandwidth")
        found = share and f"{share:.0%} of copy bandwidth"
        yield Figure(f"{name_of(shape)} bfloat16", found, f"{COPY_SHARE:.0%} of copy", share and share >= COPY_SHARE)
    for shape in ((4096, 1000), (128, 100)):
        for dtype in ("bfloat16", "float32"):
            ours = rows.get((*shape, dtype), {"contestants": {}})["contestants"].get("ours", {})
            taken = ours.get("us back to back")
            found = taken and f"{taken:.0f} us, {ours['launches']} launches"
            yield Figure(f"{name_of(shape)} {dtype}, eager", found, f"{MICROSECONDS:g} us", taken and taken <= MICROSECONDS)
    soft = {(*row["shape"], row["dtype"]): row["contestants"].get("ours", {}) for row in record["rows"] if has_probabilities(row)}
    for dtype in ("bfloat16", "float32"):
        ours = soft.get((4096, 1000, dtype), {})
        found = f"{ours['us back to back']:.0f} us, {ours['launches']} launches" if "launches" in ours else None
        yield Figure(f"4096x1000 {dtype}, soft", found, f"{LAUNCHES} launches", ours["launches"] <= LAUNCHES if found else None)


def has_probabilities(row: dict[str, Any]) -> bool:
    return row.get("target") == "probabilities"


def of_linear(record: dict[str, Any]) -> Iterator[Figure]:
    rows = {tuple(row["rows, width, classes"]): row for row in record["rows"]}
    for shape in ((8192, 4096, 128256), MILLION):
        row = rows.get(shape, {})
        times, bound = row.get("ours / three products"), row.get("bound / ours")
        found = times and f"{times:.2f} products, {bound:.0%} of bound"
        yield Figure(f"linear {name_of(shape)}", found, f"{PRODUCTS:g} products", times and times <= PRODUCTS)


def of_training(record: dict[str, Any]) -> Iterator[Figure]:
    rates = {(row["case"], row["graph"], row["at once"]): row["images/s"] for row in record["rows"] if "images/s" in row}
    alone = max((rate for (_, _, at_once), rate in rates.items() if at_once == 1), default=None)
    yield Figure("13-layer network, one run", alone and f"{alone:,.0f} images/s", f"{IMAGES:,.0f}/s", alone and alone >= IMAGES)
    most = max(rates, key=lambda key: rates[key], default=None)
    yield Figure("13-layer network, several", most and f"{rates[most]:,.0f} images/s, {most[2]} at once")


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def lines(found: list[Figure], width: int = 80) -> list[str]:
    """The figures as a table of at most ``width`` characters a line."""
    rows = [("what", "found", "goal", "")]
    rows += [(figure.what, figure.found or "not measured", figure.goal, word(figure)) for figure in found]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["  ".join(f"{cell:{size}}" for cell, size in zip(row, widths, strict=True)).rstrip()[:width] for row in rows]


def word(figure: Figure) -> str:
    return "" if figure.reached is None else "reached" if figure.reached else "MISSED"
