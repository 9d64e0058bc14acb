"""What is printed reaches every terminal: no control code of a file or a path acts on it, and no symbol is too much for it."""

import codecs
import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

from .words import printable

# for a terminal, or a file, that is not UTF-8
ASCII = {"λ": "lambda", "ρ": "rho", "ε": "epsilon", "α": "alpha", "ξ": "xi", "σ": "sigma", "±": "+-", "×": "x", "²": "^2", "‖": "||"}
ASCII |= {"−": "-", "–": "-", "—": "-", "…": "...", "“": '"', "”": '"', "’": "'", "½": "1/2", "≥": ">=", "≤": "<="}


class Screen(Console):
    """A console that shows the control codes of a text instead of sending them to the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, keep="\n\t"), **options)


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    """The error handler ``spelled_out``: symbols by their names, other characters without their accents, or a question mark."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    plain = (ASCII.get(one) or unicodedata.normalize("NFKD", one).encode("ascii", "ignore").decode() for one in text)
    return "".join(spelled or "?" * (not unicodedata.combining(one)) for one, spelled in zip(text, plain, strict=True)), error.end


codecs.register_error("spelled_out", _spelled_out)


def spell_out() -> None:
    """Let the standard output take every text, whatever its encoding."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # what stands in for it may have none
    if reconfigure is not None and sys.stdout.errors in ("strict", "surrogateescape"):  # the usual ones
        reconfigure(errors="spelled_out")
