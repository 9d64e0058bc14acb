"""The losses and the classifiers that :data:`~largemargin.lab.run.methods.METHODS` names: a function each, of a method's settings."""

from typing import Any

from torch import Tensor, nn

from ... import (
    ConfidencePenaltyLoss,
    CrammerSingerHingeLoss,
    DualFocalCrossEntropyLoss,
    FocalCrossEntropyLoss,
    GeneralizedCrossEntropyLoss,
    HardMarginSoftplusLoss,
    LargeMarginCrossEntropyLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    MarginLabelSmoothingLoss,
    MaxSuppressionLoss,
    MulticlassHingeLoss,
    NormalizedReverseCrossEntropyLoss,
    Poly1CrossEntropyLoss,
    SymmetricCrossEntropyLoss,
    TaylorCrossEntropyLoss,
)
from ...heads import CosineLinear, GaussianMixtureHead, LSoftmaxLinear, NoisySoftmaxLinear, SuperSymmetricLinear, TVMFLinear
from ...schedules import AnnealedLambda, SteppedAlpha

multiclass_hinge = MulticlassHingeLoss
crammer_singer_hinge = CrammerSingerHingeLoss
hard_margin_softplus = HardMarginSoftplusLoss
gce = GeneralizedCrossEntropyLoss
sce = SymmetricCrossEntropyLoss
nce_rce = NormalizedReverseCrossEntropyLoss
taylor = TaylorCrossEntropyLoss
confidence_penalty = ConfidencePenaltyLoss
maxsup = MaxSuppressionLoss
focal = FocalCrossEntropyLoss
dual_focal = DualFocalCrossEntropyLoss
poly1 = Poly1CrossEntropyLoss
mbls = MarginLabelSmoothingLoss


def logit_adjusted(*, tau: float, class_counts: Tensor) -> nn.Module:
    return LogitAdjustedLoss(class_counts=class_counts, tau=tau)


def ldam(*, max_margin: float, scale: float, class_counts: Tensor) -> nn.Module:
    """Of logits that are ``scale`` times the cosines: their softmax is that of the network."""
    return LDAMLoss(class_counts=class_counts, max_margin=scale * max_margin, scale=1.0)


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


def cosine(in_features: int, num_classes: int, num_steps: int, *, scale: float, **settings: Any) -> nn.Module:
    return CosineLinear(in_features, num_classes, scale=scale, margin=0.0)


def subcenter_arcface(in_features: int, num_classes: int, num_steps: int, *, scale: float, margin: float, subcenters: int) -> nn.Module:
    return CosineLinear(in_features, num_classes, scale=scale, margin=margin, kind="arcface", subcenters=subcenters)


def sphereface(in_features: int, num_classes: int, num_steps: int, *, scale: float, angular_multiplier: int) -> nn.Module:
    schedule = AnnealedLambda.for_steps(num_steps)
    return CosineLinear(in_features, num_classes, scale=scale, margin=angular_multiplier, kind="sphereface", schedule=schedule)


def t_vmf(in_features: int, num_classes: int, num_steps: int, *, kappa: float) -> nn.Module:
    return TVMFLinear(in_features, num_classes, kappa=kappa)
