"""What a trained network says of the samples that it was measured on: ``predictions.npz`` of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import LabError
from .files import write_atomically
from .stopping import interrupts_end_at_once

NAME = "predictions.npz"
HALF_ABOVE = 32 << 20  # bytes of float32 logits; larger ones are kept in float16
LARGEST_HALF = np.float32(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Predictions:
    """Logits ``(N, C)`` and labels ``(N,)``, and for each sample its file name, or its index in the data set."""

    logits: NDArray[np.floating]
    labels: NDArray[np.int64]
    ids: NDArray[np.str_] | NDArray[np.int64]
    predicted: NDArray[np.int64] = None  # type: ignore[assignment]  # the largest logit, before any rounding

    def __post_init__(self) -> None:
        if self.predicted is None:
            object.__setattr__(self, "predicted", self.logits.argmax(1))

    @property
    def wrong(self) -> NDArray[np.bool_]:
        return np.asarray(self.predicted != self.labels)

    @property
    def probabilities(self) -> NDArray[np.float64]:
        with interrupts_end_at_once():
            from scipy.special import softmax

        return np.asarray(softmax(self.logits.astype(np.float64), axis=1))

    def save(self, path: Path) -> None:
        logits = self.logits.astype(np.float32)
        if logits.nbytes > HALF_ABOVE:
            logits = logits.clip(-LARGEST_HALF, LARGEST_HALF).astype(np.float16)  # those of a diverged run may be larger
        write_atomically(path, lambda file: np.savez(file, logits=logits, labels=self.labels, ids=self.ids, predicted=self.predicted))

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """What :meth:`save` wrote; nothing of the file is executed."""
        try:
            with np.load(path, allow_pickle=False) as file:
                logits, labels, ids, predicted = (file[name] for name in ("logits", "labels", "ids", "predicted"))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise LabError(f"{path} does not hold the predictions of a run ({error})") from error
        if logits.ndim != 2 or not labels.shape == ids.shape == predicted.shape == logits.shape[:1]:
            raise LabError(f"{path} does not hold the predictions of a run: its arrays are {logits.shape}, {labels.shape}, {ids.shape}")
        return cls(logits, labels.astype(np.int64), ids, predicted.astype(np.int64))


def bytes_of(num_samples: int, num_classes: int) -> int:
    """About how large the file of a run is."""
    logits = 4 * num_samples * num_classes
    return (logits // 2 if logits > HALF_ABOVE else logits) + 24 * num_samples


def same_samples(predictions: Sequence[Predictions]) -> bool:
    """Whether all are of the same samples, in one order."""
    first = predictions[0]
    return all(
        np.array_equal(first.ids, other.ids) and np.array_equal(first.labels, other.labels) and first.logits.shape == other.logits.shape
        for other in predictions[1:]
    )
