"""A recipe is a run: every number of it, and nothing that is not.

This module is read by the command line before anything heavy is imported, so it needs the standard library alone.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..data import SETS
from ..models import NAMES
from ..options import NON_NEGATIVE, NON_NEGATIVE_INT, PIXELS, POSITIVE, POSITIVE_INT, POSITIVE_SHARE, SHARE, SHARE_BELOW_1, option
from .methods import LOSSES, METHODS, SYMBOLS, Settings
from .noise import Noise, noise_of

PLACES = ("data", "data_root", "weights", "labels")  # fields that say where, not what
SCHEDULES = ("log", "cosine", "steps")
AUGMENTATIONS = ("shift", "inception")
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class Recipe(Settings):
    """One run. The seed fixes initial weights, order, augmentation, subset and noise, so runs of the same seed are pairs."""

    loss: str = option(help=" ".join(METHODS), type=tuple(METHODS), metavar="LOSS", usual=True)
    seed: int = option(
        help="of initial weights, order, augmentation, subset and noise; runs of the same seed are pairs",
        type=NON_NEGATIVE_INT,
        metavar="SEED",
        usual=True,
    )
    # data
    data: str = option("digits", help=f"{', '.join(SETS)} or the path of an image folder", usual=True)
    data_root: str = option("data", help="where the files of the named data sets are", metavar="DIR", usual=True)
    data_digest: str = option(
        "", help="the digest of all images and labels, or of the list of files: other data, another run", computed=True
    )
    image_size: int = option(
        32, help="pixels to which the images of a folder are resized and cropped", type=PIXELS, metavar="PIXELS", usual=True
    )
    train_fraction: float = option(1.0, help="this share of the training set is used", type=POSITIVE_SHARE, metavar="SHARE", usual=True)
    label_noise: float = option(
        0.0, help="this share of the training labels is moved to another class", type=SHARE, metavar="SHARE", usual=True
    )
    noise_kind: str | None = option(
        None, help="asymmetric: labels are moved to the next class; human: CIFAR-100N; None: uniformly to any other class", computed=True
    )
    long_tail: float | None = option(
        None, help="class sizes fall exponentially; this is the largest over the smallest", type=POSITIVE, metavar="RATIO", usual=True
    )
    labels: str | None = option(
        None, help="a CSV file (image, label) with other labels for the training images of a folder", metavar="FILE", usual=True
    )
    unverified: bool | None = option(None, help="whether files of svhn are taken whose md5 is not the published one", computed=True)
    validation_fraction: float = option(
        0.0, help="this share of what is used is held out; such a run measures itself there and never sees the test set", type=SHARE_BELOW_1
    )
    augmentation: str = option(
        "shift", help="shift: by crop_padding and flip; inception: random resized crops, flip, colours, PCA lighting", type=AUGMENTATIONS
    )
    crop_padding: int = option(0, help="pixels by which a training image is moved at most", type=NON_NEGATIVE_INT)
    crop_fill: str = option("mean", help="what comes in at the border: mean (of the channel) or reflect", type=("mean", "reflect"))
    flip: bool = option(False, help="whether a training image is mirrored half the time")
    # network
    network: str = option("small", help=f"one of {' '.join(NAMES)}", metavar="NAME", usual=True)
    width: float = option(
        1.0, help="this share of the channels of layer13, wrn28_10, vgg16, vgg16_mod, mobilenet or resnext50", type=POSITIVE
    )
    dropout: float = option(
        0.0, help="the share of dropout in the blocks of wrn28_10, or before the classifier of a timm model", type=SHARE_BELOW_1
    )
    weights: str = option(
        "", help="a local file of pretrained weights; a classifier of another size in it is left out", metavar="FILE", usual=True
    )
    weights_digest: str = option("", help="the digest of the file of weights", computed=True)
    # training: the defaults are the paper's (Sec. 4.1)
    epochs: int = option(30, help="passes over the training set", type=POSITIVE_INT, metavar="N", usual=True)
    batch_size: int = option(128, help="samples in a batch, of all processes together", type=POSITIVE_INT, metavar="N", usual=True)
    learning_rate: float = option(0.1, help="the learning rate of the first epoch", type=POSITIVE, usual=True)
    schedule: str = option(
        "log",
        help="how the learning rate, set once an epoch, falls: log falls evenly in log scale to final_factor in the last, "
        "cosine falls to final_factor, steps changes at milestones",
        type=SCHEDULES,
    )
    final_factor: float = option(1e-3, help="the last learning rate over the first; log and cosine", type=POSITIVE_SHARE)
    milestones: tuple[int, ...] = option((), help="epochs (from 0) at which the learning rate is multiplied by step_factor")
    step_factor: float = option(0.1, help="the factor of the learning rate at each milestone", type=POSITIVE_SHARE)
    momentum: float = option(0.9, help="the momentum of SGD", type=SHARE)
    nesterov: bool = option(False, help="whether the momentum is Nesterov's")
    weight_decay: float = option(
        1e-4, help="the weight decay: so many times half the squared weights are added to the loss", type=NON_NEGATIVE
    )
    decay_all: bool = option(True, help="whether the weight decay acts on biases and on what normalisation learns, too")
    clip_norm: float | None = option(
        None, help="the largest norm of the gradient of all parameters; a longer gradient is scaled down to it", type=POSITIVE
    )
    evaluate_every: int = option(1, help="epochs from one evaluation to the next; the last is always evaluated", type=POSITIVE_INT)
    # the machine, where it changes the digits
    device: str = option("cpu", help="cpu, cuda, cuda:1, mps, ...", usual=True)
    threads: int = option(1, help="threads of a run on the CPU", type=POSITIVE_INT, metavar="N")
    processes: int = option(1, help="processes that share each batch, as torchrun starts them", computed=True)
    precision: str = option(
        "float32",
        help="the precision of the network: float32, tf32 (of matrix products on a GPU) or bfloat16 (by autocast)",
        type=PRECISIONS,
    )
    channels_last: bool = option(False, help="whether images lie in memory with their channels last")
    compile: str = option(
        "",
        help="a backend of torch.compile, inductor say, for full training batches; the first step compiles, which takes a while. "
        "Empty: none",
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
        kind = f"-{self.noise_kind}" if self.noise_kind else ""
        return f"{self.loss}{kind}-noise{self.label_noise:g}-seed{self.seed}-{digest}"

    @property
    def noise(self) -> Noise:
        """The wrong labels of the training set, as ``--label-noise`` has them."""
        return noise_of(self.label_noise, self.noise_kind)

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
        symbols = SYMBOLS | dict(METHODS[self.loss].symbols)
        settings = [f"{symbols[name]}={value:g}" for name, value in self.settings.items()]
        settings += [{"kl_qu": "D(q‖u)", "kl_uq": "D(u‖q)"}[self.divergence]] if self.divergence in ("kl_qu", "kl_uq") else []
        return " ".join([self.loss.replace("_", " "), *settings])


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
