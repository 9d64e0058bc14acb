"""Classifiers that replace the last linear layer, and edit the target's logit in training.

``head(features, target)`` gives the logits to train with, ``head(features)`` plain logits. Any loss takes them.
"""

from .center import CenterLoss
from .cosine import CosineLinear
from .gaussian_mixture import GaussianMixtureHead
from .lsoftmax import LSoftmaxLinear
from .noisy import NoisySoftmaxLinear
from .super_symmetric import SuperSymmetricLinear, super_symmetry_penalty
from .t_vmf import TVMFLinear

__all__ = [
    "CenterLoss",
    "CosineLinear",
    "GaussianMixtureHead",
    "LSoftmaxLinear",
    "NoisySoftmaxLinear",
    "SuperSymmetricLinear",
    "TVMFLinear",
    "super_symmetry_penalty",
]
