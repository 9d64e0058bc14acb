"""What is left to do: what fails is tried once more, and what another process does is asked for again."""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from ..run.planned import Planned
from .attempt import Outcome
from .budget import Budget

ATTEMPTS = 2
HELD_SECONDS = 2.0  # between two looks at a run that another process does


class Plan:
    """What is left to do. A run that fails goes to the end of the line, once; one that another process does is asked for again.

    With a ``budget`` only the runs that it allows are given out.
    """

    def __init__(
        self, recipes: Sequence[Planned], on_message: Callable[[str], object] = lambda _: None, budget: Budget | None = None
    ) -> None:
        self._waiting = deque(recipes)
        self._held: deque[tuple[float, Planned]] = deque()
        self._running: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._on_message = on_message
        self._held_before = False
        self._budget = budget
        self._said: set[str] = set()
        self.reasons: dict[str, str] = {}  # of the last failure of each run
        self.refused: set[str] = set()  # runs for which the user must mend something

    @property
    def unfinished(self) -> bool:
        waits = bool(self._held) and (self._budget is None or self._budget.left > 0)  # for another process
        return waits or bool(self._running) or self._next() is not None

    def take(self) -> Planned | None:
        """The next run, or None where there is none now."""
        if self._held and self._held[0][0] <= time.monotonic() and (self._budget is not None or not self._waiting):
            self._waiting.append(self._held.popleft()[1])
        recipe = self._next()
        if recipe is None:
            return None
        self._waiting.remove(recipe)
        self._running.add(recipe.id)
        if self._budget is not None:
            self._budget.started(recipe)
        return recipe

    def _next(self) -> Planned | None:
        if self._budget is None:
            return self._waiting[0] if self._waiting else None
        return self._budget.choose(self._waiting)

    def epoch(self, recipe: Planned, epoch: int) -> None:
        """Hear that a run has done an epoch."""
        if self._budget is not None:
            self._budget.epoch(recipe, epoch)

    def say(self, recipe: Planned, line: str) -> None:
        """Pass on what a run has to say, once for all runs of its loss."""
        if (line := f"{recipe.loss}: {line}") not in self._said:
            self._said.add(line)
            self._on_message(line)

    def ended(self, recipe: Planned, outcome: Outcome) -> None:
        """Hear how an attempt at a run that was taken ended."""
        self._running.remove(recipe.id)
        if self._budget is not None:
            self._budget.ended(recipe, outcome.kind == "done")
        if outcome.kind == "held":
            self._held.append((time.monotonic() + HELD_SECONDS, recipe))
            if not self._held_before:
                self._held_before = True
                self._on_message(f"{recipe.id} is being done by another process; it is waited for, and any other such run")
        elif outcome.kind != "done":
            self.reasons[recipe.id] = outcome.reason
            self._failures[recipe.id] += 1
            if outcome.kind == "refused":
                self.refused.add(recipe.id)
            if outcome.kind == "failed" and self._failures[recipe.id] < ATTEMPTS:  # an error of the user's is no better the second time
                self._waiting.append(recipe)
