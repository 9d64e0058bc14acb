"""Classifiers that take the place of the last linear layer: each gives logits, and edits the target's in training.

``head(features, target)`` are the logits to train with, ``head(features)`` the plain ones. Any loss takes them.
"""

from .center import CenterLoss
from .cosine import CosineLinear
from .gaussian_mixture import GaussianMixtureHead
from .lsoftmax import LSoftmaxLinear
from .noisy import NoisySoftmaxLinear
from .super_symmetric import SuperSymmetricLinear, super_symmetry_penalty

__all__ = [
    "CenterLoss",
    "CosineLinear",
    "GaussianMixtureHead",
    "LSoftmaxLinear",
    "NoisySoftmaxLinear",
    "SuperSymmetricLinear",
    "super_symmetry_penalty",
]
