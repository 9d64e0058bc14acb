"""What numbers over seeds say: means, spreads, and paired differences with their intervals. Numbers in, numbers out."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .stopping import interrupts_end_at_once


@dataclass(frozen=True)
class Difference:
    """The paired difference of test errors to the baseline, loss minus baseline, in percentage points."""

    mean: float
    low: float  # the ends of the 95% Student-t interval over seeds
    high: float

    @property
    def text(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"

    @property
    def verdict(self) -> str:
        if self.high - self.low < 1e-9:  # every pair differs by the same few samples: there is no spread to judge by
            return "inconclusive"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "inconclusive"


def paired_difference(errors: dict[int, float], baseline: dict[int, float], confidence: float = 0.95) -> Difference | None:
    """The mean of ``errors - baseline`` over the seeds that both have, with its Student-t interval; None for fewer than two pairs."""
    differences = [errors[seed] - baseline[seed] for seed in errors.keys() & baseline.keys()]
    if len(differences) < 2:
        return None
    with interrupts_end_at_once():
        from scipy import stats

    mean = statistics.fmean(differences)
    half = stats.t.ppf((1 + confidence) / 2, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return Difference(mean, float(mean - half), float(mean + half))


def verdict_of(verdict: str, diverged: int) -> str:
    """The verdict on a loss of which so many runs diverged: the seeds that are left do not make it better."""
    return "inconclusive" if diverged and verdict == "better" else verdict


def mean_or_nan(values: Sequence[float]) -> float:
    """The mean; NaN of none."""
    return statistics.fmean(values) if values else float("nan")


def moments(values: Iterable[float]) -> tuple[float, float | None]:
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def spread(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}")
