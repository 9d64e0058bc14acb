"""What a comparison is made of: every loss with every seed at every share of label noise.

This module is read by the command line before anything heavy is imported, so it needs the standard library alone.
"""

import dataclasses
import json
import shlex
from dataclasses import dataclass, field
from typing import Any

from ..data import SETS, is_data_file, suited_to
from ..models import NAMES, OF_FEATURES
from ..options import NON_NEGATIVE, OPEN_SHARE, PIXELS, POSITIVE, POSITIVE_INT, POSITIVE_SHARE, option
from ..run.methods import LOSSES, METHODS, OF_SOME_LOSSES, has_setting
from ..run.noise import Noise, fields_of
from ..run.recipe import Recipe
from ..words import counted
from .design import Design

AUTO = "auto"  # of --seeds


@dataclass(frozen=True)
class Comparison(Design[Recipe]):
    """What is compared: every loss with every seed at every share of label noise."""

    data: str = option("digits", help=f"{', '.join(SETS)}, an image folder, FILE.npz or a table (.csv, .parquet)", usual=True)
    data_root: str = option("data", help="where the files of the named data sets are", metavar="DIR", usual=True)
    data_digest: str = option("", help="that of the recipes", computed=True)
    image_size: int | None = option(
        None,
        help="images of a folder are resized and cropped to this; default: 32, or what a named data set has",
        type=PIXELS,
        metavar="PIXELS",
        usual=True,
    )
    network: str = option("small", help=f"{' '.join(NAMES)}; default: small; mlp for features", metavar="NAME", usual=True)
    losses: tuple[str, ...] = option(
        ("softmax", "label_smoothing", "large_margin"), help=" ".join(METHODS), type=tuple(METHODS), metavar="LOSS", usual=True, many=True
    )
    lam: tuple[float, ...] = option(
        (0.3,),
        help="lambda, the weight of the large-margin term; of several values one is chosen on held-out training data",
        type=NON_NEGATIVE,
        metavar="LAMBDA",
        usual=True,
        many=True,
    )
    validation_fraction: float = option(
        0.2,
        help="the part of the training set that is held out from the runs that choose among several --lam",
        type=OPEN_SHARE,
        metavar="SHARE",
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2, 3, 4),
        help="every loss runs with each seed, and losses are compared seed by seed; auto: add seeds until every verdict is clear",
        type=int | str,
        metavar="SEED",
        usual=True,
        many=True,
    )
    epochs: int | None = option(
        None,
        help="passes over the training set; default: what suits the data, 50 for a folder",
        type=POSITIVE_INT,
        metavar="N",
        usual=True,
    )
    label_noise: tuple[Noise, ...] = option(
        (0.0,),
        help="SHARE of the training labels to move to any other class, asymmetric:SHARE to move them to the next class, or human "
        "(labels of cifar100n); several are compared separately",
        type=Noise,
        metavar="NOISE",
        usual=True,
        many=True,
    )
    train_fraction: float = option(1.0, help="share of the training set to train on", type=POSITIVE_SHARE, metavar="SHARE", usual=True)
    long_tail: float | None = option(
        None,
        help="class sizes fall exponentially; this is the largest over the smallest",
        type=POSITIVE,
        metavar="RATIO",
    )
    labels: str | None = option(
        None, help="a CSV file (image, label) with other labels for the training images of a folder", metavar="FILE"
    )
    target: str | None = option(
        None, help="the column of the classes in a table; default: label, target, class or y, else the last", metavar="COLUMN"
    )
    unverified: bool = option(False, help="take files of svhn whose md5 is not the published one, also from svhn-first")
    max_seeds: int | None = option(None, help="with --seeds auto: no more pairs than these; default: 20", type=POSITIVE_INT, metavar="N")
    device: str = "cpu"
    overrides: dict[str, Any] = field(default_factory=dict)  # other fields of the recipes; of a loss only where it has them

    @property
    def noun(self) -> str:
        return "sample" if self.network in OF_FEATURES else "image"

    @property
    def is_folder(self) -> bool:
        return self.data not in SETS and not is_data_file(self.data)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Comparison":
        """What ``vars`` gave, also after a passage through JSON."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        if isinstance(values.get("lam"), float | int):  # as it was before there could be several
            values["lam"] = (values["lam"],)
        return cls(**values)

    @property
    def title(self) -> str:
        return f"What a margin buys on {self.data}"

    @property
    def subject(self) -> str:
        return f"{counted(self.example.epochs, 'epoch')} on {self.data}"

    def told(self) -> dict[str, Any]:
        return {"comparison": vars(self)}

    def has_lam(self, loss: str) -> bool:
        return "lam" in LOSSES[loss]

    @property
    def choice_note(self) -> str:
        return (
            f"lam was chosen by the error on a part of the training set ({100 * self.validation_fraction:g}%, held out from these runs), "
            "mean ± std (n-1) over seeds; its labels are as noisy as the others. The test set had no part in it: it is measured once, "
            "after the last epoch of the runs with the chosen lam, which train on the whole training set."
        )

    def planned(self, loss: str, seed: int, noise: Noise, *, lam: float, **more: Any) -> Recipe:
        values: dict[str, Any] = {"data": self.data, "data_root": self.data_root, "data_digest": self.data_digest, "network": self.network}
        values |= fields_of(noise) | {"train_fraction": self.train_fraction, "device": self.device}
        values |= {"long_tail": self.long_tail, "labels": self.labels, "target": self.target, "unverified": self.unverified or None}
        values |= suited_to(self.data, self.image_size) | LOSSES[loss]
        if self.epochs is not None:
            values["epochs"] = self.epochs
        if "lam" in LOSSES[loss]:
            values["lam"] = lam
        values |= {name: value for name, value in self.overrides.items() if name not in OF_SOME_LOSSES or has_setting(loss, name)}
        recipe = Recipe(loss=loss, seed=seed, **values | more)
        if self.choosing and not more:  # the test set is read once
            recipe = dataclasses.replace(recipe, evaluate_every=recipe.epochs)
        return recipe

    def command(self) -> str:
        """The command that makes this comparison: what differs from the defaults."""
        words = ["largemargin", "compare"]
        for name, default in ((f.name, f.default) for f in dataclasses.fields(self)):
            value = getattr(self, name)
            if name in ("overrides", "data_digest") or value == default:
                continue
            if name == "seeds" and self.max_seeds:
                value = AUTO
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if isinstance(v, float) else str(v) for v in values if v is not True)]
        for name, value in self.overrides.items():
            if name != "weights_digest":
                words += [f"--recipe.{name}", value if isinstance(value, str) else json.dumps(value)]
        return shlex.join(words)
