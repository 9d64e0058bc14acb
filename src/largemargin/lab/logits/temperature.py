"""Temperature scaling: one number that makes probabilities as sure as they are right (Guo et al., *On Calibration of Modern Neural
Networks*, ICML 2017).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import LabError

LARGEST = 1000.0  # temperatures are looked for up to this, and down to its inverse

Array = NDArray[np.float64]


class Fitted(NamedTuple):
    """The temperature of least NLL, and the NLL without and with it, in nats."""

    temperature: float
    nll_before: float
    nll_after: float


def probabilities(logits: Array, temperature: float = 1.0) -> Array:
    """The softmax of ``logits / temperature``."""
    from scipy.special import softmax

    return np.asarray(softmax(logits / temperature, axis=1))


def nll(logits: Array, labels: NDArray[np.int64], temperature: float = 1.0) -> float:
    """The mean negative log-likelihood."""
    from scipy.special import log_softmax

    return -float(log_softmax(logits / temperature, axis=1)[np.arange(len(logits)), labels].mean())


def fit(logits: Array, labels: NDArray[np.int64]) -> Fitted:
    """The temperature of least NLL on labelled rows; raises LabError where none is best."""
    from scipy.optimize import minimize_scalar

    def of_log(log_temperature: float) -> float:
        return nll(logits, labels, math.exp(log_temperature))

    why = ""
    if (logits.argmax(1) == labels).all():  # the smaller, the better
        why = "the network classifies all of them rightly"
    elif (logits[np.arange(len(labels)), labels] - logits.mean(1)).mean() <= 0:  # the larger, the better
        why = "the network does no better on them than chance"
    if why:
        raise LabError(f"--calibrate: no temperature fits these {len(labels)} images best: {why}; give more images, or leave it out")
    bound = math.log(LARGEST)
    found: Any = minimize_scalar(of_log, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return Fitted(math.exp(found.x), nll(logits, labels), float(found.fun))
