"""The paper as data: the cells of its tables, each with the recipe that computes it and the number that was printed.

This module is read by the command line before anything heavy is imported, so it needs the standard library alone.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..data import STREAMED as LARGE_DATA  # no reduced scale
from ..errors import LabError
from ..run.methods import LOSSES
from ..run.noise import HUMAN, fields_of
from ..run.recipe import Recipe

SEEDS = (0, 1, 2)  # "three times with different initial random seeds"


@dataclass(frozen=True)
class Number:
    """An error in %, as printed."""

    mean: float
    std: float | None = None

    @classmethod
    def read(cls, text: str) -> "Number | None":
        """Of ``27.27±0.15``, ``27.27`` or ``-``, which is none."""
        mean, _, std = text.partition("±")
        return None if mean == "-" else cls(float(mean), float(std) if std else None)


@dataclass(frozen=True)
class Scale:
    """How much smaller than the paper's the runs are."""

    name: str
    changes: Mapping[str, Any]  # fields of Recipe
    description: str


SCALES = {
    "full": Scale("full", {}, "The size of the paper."),
    "reduced": Scale(
        "reduced",
        {"train_fraction": 0.2, "epochs": 15, "width": 0.25, "precision": "bfloat16", "channels_last": True, "evaluate_every": 5},
        "Smaller than the paper: a fifth of the training set (10,000 images of CIFAR), 15 epochs in place of 50, and the "
        "13-layer network with a quarter of its channels (other networks are whole), so its errors compare with each other, not with the "
        "paper's.",
    ),
}


@dataclass(frozen=True)
class Cell:
    """One cell of one table."""

    table: str  # a name of TABLES
    row: str  # the method, as the paper calls it
    column: str  # "" where the table has one column
    settings: Mapping[str, Any]  # fields of Recipe, without the seed
    paper: Number | None = None  # the paper's number
    port: Number | None = None  # the number that the README of the author's PyTorch port has for this setting
    baseline: bool = False  # the softmax of its column
    note: str = ""  # what the paper says of it beside a number

    @property
    def name(self) -> str:
        return "/".join([self.table, *(slug(text) for text in (self.row, self.column) if text)])

    @property
    def seeds(self) -> tuple[int, ...]:
        """Those that the paper's number is of, so far as it says."""
        return SEEDS[:1] if self.settings["data"] in LARGE_DATA else SEEDS

    def lacks(self, scale: Scale) -> str:
        """Why the cell cannot be computed at this scale; empty where it can."""
        if scale.changes and self.settings["data"] in LARGE_DATA:
            return f"{self.settings['data']} is only used whole"
        if "width" in scale.changes and self.settings["loss"] == "super_symmetric" and self.settings["network"] == "layer13":
            return "a super-symmetric classifier of 100 classes needs 99 features or more, and the narrow network has 32"
        return ""

    def recipes(self, seeds: Sequence[int] | None = None, scale: Scale | None = None, **fixed: Any) -> list[Recipe]:
        """Its runs, one a seed; ``fixed`` has the last word, over the scale's changes, over the settings."""
        scale = scale or SCALES["full"]
        if reason := self.lacks(scale):
            raise LabError(f"--scale {scale.name}: {self.name} has no such scale, {reason}; use --scale full")
        shares = [settings.get("train_fraction", 1.0) for settings in (self.settings, scale.changes)]
        settings = {**self.settings, **scale.changes, "train_fraction": round(math.prod(shares), 10), **fixed}
        if settings["network"] != "layer13" and "width" not in fixed:
            settings.pop("width", None)  # others are whole
        return [Recipe(seed=seed, **settings) for seed in (self.seeds if seeds is None else seeds)]


def slug(text: str) -> str:
    """``ours λ=0.3`` as ``ours-0.3``."""
    plain = text.replace("λ=", "").encode("ascii", "replace").decode().lower()
    return re.sub(r"[^a-z0-9.]+", "-", plain).strip("-")


# what is trained

