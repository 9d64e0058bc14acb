"""The choice among several lambdas, by runs that never see the test set."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from ..results import RunRecord, kept
from ..run.noise import Noise, order_of, text_of
from ..stats import spread
from .plan import Comparison


@dataclass(frozen=True)
class Choice:
    """What the validating runs of a loss at a share of label noise said of each lam."""

    loss: str
    label_noise: Noise
    errors: dict[float, list[float]]  # lam: the validation errors of the seeds that did not diverge
    diverged: dict[float, int]  # lam: how many seeds did

    def _rank(self, lam: float) -> tuple[int, float]:
        """The smallest is the best: seeds that diverged count before errors."""
        return self.diverged[lam], round(statistics.fmean(self.errors[lam]), 9) if self.errors[lam] else 100.0

    @property
    def lam(self) -> float:
        """The one of fewest diverged seeds and least mean error; of equals the smallest."""
        return min(self.errors, key=lambda lam: (*self._rank(lam), lam))

    @property
    def ties(self) -> list[float]:
        """The other values of lam that were as good as the chosen one."""
        return [lam for lam in sorted(self.errors) if lam != self.lam and self._rank(lam) == self._rank(self.lam)]


def choose(records: Sequence[RunRecord]) -> list[Choice]:
    """The choices that validating runs make, in the order in which losses and noise first come."""
    groups: dict[tuple[str, Noise], dict[float, list[RunRecord]]] = {}
    for record in records:
        group = groups.setdefault((record.recipe.loss, record.recipe.noise), {})
        group.setdefault(record.recipe.settings["lam"], []).append(record)
    choices = []
    for (loss, noise), by_lam in sorted(groups.items(), key=lambda item: order_of(item[0][1])):
        errors = {lam: [record.measured.error for record in kept(group)] for lam, group in by_lam.items()}
        choices.append(Choice(loss, noise, errors, {lam: len(group) - len(errors[lam]) for lam, group in by_lam.items()}))
    return choices


def chosen_of(choices: Sequence[Choice]) -> dict[tuple[str, Noise], float]:
    return {(choice.loss, choice.label_noise): choice.lam for choice in choices}


CHOICE_COLUMNS = ("loss", "label noise", "lam", "validation error %", "")


def choice_note(comparison: Comparison) -> str:
    return (
        f"lam was chosen by the error on a part of the training set ({100 * comparison.validation_fraction:g}%, held out from these runs), "
        "mean ± std (n-1) over seeds; its labels are as noisy as the others. The test set had no part in it: it is measured once, after "
        "the last epoch of the runs with the chosen lam, which train on the whole training set."
    )


def ties(choices: Sequence[Choice]) -> list[str]:
    """A sentence for each choice that could as well have been another."""
    sentences = []
    for choice in choices:
        if choice.ties:
            *first, last = [f"{lam:g}" for lam in sorted([choice.lam, *choice.ties])]
            noise = f" at label noise {text_of(choice.label_noise)}" if choice.label_noise else ""
            name = choice.loss.replace("_", " ")
            sentences.append(
                f"lam {', '.join(first)} and {last} are equally good for {name}{noise}: the smallest was taken, and the validation error "
                "does not say that it is the best."
            )
    return sentences


def choice_cells(choices: Sequence[Choice]) -> list[tuple[str, ...]]:
    """The lines of the table of choices as text, under CHOICE_COLUMNS."""
    lines: list[tuple[str, ...]] = []
    for choice in choices:
        for lam, errors in choice.errors.items():
            error = spread(statistics.fmean(errors), statistics.stdev(errors) if len(errors) > 1 else None) if errors else "diverged"
            if errors and choice.diverged[lam]:
                error += f" ({choice.diverged[lam]} diverged)"
            name = choice.loss.replace("_", " ")
            mark = "chosen" if lam == choice.lam else "as good" if lam in choice.ties else ""
            lines.append((name, f"{text_of(choice.label_noise)}", f"{lam:g}", error, mark))
    return lines


def print_choices(comparison: Comparison, choices: Sequence[Choice], console: Console) -> None:
    """What was chosen, and by what."""
    if not choices:
        return
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(CHOICE_COLUMNS):
        result.add_column(column, justify="left" if i in (0, 4) else "right", no_wrap=True)
    for line in choice_cells(choices):
        result.add_row(*line)
    console.print("\nthe choice of lam", style="bold", highlight=False)
    console.print(result)
    for sentence in ties(choices):
        console.print(sentence, markup=False, highlight=False)
    console.print(choice_note(comparison), style="dim")
