"""The verdicts on scores: a line for each method, metric and data set, and over several data sets one overall verdict."""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .. import stats
from ..directions import lower_is_better, phrase_of, room
from ..errors import LabError
from ..stats import Verdict, paired
from ..verdicts import Judged, number
from ..words import counted, listed
from .runs import Scores

MOST_DECIMALS = 6
REFERENCES = (
    "Over several data sets a verdict is Wilcoxon's signed-rank test of the mean differences of the data sets. J. Demšar (Statistical "
    "comparisons of classifiers over multiple data sets, JMLR 7, 2006) recommends it: it assumes no normal distribution, and it compares "
    "scores within a data set alone. Each method is tested against the baseline, with Holm's correction: tests by mean ranks would depend "
    "on which other methods are in the table (A. Benavoli, G. Corani and F. Mangili, JMLR 17, 2016)."
)


@dataclass(frozen=True)
class Line:
    """A method on a data set by a metric, over its seeds. ``std`` is over seeds, with n - 1."""

    data_set: str
    method: str
    metric: str
    n: int
    mean: float
    std: float
    decimals: int
    judged: Judged | None  # None for the baseline

    @property
    def verdict(self) -> Verdict | None:
        return None if self.judged is None else self.judged.verdict


@dataclass(frozen=True)
class Overall:
    """A method beside the baseline over several data sets."""

    method: str
    baseline: str
    metric: str
    lower_is_better: bool
    differences: Mapping[str, float]  # of the means over seeds, by data set
    p: float
    adjusted_p: float
    num_verdicts: int  # overall verdicts, which Holm's correction holds
    decimals: int = 2

    @property
    def verdict(self) -> Verdict:
        """By the sign of the rank sum, which the test is of."""
        return stats.verdict(float(stats.signed_ranks(list(self.differences.values())).sum()), self.adjusted_p, self.lower_is_better)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Data sets on which its mean is better than the baseline's, worse and equal."""
        gains = [-d if self.lower_is_better else d for d in self.differences.values()]
        return sum(d > 0 for d in gains), sum(d < 0 for d in gains), sum(d == 0 for d in gains)

    @property
    def median(self) -> float:
        return statistics.median(self.differences.values())

    @property
    def data_sets_needed(self) -> int:
        """The fewest by which the test can show a difference: 6 for one verdict."""
        return next(n for n in itertools.count(2) if self.num_verdicts * stats.smallest_sign_flip_p(n) < stats.LEVEL)

    def sentences(self) -> list[str]:
        """What the verdict rests on."""
        n, (better, worse, equal) = len(self.differences), self.counts
        ties = f", equal on {equal}" if equal else ""
        test = f"Wilcoxon signed-rank test over {n} data sets, exact: p = {number(self.p)}"
        if self.num_verdicts > 1:
            test += f"; Holm-adjusted over the {self.num_verdicts} overall verdicts: p = {number(self.adjusted_p)}"
        found = [
            f"Its mean is better on {better} of {n} data sets, worse on {worse}{ties}; the median difference is "
            f"{self.median:+.{self.decimals}f} in {self.metric}.",
            f"{test}.",
        ]
        if n < self.data_sets_needed:
            again = " after the correction" if self.num_verdicts > 1 else ""
            smallest = number(min(1.0, self.num_verdicts * stats.smallest_sign_flip_p(n)))
            found.append(
                f"{n} data sets allow no p below {smallest}{again}, so this test cannot show a difference; from {self.data_sets_needed} "
                "data sets on it can. The verdicts on each data set stand by themselves."
            )
        return found


def judge(scores: Scores, lower: Sequence[str] = (), higher: Sequence[str] = ()) -> list[Line]:
    """The lines of all tables; Holm's correction runs over all their verdicts."""
    _check_directions(scores.metrics, lower, higher)
    keys = [(metric, data_set, method) for metric in scores.metrics for data_set in scores.data_sets for method in scores.others]
    pairs = {key: _paired(scores, *key) for key in keys}
    adjusted = dict(zip(keys, stats.adjusted([pair.p for pair in pairs.values()]), strict=True))
    lines = []
    for metric in scores.metrics:
        decimals = _decimals([pair.std for key, pair in pairs.items() if key[0] == metric])
        is_lower = lower_is_better(metric, lower, higher)
        for data_set in scores.data_sets:
            for method in (scores.baseline, *scores.others):
                key, judged = (metric, data_set, method), None
                if key in pairs:
                    judged = Judged(
                        *(method, scores.baseline, pairs[key], adjusted[key]),
                        num_verdicts=len(keys),
                        lower_is_better=is_lower,
                        unit=f"in {metric}",
                        decimals=decimals,
                        room=room(metric, statistics.fmean(scores.values(scores.baseline, metric, data_set)), is_lower),
                        no_samples=scores.no_samples,
                    )
                values = scores.values(method, metric, data_set)
                mean, std = statistics.fmean(values), statistics.stdev(values)
                lines.append(Line(data_set, method, metric, len(values), mean, std, decimals, judged))
    return lines


