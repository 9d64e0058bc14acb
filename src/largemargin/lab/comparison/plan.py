"""What a comparison is made of: every loss with every seed at every share of label noise.

This module is read by the command line before anything heavy is imported, so it needs the standard library alone.
"""

import dataclasses
import itertools
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data import SETS, is_array_file, suited_to
from ..models import NAMES
from ..options import NON_NEGATIVE, OPEN_SHARE, PIXELS, POSITIVE, POSITIVE_INT, POSITIVE_SHARE, option
from ..run.methods import LOSSES, METHODS, OF_SOME_LOSSES, has_setting
from ..run.noise import Noise, fields_of
from ..run.recipe import Recipe

Chosen = Mapping[tuple[str, Noise], float]  # the lam of a loss at a share of label noise


AUTO = "auto"  # of --seeds
FIRST_LOOK, MAX_SEEDS = 5, 20  # of --seeds auto


def looks_of(first: int, most: int) -> tuple[int, ...]:
    """How many pairs there are at each of at most 4 looks, evenly spaced."""
    return tuple(sorted({first, *(first + (most - first) * step // 3 for step in (1, 2, 3))}))


@dataclass(frozen=True)
class Comparison:
    """What is compared: every loss with every seed at every share of label noise."""

    data: str = option("digits", help=f"{', '.join(SETS)}, or the path of an image folder; scikit-learn has the digits", usual=True)
    data_root: str = option("data", help="where the files of the named data sets are", metavar="DIR", usual=True)
    data_digest: str = option("", help="that of the recipes", computed=True)
    image_size: int | None = option(
        None,
        help="images of a folder are resized and cropped to this; default: 32, or what a named data set has",
        type=PIXELS,
        metavar="PIXELS",
        usual=True,
    )
    network: str = option("small", help=" ".join(NAMES), metavar="NAME", usual=True)
    losses: tuple[str, ...] = option(
        ("softmax", "label_smoothing", "large_margin"), help=" ".join(METHODS), type=tuple(METHODS), metavar="LOSS", usual=True, many=True
    )
    lam: tuple[float, ...] = option(
        (0.3,),
        help="the paper's lambda, for the large-margin losses; of several one is chosen on a part of the training set",
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
        help="every loss is run with each seed; runs of one seed are pairs; auto: more of them until every verdict is clear",
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
        help="the share of the training labels that is moved to another class, asymmetric:SHARE (to the next class) or human "
        "(cifar100n); each of several is compared by itself",
        type=Noise,
        metavar="NOISE",
        usual=True,
        many=True,
    )
    train_fraction: float = option(1.0, help="train on this share of the training set", type=POSITIVE_SHARE, metavar="SHARE", usual=True)
    long_tail: float | None = option(
        None,
        help="class sizes fall exponentially; this is the largest over the smallest",
        type=POSITIVE,
        metavar="RATIO",
    )
    labels: str | None = option(
        None, help="a CSV file (image, label) with other labels for the training images of a folder", metavar="FILE"
    )
    unverified: bool = option(False, help="take files of svhn whose md5 is not the published one, also from svhn-first")
    max_seeds: int | None = option(None, help="with --seeds auto: no more pairs than these; default: 20", type=POSITIVE_INT, metavar="N")
    device: str = "cpu"
    overrides: dict[str, Any] = field(default_factory=dict)  # other fields of the recipes; of a loss only where it has them

    @property
    def is_folder(self) -> bool:
        return self.data not in SETS and not is_array_file(self.data)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "Comparison":
        """What ``vars`` gave, also after a passage through JSON."""
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        if isinstance(values.get("lam"), float | int):  # as it was before there could be several
            values["lam"] = (values["lam"],)
        return cls(**values)

    @property
    def choosing(self) -> tuple[str, ...]:
        """The losses whose lam has to be chosen."""
        return tuple(loss for loss in self.losses if "lam" in LOSSES[loss]) if len(self.lam) > 1 else ()

    @property
    def looks(self) -> tuple[int, ...]:
        """How many seeds there are at each look at the verdicts; one look where the seeds are given."""
        return looks_of(FIRST_LOOK, self.max_seeds) if self.max_seeds else (len(self.seeds),)

    @property
    def num_runs(self) -> int:
        """Runs that measure themselves on the test set, when all are done."""
        return len(self.losses) * len(self.seeds) * len(self.label_noise)

    def validating_recipes(self) -> list[Recipe]:
        """The runs by which lam is chosen: each measures itself on a part of its training set and never sees the test set."""
        return [
            self._recipe(loss, seed, noise, lam=lam, validation_fraction=self.validation_fraction)
            for seed in self.seeds[: self.looks[0]]  # seeds that are added change no choice
            for noise in self.label_noise
            for loss in self.choosing
            for lam in self.lam
        ]

    def recipes(self, chosen: Chosen | None = None) -> list[Recipe]:
        """The runs compared, seed by seed, so that pairs are finished together; without those whose lam is not chosen yet."""
        runs = []
        for seed, noise, loss in itertools.product(self.seeds, self.label_noise, self.losses):
            recipe = self._recipe(loss, seed, noise, lam=self.lam[0])
            if self.choosing:  # the test set is read once
                recipe = dataclasses.replace(recipe, evaluate_every=recipe.epochs)
            if loss in self.choosing:
                if (loss, noise) not in (chosen or {}):
                    continue
                recipe = dataclasses.replace(recipe, lam=(chosen or {})[loss, noise])
            runs.append(recipe)
        return runs

    def all_recipes(self) -> list[Recipe]:
        """The validating runs and the runs compared, before any lam is chosen: the first of the given ones stands for it."""
        any_lam = {(loss, noise): self.lam[0] for loss in self.choosing for noise in self.label_noise}
        return [*self.validating_recipes(), *self.recipes(any_lam)] if self.choosing else self.recipes()

    @property
    def example(self) -> Recipe:
        """One of its recipes, for what they share."""
        return self._recipe(self.losses[0], self.seeds[0], self.label_noise[0], lam=self.lam[0])

    def _recipe(self, loss: str, seed: int, noise: Noise, *, lam: float, **more: Any) -> Recipe:
        values: dict[str, Any] = {"data": self.data, "data_root": self.data_root, "data_digest": self.data_digest, "network": self.network}
        values |= fields_of(noise) | {"train_fraction": self.train_fraction, "device": self.device}
        values |= {"long_tail": self.long_tail, "labels": self.labels, "unverified": self.unverified or None}
        values |= suited_to(self.data, self.image_size) | LOSSES[loss]
        if self.epochs is not None:
            values["epochs"] = self.epochs
        if "lam" in LOSSES[loss]:
            values["lam"] = lam
        values |= {name: value for name, value in self.overrides.items() if name not in OF_SOME_LOSSES or has_setting(loss, name)}
        return Recipe(loss=loss, seed=seed, **values | more)

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
