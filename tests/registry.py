"""What the laws run over: the losses, the heads, the backends, the divergences and the dtypes, each listed once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from largemargin import (
    CrammerSingerHingeLoss,
    HardMarginSoftplusLoss,
    LargeMarginCrossEntropyLoss,
    MulticlassHingeLoss,
    crammer_singer_hinge,
    hard_margin_softplus,
    heads,
    large_margin_cross_entropy,
    multiclass_hinge,
)
from largemargin._backend_names import BACKENDS

DIVERGENCES = ("symmetric", "kl_qu", "kl_uq")
DTYPES = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)
KERNELS = tuple(name for name in BACKENDS if name not in (None, "reference"))


class Loss(NamedTuple):
    """A loss of logits as a function and as a module, and settings that both take."""

    function: Callable[..., Tensor]
    module: type[nn.Module]
    settings: list[dict[str, Any]]


_HINGE_SETTINGS: list[dict[str, Any]] = [{}, {"margin": 2.0, "ignore_index": 2, "reduction": "none"}, {"reduction": "sum"}]
LARGE_MARGIN = Loss(
    large_margin_cross_entropy,
    LargeMarginCrossEntropyLoss,
    [
        {},
        {"lam": 1.0, "divergence": "kl_uq", "hard_bias": 1.0, "label_smoothing": 0.1, "ignore_index": 2, "reduction": "sum"},
        {"divergence": "kl_qu", "reduction": "none", "backend": "reference"},
    ],
)
HINGES = (
    Loss(multiclass_hinge, MulticlassHingeLoss, _HINGE_SETTINGS),
    Loss(crammer_singer_hinge, CrammerSingerHingeLoss, _HINGE_SETTINGS),
    Loss(hard_margin_softplus, HardMarginSoftplusLoss, _HINGE_SETTINGS),
)
LOSSES = (LARGE_MARGIN, *HINGES)

# name -> a head of so many features and classes, with the options of a module
HEADS: dict[str, Callable[..., nn.Module]] = {
    "cosface": heads.CosineLinear,
    "arcface": lambda *sizes, **options: heads.CosineLinear(*sizes, kind="arcface", **options),
    "arcface_insightface": lambda *sizes, **options: heads.CosineLinear(*sizes, kind="arcface_insightface", **options),
    "sphereface": lambda *sizes, **options: heads.CosineLinear(*sizes, kind="sphereface", **options),
    "t_vmf": heads.TVMFLinear,
    "lsoftmax": heads.LSoftmaxLinear,
    "mixture": heads.GaussianMixtureHead,
    "mixture_diagonal": lambda *sizes, **options: heads.GaussianMixtureHead(*sizes, covariance="diagonal", **options),
    "super_symmetric": heads.SuperSymmetricLinear,
    "noisy": lambda *sizes, **options: heads.NoisySoftmaxLinear(*sizes, alpha_squared=0.0, **options),
    "center": lambda *sizes, **options: heads.CenterLoss(*sizes, as_parameter=True, **options),
}
