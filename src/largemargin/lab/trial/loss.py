"""The loss of a run in a loop that is not ours: a word of ``losses``, or a module of the user's own."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...heads import CenterLoss, GaussianMixtureHead, super_symmetry_penalty
from ...schedules import GradualWeight
from ..errors import LabError
from ..run.method import build_head, build_loss
from ..run.methods import METHODS, Chosen
from .trial import Trial

ANNEALED = ("lsoftmax", "gaussian_mixture", "sphereface")  # heads that change over the training steps


class TrialLoss(Protocol):
    """A loss and the classifier that it needs."""

    def head(self, in_features: int, num_classes: int, num_steps: int | None) -> nn.Module: ...

    def __call__(
        self, logits: Tensor, target: Tensor, features: Tensor | None, head: nn.Module | None, class_counts: Tensor | None
    ) -> Tensor: ...


def loss_of(trial: Trial, make: Callable[[], Any] | None) -> TrialLoss:
    """That of a run; ``make`` makes the module of a loss that is no word."""
    if trial.chosen is not None:
        return _OfWord(trial.chosen)
    assert make is not None
    return _OfUser(trial, make)


class _OfUser:
    """A module that takes logits and target."""

    def __init__(self, trial: Trial, make: Callable[[], Any]) -> None:
        self.criterion = make()
        if not callable(self.criterion):
            raise LabError(
                f'losses: what makes the loss "{trial.loss}" returned {self.criterion!r}, which cannot be called with logits and target; '
                "give a class or a function that returns a module"
            )
        if isinstance(self.criterion, nn.Module):
            self.criterion.to(trial.device)

    def head(self, in_features: int, num_classes: int, num_steps: int | None) -> nn.Module:
        return nn.Linear(in_features, num_classes)

    def __call__(
        self, logits: Tensor, target: Tensor, features: Tensor | None, head: nn.Module | None, class_counts: Tensor | None
    ) -> Tensor:
        loss: Tensor = self.criterion(logits, target)
        return loss


class _OfWord:
    """A word of METHODS, with its head and its second term."""

    def __init__(self, chosen: Chosen) -> None:
        self.chosen, self.known = chosen, METHODS[chosen.loss]
        self.own_head = self.known.head != "linear"
        self.needs_features = self.own_head or chosen.center is not None
        self.needs_head = self.own_head or chosen.symmetry is not None
        self.criterion: nn.Module | None = None
        self.center: CenterLoss | None = None
        self.symmetry: GradualWeight | None = None

    def head(self, in_features: int, num_classes: int, num_steps: int | None) -> nn.Module:
        if num_steps is None and (self.known.head in ANNEALED or self.chosen.symmetry is not None):
            raise LabError(
                f"the loss {self.chosen.loss} changes over the run: give run.head(in_features, num_classes, num_steps) the number of "
                "training steps, epochs times batches"
            )
        steps = num_steps or 1
        if self.chosen.symmetry is not None:
            self.symmetry = GradualWeight(steps, 0.0, self.chosen.symmetry)
        return build_head(self.chosen, in_features, num_classes, steps)

    def __call__(
        self, logits: Tensor, target: Tensor, features: Tensor | None, head: nn.Module | None, class_counts: Tensor | None
    ) -> Tensor:
        self._check(features, head)
        if self.own_head and head is not None:
            logits = head(features, target)  # the margin is on the logit of the target
        if self.criterion is None:
            self.criterion = self._made(logits, class_counts)
        loss: Tensor = self.criterion(logits, target)
        if isinstance(head, GaussianMixtureHead) and features is not None:
            loss = loss + head.likelihood(features, target)
        if self.chosen.center is not None and features is not None:
            self.center = self.center or CenterLoss(features.shape[1], logits.shape[1]).to(features.device)
            loss = loss + self.chosen.center * self.center.train(torch.is_grad_enabled())(features, target)
        if self.symmetry is not None and head is not None:
            weight = self.symmetry.train(torch.is_grad_enabled())()  # a loss that is only measured is no training step
            loss = loss + weight.to(loss.dtype) * super_symmetry_penalty(head.weight)  # type: ignore[arg-type]
        return loss

    def _check(self, features: Tensor | None, head: nn.Module | None) -> None:
        word = self.chosen.loss
        if (self.needs_features and features is None) or (self.needs_head and head is None):
            given = "features=features" + (", head=head" if self.needs_head else "")
            what = "has a classifier of its own" if self.own_head else "reads features" if self.needs_features else "reads weights"
            made = "make the last layer by head = run.head(in_features, num_classes) and " if self.needs_head else ""
            raise LabError(f"the loss {word} {what}: {made}call run.loss(logits, target, {given})")
        if (self.own_head and isinstance(head, nn.Linear)) or (self.chosen.symmetry is not None and self.symmetry is None):
            raise LabError(f"the loss {word} needs the head that run.head(in_features, num_classes) makes, got {type(head).__name__}")

    def _made(self, logits: Tensor, class_counts: Tensor | None) -> nn.Module:
        if self.known.of_counts and class_counts is None:
            raise LabError(
                f"the loss {self.chosen.loss} needs the class sizes of the training set: set run.class_counts = torch.bincount(targets, "
                "minlength=num_classes) before the first run.loss"
            )
        counts = torch.ones(logits.shape[1]) if class_counts is None else torch.as_tensor(class_counts)
        return build_loss(self.chosen, counts.to(logits.device)).to(logits.device)
