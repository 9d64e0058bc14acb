"""The methods: what each word of --losses means, with its settings. It is read before anything heavy is imported.

A setting is a field of :class:`Settings`; a method that does not have it leaves it None.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import LabError
from ..options import FINITE, MULTIPLIER, NON_NEGATIVE, POSITIVE, POSITIVE_INT, POSITIVE_SHARE, SHARE, option


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of the losses, as fields of a recipe."""

    lam: float | None = option(None, help="the paper's lambda, eq. (11)", type=NON_NEGATIVE, symbol="λ")
    hard_bias: float | None = option(
        None, help="b of eq. (15): the head start of the other classes over the target", type=FINITE, symbol="b"
    )
    label_smoothing: float | None = option(None, help="epsilon of eq. (13)", type=SHARE, symbol="ε")
    divergence: str | None = option(None, help="symmetric (8), kl_qu or kl_uq (10); None: symmetric", type=("symmetric", "kl_qu", "kl_uq"))
    margin: float | None = option(
        None, help="rho of the hinges and the softplus; of cosface a cosine, of arcface radians", type=FINITE, symbol="ρ"
    )
    angular_multiplier: int | None = option(None, help="m of lsoftmax: 1 to 4", type=MULTIPLIER, symbol="m")
    alpha: float | None = option(
        None,
        help="the margin of gaussian_mixture; the weight of a term of sce, nce_rce, maxsup and mbls",
        type=NON_NEGATIVE,
        symbol="α",
    )
    beta: float | None = option(
        None, help="the weight of the second term of sce, nce_rce, confidence_penalty", type=NON_NEGATIVE, symbol="β"
    )
    q: float | None = option(None, help="q of gce: near 0 the softmax loss, at 1 the mean absolute error", type=POSITIVE_SHARE, symbol="q")
    order: int | None = option(None, help="the number of terms of taylor", type=POSITIVE_INT, symbol="t")
    gamma: float | None = option(None, help="the exponent of focal and dual_focal", type=NON_NEGATIVE, symbol="γ")
    epsilon: float | None = option(None, help="the weight of the first power of poly1", type=FINITE, symbol="ε")
    tau: float | None = option(None, help="the exponent of the class shares of logit_adjusted", type=NON_NEGATIVE, symbol="τ")
    max_margin: float | None = option(None, help="the margin of the rarest class of ldam", type=NON_NEGATIVE, symbol="Δ")
    kappa: float | None = option(None, help="how compact the classes of t_vmf are", type=NON_NEGATIVE, symbol="κ")
    subcenters: int | None = option(None, help="centers of each class of subcenter_arcface", type=POSITIVE_INT, symbol="K")
    alpha_squared: float | None = option(None, help="the strength of the noise of noisy_softmax", type=NON_NEGATIVE, symbol="α²")
    likelihood: float | None = option(None, help="the weight of gaussian_mixture's likelihood term", type=NON_NEGATIVE, symbol="λ_lkd")
    scale: float | None = option(None, help="s of cosface and arcface: the length of the features", type=POSITIVE, symbol="s")
    center: float | None = option(None, help="the weight of the center loss", type=NON_NEGATIVE, symbol="center")
    symmetry: float | None = option(
        None,
        help="the weight of the distance from the super-symmetric classifier at the end of the run",
        type=NON_NEGATIVE,
        symbol="symmetry",
    )


@dataclass(frozen=True)
class Known:
    """A method."""

    source: str  # in the paper by number, else the authors
    settings: Mapping[str, Any] = field(default_factory=dict)  # with their usual values
    loss: str = "of_logits"  # the function of losses.py that makes its loss
    head: str = "linear"  # the function of losses.py that makes its classifier
    symbols: Mapping[str, str] = field(default_factory=dict)  # of settings that its authors call otherwise
    of_counts: bool = False  # whether its loss needs the class sizes of the training set


