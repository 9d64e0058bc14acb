"""What a word of --losses trains with: a classifier in place of the network's last layer, and a loss of its logits and features."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import gather_rows
from ...heads import CenterLoss, GaussianMixtureHead, super_symmetry_penalty
from ...schedules import GradualWeight
from . import losses
from .methods import METHODS, Chosen
from .recipe import Recipe


def build_loss(chosen: Chosen, class_counts: Tensor) -> nn.Module:
    """The loss of logits; ``class_counts`` (C,) are those of the training set."""
    known = METHODS[chosen.loss]
    # a class without a training sample counts as one: its margin and its shift stay finite
    counts = {"class_counts": class_counts.clamp(min=1).float()} if known.of_counts else {}
    divergence = {"divergence": chosen.divergence} if chosen.divergence is not None and "lam" in chosen.settings else {}
    loss: nn.Module = getattr(losses, known.loss)(**chosen.settings, **divergence, **counts)
    return loss


def build_head(chosen: Chosen, in_features: int, num_classes: int, num_steps: int) -> nn.Module:
    """The classifier, with its schedule for so many training steps."""
    head: nn.Module = getattr(losses, METHODS[chosen.loss].head)(in_features, num_classes, num_steps, **chosen.settings)
    return head


class Step(NamedTuple):
    """What a batch gave."""

    plain: Tensor  # (N, C) logits as at test time, without gradient history where a head edits them
    logits: Tensor  # (N, C) those of the loss
    loss: Tensor


class Method(nn.Module):
    """A network and the loss it is trained with; what the loss remembers from batch to batch is in its state."""

    def __init__(self, recipe: Recipe, network: nn.Module, num_steps: int, class_counts: Tensor | None = None) -> None:
        """Put the classifier of the recipe into ``network``, whose ``features`` and ``classifier`` are its parts.

        ``class_counts`` (C,) are those of the training labels; None: all equal.
        """
        super().__init__()
        old = network.classifier
        assert isinstance(old, nn.Linear)
        self.criterion = build_loss(recipe, torch.ones(old.out_features) if class_counts is None else class_counts)
        head = build_head(recipe, old.in_features, old.out_features, num_steps)
        network.classifier = old if isinstance(head, nn.Linear) else head  # the same first weights for all that have them
        self.network = network
        self.center = CenterLoss(old.in_features, old.out_features) if recipe.center is not None else None
        self.center_weight = recipe.center or 0.0
        self.symmetry = GradualWeight(num_steps, 0.0, recipe.symmetry) if recipe.symmetry is not None else None
        self.in_bfloat16 = recipe.precision == "bfloat16"
        self.compiled: tuple[Callable[[Tensor], Tensor], int] | None = None

    def compile_features(self, backend: str, num_rows: int) -> None:
        """Compile the features of training batches of ``num_rows``; a shorter batch and evaluation run without compiling.

        Each of these would need a compilation of its own, which can take longer than many epochs.
        """
        features = self.network.features

        # a function of our own: of features.compile() torch compiles nothing where features is a Sequential, all of it torch's code
        def run(images: Tensor) -> Tensor:
            result: Tensor = features(images)  # type: ignore[operator]
            return result

        self.compiled = torch.compile(run, backend=backend, dynamic=False), num_rows

    def _features(self, images: Tensor) -> Tensor:
        if self.compiled is not None and self.training and len(images) == self.compiled[1]:
            return self.compiled[0](images)
        features: Tensor = self.network.features(images)  # type: ignore[operator]
        return features

    def forward(self, images: Tensor, target: Tensor, num_rows: int | None = None) -> Step:
        """The logits of a batch and the loss to train with; the classifier and all after it are float32 at any precision.

        Rows from ``num_rows`` on, where it is given, move no center.
        """
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.in_bfloat16):
            features = self._features(images)
        features, head = features.float(), self.network.classifier
        edits = not isinstance(head, nn.Linear)
        logits = head(features, target) if edits else head(features)  # type: ignore[operator]
        loss = self.criterion(logits, target)
        if isinstance(head, GaussianMixtureHead):
            loss = loss + head.likelihood(features, target)
        if self.center is not None:
            loss = loss + self.center_weight * self._center_loss(self.center, features, target, num_rows)
        if self.symmetry is not None:
            loss = loss + self.symmetry().to(loss.dtype) * super_symmetry_penalty(head.weight)  # type: ignore[union-attr, arg-type]
        with torch.no_grad():
            plain = head(features) if edits else logits  # type: ignore[operator]
        return Step(plain, logits, loss)

    def _center_loss(self, center: CenterLoss, features: Tensor, target: Tensor, num_rows: int | None) -> Tensor:
        """Of the rows of this process; the centers move by those of all."""
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return center(features, target)
        loss = center.eval()(features, target)
        world = dist.group.WORLD
        assert world is not None
        center.train()(*gather_rows(features.detach()[:num_rows], target[:num_rows], group=world))
        return loss

    @torch.no_grad()
    def asymmetry(self) -> float | None:
        """How far the classifier is from the super-symmetric form (Sec. 3); None for a head without a weight a class."""
        weight = getattr(self.network.classifier, "weight", None)
        return super_symmetry_penalty(weight).item() if isinstance(weight, Tensor) and weight.dim() == 2 else None


def parameter_groups(recipe: Recipe, network: nn.Module) -> list[dict[str, Any]]:
    """Those of the optimiser; ``factor`` is of the learning rate of each."""
    head = network.classifier
    own: list[dict[str, Any]] = head.param_groups(1.0) if isinstance(head, GaussianMixtureHead) else []
    factors = {id(parameter): group["lr"] for group in own for parameter in group["params"]}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        decay = recipe.weight_decay if recipe.decay_all or parameter.dim() > 1 else 0.0
        groups.setdefault((factors.get(id(parameter), 1.0), decay), []).append(parameter)
    return [{"params": params, "factor": factor, "weight_decay": decay} for (factor, decay), params in groups.items()]
