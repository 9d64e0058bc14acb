"""Classifiers that replace the last linear layer, and edit the target's logit in training.

``head(features, target)`` gives the logits to train with, ``head(features)`` plain logits. Any loss takes them.
"""

from .center import CenterLoss as CenterLoss
from .cosine import CosineLinear as CosineLinear
from .gaussian_mixture import GaussianMixtureHead as GaussianMixtureHead
from .lsoftmax import LSoftmaxLinear as LSoftmaxLinear
from .noisy import NoisySoftmaxLinear as NoisySoftmaxLinear
from .super_symmetric import SuperSymmetricLinear as SuperSymmetricLinear
from .super_symmetric import super_symmetry_penalty as super_symmetry_penalty
from .t_vmf import TVMFLinear as TVMFLinear

__all__ = [name for name, value in tuple(globals().items()) if getattr(value, "__module__", "").startswith(__name__)]
