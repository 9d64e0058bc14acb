"""The choice among several lambdas, by runs that never see the test set."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..metrics import ERROR, Metric
from ..results import Record, kept
from ..run.noise import UNTOLD, Noise, order_of, text_of
from ..stats import spread
from .design import Design


@dataclass(frozen=True)
class Choice:
    """What the validating runs of a loss at a share of label noise said of each lam."""

    loss: str
    label_noise: Noise
    errors: dict[float, list[float]]  # lam: the metric on held-out data, of the seeds that did not diverge
    diverged: dict[float, int]  # lam: how many seeds did
    metric: Metric = ERROR

    def _rank(self, lam: float) -> tuple[int, float]:
        """The smallest is the best: seeds that diverged count before errors."""
        if not self.errors[lam]:
            return self.diverged[lam], math.inf
        sign = 1 if self.metric.lower_is_better else -1
        return self.diverged[lam], round(sign * statistics.fmean(self.errors[lam]), 9)

    @property
    def lam(self) -> float:
        """The one of fewest diverged seeds and best mean; of equals the smallest."""
        return min(self.errors, key=lambda lam: (*self._rank(lam), lam))

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` prints of it."""
        names = ("loss", "label_noise", "errors", "diverged", "lam")
        return {name: getattr(self, name) for name in names}

    @property
    def ties(self) -> list[float]:
        """The other values of lam that were as good as the chosen one."""
        return [lam for lam in sorted(self.errors) if lam != self.lam and self._rank(lam) == self._rank(self.lam)]


def choose(records: Sequence[Record], metric: Metric = ERROR) -> list[Choice]:
    """The choices that validating runs make, in the order in which losses and noise first come."""
    groups: dict[tuple[str, Noise], dict[float, list[Record]]] = {}
    for record in records:
        group = groups.setdefault((record.recipe.loss, record.recipe.noise), {})
        group.setdefault(record.recipe.settings["lam"], []).append(record)
    choices = []
    for (loss, noise), by_lam in sorted(groups.items(), key=lambda item: order_of(item[0][1])):
        errors = {lam: [record.scores[metric.name] for record in kept(group)] for lam, group in by_lam.items()}
        choices.append(Choice(loss, noise, errors, {lam: len(group) - len(errors[lam]) for lam, group in by_lam.items()}, metric))
    return choices


def chosen_of(choices: Sequence[Choice]) -> dict[tuple[str, Noise], float]:
    return {(choice.loss, choice.label_noise): choice.lam for choice in choices}


def choice_columns(choices: Sequence[Choice]) -> tuple[str, ...]:
    metric = choices[0].metric if choices else ERROR
    what = "validation error %" if metric == ERROR else f"{metric.header}, held out"
    return _told(choices, ("loss", "label noise", "lam", what, ""))


def _told(choices: Sequence[Choice], line: tuple[str, ...]) -> tuple[str, ...]:
    """A line of the table of choices, without the label noise where the lab knows of none."""
    return line if any(choice.label_noise != UNTOLD for choice in choices) else (line[0], *line[2:])


def ties(choices: Sequence[Choice]) -> list[str]:
    """A sentence for each choice that could as well have been another."""
    sentences = []
    for choice in choices:
        if choice.ties:
            *first, last = [f"{lam:g}" for lam in sorted([choice.lam, *choice.ties])]
            noise = f" at label noise {text_of(choice.label_noise)}" if choice.label_noise else ""
            name = choice.loss.replace("_", " ")
            what = "the validation error" if choice.metric == ERROR else f"{choice.metric.name} on held-out data"
            sentences.append(
                f"lam {', '.join(first)} and {last} are equally good for {name}{noise}: the smallest was taken, and {what} does not say "
                "that it is the best."
            )
    return sentences


def choice_cells(choices: Sequence[Choice]) -> list[tuple[str, ...]]:
    """The lines of the table of choices as text, under :func:`choice_columns`."""
    lines: list[tuple[str, ...]] = []
    for choice in choices:
        for lam, errors in choice.errors.items():
            std, decimals = statistics.stdev(errors) if len(errors) > 1 else None, choice.metric.decimals
            error = spread(statistics.fmean(errors), std, decimals) if errors else "diverged"
            if errors and choice.diverged[lam]:
                error += f" ({choice.diverged[lam]} diverged)"
            name = choice.loss.replace("_", " ")
            mark = "chosen" if lam == choice.lam else "as good" if lam in choice.ties else ""
            lines.append(_told(choices, (name, text_of(choice.label_noise), f"{lam:g}", error, mark)))
    return lines


def print_choices(comparison: Design[Any], choices: Sequence[Choice], console: Console) -> None:
    """What was chosen, and by what."""
    if not choices:
        return
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in choice_columns(choices):
        result.add_column(column, justify="left" if column in ("loss", "") else "right", no_wrap=True)
    for line in choice_cells(choices):
        result.add_row(*line)
    console.print("\nthe choice of lam", style="bold", highlight=False)
    console.print(result)
    for sentence in ties(choices):
        console.print(sentence, markup=False, highlight=False)
    console.print(comparison.choice_note, style="dim")
