"""From features to inputs of a network, fitted on the training samples of a run alone."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..data.features import Column
from ..errors import LabError
from ..stopping import interrupts_end_at_once

AT_ONCE = 4096  # samples that are standardised, or evaluated, together


@dataclass(frozen=True)
class Standard:
    """How features become inputs: as ``SimpleImputer(strategy="median")`` and ``StandardScaler`` of scikit-learn have it.

    Called with features (N, D) or (D,), gives a float32 tensor of that shape.
    """

    fill: tuple[float, ...]  # for a missing number
    mean: tuple[float, ...]
    std: tuple[float, ...]  # 0 for a feature of one value, which is 0 for every sample: nothing was learnt of other values
    columns: tuple[Column, ...] = ()  # of the table that the features come from

    @property
    def in_channels(self) -> int:
        return len(self.mean)

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (len(self.mean),)

    @functools.cached_property
    def _numbers(self) -> tuple[NDArray[np.float64], ...]:
        return tuple(np.array(values) for values in (self.fill, self.mean, self.std))

    def __call__(self, features: Any) -> Tensor:
        values = np.asarray(features)
        if values.ndim not in (1, 2) or values.shape[-1] != self.in_channels:
            raise LabError(
                f"features have the shape {values.shape}; expected (N, {self.in_channels}), or ({self.in_channels},) for one sample"
            )
        fill, mean, std = self._numbers
        rows = np.atleast_2d(values)
        result = torch.empty(rows.shape, dtype=torch.float32)
        for part in (slice(start, start + AT_ONCE) for start in range(0, len(rows), AT_ONCE)):
            exact = rows[part].astype(np.float64)  # large numbers with a small spread need it
            centred = np.where(np.isnan(exact), fill, exact) - mean
            result[part] = torch.from_numpy(np.divide(centred, std, out=np.zeros_like(centred), where=std > 0)).float()
        return result.reshape(values.shape)


def standard_of(training: NDArray[Any], held_out: NDArray[Any], columns: tuple[Column, ...] = ()) -> Standard:
    """That of training samples (N, D). The others say only in which features numbers are missing.

    The median takes a while, so only these features have it; another that lacks a number later is filled with its mean.
    """
    with interrupts_end_at_once():
        from sklearn.preprocessing import StandardScaler

    lacking = np.flatnonzero(np.isnan(training).any(0) | np.isnan(held_out).any(0))
    filled = training.astype(np.float64) if len(lacking) else training
    medians = [np.median(known) if len(known := filled[~np.isnan(filled[:, i]), i]) else 0.0 for i in lacking]
    for i, median in zip(lacking, medians, strict=True):
        filled[np.isnan(filled[:, i]), i] = median
    scaler = StandardScaler().fit(filled)
    fill = scaler.mean_.copy()
    fill[lacking] = medians
    std = np.where(filled.max(0) > filled.min(0), scaler.scale_, 0.0)
    return Standard(tuple(fill.tolist()), tuple(scaler.mean_.tolist()), tuple(std.tolist()), columns)
