"""What a training function is given: its loss, its seed, the samples that it holds out, and a place for what it found."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LabError
from ..predictions import Predictions
from ..run.evaluate import SCORES, Evaluation, evaluate
from ..run.seeds import seeded
from .loss import loss_of
from .trial import Trial

SAY_SECONDS = 0.5  # between two lines of progress


class Run:
    """One run of a training function: ``train(run)``.

    ``seed``, ``lam`` (None for a loss without), ``device``, ``settings`` (of ``lab.compare``) and ``folder`` (for files of your own, say
    checkpoints) are plain attributes; ``name`` is that of the loss. Set ``class_counts`` (C,) to the class sizes of the training set, which
    ``logit_adjusted`` and ``ldam`` need.
    """

    def __init__(
        self, trial: Trial, make_loss: Callable[[], Any] | None, folder: Path, say: Callable[[str], object] = lambda _: None
    ) -> None:
        self.seed, self.name, self.device = trial.seed, trial.loss, torch.device(trial.device)
        self.lam: float | None = trial.settings.get("lam")
        self.settings: Mapping[str, Any] = dict(trial.given)
        self.folder = folder
        self.logged: list[dict[str, Any]] = []
        self.asked_to_hold_out = False
        self.class_counts: Tensor | None = None
        self.predictions: Predictions | None = None
        self.measured: Evaluation | None = None
        self._trial, self._say, self._said = trial, say, 0.0
        self._states: dict[str, Tensor] = {}
        with self._random("loss"):
            self._loss = loss_of(trial, make_loss)

    def seed_everything(self) -> None:
        """Seed the random numbers of Python, numpy and torch: all losses of a seed begin with the same weights and the same order."""
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    def loss(self, logits: Tensor, target: Tensor, *, features: Tensor | None = None, head: nn.Module | None = None) -> Tensor:
        """The loss of a batch; ``features`` and ``head`` where the loss has a classifier of its own, or reads features or weights."""
        with self._random("loss"):
            return self._loss(logits, target, features, head, self.class_counts)

    def head(self, in_features: int, num_classes: int, num_steps: int | None = None) -> nn.Module:
        """The classifier of the loss, on the run's device: an ``nn.Linear`` for most.

        Some change over ``num_steps`` training steps, epochs times batches, and cannot be made without.
        """
        with self._random("head"):
            return self._loss.head(in_features, num_classes, num_steps).to(self.device)

    @contextlib.contextmanager
    def _random(self, name: str) -> Iterator[None]:
        """Random numbers of the loss alone, so that those of ``train`` are the same whatever the loss draws on the CPU."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self._states.get(name, seeded(self.seed, name).get_state()))
        try:
            yield
        finally:
            self._states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    @property
    def validation(self) -> float:
        """The share of the training set to hold out: above 0 in the runs that choose among several lam."""
        self.asked_to_hold_out = True
        return self._trial.validation_fraction

    def split(self, n: int) -> tuple[Tensor, Tensor]:
        """The indices of ``n`` training samples to train on, and those to hold out: none where no lam is chosen.

        They are the same for all losses of a seed.
        """
        held_out = round(self.validation * n)
        if self.validation and not 0 < held_out < n:
            raise LabError(
                f"run.split({n}): {held_out} of {n} samples would be held out; a validation_fraction must leave some on both sides"
            )
        order = torch.randperm(n, generator=seeded(self.seed, "validation"))
        return order[held_out:].sort().values, order[:held_out].sort().values

    def log(self, **values: Any) -> None:
        """Keep numbers of the run so far: ``run.log(epoch=3, loss=0.2)``. The report draws ``loss`` over ``epoch``."""
        plain = {name: _number(name, value) for name, value in values.items()}
        self.logged.append(plain)
        if time.monotonic() - self._said > SAY_SECONDS:
            self._said = time.monotonic()
            self._say(", ".join(f"{name} {value:.4g}" for name, value in plain.items()))

    def score(self, logits: Any, target: Any, ids: Any = None) -> dict[str, float]:
        """The error in percent and more, of logits ``(N, C)`` and class indices ``(N,)``; ``train`` returns it.

        The predictions are kept. Where all runs were scored on the same samples, the verdicts cover the choice of samples too. Samples are
        the same if their ``ids`` (names or numbers) are, in any order; without ids, if all targets are.
        """
        logits, target = _tensor("logits", logits).detach(), _tensor("target", target).detach().to("cpu")
        if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
            raise LabError(f"run.score: logits must be floating-point numbers of shape (N, C), got {logits.dtype} {tuple(logits.shape)}")
        if target.shape != logits.shape[:1] or target.is_floating_point() or target.is_complex():
            raise LabError(f"run.score: target must be class indices of shape ({len(logits)},), got {target.dtype} {tuple(target.shape)}")
        if not len(target) or target.min() < 0 or target.max() >= logits.shape[1]:
            got = f"{target.min().item()} to {target.max().item()}" if len(target) else "none"
            raise LabError(f"run.score: target must be from 0 to {logits.shape[1] - 1}, got {got}; leave ignored samples out")
        self.measured = evaluate(logits, target)
        self.predictions = _predictions(logits.float().cpu().numpy(), target.long().numpy(), ids)
        return {name: getattr(self.measured, name) for name in SCORES}


def _predictions(logits: Any, target: Any, ids: Any) -> Predictions:
    if ids is None:
        return Predictions(logits, target, np.arange(len(target)))
    names = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    names = names if names.dtype.kind in "iu" else names.astype(str)
    if names.shape != target.shape or len(set(names.tolist())) < len(names):
        different = len(set(names.ravel().tolist()))
        raise LabError(f"run.score: ids must be {len(target)} different names or numbers, got {different} in shape {names.shape}")
    order = np.argsort(names, kind="stable")  # a loader may shuffle
    return Predictions(logits[order], target[order], names[order])


def _tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        if isinstance(values, Sequence) and values and isinstance(values[0], Tensor):
            return torch.cat([one if one.dim() else one.unsqueeze(0) for one in values])
        return torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise LabError(f"run.score: {name} must be a tensor or an array, got {type(values).__name__} ({error})") from error


def _number(name: str, value: Any) -> float:
    try:
        return int(value) if isinstance(value, int) else float(value)
    except (TypeError, ValueError) as error:
        raise LabError(f"run.log: {name} must be a number, got {value!r}") from error
