"""Verdicts on methods against a baseline, and the sentences that say what each rests on. It knows methods by name alone."""

from collections.abc import Sequence
from dataclasses import dataclass

from . import stats
from .stats import Interval, Paired, Verdict
from .words import counted

MANY_PAIRS = 1000  # more seeds than anybody runs


@dataclass(frozen=True)
class Judged:
    """A method beside its baseline, with p adjusted for all verdicts of the report."""

    method: str
    baseline: str
    paired: Paired
    adjusted_p: float
    num_verdicts: int = 1  # in the family that Holm's correction holds
    looks: int = 1  # at growing data
    diverged: int = 0  # runs of the method
    lower_is_better: bool = True
    unit: str = "points"  # after a number: "0.21 points"
    decimals: int = 2
    room: float | None = None  # the most that a method can be better than the baseline; None: not known
    no_samples: str = "the predictions of the runs are not there, or are not of the same samples."  # why there is no interval over samples

    @property
    def verdict(self) -> Verdict:
        """A method with a diverged run is never better."""
        found = stats.verdict(self.paired.mean, self.adjusted_p, self.lower_is_better)
        return "inconclusive" if self.diverged and found == "better" else found

    @property
    def detectable(self) -> float | None:
        """The true difference that is detected 8 times in 10, before any correction; None without spread."""
        return self.paired.detectable

    @property
    def can_detect_a_gain(self) -> bool:
        """Whether that difference is one by which a method can be better."""
        return self.detectable is not None and (self.room is None or self.detectable <= self.room)

    @property
    def is_corrected(self) -> bool:
        """Whether its p is adjusted."""
        return self.num_verdicts > 1 or self.looks > 1

    @property
    def is_undone_by_correction(self) -> bool:
        """Whether the interval over seeds excludes 0, and the correction for several verdicts makes it inconclusive."""
        interval = self.paired.over_seeds
        return interval is not None and interval.excludes_zero and not self.adjusted_p < stats.LEVEL

    @property
    def text(self) -> str:
        """The mean difference with its interval over seeds."""
        interval = self.paired.over_seeds
        return f"{self._signed(self.paired.mean)} " + ("(no spread)" if interval is None else self._text(interval))

    def sentences(self) -> list[str]:
        """What the verdict rests on: intervals, tests, power."""
        parts = [self._over_seeds(), self._over_seeds_and_samples(), self._bootstrap(), self._tests(), self._power()]
        return [sentence for sentence in parts if sentence]

    def _over_seeds(self) -> str:
        p = self.paired
        if p.over_seeds is None:
            return (
                f"All {p.n} pairs differ by the same amount, {self._signed(p.mean)} {self.unit}: without spread there is no interval over "
                "seeds, and the exact sign-flip test decides alone."
            )
        return (
            f"Over {p.n} seeds: {self._signed(p.mean)} {self.unit}, 95% interval {self._text(p.over_seeds)} (Student's t, unadjusted). "
            "It covers the choice of seeds, with these test samples."
        )

    def _over_seeds_and_samples(self) -> str:
        interval = self.paired.over_seeds_and_samples
        if interval is None:
            return "Over seeds and test samples: neither interval nor bootstrap, because " + self._why_no_samples()
        return (
            f"Over seeds and test samples: 95% interval {self._text(interval)} (two-way random effects with Satterthwaite's degrees of "
            "freedom, unadjusted). It covers the choice of both."
        )

    def _bootstrap(self) -> str:
        interval, n = self.paired.bootstrap, self.paired.n
        if interval is None and self.paired.over_seeds_and_samples is None:
            return ""  # the sentence before has said why
        if interval is None:
            return "Bootstrap over seeds and test samples: none, because " + self._why_no_samples()
        closest = min(stats.BOOTSTRAP_COVERAGE, key=lambda seeds: abs(seeds - n))
        return (
            f"Bootstrap over seeds and test samples: {self._text(interval)} (BCa). No verdict rests on it: in a simulation with {closest} "
            f"seeds such a 95% interval held the truth {100 * stats.BOOTSTRAP_COVERAGE[closest]:.0f} times in 100."
        )

    def _why_no_samples(self) -> str:
        if not self.paired.has_spread:
            return "the pairs have no spread."
        return self.no_samples

    def _tests(self) -> str:
        p = self.paired
        test = f"Paired t test over seeds: p = {number(p.p)}" if p.has_spread else f"Exact sign-flip test: p = {number(p.p)}"
        if self.num_verdicts > 1:
            test += f"; Holm-adjusted over the {self.num_verdicts} verdicts of this report"
        else:
            test += "; with one verdict Holm's correction changes nothing"
        if self.looks > 1:
            test += f", times the {self.looks} planned looks"
        if self.is_corrected:
            test += f": p = {number(self.adjusted_p)}"
        smallest = number(stats.smallest_sign_flip_p(p.n))
        flip = f"Exact sign-flip p = {number(p.sign_flip_p)}; {counted(p.n, 'pair')} allow no p below {smallest}."
        undone = " The interval excludes 0, and the correction for several verdicts makes this inconclusive."
        return f"{test}. {flip}" + (undone if self.is_undone_by_correction else "")

    def _signed(self, value: float) -> str:
        return f"{value:+.{self.decimals}f}"

    def _text(self, interval: Interval) -> str:
        return f"[{self._signed(interval.low)}, {self._signed(interval.high)}]"

    def _power(self) -> str:
        p = self.paired
        if not p.has_spread:
            return "Effect size and power cannot be computed, because the pairs have no spread."
        corrected = " before the correction" if self.is_corrected else ""
        power = f"With {p.n} seeds a true difference of {p.detectable:.2g} {self.unit} would be detected 8 times in 10{corrected}"
        if not self.can_detect_a_gain:
            power = (
                f"With {p.n} seeds no possible gain would be detected 8 times in 10{corrected}: it would have to be {p.detectable:.2g} "
                f"{self.unit}, and {self.baseline} leaves {self.room:.2g}"
            )
        seen = abs(p.mean)
        needed = p.pairs_needed(seen) if seen > stats.NO_SPREAD else None
        if needed is None or needed > MANY_PAIRS:
            rest = f"; detecting the difference seen takes more than {MANY_PAIRS:,} seeds."
        else:
            rest = f"; detecting {seen:.2g} takes {counted(needed, 'seed')}."
        return f"Effect size d_z = {p.d_z:.2f}. {power}{rest}"


def judge(
    compared: Sequence[tuple[str, str, Paired, int]], looks: int = 1, lower_is_better: bool = True, unit: str = "points"
) -> list[Judged]:
    """The verdicts of a report, from (method, baseline, pairs, diverged runs) of each: Holm's correction runs over all of them."""
    adjusted = stats.adjusted([paired.p for _, _, paired, _ in compared], looks)
    return [
        Judged(method, baseline, paired, p, len(compared), looks, diverged, lower_is_better, unit)
        for (method, baseline, paired, diverged), p in zip(compared, adjusted, strict=True)
    ]


def number(p: float) -> str:
    """A p value with three digits that count."""
    return "1" if p >= 0.995 else f"{p:.3g}" if p >= 1e-4 else "< 0.0001"
