"""Wrong training labels: a share of them moved to any other class, or to the next one, or labels that people gave.

A noise is a number, the share of the first kind, or a word: ``asymmetric:0.3`` or ``human``.
"""

from typing import Any

from ..errors import LabError

Noise = float | str
HUMAN = "human"
HUMAN_SHARE = 0.402  # of the labels of CIFAR-100N that are wrong
ASYMMETRIC = "asymmetric"
UNTOLD: Noise = ""  # of labels that the lab has not made


def parsed(noise: Any) -> Noise:
    """What was typed; raises LabError for what is no noise."""
    text = str(noise).strip()
    kind, colon, share = text.rpartition(":")
    if text == HUMAN:
        return HUMAN
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if kind not in ("", ASYMMETRIC) or bool(colon) != bool(kind) or not 0 <= value <= 1:
        raise LabError(f"--label-noise must be a share from 0 to 1, {ASYMMETRIC}:SHARE or {HUMAN}, got {noise}")
    return value if not kind or not value else f"{ASYMMETRIC}:{value:g}"


def fields_of(noise: Noise) -> dict[str, Any]:
    """The fields of a recipe with this noise."""
    if noise == HUMAN:
        return {"label_noise": HUMAN_SHARE, "noise_kind": HUMAN}
    if isinstance(noise, str):
        return {"label_noise": float(noise.partition(":")[2]), "noise_kind": ASYMMETRIC}
    return {"label_noise": noise}


def noise_of(label_noise: float, noise_kind: str | None) -> Noise:
    """The noise of a recipe with these fields."""
    return label_noise if noise_kind is None else HUMAN if noise_kind == HUMAN else f"{noise_kind}:{label_noise:g}"


def order_of(noise: Noise) -> tuple[str, float]:
    """Shares first, the smallest in front."""
    return (noise, 0.0) if isinstance(noise, str) else ("", noise)


def text_of(noise: Noise) -> str:
    """As it is typed."""
    return noise if isinstance(noise, str) else f"{noise:g}"


def phrase_of(noise: Noise) -> str:
    """In a sentence, after "with"."""
    if noise == UNTOLD:
        return "the labels of the training function"
    if noise == HUMAN:
        return f"human training labels, {100 * HUMAN_SHARE:g}% of them wrong"
    if isinstance(noise, str):
        return f"{100 * float(noise.partition(':')[2]):g}% of the training labels moved to the next class"
    return f"{100 * noise:g}% wrong training labels" if noise else "the given labels"