def overall(lines: Sequence[Line]) -> list[Overall]:
    """The verdicts over data sets, for each metric and method; none with one data set. Holm's correction runs over them."""
    groups: dict[tuple[str, str], list[Judged]] = {}
    names: dict[tuple[str, str], list[str]] = {}
    decimals = {line.metric: line.decimals for line in lines}
    for line in lines:
        if line.judged is not None:
            groups.setdefault((line.metric, line.method), []).append(line.judged)
            names.setdefault((line.metric, line.method), []).append(line.data_set)
    groups = {key: group for key, group in groups.items() if len(group) > 1}
    p_values = [stats.wilcoxon_p([judged.paired.mean for judged in group]) for group in groups.values()]
    return [
        Overall(
            *(method, group[0].baseline, metric, group[0].lower_is_better),
            differences=dict(zip(names[metric, method], (judged.paired.mean for judged in group), strict=True)),
            p=p,
            adjusted_p=adjusted,
            num_verdicts=len(groups),
            decimals=decimals[metric],
        )
        for ((metric, method), group), p, adjusted in zip(groups.items(), p_values, stats.adjusted(p_values), strict=True)
    ]


def advice(lines: Sequence[Line], overalls: Sequence[Overall]) -> list[str]:
    """A sentence for each metric; with several data sets it is on the overall verdicts."""
    sentences = []
    for metric in dict.fromkeys(line.metric for line in lines):
        judged: list[Judged | Overall] = [found for found in overalls if found.metric == metric]
        judged = judged or [line.judged for line in lines if line.metric == metric and line.judged is not None]
        first = judged[0]
        by_word = {word: [_with_difference(one) for one in judged if one.verdict == word] for word in ("better", "worse", "inconclusive")}
        said = [
            f"{listed(methods)} {'is' if len(methods) == 1 else 'are'} {word} than {first.baseline}"
            for word, methods in by_word.items()
            if methods and word != "inconclusive"
        ]
        if by_word["inconclusive"]:
            said.append(f"no difference from {first.baseline} is shown for {listed(by_word['inconclusive'])}")
        over = "over all data sets, " if isinstance(first, Overall) else ""
        sentences.append(f"By {metric} ({phrase_of(first.lower_is_better)}), {over}{'; '.join(said)}.")
    return sentences


def _with_difference(found: Judged | Overall) -> str:
    difference = found.paired.mean if isinstance(found, Judged) else found.median
    return f"{found.method} ({difference:+.{found.decimals}f})"


def _paired(scores: Scores, metric: str, data_set: str, method: str) -> stats.Paired:
    ours, theirs = (scores.values(name, metric, data_set) for name in (method, scores.baseline))
    wrong, of_baseline = (scores.wrong(name, data_set) for name in (method, scores.baseline))
    # what is wrong of single samples is in percent, as the metric of predictions
    of_samples = None if wrong is None or of_baseline is None else 100 * (wrong.astype(float) - of_baseline.astype(float))
    found = paired([a - b for a, b in zip(ours, theirs, strict=True)], of_samples)
    assert found is not None  # there are at least two seeds
    return found


def _decimals(spreads: Sequence[float]) -> int:
    """Enough for two digits of the smallest spread, at least 2."""
    smallest = min((std for std in spreads if std > stats.NO_SPREAD), default=1.0)
    return min(MOST_DECIMALS, max(2, 1 - math.floor(math.log10(smallest))))


def _check_directions(metrics: Sequence[str], lower: Sequence[str], higher: Sequence[str]) -> None:
    for option, names in (("--lower-is-better", lower), ("--higher-is-better", higher)):
        for name in names:
            if name not in metrics:
                raise LabError(f"{option} {name} is not one of the metrics, {', '.join(metrics)}; name one of these")
    if both := sorted(set(lower) & set(higher)):
        raise LabError(f"--lower-is-better and --higher-is-better both name {both[0]}; leave one out")


def family(lines: Sequence[Line], overalls: Sequence[Overall]) -> str:
    """Which verdicts the correction holds together."""
    verdicts = counted(sum(line.judged is not None for line in lines), "verdict")
    if not overalls:
        return f"Holm's correction holds the error of {verdicts} at 5%."
    return (
        f"Holm's correction holds the error of the {verdicts} on single data sets at 5%, and by itself that of the "
        f"{counted(len(overalls), 'overall verdict')}."
    )
