"""The records of runs as they are read back from ``result.json``: what has another form is refused before it is counted with."""

from collections.abc import Iterable, Mapping
from typing import Any

MEASURED = ("error", "nll", "ece", "margin", "rho", "margin_histogram")  # what a report needs of a split
OF_A_REPORT = ("num_train", "num_test", "classes", "seconds", "rho_of_batches", "epochs", "environment")


def check(record: Any) -> None:
    """Raises ValueError, and says what is wrong, for a record that no run has written."""
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    for split in ("test", "validation"):
        values = record.get(split)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{split} is {values!r}, not an object")
        _check_numbers(split, ((name, value) for name, value in values.items() if name != "margin_histogram"))
        _check_numbers(f"{split}.margin_histogram", enumerate(_list(f"{split}.margin_histogram", values.get("margin_histogram", []))))
    for i, row in enumerate(_list("epochs", record.get("epochs", []))):
        if not isinstance(row, dict):
            raise ValueError(f"epochs[{i}] is {row!r}, not an object")
        _check_numbers(f"epochs[{i}]", row.items())
    _check_numbers("the record", ((name, record[name]) for name in ("seconds", "images_per_second", "num_train") if name in record))
    _list("classes", record.get("classes", []))
    for name in ("recipe", "environment"):
        if not isinstance(record.get(name), dict):
            raise ValueError(f"{name} is {record.get(name)!r}, not an object")


def check_complete(record: Mapping[str, Any]) -> None:
    """Raises ValueError for a record that lacks what a report needs."""
    split = next((name for name in ("test", "validation") if record.get(name)), "test")
    missing = [name for name in OF_A_REPORT if name not in record]
    missing += [f"{split}.{name}" for name in MEASURED if name not in (record.get(split) or {})]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")


def _check_numbers(where: str, values: Iterable[tuple[Any, Any]]) -> None:
    for name, value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{where}: {name} is {value!r}, not a number")


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is {value!r}, not a list")
    return value
