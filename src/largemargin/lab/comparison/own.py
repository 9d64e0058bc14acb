"""A comparison of losses in a training function of the user's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import LabError
from ..metrics import ERROR, Metric, metric_of
from ..results import Record, TrialRecord
from ..run.methods import LOSSES
from ..run.noise import UNTOLD, Noise
from ..trial.losses import Given
from ..trial.trial import Trial
from .design import Design

DEFAULTS: dict[str, Any] = {"lam": (0.3,), "validation_fraction": 0.2, "threads": 1}


@dataclass(frozen=True)
class OwnComparison(Design[Trial]):
    """The function with every loss and every seed."""

    function: str  # its name
    losses: tuple[str, ...]
    words: Mapping[str, Mapping[str, Any]]  # of each loss: word, settings, named
    lam: tuple[float, ...] = DEFAULTS["lam"]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    max_seeds: int | None = None
    validation_fraction: float = DEFAULTS["validation_fraction"]
    settings: Mapping[str, Any] = field(default_factory=dict)  # of all runs
    judged_by: str = ""  # the number that runs are compared by; empty: the first
    lower_is_better: bool | None = None  # None: what the name of that number says
    device: str = "cpu"
    threads: int = DEFAULTS["threads"]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OwnComparison":
        """What ``vars`` gave, after a passage through JSON."""
        plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**plain)

    @staticmethod
    def words_of(losses: Sequence[Given]) -> dict[str, dict[str, Any]]:
        return {one.name: {"word": one.word, "settings": dict(one.settings), "named": one.named} for one in losses}

    @property
    def label_noise(self) -> tuple[Noise, ...]:  # type: ignore[override]
        return (UNTOLD,)

    def has_lam(self, loss: str) -> bool:
        """Whether lam is a setting of this loss, and was not given with it."""
        word = self.words[loss]["word"]
        return bool(word) and "lam" in LOSSES[word] and "lam" not in self.words[loss]["settings"]

    def planned(self, loss: str, seed: int, noise: Noise, *, lam: float, **more: Any) -> Trial:
        given = self.words[loss]
        of_loss = {**given["settings"], **({"lam": lam} if self.has_lam(loss) else {})}
        shared: dict[str, Any] = {"given": self.settings, "device": self.device, "threads": self.threads, **more}
        return Trial(loss, seed, given["named"], given["word"], of_loss, **shared)

    def metric(self, records: Sequence[Record]) -> Metric:
        """The number by which it is judged; the error in percent where ``run.score`` gave it."""
        if not records:
            return ERROR
        name = self.judged_by or next(iter(records[0].scores))
        lacking = next((record for record in records if name not in record.scores), None)
        if lacking is not None:
            raise LabError(
                f"{self.function} returned no {name} in the run {lacking.recipe.id}, but {', '.join(lacking.scores)}; all runs must return "
                "the number that they are compared by"
            )
        if name == "error" and self.lower_is_better is not False and all(map(_is_scored, records)):
            return ERROR
        return metric_of(name, [record.scores[name] for record in records], self.lower_is_better)

    @property
    def title(self) -> str:
        return f"Losses compared in {self.function}"

    @property
    def subject(self) -> str:
        return self.function

    def told(self) -> dict[str, Any]:
        return {"own": vars(self)}

    def command(self) -> str:
        """The call: what differs from the defaults."""
        words = [self.function, f"losses={list(self.losses)!r}", 'seeds="auto"' if self.max_seeds else f"seeds={list(self.seeds)}"]
        for name in ("lam", "validation_fraction", "settings", "threads"):
            value, default = getattr(self, name), DEFAULTS.get(name)
            words += [f"{name}={list(value) if isinstance(value, tuple) else value}"] if value and value != default else []
        return f"lab.compare({', '.join(words)})"

    @property
    def choice_note(self) -> str:
        return (
            f"lam was chosen by the scores on held-out data ({100 * self.validation_fraction:g}% of the training set, which "
            f"{self.function} left out of the training of these runs), mean ± std (n-1) over seeds. The runs with the chosen lam train on "
            "all of it."
        )


def _is_scored(record: Record) -> bool:
    """Whether the error is that of ``run.score``."""
    return isinstance(record, TrialRecord) and record.measured is not None and record.measured.error == record.scores["error"]
