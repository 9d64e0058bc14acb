"""What a queue, a record and a table know of a run, whether it trains a network of ours or calls the user's function."""

from collections.abc import Hashable, Mapping
from typing import Any, Protocol

from .noise import UNTOLD, Noise
from .noise import text_of as noise_text


class Note(str):
    """What a run has just done, for its progress bar."""


class Planned(Protocol):
    """A run, whether it is done or not: its identity and what it asks of the machine."""

    @property
    def loss(self) -> str:
        """Names the row of the table."""

    @property
    def loss_label(self) -> str:
        """What the row is called: the loss with its settings."""

    @property
    def seed(self) -> int:
        """Runs of the same seed are pairs."""

    @property
    def noise(self) -> Noise:
        """The wrong labels of the training set."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of the loss, by name."""

    @property
    def validation_fraction(self) -> float:
        """The share of the training set on which the run measures itself; 0 for the test set."""

    @property
    def id(self) -> str:
        """The name of the run's folder."""

    @property
    def device(self) -> str: ...

    @property
    def epochs(self) -> int:
        """The steps of a progress bar."""

    @property
    def threads(self) -> int: ...

    @property
    def cost_key(self) -> Hashable:
        """Runs with the same key take the same time for the same :attr:`work`."""

    @property
    def work(self) -> float:
        """How much there is to do, in any unit that runs of the same :attr:`cost_key` share."""

    @property
    def pair_key(self) -> Hashable:
        """The same for runs that differ in their loss alone: they are compared as pairs."""

    def to_dict(self) -> dict[str, Any]: ...

    def __hash__(self) -> int: ...


def text_of(run: Planned) -> str:
    """The run in a line of text."""
    noise = f", label noise {noise_text(run.noise)}" if run.noise != UNTOLD else ""
    return f"{run.loss_label}{noise}, seed {run.seed}"