# Sec. 4.1; the learning rate goes from 0.1 to 0.0001 in log scale, once an epoch
SGD: dict[str, Any] = {
    "epochs": 50,
    "batch_size": 128,
    "learning_rate": 0.1,
    "schedule": "log",
    "final_factor": 1e-3,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "decay_all": True,
}
CROPS: dict[str, Any] = {"crop_padding": 4, "crop_fill": "mean", "flip": True}
CIFAR100: dict[str, Any] = {"data": "cifar100", "network": "layer13", **SGD, **CROPS}
CIFAR10: dict[str, Any] = {**CIFAR100, "data": "cifar10"}
WRN_CIFAR10: dict[str, Any] = {**CIFAR10, "network": "wrn28_10"}
WRN_SVHN: dict[str, Any] = {"data": "svhn", "network": "wrn28_10", **SGD}
STEPS: dict[str, Any] = {
    **{name: value for name, value in SGD.items() if name != "final_factor"},
    "epochs": 120,
    "batch_size": 256,
    "schedule": "steps",
    "milestones": (30, 60, 90),
    "step_factor": 0.1,
    "augmentation": "inception",
    "image_size": 224,
}


def large(network: str, data: str = "imagenet") -> dict[str, Any]:
    return {"data": data, "network": network, **STEPS}


def loss(word: str, **changes: Any) -> dict[str, Any]:
    """The fields of a loss: its usual settings but for ``changes``."""
    return {"loss": word, **LOSSES[word], **changes}


SOFTMAX = loss("softmax")
OURS = loss("large_margin", lam=0.3)

# the assumptions, by table, network, data or loss

ASSUMPTIONS: dict[str, tuple[str, ...]] = {
    "layer13": (
        "The paper's table of the 13-layer network is in its supplement; the network is that of the author's PyTorch port, whose last "
        "two convolutions are 3x3, with ReLU, no dropout, no noise (--recipe.network layer13_mean_teacher is the network of its origin, "
        "where they are 1x1).",
        "First weights are those of the port: He's by the fan out, and normal with standard deviation 0.01 in the classifier.",
    ),
    "sgd": (
        "Weight decay is on every parameter, as in the port (--recipe.decay_all false leaves out biases and batch norm).",
        "The paper does not say of which epoch its error is; the error is of the last epoch, never of the best on the test set.",
        "The paper's runs were made with MatConvNet, and it says nothing of first weights and of batch norm; here inputs are normalized by "
        "channel.",
    ),
    "cifar": ("Training images are moved by up to 4 pixels, with the channel's mean at the border, and mirrored, as in the port.",),
    "sub-sample": ("The sub-sample is drawn uniformly without replacement, anew for each seed, and not balanced over classes.",),
    "table3a": ("The number of epochs is the same for smaller training sets, so there are fewer steps.",),
    "table3b": (
        "Exactly the given share of the labels is moved, each uniformly to one of the other classes, anew for each seed; the test labels "
        "are clean.",
    ),
    "human": (
        "Beyond the paper: the training labels are those that people gave (CIFAR-100N, Wei et al., ICLR 2022), 40.2% of them wrong and the "
        "same for each seed; the test labels are clean.",
        "The leaderboard of CIFAR-100N has an accuracy of 55.50 ± 0.66% for cross-entropy, of another network (ResNet-34) and schedule.",
    ),
    "fig3": ("The bias is the mean over the training samples of an epoch, each measured when its batch is trained on.",),
    "wrn28_10": (
        "The paper's schedule for WRN-28-10 is in its supplement; it is taken to be that of Sec. 4.1, 50 epochs in log scale with weight "
        "decay 0.0001, because the printed baseline is worse than that of the network's authors with their 200 epochs.",
        "No dropout; first weights are He's by the fan in, and batch norm starts with a scale of 1.",
    ),
    "svhn": (
        "SVHN is trained on its 73,257 training images, without the extra ones.",
        "Its training images are neither moved nor mirrored, as by the authors of the network.",
    ),
    "imagenet": (
        "The paper's recipe for ImageNet is in its supplement; it is that of the port: batches of 256, learning rate 0.1 divided by 10 "
        "after 30, 60 and 90 of 120 epochs, weight decay 0.0001, random resized crops of 224 pixels with flip, colour jitter and PCA "
        "lighting.",
        "The paper prints no deviation here: one run a cell.",
    ),
    "places365": (
        "The paper's recipe for Places-365 is in its supplement; it is taken to be that of ImageNet.",
        "The data set is the small images of Places365-Standard, with its validation set for testing.",
    ),
    "vgg16": (
        "Batch norm also after the fully connected layers, no dropout, and first weights of standard deviation 0.01, as in the port.",
    ),
    "vgg16_mod": (
        "The network is that of the port: a 1x1 convolution to 4096 channels in place of the last pooling, no dropout, and first weights "
        "of standard deviation 0.01.",
    ),
    "mobilenet": (
        "The port has no MobileNet: the network is version 1 at full width, trained as the others are, with He's first weights by the fan "
        "out.",
    ),
    "resnext50": ("The network is torchvision's ResNeXt-50 32x4d, with its first weights.",),
    "timm:resnet50": ("The port took torchvision's network; this one is timm's.",),
    "timm:densenet169": ("The port took torchvision's network; this one is timm's.",),
    "port": (
        "The README of the port does not say of which epoch its errors are; its program prints the best on the test set, these are of the "
        "last.",
    ),
    "super_symmetric": (
        "The constraint is in the paper's supplement; here the classifier is exactly super-symmetric, with a learned frame and scale.",
    ),
    "gradual_super_symmetry": (
        "The paper suggests to enforce super-symmetry gradually and gives no form; here a penalty grows linearly over the run.",
    ),
    "lsoftmax": (
        "The paper does not say which multiplier of the angle LSM has; it is 4, annealed by its authors' formula: the weight of the plain "
        "logit falls from 1000 to 0.01 over the run, with a λ_min of 0.",
        "The classifier of LSM has no bias.",
    ),
    "gaussian_mixture": (
        "The paper does not give the settings of LGM; they are its authors' for CIFAR-100: alpha in steps up to 0.3, likelihood weight "
        "0.1, identity covariances.",
        "The means of LGM start normal with variance 2 / D, D the number of features, and have twice the learning rate of the network, as "
        "its authors'.",
    ),
    "center": ("The paper gives no weight of the center loss; it is 0.003, that of the loss's authors.",),
    "center_large_margin": ("The paper gives no weight of the center loss; it is 0.003, that of the loss's authors.",),
}


