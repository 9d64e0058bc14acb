"""What a word of --losses trains with: a classifier in place of the network's last layer, and a loss of its logits and features."""

import torch
from torch import Tensor, nn

from .. import CrammerSingerHingeLoss, HardMarginSoftplusLoss, LargeMarginCrossEntropyLoss, MulticlassHingeLoss
from ..heads import (
    CenterLoss,
    CosineLinear,
    GaussianMixtureHead,
    LSoftmaxLinear,
    NoisySoftmaxLinear,
    SuperSymmetricLinear,
    super_symmetry_penalty,
)
from ..schedules import AnnealedLambda, GradualWeight, SteppedAlpha
from .recipe import LOSSES, Recipe

MODULES = {
    "multiclass_hinge": MulticlassHingeLoss,
    "crammer_singer_hinge": CrammerSingerHingeLoss,
    "hard_margin_softplus": HardMarginSoftplusLoss,
}


def build_loss(recipe: Recipe) -> nn.Module:
    """The loss of logits. The baselines are torch's own."""
    settings = {name: getattr(recipe, name) for name in LOSSES[recipe.loss]}
    if recipe.loss in MODULES:
        return MODULES[recipe.loss](**settings)
    of_logits = {name: value for name, value in settings.items() if name in ("lam", "hard_bias", "label_smoothing")}
    if of_logits.keys() <= {"label_smoothing"}:
        return nn.CrossEntropyLoss(**of_logits)
    return LargeMarginCrossEntropyLoss(**{"lam": 0.0, **of_logits})


def build_head(recipe: Recipe, in_features: int, num_classes: int, num_steps: int) -> nn.Module:
    """The classifier, with its schedule for so many training steps."""
    match recipe.loss:
        case "lsoftmax":
            schedule = AnnealedLambda.for_steps(num_steps)
            return LSoftmaxLinear(in_features, num_classes, int(recipe.angular_multiplier or 1), schedule=schedule)
        case "gaussian_mixture":
            alpha = SteppedAlpha.for_steps(num_steps, maximum=recipe.alpha or 0.0)
            return GaussianMixtureHead(in_features, num_classes, alpha=alpha, likelihood_weight=recipe.likelihood or 0.0)
        case "noisy_softmax":
            return NoisySoftmaxLinear(in_features, num_classes, alpha_squared=recipe.alpha or 0.0)
        case "super_symmetric":
            return SuperSymmetricLinear(in_features, num_classes, frame="learned", learn_scale=True)
        case "cosface" | "arcface":
            return CosineLinear(in_features, num_classes, scale=recipe.scale or 1.0, margin=recipe.margin or 0.0, kind=recipe.loss)
    return nn.Linear(in_features, num_classes)


class Method(nn.Module):
    """The loss of a batch; what it remembers from batch to batch is in its state."""

    def __init__(self, recipe: Recipe, network: nn.Module, num_steps: int) -> None:
        """Put the classifier of the recipe into ``network``, whose ``features`` and ``classifier`` are its parts."""
        super().__init__()
        old = network.classifier
        assert isinstance(old, nn.Linear)
        self.criterion = build_loss(recipe)
        head = build_head(recipe, old.in_features, old.out_features, num_steps)
        network.classifier = old if isinstance(head, nn.Linear) else head  # the same first weights for all that have them
        self.center = CenterLoss(old.out_features, old.in_features) if recipe.center is not None else None
        self.center_weight = recipe.center or 0.0
        self.symmetry = GradualWeight(num_steps, 0.0, recipe.symmetry) if recipe.symmetry is not None else None

    def forward(self, network: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The plain logits of a batch, and the loss to train with."""
        features, head = network.features(images), network.classifier  # type: ignore[operator]
        edits = not isinstance(head, nn.Linear)
        logits = head(features, target) if edits else head(features)  # type: ignore[operator]
        loss = self.criterion(logits, target)
        if isinstance(head, GaussianMixtureHead):
            loss = loss + head.likelihood(features, target)
        if self.center is not None:
            loss = loss + self.center_weight * self.center(features, target)
        if self.symmetry is not None:
            loss = loss + self.symmetry().to(loss.dtype) * super_symmetry_penalty(head.weight)  # type: ignore[union-attr, arg-type]
        with torch.no_grad():
            plain = head(features) if edits else logits  # type: ignore[operator]
        return plain, loss


def parameter_groups(network: nn.Module, learning_rate: float) -> list[dict[str, object]]:
    """Those of the optimiser; ``factor`` is of the learning rate of each."""
    head = network.classifier
    if not isinstance(head, GaussianMixtureHead):
        return [{"params": list(network.parameters()), "factor": 1.0}]
    groups = head.param_groups(learning_rate)
    own = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in network.parameters() if id(parameter) not in own]
    return [{"params": rest, "factor": 1.0}, *({"params": group["params"], "factor": group["lr"] / learning_rate} for group in groups)]
