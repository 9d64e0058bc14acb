"""A recipe is a run: every number of it, and nothing that is not.

This module is read by the command line before anything heavy is imported, so it needs the standard library alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data import SETS
from ..errors import LabError
from ..models import NAMES

BASELINE = "softmax"
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
    "noisy_softmax": {"alpha_squared": 0.1},  # Chen et al., 2017
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
    "alpha_squared": "α²",
    "likelihood": "λ_lkd",
    "scale": "s",
    "center": "center",
    "symmetry": "symmetry",
}
OF_SOME_LOSSES = ("divergence", *SYMBOLS)  # the fields of a recipe that are settings of some losses only

PLACES = ("data", "data_root", "weights")  # fields that say where, not what
SCHEDULES = ("log", "cosine", "steps")
AUGMENTATIONS = ("shift", "inception")
PRECISIONS = ("float32", "tf32", "bfloat16")


def option(default: Any, help: str) -> Any:
    """A field with its default and what ``--help`` says of it."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Recipe:
    """One run. The seed fixes initial weights, order, augmentation, subset and noise, so runs of the same seed are pairs."""

    loss: str = field(metadata={"help": "a word of LOSSES"})
    seed: int = field(metadata={"help": "of initial weights, order, augmentation, subset and noise; runs of the same seed are pairs"})
    # data
    data: str = option("digits", f"{', '.join(SETS)} or the path of an image folder")
    data_root: str = option("data", "where the files of the named data sets are")
    data_digest: str = option("", "the digest of all images and labels, or of the list of files: other data, another run")
    image_size: int = option(32, "pixels to which the images of a folder are resized and cropped")
    train_fraction: float = option(1.0, "this share of the training set is used")
    label_noise: float = option(0.0, "this share of the training labels is moved to another class")
    validation_fraction: float = option(
        0.0, "this share of what is used is held out; such a run measures itself there and never sees the test set"
    )
    augmentation: str = option("shift", "shift: by crop_padding and flip; inception: random resized crops, flip, colours, PCA lighting")
    crop_padding: int = option(0, "pixels by which a training image is moved at most")
    crop_fill: str = option("mean", "what comes in at the border: mean (of the channel) or reflect")
    flip: bool = option(False, "whether a training image is mirrored half the time")
    # network
    network: str = option("small", f"one of {' '.join(NAMES)}")
    width: float = option(1.0, "this share of the channels of layer13")
    dropout: float = option(0.0, "the share of dropout in the blocks of wrn28_10, or before the classifier of a timm model")
    weights: str = option("", "a local file of pretrained weights; a classifier of another size in it is left out")
    weights_digest: str = option("", "the digest of the file of weights")
    # training: the defaults are the paper's (Sec. 4.1)
    epochs: int = option(30, "passes over the training set")
    batch_size: int = option(128, "samples in a batch, of all processes together")
    learning_rate: float = option(0.1, "the learning rate of the first epoch")
    schedule: str = option(
        "log",
        "how the learning rate, set once an epoch, falls: log falls evenly in log scale to final_factor in the last, "
        "cosine falls to final_factor, steps changes at milestones",
    )
    final_factor: float = option(1e-3, "the last learning rate over the first; log and cosine")
    milestones: tuple[int, ...] = option((), "epochs (from 0) at which the learning rate is multiplied by step_factor")
    step_factor: float = option(0.1, "the factor of the learning rate at each milestone")
    momentum: float = option(0.9, "the momentum of SGD")
    nesterov: bool = option(False, "whether the momentum is Nesterov's")
    weight_decay: float = option(1e-4, "the weight decay: so many times half the squared weights are added to the loss")
    decay_all: bool = option(True, "whether the weight decay acts on biases and on what normalisation learns, too")
    clip_norm: float | None = option(None, "the largest norm of the gradient of all parameters; a longer gradient is scaled down to it")
    evaluate_every: int = option(1, "epochs from one evaluation to the next; the last is always evaluated")
    # the loss: what LOSSES names of it
    lam: float | None = option(None, "the paper's lambda, eq. (11)")
    hard_bias: float | None = option(None, "b of eq. (15): the head start of the other classes over the target")
    label_smoothing: float | None = option(None, "epsilon of eq. (13)")
    divergence: str | None = option(None, "symmetric (8), kl_qu or kl_uq (10); None: symmetric")
    margin: float | None = option(None, "rho of the hinges and the softplus; of cosface a cosine, of arcface radians")
    angular_multiplier: int | None = option(None, "m of lsoftmax: 1 to 4")
    alpha: float | None = option(None, "the margin of gaussian_mixture")
    alpha_squared: float | None = option(None, "the strength of the noise of noisy_softmax")
    likelihood: float | None = option(None, "the weight of gaussian_mixture's likelihood term")
    scale: float | None = option(None, "s of cosface and arcface: the length of the features")
    center: float | None = option(None, "the weight of the center loss")
    symmetry: float | None = option(None, "the weight of the distance from the super-symmetric classifier at the end of the run")
    # the machine, where it changes the digits
    device: str = option("cpu", "cpu, cuda, cuda:1, mps, ...")
    threads: int = option(1, "threads of a run on the CPU")
    processes: int = option(1, "processes that share each batch, as torchrun starts them")
    precision: str = option(
        "float32", "the precision of the network: float32, tf32 (of matrix products on a GPU) or bfloat16 (by autocast)"
    )
    channels_last: bool = option(False, "whether images lie in memory with their channels last")
    compile: str = option(
        "", "a backend of torch.compile, inductor say, for full training batches; the first step compiles, which takes a while. Empty: none"
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(self.milestones))  # JSON has lists

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def id(self) -> str:
        """The name of the run's folder: readable, and different for every different recipe."""
        # the digests say which data and weights these are; their files may move
        what = {name: value for name, value in self.to_dict().items() if name not in PLACES and value is not None}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.loss}-noise{self.label_noise:g}-seed{self.seed}-{digest}"

    @property
    def streamed(self) -> bool:
        """Whether the images of a folder stay in their files, from which each epoch reads them anew."""
        return self.augmentation == "inception"

    @property
    def settings(self) -> dict[str, Any]:
        """Those that LOSSES names of its loss."""
        return {name: getattr(self, name) for name in LOSSES[self.loss]}

    @property
    def loss_label(self) -> str:
        """The loss and its settings, as a row of a table is called."""
        symbols = SYMBOLS | ({"margin": "m"} if self.loss in ("cosface", "arcface") else {})
        settings = [f"{symbols[name]}={value:g}" for name, value in self.settings.items()]
        settings += [{"kl_qu": "D(q‖u)", "kl_uq": "D(u‖q)"}[self.divergence]] if self.divergence in ("kl_qu", "kl_uq") else []
        return " ".join([self.loss.replace("_", " "), *settings])