def assumptions(cell: Cell, scale: Scale | None = None) -> tuple[str, ...]:
    """What the paper leaves open, and how it is decided for this cell."""
    data, network = cell.settings["data"], cell.settings["network"]
    shares = [settings.get("train_fraction", 1.0) for settings in (cell.settings, (scale or SCALES["full"]).changes)]
    kinds = [network, "cifar" if data.startswith("cifar") else data, "imagenet" if data == "places365" else "", "sgd"]
    uniform = cell.settings.get("label_noise") and not cell.settings.get("noise_kind")
    degraded = ["sub-sample" if min(shares) < 1 else "", "table3b" if uniform else ""]
    keys = [*degraded, cell.table, *kinds, cell.settings["loss"], "port" if cell.port else ""]
    return tuple(dict.fromkeys(sentence for key in keys for sentence in ASSUMPTIONS.get(key, ())))


# what was printed

TABLE_1_LAMS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TABLE_1 = {
    "D(u‖q)": "27.99±0.18 27.62±0.16 27.30±0.34 27.35±0.14 26.98±0.22 27.11±0.22 26.77±0.35 26.99±0.16 26.89±0.07",
    "D(q‖u)": "28.45±0.41 28.52±0.44 27.79±0.23 27.77±0.09 27.40±0.11 27.33±0.12 27.15±0.07 27.14±0.16 26.98±0.09",
    "symmetric D̃(q)": "28.21±0.32 27.92±0.12 27.27±0.15 27.38±0.10 27.13±0.17 26.73±0.15 26.98±0.09 27.13±0.08 26.87±0.08",
}
# the symmetric one is what None means: the same recipe, and the same run, as "ours"
DIVERGENCES: dict[str, dict[str, Any]] = {"D(u‖q)": {"divergence": "kl_uq"}, "D(q‖u)": {"divergence": "kl_qu"}, "symmetric D̃(q)": {}}