COSINE = {"margin": "m"}
METHODS = {
    "softmax": Known("eq. (2)"),
    "label_smoothing": Known("eq. (13)", {"label_smoothing": 0.1}),
    "large_margin": Known("eq. (11)", {"lam": 0.3}),
    "modified": Known("eq. (15)", {"hard_bias": 1.0}),
    "modified_large_margin": Known("eq. (15) + (8)", {"hard_bias": 1.0, "lam": 0.3}),
    "multiclass_hinge": Known("eq. (14)", {"margin": 1.0}, "multiclass_hinge"),
    "crammer_singer_hinge": Known("eq. (1)", {"margin": 1.0}, "crammer_singer_hinge"),
    "hard_margin_softplus": Known("Sec. 3", {"margin": 1.0}, "hard_margin_softplus"),
    # with a classifier of their own; alpha is the last of three steps
    "lsoftmax": Known("Liu et al., 2016, annealed over the run", {"angular_multiplier": 4}, head="lsoftmax"),
    "gaussian_mixture": Known("Wan et al., 2018", {"alpha": 0.3, "likelihood": 0.1}, head="gaussian_mixture"),
    "noisy_softmax": Known("Chen et al., 2017", {"alpha_squared": 0.1}, head="noisy_softmax"),
    "super_symmetric": Known("Otsu, 1982; Sec. 3", head="super_symmetric"),
    "cosface": Known("Wang et al., 2018", {"scale": 30.0, "margin": 0.35}, head="cosface", symbols=COSINE),
    "arcface": Known("Deng et al., 2019", {"scale": 30.0, "margin": 0.5}, head="arcface", symbols=COSINE),
    # with a second term
    "center": Known("Wen et al., 2016", {"center": 0.003}),
    "center_large_margin": Known("Sec. 3", {"center": 0.003, "lam": 0.3}),
    "gradual_super_symmetry": Known("Sec. 4.1", {"symmetry": 1.0}),
    # losses of other papers: for wrong labels, over-confidence and long tails
    "gce": Known("Zhang and Sabuncu, 2018", {"q": 0.7}, "gce"),
    "sce": Known("Wang et al., 2019", {"alpha": 0.1, "beta": 1.0}, "sce"),
    "nce_rce": Known("Ma et al., 2020", {"alpha": 1.0, "beta": 1.0}, "nce_rce"),
    "taylor": Known("Feng et al., 2020", {"order": 2}, "taylor"),
    "confidence_penalty": Known("Pereyra et al., 2017", {"beta": 0.1}, "confidence_penalty"),
    "maxsup": Known("Zhou et al., 2025", {"alpha": 0.1}, "maxsup"),
    "focal": Known("Lin et al., 2017", {"gamma": 2.0}, "focal"),
    "dual_focal": Known("Tao et al., 2023", {"gamma": 5.0}, "dual_focal"),
    "poly1": Known("Leng et al., 2022", {"epsilon": 2.0}, "poly1"),
    "mbls": Known("Liu et al., 2022", {"margin": 10.0, "alpha": 0.1}, "mbls", symbols=COSINE),
    "logit_adjusted": Known("Menon et al., 2021", {"tau": 1.0}, "logit_adjusted", of_counts=True),
    "ldam": Known("Cao et al., 2019", {"max_margin": 0.5, "scale": 30.0}, "ldam", "cosine", of_counts=True),
    "subcenter_arcface": Known(
        "Deng et al., 2020", {"scale": 30.0, "margin": 0.5, "subcenters": 3}, head="subcenter_arcface", symbols=COSINE
    ),
    "sphereface": Known("Liu et al., 2017", {"scale": 30.0, "angular_multiplier": 4}, head="sphereface"),
    "t_vmf": Known("Kobayashi, 2021", {"kappa": 16.0}, head="t_vmf"),
}
BASELINE = "softmax"
LOSSES = {word: dict(method.settings) for word, method in METHODS.items()}
OF_SOME_LOSSES = tuple(setting.name for setting in fields(Settings))
SYMBOLS = {setting.name: setting.metadata["symbol"] for setting in fields(Settings) if "symbol" in setting.metadata}


@dataclass(frozen=True)
class Chosen(Settings):
    """A word of --losses with its settings."""

    loss: str

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


def has_setting(loss: str, name: str) -> bool:
    """Whether a field of OF_SOME_LOSSES is a setting of this loss."""
    return name in LOSSES[loss] or (name == "divergence" and "lam" in LOSSES[loss])


def check_settings(losses: Sequence[str], given: Iterable[str]) -> None:
    """Raises LabError for a setting that none of these losses has: it would change nothing, or another loss."""
    for name in given:
        if name in OF_SOME_LOSSES and not any(has_setting(loss, name) for loss in losses):
            having = ", ".join(loss for loss in LOSSES if has_setting(loss, name))
            raise LabError(f"{name} is a setting of {having}, and not of {', '.join(losses)}; leave it out")
