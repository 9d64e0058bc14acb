"""What is printed reaches every terminal: no control code of a file or a path acts on it, and no symbol is too much for it."""

import codecs
import os
import sys
import unicodedata
from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import LabError
from ..files import strict_json
from ..words import printable

READER_GONE = 128 + 13  # the exit status of what SIGPIPE ends, as in a shell
# for a terminal, or a file, that is not UTF-8
ASCII = {"λ": "lambda", "ρ": "rho", "ε": "epsilon", "α": "alpha", "ξ": "xi", "σ": "sigma", "±": "+-", "×": "x", "²": "^2", "‖": "||"}
ASCII |= {"−": "-", "–": "-", "—": "-", "…": "...", "“": '"', "”": '"', "’": "'", "½": "1/2", "≥": ">=", "≤": "<="}


class Screen(Console):
    """A console that shows the control codes of a text instead of sending them to the terminal.

    What the terminal's encoding lacks is spelled out before a text is measured, so that the columns of a table stay in line.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        text = printable(text, keep="\n\t")
        if not text.isascii():
            text = text.encode(self.encoding, "spelled_out").decode(self.encoding)
        return super().render_str(text, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:
            discard_output()  # else Python would write the rest as it ends, and fail again
            raise LabError(f"the output cannot be written: {error.strerror or error}; make room, or send it elsewhere") from error

    def on_broken_pipe(self) -> None:
        """End as a process whose reader has gone, as ``head`` does."""
        discard_output()
        raise SystemExit(READER_GONE)


def print_json(value: Any) -> None:
    """The one document of ``--json``, on the standard output."""
    Screen(width=80).print(strict_json(value), soft_wrap=True, markup=False, highlight=False, emoji=False)


def discard_output() -> None:
    """Let nothing that is still to be written reach the standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _spelled_out(error: UnicodeError) -> tuple[str, int]:
    """The error handler ``spelled_out``: symbols by their names, other characters without their accents, or as escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(map(_spelling, text)), error.end


def _spelling(one: str) -> str:
    plain = ASCII.get(one) or unicodedata.normalize("NFKD", one).encode("ascii", "ignore").decode()
    return plain or ("" if unicodedata.combining(one) else one.encode("ascii", "backslashreplace").decode())


codecs.register_error("spelled_out", _spelled_out)


def spell_out() -> None:
    """Let the standard output take every text, whatever its encoding."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # what stands in for it may have none
    if reconfigure is not None and sys.stdout.errors in ("strict", "surrogateescape"):  # the usual ones
        reconfigure(errors="spelled_out")