TABLE_2: dict[str, tuple[dict[str, Any], str]] = {
    "softmax": (SOFTMAX, "28.62±0.24"),
    "super-symmetry": (loss("super_symmetric"), "28.67±0.46"),
    "LSR λ=0.01": (loss("label_smoothing", label_smoothing=0.01), "28.80±0.23"),
    "LSR λ=0.05": (loss("label_smoothing", label_smoothing=0.05), "28.51±0.22"),
    "LSR λ=0.1": (loss("label_smoothing", label_smoothing=0.1), "28.48±0.13"),
    "LSR λ=0.3": (loss("label_smoothing", label_smoothing=0.3), "28.65±0.25"),
    "ours λ=0.3": (OURS, "27.27±0.15"),
}

TABLE_3_LOSSES = {"softmax": SOFTMAX, **{f"ours λ={lam:g}": loss("large_margin", lam=lam) for lam in (0.3, 0.5, 1.0)}}
TABLE_3A_RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5)
TABLE_3A = {
    "softmax": "29.66±0.21 30.94±0.06 32.71±0.07 34.11±0.14 36.87±0.26",
    "ours λ=0.3": "28.62±0.12 29.95±0.09 31.35±0.47 33.49±0.22 36.06±0.06",
    "ours λ=0.5": "28.09±0.03 29.56±0.20 30.83±0.20 33.13±0.09 35.58±0.37",
    "ours λ=1": "27.88±0.23 29.21±0.13 30.83±0.15 33.11±0.46 35.49±0.15",
}
TABLE_3B_NOISES = (0.1, 0.2, 0.3, 0.4, 0.5)
TABLE_3B = {
    "softmax": "33.97±0.21 37.17±0.34 40.54±0.35 43.65±0.81 48.37±0.19",
    "ours λ=0.3": "31.59±0.17 34.98±0.07 38.23±0.26 42.06±0.11 46.87±0.32",
    "ours λ=0.5": "31.00±0.19 34.38±0.19 37.91±0.17 41.53±0.31 46.41±0.09",
    "ours λ=1": "30.42±0.20 33.50±0.07 36.75±0.23 40.76±0.25 46.43±0.19",
}

TABLE_4_LOSSES = {
    "softmax": SOFTMAX,
    "hinge (14)": loss("multiclass_hinge"),
    "modified (15)": loss("modified"),
    "LGM": loss("gaussian_mixture"),
    "LSM": loss("lsoftmax"),
    "ours λ=0.3": OURS,
    "modified (15) + ours λ=0.3": loss("modified_large_margin", lam=0.3),
}
TABLE_4: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "CIFAR-10 WRN-28-10": (
        WRN_CIFAR10,
        {
            "softmax": "4.73±0.07",
            "hinge (14)": "5.26±0.15",
            "modified (15)": "4.68±0.07",
            "LGM": "4.75±0.04",
            "LSM": "4.49±0.13",
            "ours λ=0.3": "4.60±0.05",
        },
    ),
    "SVHN WRN-28-10": (
        WRN_SVHN,
        {
            "softmax": "2.93±0.03",
            "hinge (14)": "3.15±0.04",
            "modified (15)": "2.89±0.05",
            "LGM": "2.65±0.07",
            "LSM": "2.80±0.03",
            "ours λ=0.3": "2.67±0.03",
        },
    ),
    "ImageNet VGG-16": (
        large("vgg16"),
        {"softmax": "27.94", "hinge (14)": "46.58", "modified (15)": "27.65", "LGM": "-", "LSM": "27.92", "ours λ=0.3": "27.27"},
    ),
    "ImageNet VGG-16-mod": (
        large("vgg16_mod"),
        {
            "softmax": "25.65",
            "hinge (14)": "45.17",
            "modified (15)": "24.92",
            "LGM": "-",
            "LSM": "24.98",
            "ours λ=0.3": "24.53",
            "modified (15) + ours λ=0.3": "24.37",
        },
    ),
    "ImageNet MobileNet": (
        large("mobilenet"),
        {"softmax": "29.84", "hinge (14)": "55.79", "modified (15)": "29.15", "LGM": "34.12", "LSM": "39.35", "ours λ=0.3": "28.94"},
    ),
    "ImageNet ResNeXt-50": (large("resnext50"), {"softmax": "22.69", "ours λ=0.3": "22.27", "modified (15) + ours λ=0.3": "22.00"}),
    "Places-365 VGG-16-mod": (large("vgg16_mod", "places365"), {"softmax": "45.02", "ours λ=0.3": "44.61"}),
}

