"""The command ``largemargin``. Help and wrong options cost no import of torch.

Exit statuses: 0, the command did its work; 1, a run failed; 2, something that the user can mend, as a wrong option; 130, an interrupt; 141,
the reader of the output went away.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import NEEDED, SPARED
from .errors import LabError, RunFailed, how_to_install
from .stopping import INTERRUPTED, by_interrupt, interrupts_end_at_once
from .words import printable

if TYPE_CHECKING:
    from jsonargparse import Namespace

LISTS = "; what takes several values is a list there, seeds: [0] say"


def run(arguments: "Namespace") -> None:
    with interrupts_end_at_once():
        from .commands.screen import Screen, spell_out

        command = importlib.import_module(f".commands.{arguments.command}", __package__)
    spell_out()
    options = arguments[arguments.command]
    as_json = bool(options.get("json"))  # the standard output is for the document
    stream = sys.stderr if as_json else sys.stdout
    on_terminal = stream is not None and stream.isatty()  # a process may have none
    command.run(options, Screen(width=None if on_terminal else 140, emoji=False, stderr=as_json, quiet=bool(options.get("quiet"))))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    try:
        return answer(argv)
    except BaseException as error:
        if isinstance(error, SystemExit) or not by_interrupt(error):
            raise
        print("largemargin: interrupted", file=sys.stderr)
        return INTERRUPTED


def answer(argv: Sequence[str] | None) -> int:
    """Do what the arguments say; the exit status, with a line for the user where something is wrong."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words == ["doctor"]:  # which needs torch alone
        with interrupts_end_at_once():
            from .doctor import main as doctor

        return doctor()
    with interrupts_end_at_once():
        spared = SPARED.get(words[0], ()) if words else ()
        missing = [name for name in NEEDED if name not in spared and importlib.util.find_spec(name) is None]
        if missing:
            print(
                f"largemargin: the command line needs {', '.join(missing)}; install it with: {how_to_install('lab')} "
                "(largemargin doctor works without)",
                file=sys.stderr,
            )
            return 2
        from jsonargparse import ArgumentError

        from .arguments.options import reworded
        from .arguments.parsers import build_parser

        parser = build_parser(everything=any(word.startswith(("--help-all", "--print_completion")) for word in words))
    if not words:
        parser.print_help()
        return 0
    try:
        try:
            arguments = parser.parse_args(["--help" if word == "--help-all" else word for word in words])
        except (AssertionError, TypeError, UnicodeDecodeError) as error:  # the parser's own, for odd values in a --config file
            reason = str(error) or f"a value in the --config file has the wrong type{LISTS}"
            raise LabError(f"the options cannot be read: {reason}") from error
        run(arguments)
    except (LabError, ArgumentError) as error:
        lists = LISTS if str(error).endswith("object is not iterable") else ""  # the parser's own words
        text = " ".join(str(error).split())
        print(f"largemargin: {printable(reworded(text) if isinstance(error, ArgumentError) else text)}{lists}", file=sys.stderr)
        return INTERRUPTED if by_interrupt(error) else 1 if isinstance(error, RunFailed) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
