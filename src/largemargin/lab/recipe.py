"""A recipe is a run: every number of it, and nothing that is not.

This module is read by the command line before anything heavy is imported, so it needs the standard library alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import LabError

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
# the names of --network; the last stands for any of timm's
NETWORKS = ("small", "layer13", "layer13_mean_teacher", "wrn28_10", "vgg16", "vgg16_mod", "mobilenet", "resnext50", "timm:NAME")
SCHEDULES = ("log", "cosine", "steps")
AUGMENTATIONS = ("shift", "inception")
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class Recipe:
    """One run. The seed fixes initial weights, order, augmentation, subset and noise, so runs of the same seed are pairs."""

    loss: str  # a word of LOSSES
    seed: int
    # data
    data: str = "digits"  # digits, cifar10, cifar100, svhn, imagenet, places365 or the path of an image folder
    data_root: str = "data"  # where the files of the named data sets are
    data_digest: str = ""  # of all images and labels, or of the list of files: other data, another run
    image_size: int = 32  # pixels; image folders only
    train_fraction: float = 1.0  # this share of the training set is used
    label_noise: float = 0.0  # this share of the training labels is moved to another class
    validation_fraction: float = 0.0  # this share of what is used is held out; such a run measures itself there and never sees the test set
    augmentation: str = "shift"  # shift: by crop_padding and flip; inception: random resized crops, flip, colours, PCA lighting
    crop_padding: int = 0  # pixels by which a training image is moved at most
    crop_fill: str = "mean"  # what comes in at the border: mean (of the channel) or reflect
    flip: bool = False  # whether a training image is mirrored half the time
    # network
    network: str = "small"  # a name of NETWORKS
    width: float = 1.0  # this share of the channels of layer13
    dropout: float = 0.0  # in the blocks of wrn28_10; before the classifier of a timm model
    weights: str = ""  # a local file of pretrained weights; a classifier of another size in it is left out
    weights_digest: str = ""  # of that file
    # training: the defaults are the paper's (Sec. 4.1)
    epochs: int = 30
    batch_size: int = 128  # of all processes together
    learning_rate: float = 0.1  # of the first epoch
    schedule: str = (
        "log"  # once an epoch; log: evenly in log scale to final_factor in the last; cosine: to final_factor; steps: at milestones
    )
    final_factor: float = 1e-3  # the last learning rate over the first; log and cosine
    milestones: tuple[int, ...] = ()  # epochs (from 0) at which the learning rate is multiplied by step_factor
    step_factor: float = 0.1  # at each milestone
    momentum: float = 0.9  # of SGD
    nesterov: bool = False  # whether the momentum is Nesterov's
    weight_decay: float = 1e-4  # times half the squared weights, added to the loss
    decay_all: bool = True  # also biases and what normalisation learns
    clip_norm: float | None = None  # of the gradient of all parameters
    evaluate_every: int = 1  # epochs; the last is always evaluated
    # the loss: what LOSSES names of it
    lam: float | None = None  # the paper's lambda, eq. (11)
    hard_bias: float | None = None  # b of eq. (15): the head start of the other classes over the target
    label_smoothing: float | None = None  # epsilon of eq. (13)
    divergence: str | None = None  # symmetric (8), kl_qu or kl_uq (10); None: symmetric
    margin: float | None = None  # rho of the hinges and the softplus; of cosface a cosine, of arcface radians
    angular_multiplier: int | None = None  # m of lsoftmax: 1 to 4
    alpha: float | None = None  # of gaussian_mixture: its margin
    alpha_squared: float | None = None  # of noisy_softmax: of the noise
    likelihood: float | None = None  # the weight of gaussian_mixture's likelihood term
    scale: float | None = None  # s of cosface and arcface: the length of the features
    center: float | None = None  # the weight of the center loss
    symmetry: float | None = None  # the weight of the distance from the super-symmetric classifier at the end of the run
    # the machine, where it changes the digits
    device: str = "cpu"
    threads: int = 1  # of a run on the CPU
    processes: int = 1  # that share each batch, as torchrun starts them
    precision: str = "float32"  # of the network: float32, tf32 (of matrix products on a GPU) or bfloat16 (by autocast)
    channels_last: bool = False  # how images lie in memory
    compile: str = ""  # a backend of torch.compile, inductor say, for full training batches; the first step compiles, which takes a while

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


def check_image_size(data: str, image_size: int | None) -> None:
    """Raises LabError for one that would change nothing."""
    if data in ("digits", "cifar10", "cifar100", "svhn") and image_size is not None:
        raise LabError(f"image_size {image_size} is nothing that {data} has: its images are used as they are; leave it out")


def suited_to(data: str, image_size: int | None = None) -> dict[str, Any]:
    """The fields in which a data set asks for other than the defaults; ``image_size`` is of image folders, None: 32 or what is usual."""
    match data:
        case "digits":
            return {}
        case "cifar10" | "cifar100":
            return {"epochs": 50, "crop_padding": 4, "flip": True}  # Sec. 4.1
        case "svhn":
            return {"epochs": 50}  # a mirrored digit is another
        case "imagenet" | "places365":
            schedule = {"epochs": 120, "batch_size": 256, "schedule": "steps", "milestones": (30, 60, 90)}
            return {**schedule, "augmentation": "inception", "image_size": image_size or 224}
    pixels = image_size or 32
    return {"epochs": 50, "image_size": pixels, "crop_padding": pixels // 8, "flip": True}
