"""What a run is judged by: the name of a number, its unit, and which way is better."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .directions import lower_is_better, phrase_of


@dataclass(frozen=True)
class Metric:
    """A number that runs are compared by."""

    name: str
    header: str  # of a column
    text: str  # in a sentence
    unit: str  # after a difference: "0.21 points"
    percent: bool = False
    decimals: int = 2
    lower_is_better: bool = True

    def number(self, value: float) -> str:
        """A value, as a table has it."""
        return f"{value:.{self.decimals}f}"

    def value(self, value: float) -> str:
        """A value, as a sentence has it."""
        return self.number(value) + ("%" if self.percent else "")


ERROR = Metric("error", "test error %", "test error", "points", percent=True)
OF_LOGITS = {  # what the evaluation of logits gives beside the error
    "margin": Metric("margin", "margin", "margin", "nats", lower_is_better=False),
    "rho": Metric("rho", "rho-hat", "rho-hat", "nats"),
    "ece": Metric("ece", "ECE %", "ECE", "points", percent=True),
    "nll": Metric("nll", "NLL", "NLL", "nats", decimals=3),
}


def metric_of(name: str, values: Iterable[float], lower: bool | None = None) -> Metric:
    """A metric by its name, with the decimals that suit its values; ``lower`` is better, or None: what the name says."""
    lower = lower_is_better(name) if lower is None else lower
    header = f"{name}, {phrase_of(lower)}"
    return Metric(name, header, name, f"in {name}", decimals=decimals_of(values), lower_is_better=lower)


def decimals_of(values: Iterable[float]) -> int:
    """As many as leave four digits of the largest: ``12.34``, ``0.7123``."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return min(6, max(0, 3 - math.floor(math.log10(largest)))) if largest else 2