# of the README of the author's PyTorch port: softmax and ours
PORT: dict[str, tuple[dict[str, Any], str, str]] = {
    "CIFAR-10 13-layer": (CIFAR10, "8.45±0.27", "7.81±0.20"),
    "CIFAR-100 13-layer": (CIFAR100, "29.42±0.19", "27.61±0.09"),
    "ImageNet VGG-16-mod": (large("vgg16_mod"), "22.99", "22.09"),
    "ImageNet VGG-16": (large("vgg16"), "25.04", "24.08"),
    "ImageNet ResNet-50": (large("timm:resnet50"), "23.45", "23.28"),
    "ImageNet ResNeXt-50": (large("resnext50"), "22.42", "22.27"),
    "ImageNet DenseNet-169": (large("timm:densenet169"), "23.03", "22.70"),
}
PORT_ROWS = ("softmax", "ours λ=0.3")


def of_port(row: str, column: str) -> Number | None:
    """The port's number for a cell of the paper."""
    if column not in PORT or row not in PORT_ROWS:
        return None
    _, *printed = PORT[column]
    return Number.read(printed[PORT_ROWS.index(row)])


# the cells


def table_1() -> list[Cell]:
    """With the softmax of Table 2: the baseline that its numbers imply."""
    softmax = next(cell for cell in table_2() if cell.baseline)
    return [replace(softmax, table="table1", note="the baseline, which stands in Table 2")] + [
        Cell(
            "table1",
            row,
            f"{lam:g}",
            {**CIFAR100, **loss("large_margin", lam=lam), **DIVERGENCES[row]},
            Number.read(text),
            None if DIVERGENCES[row] else of_port(f"ours λ={lam:g}", "CIFAR-100 13-layer"),
        )
        for row, line in TABLE_1.items()
        for lam, text in zip(TABLE_1_LAMS, line.split(), strict=True)
    ]


def table_2() -> list[Cell]:
    return [
        Cell("table2", row, "", {**CIFAR100, **of_loss}, Number.read(text), of_port(row, "CIFAR-100 13-layer"), baseline=of_loss is SOFTMAX)
        for row, (of_loss, text) in TABLE_2.items()
    ]


def table_3(table: str, printed: Mapping[str, str], field: str, values: Sequence[float]) -> list[Cell]:
    return [
        Cell(table, row, f"{value:g}", {**CIFAR100, field: value, **TABLE_3_LOSSES[row]}, Number.read(text), baseline=row == "softmax")
        for row, line in printed.items()
        for value, text in zip(values, line.split(), strict=True)
    ]


def table_3a() -> list[Cell]:
    return table_3("table3a", TABLE_3A, "train_fraction", TABLE_3A_RATIOS)


def table_3b() -> list[Cell]:
    return table_3("table3b", TABLE_3B, "label_noise", TABLE_3B_NOISES)


def table_4() -> list[Cell]:
    return [
        Cell(
            "table4",
            row,
            column,
            {**training, **TABLE_4_LOSSES[row]},
            Number.read(text),
            of_port(row, column),
            baseline=row == "softmax",
            note="not printed: the paper says that the VGG models collapsed under LGM" if text == "-" else "",
        )
        for column, (training, printed) in TABLE_4.items()
        for row, text in printed.items()
    ]


def human() -> list[Cell]:
    """Table 3b with the labels that people gave, and label smoothing beside it."""
    methods = {"softmax": SOFTMAX, "LSR λ=0.1": TABLE_2["LSR λ=0.1"][0], **TABLE_3_LOSSES}
    return [
        Cell("human", row, "", {**CIFAR100, **fields_of(HUMAN), **of_loss}, baseline=row == "softmax", note="not in the paper")
        for row, of_loss in methods.items()
    ]


