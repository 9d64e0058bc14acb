"""A recipe is a run: every number of it, and nothing that is not.

This module is read by the command line before anything heavy is imported, so it needs the standard library alone.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

# what the words of --losses mean; a setting left out is one the loss does not have
LOSSES: dict[str, dict[str, Any]] = {
    "softmax": {},  # eq. (2)
    "label_smoothing": {"label_smoothing": 0.1},  # eq. (13)
    "large_margin": {"lam": 0.3},  # eq. (11)
    "modified": {"hard_bias": 1.0},  # eq. (15)
    "modified_large_margin": {"hard_bias": 1.0, "lam": 0.3},  # eq. (15) + (8)
    "multiclass_hinge": {"margin": 1.0},  # eq. (14)
    "crammer_singer_hinge": {"margin": 1.0},  # eq. (1)
    "hard_margin_softplus": {"margin": 1.0},  # Sec. 3
    # with a classifier of their own
    "lsoftmax": {"angular_multiplier": 4},  # Liu et al., 2016, annealed over the run
    "gaussian_mixture": {"alpha": 0.3, "likelihood": 0.1},  # Wan et al., 2018; alpha is the last of three steps
    "noisy_softmax": {"alpha": 0.1},  # Chen et al., 2017; alpha squared
    "super_symmetric": {},  # Otsu, 1982; Sec. 3
    "cosface": {"scale": 30.0, "margin": 0.35},  # Wang et al., 2018
    "arcface": {"scale": 30.0, "margin": 0.5},  # Deng et al., 2019
    # with a second term
    "center": {"center": 0.003},  # Wen et al., 2016
    "center_large_margin": {"center": 0.003, "lam": 0.3},  # Sec. 3
    "gradual_super_symmetry": {"symmetry": 1.0},  # Sec. 4.1
}
SYMBOLS = {
    "lam": "λ",
    "label_smoothing": "ε",
    "hard_bias": "b",
    "margin": "ρ",
    "angular_multiplier": "m",
    "alpha": "α",
    "likelihood": "λ_lkd",
    "scale": "s",
    "center": "center",
    "symmetry": "symmetry",
}


@dataclass(frozen=True)
class Recipe:
    """One run. The seed fixes initial weights, order, augmentation, subset and noise, so runs of the same seed are pairs."""

    loss: str  # a word of LOSSES
    seed: int
    data: str = "digits"  # digits, cifar10, cifar100 or the path of an image folder
    data_root: str = "data"  # where the files of cifar10 and cifar100 are
    data_digest: str = ""  # of all images and labels: other data, another run
    image_size: int = 32  # pixels; image folders only
    network: str = "small"
    label_noise: float = 0.0  # this share of the training labels is moved to another class
    train_fraction: float = 1.0  # this share of the training set is used
    epochs: int = 30
    batch_size: int = 128  # this and the next three are the paper's (Sec. 4.1)
    learning_rate: float = 0.1  # of the first epoch; it falls evenly in log scale, once an epoch, to 1/1000 in the last
    momentum: float = 0.9
    weight_decay: float = 1e-4
    crop_padding: int = 0  # pixels by which a training image is moved at most
    flip: bool = False  # whether a training image is mirrored half the time
    lam: float | None = None
    hard_bias: float | None = None
    label_smoothing: float | None = None
    margin: float | None = None
    angular_multiplier: int | None = None
    alpha: float | None = None
    likelihood: float | None = None
    scale: float | None = None
    center: float | None = None
    symmetry: float | None = None
    device: str = "cpu"

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def id(self) -> str:
        """The name of the run's folder: readable, and different for every different recipe."""
        # the digest says which data it is; the folder may move
        what = {name: value for name, value in self.to_dict().items() if name not in ("data", "data_root") and value is not None}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.loss}-noise{self.label_noise:g}-seed{self.seed}-{digest}"

    @property
    def loss_label(self) -> str:
        """The loss and its settings, as a row of a table is called."""
        settings = [f"{SYMBOLS[name]}={getattr(self, name):g}" for name in LOSSES[self.loss]]
        return " ".join([self.loss.replace("_", " "), *settings])
