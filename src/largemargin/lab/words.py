"""Numbers with their nouns, and text that is safe to print."""

import unicodedata
from collections.abc import Sequence

# controls, formats (which turn the direction of a line), surrogates, and what ends a line or a paragraph
NOT_PRINTED = ("Cc", "Cf", "Cs", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # without which some scripts are not written rightly


def counted(number: int, noun: str) -> str:
    """``1 run``, ``2 runs``, ``2 classes``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def short(number: float) -> str:
    """Three decimals, or three digits where that leaves few: ``12.345``, ``0.000123``."""
    return f"{number:.3f}" if abs(number) >= 0.1 or not number else f"{number:.3g}"


def printable(text: str, keep: str = "") -> str:
    r"""The text with escapes (``\x1b``) in place of what a terminal would obey; characters of ``keep`` stay as they are."""
    if text.isprintable():
        return text
    kept = keep + JOINERS
    return "".join(
        one if one in kept or unicodedata.category(one) not in NOT_PRINTED else one.encode("unicode_escape").decode() for one in text
    )


def hours(seconds: float) -> str:
    """``40 s``, ``4.0 min``, ``3.1 h``, ``2.5 d``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"