def figure_3() -> list[Cell]:
    rows = ("softmax", "LSR λ=0.1", "ours λ=0.3")
    return [Cell("fig3", row, "", {**CIFAR100, **TABLE_2[row][0]}, baseline=row == "softmax") for row in rows]


def section_3() -> list[Cell]:
    """The claims of the discussion, which have no numbers."""
    untrained = "the paper says that CNNs are not properly trained at all with it"
    complement = "the paper says that the center loss and ours complement each other"
    methods = {
        "softmax": (SOFTMAX, ""),
        "LSR λ=0.1": (TABLE_2["LSR λ=0.1"][0], "the paper says that LSR also enlarges the bias"),
        "ours λ=0.3": (OURS, "the paper says that ours pushes the classifier toward the super-symmetric one"),
        "hinge": (loss("crammer_singer_hinge"), untrained),
        "softplus with bias 1": (loss("hard_margin_softplus"), untrained),
        "gradual super-symmetry": (loss("gradual_super_symmetry"), "the paper suggests to enforce super-symmetry gradually (Sec. 4.1)"),
        "center": (loss("center"), complement),
        "center + ours λ=0.3": (loss("center_large_margin", lam=0.3), complement),
    }
    return [
        Cell("sec3", row, "", {**CIFAR100, **of_loss}, baseline=row == "softmax", note=note) for row, (of_loss, note) in methods.items()
    ]


def port() -> list[Cell]:
    printed = {(cell.row, cell.column): cell.paper for cell in table_4()}
    printed |= {(cell.row, "CIFAR-100 13-layer"): cell.paper for cell in table_2()}
    return [
        Cell(
            "port", row, column, {**PORT[column][0], **of_loss}, printed.get((row, column)), of_port(row, column), baseline=row == "softmax"
        )
        for column in PORT
        for row, of_loss in zip(PORT_ROWS, (SOFTMAX, OURS), strict=True)
    ]


def study() -> list[Cell]:
    """What a small machine can do of Tables 2 and 3b."""
    printed = {(cell.row, ""): cell.paper for cell in table_2()} | {(cell.row, cell.column): cell.paper for cell in table_3b()}
    methods = {row: TABLE_2[row][0] for row in ("softmax", "LSR λ=0.1", "ours λ=0.3")} | {"ours λ=1": TABLE_3_LOSSES["ours λ=1"]}
    return [
        Cell(
            "study",
            row,
            column or "clean",
            {**CIFAR100, "label_noise": float(column or 0), **of_loss},
            printed.get((row, column)),
            None if column else of_port(row, "CIFAR-100 13-layer"),
            baseline=row == "softmax",
        )
        for column in ("", "0.3")
        for row, of_loss in methods.items()
    ]


class Table(NamedTuple):
    """What is known of a table as a whole."""

    title: str
    columns: str  # what its columns are; "" where it has one
    cells: Callable[[], list[Cell]]


TABLES = {
    "table1": Table("Table 1: three divergences as the regularizer", "λ", table_1),
    "table2": Table("Table 2: the methods discussed in Sec. 3", "", table_2),
    "table3a": Table("Table 3a: fewer training samples", "share of the 50,000 samples", table_3a),
    "table3b": Table("Table 3b: wrong training labels", "share of wrong labels", table_3b),
    "human": Table("Beyond the paper: Table 3b with the labels that people gave", "", human),
    "table4": Table("Table 4: deep networks", "data and network", table_4),
    "fig3": Table("Figure 3: the bias during the training", "", figure_3),
    "sec3": Table("Section 3: what the discussion says", "", section_3),
    "port": Table("The README of the author's PyTorch port", "data and network", port),
    "study": Table("The reduced study: part of Tables 2 and 3b", "share of wrong labels", study),
}
TARGETS = ("table1", "table2", "table3a", "table3b", "table3", "human", "table4", "fig3", "sec3", "port", "study")


def cells(target: str) -> list[Cell]:
    """The cells of a target, in the order of the paper; ``table3`` is both of its halves."""
    return [cell for table in (("table3a", "table3b") if target == "table3" else (target,)) for cell in TABLES[table].cells()]


def default_scale(target: str) -> Scale:
    return SCALES["reduced" if target == "study" else "full"]
