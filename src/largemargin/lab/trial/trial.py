"""A run of a training function before it is done: a loss, a seed and settings."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..run.methods import LOSSES, Chosen
from ..run.noise import UNTOLD, Noise


@dataclass(frozen=True)
class Trial:
    """One call of the function. Runs of the same seed are pairs."""

    loss: str  # names the row of the table
    seed: int
    named: bool = False  # whether the user gave that name
    word: str = ""  # of METHODS; empty: a loss of the user's own
    of_loss: Mapping[str, Any] = field(default_factory=dict)  # the settings of the word
    given: Mapping[str, Any] = field(default_factory=dict)  # the settings of all runs
    validation_fraction: float = 0.0
    device: str = "cpu"
    threads: int = 1

    def __hash__(self) -> int:
        return hash(self.id)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def id(self) -> str:
        """The name of the run's folder: readable, and different for every different run."""
        what = self.to_dict() | {"device": self.device.partition(":")[0]}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        return f"{re.sub(r'[^A-Za-z0-9_.]+', '-', self.loss)[:60].strip('.-') or 'loss'}-seed{self.seed}-{digest}"

    @property
    def chosen(self) -> Chosen | None:
        """The word with its settings; None for a loss of the user's own."""
        return Chosen(loss=self.word, **{**LOSSES[self.word], **self.of_loss}) if self.word else None

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the loss."""
        return self.chosen.settings if self.chosen is not None else {}

    @property
    def loss_label(self) -> str:
        """What its row is called: the word with its settings, or the name that the user gave."""
        return self.loss if self.named or self.chosen is None else self.chosen.loss_label

    @property
    def noise(self) -> Noise:
        """The function brings its labels."""
        return UNTOLD

    @property
    def epochs(self) -> int:
        """Nobody knows how many epochs the function has."""
        return 1

    @property
    def work(self) -> float:
        """Each trial counts as one unit, because its length is not known before it ends."""
        return 1.0

    @property
    def cost_key(self) -> tuple[Any, ...]:
        """Trials with the same key take the same time, near enough."""
        return (bool(self.validation_fraction), self.device, self.threads)

    @property
    def pair_key(self) -> tuple[Any, ...]:
        """The same for runs that differ in their loss alone."""
        return (self.seed, self.validation_fraction)
