"""The losses and the classifiers that :data:`~largemargin.lab.run.methods.METHODS` names: a function each, of a method's settings."""

from typing import Any

from torch import nn

from ... import CrammerSingerHingeLoss, HardMarginSoftplusLoss, LargeMarginCrossEntropyLoss, MulticlassHingeLoss
from ...heads import CosineLinear, GaussianMixtureHead, LSoftmaxLinear, NoisySoftmaxLinear, SuperSymmetricLinear
from ...schedules import AnnealedLambda, SteppedAlpha

multiclass_hinge = MulticlassHingeLoss
crammer_singer_hinge = CrammerSingerHingeLoss
hard_margin_softplus = HardMarginSoftplusLoss


def of_logits(**settings: Any) -> nn.Module:
    """The loss of plain logits. The baselines are torch's own."""
    of_the_loss = {name: value for name, value in settings.items() if name in ("lam", "hard_bias", "label_smoothing", "divergence")}
    if of_the_loss.keys() <= {"label_smoothing"}:
        return nn.CrossEntropyLoss(**of_the_loss)
    return LargeMarginCrossEntropyLoss(**{"lam": 0.0, **of_the_loss})


def linear(in_features: int, num_classes: int, num_steps: int, **settings: Any) -> nn.Module:
    return nn.Linear(in_features, num_classes)


def lsoftmax(in_features: int, num_classes: int, num_steps: int, *, angular_multiplier: int) -> nn.Module:
    return LSoftmaxLinear(in_features, num_classes, angular_multiplier, schedule=AnnealedLambda.for_steps(num_steps))


def gaussian_mixture(in_features: int, num_classes: int, num_steps: int, *, alpha: float, likelihood: float) -> nn.Module:
    stepped = SteppedAlpha.for_steps(num_steps, maximum=alpha)
    return GaussianMixtureHead(in_features, num_classes, alpha=stepped, likelihood_weight=likelihood)


def noisy_softmax(in_features: int, num_classes: int, num_steps: int, *, alpha_squared: float) -> nn.Module:
    return NoisySoftmaxLinear(in_features, num_classes, alpha_squared=alpha_squared)


def super_symmetric(in_features: int, num_classes: int, num_steps: int) -> nn.Module:
    return SuperSymmetricLinear(in_features, num_classes, frame="learned", learn_scale=True)


def cosface(in_features: int, num_classes: int, num_steps: int, *, scale: float, margin: float) -> nn.Module:
    return CosineLinear(in_features, num_classes, scale=scale, margin=margin, kind="cosface")


def arcface(in_features: int, num_classes: int, num_steps: int, *, scale: float, margin: float) -> nn.Module:
    return CosineLinear(in_features, num_classes, scale=scale, margin=margin, kind="arcface")