def has_setting(loss: str, name: str) -> bool:
    """Whether a field of OF_SOME_LOSSES is a setting of this loss."""
    return name in LOSSES[loss] or (name == "divergence" and "lam" in LOSSES[loss])


def check_settings(losses: Sequence[str], given: Iterable[str]) -> None:
    """Raises LabError for a setting that none of these losses has: it would change nothing, or another loss."""
    for name in given:
        if name in OF_SOME_LOSSES and not any(has_setting(loss, name) for loss in losses):
            having = ", ".join(loss for loss in LOSSES if has_setting(loss, name))
            raise LabError(f"{name} is a setting of {having}, and not of {', '.join(losses)}; leave it out")


def unread(recipe: Recipe, given: Iterable[str]) -> list[str]:
    """A line for each given field that changes nothing in this recipe: its schedule or its augmentation does not read it."""
    steps, shift = recipe.schedule == "steps", recipe.augmentation == "shift"
    read = {
        "milestones": (steps, "schedule steps"),
        "step_factor": (steps, "schedule steps"),
        "final_factor": (not steps, "schedule log or cosine"),
        "crop_padding": (shift, "augmentation shift"),
        "flip": (shift, "augmentation shift; inception always mirrors half of the images"),
        "crop_fill": (shift and recipe.crop_padding > 0, "augmentation shift with a crop_padding above 0"),
    }
    return [
        f"warning: {name} {getattr(recipe, name)} changes nothing: it is for {read[name][1]}"
        for name in given
        if name in read and not read[name][0]
    ]
