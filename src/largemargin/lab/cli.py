"""The command ``largemargin``. Help and wrong options cost no import of torch."""

import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from . import NEEDED
from .errors import LabError
from .recipe import LOSSES

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def build_parser() -> "ArgumentParser":
    from jsonargparse import ArgumentParser, DefaultHelpFormatter
    from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt, restricted_number_type

    PositiveShare = restricted_number_type("PositiveShare", float, [(">", 0), ("<=", 1)])
    Lambda = restricted_number_type("Lambda", float, [(">=", 0), ("<", math.inf)])
    Pixels = restricted_number_type("Pixels", int, [(">=", 8), ("<=", 1024)])

    def parser(description: str, **settings: object) -> ArgumentParser:
        return ArgumentParser(description=description, formatter_class=DefaultHelpFormatter, exit_on_error=False, **settings)  # type: ignore[arg-type]

    top = parser("Large-margin softmax cross-entropy: compare losses on data of your own.", prog="largemargin", version=__version__)
    compare = parser("Train the same network under several losses and seeds on the same data; say which is better, and by how much.")
    compare.add_argument("--config", action="config", help="a YAML file with any of these options")
    compare.add_argument(
        "--data", type=str, default="digits", help="digits (ships with scikit-learn), cifar10, cifar100, or the path of an image folder"
    )
    compare.add_argument(
        "--data-root", type=str, default="data", metavar="DIR", help="where the unpacked python batches of cifar10 or cifar100 are"
    )
    compare.add_argument(
        "--image-size", type=Pixels, default=32, metavar="PIXELS", help="images of a folder are resized and cropped to this"
    )
    compare.add_argument(
        "--losses",
        nargs="+",
        choices=list(LOSSES),
        default=["softmax", "label_smoothing", "large_margin"],
        metavar="LOSS",
        help=" ".join(LOSSES),
    )
    compare.add_argument("--lam", type=Lambda, default=0.3, help="the paper's lambda, for the large-margin losses")
    compare.add_argument(
        "--seeds", nargs="+", type=NonNegativeInt, default=[0, 1, 2, 3, 4], metavar="SEED", help="runs of the same seed are pairs"
    )
    compare.add_argument("--epochs", type=PositiveInt, default=None, metavar="N", help="default: 30 for digits, 50 for other data")
    compare.add_argument(
        "--label-noise",
        nargs="+",
        type=ClosedUnitInterval,
        default=[0.0],
        metavar="SHARE",
        help="this share of the training labels is moved to another class",
    )
    compare.add_argument(
        "--train-fraction", type=PositiveShare, default=1.0, metavar="SHARE", help="train on this share of the training set"
    )
    compare.add_argument("--device", type=str, default="cpu", help="cpu, cuda, cuda:1, mps, ...")
    compare.add_argument("--jobs", type=PositiveInt, default=2, metavar="N", help="runs at a time, each a process of one thread")
    compare.add_argument(
        "--out",
        type=str,
        default="runs/compare",
        metavar="DIR",
        help="finished runs are kept here; the same command goes on where it stopped",
    )
    report = parser("Print the table of a comparison again and write its report anew, from the runs that are finished.")
    report.add_argument("out", nargs="?", default="runs/compare", metavar="DIR", help="the folder given to compare as --out")
    inspect = parser("Say what a file of logits says about a classifier: overall, class by class, and its worst rows.")
    inspect.add_argument(
        "file",
        type=str,
        metavar="FILE",
        help=".npz with arrays logits (N, C) and labels (N,), or .csv with a column label and a logit a class",
    )
    inspect.add_argument("--top", type=PositiveInt, default=10, metavar="N", help="how many rows to list")
    inspect.add_argument("--json", action="store_true", help="print JSON: shares in [0, 1] and nats")
    reproduce = parser("Compute a figure of the paper, print it as a table, and write it with its chart.")
    reproduce.add_argument("figure", choices=["fig1", "fig2", "fig4"], metavar="FIGURE", help="fig1 fig2 fig4")
    reproduce.add_argument("--out", type=str, default="runs/figures", metavar="DIR", help="the folder for table and chart")
    doctor = parser("Say which backends are here, and whether they compute rightly; without options.")
    commands = top.add_subcommands(dest="command", metavar="COMMAND")
    commands.add_subcommand("compare", compare, help="train the same network under several losses and seeds, and compare")
    commands.add_subcommand("report", report, help="print and write the report of a comparison again")
    commands.add_subcommand("inspect", inspect, help="say what a file of logits says about a classifier")
    commands.add_subcommand("reproduce", reproduce, help="compute a figure of the paper")
    commands.add_subcommand("doctor", doctor, help="say which backends are here, and whether they compute rightly")
    return top


def path_of(text: str) -> Path:
    """A path as a shell would read it."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # there is no such user
        raise LabError(f"{text}: {error}") from error


def run(arguments: "Namespace") -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 140, emoji=False)
    if arguments.command == "inspect":
        from .inspect import inspect

        options = arguments.inspect
        inspect(path_of(options.file), int(options.top), options.json, console)
        return
    if arguments.command == "reproduce":
        from .figures import reproduce

        reproduce(arguments.reproduce.figure, path_of(arguments.reproduce.out), console)
        return
    from .compare import Comparison, compare, finished_records, print_tables, reopen, summarise, write_results

    if arguments.command == "report":
        out = path_of(arguments.report.out)
        comparison = reopen(out)
        records = finished_records(comparison, out)
        if not records:
            raise LabError(f"{out}: no run of its last comparison is finished yet; give that command again")
        rows = summarise(records)
        print_tables(rows, console)
        write_results(out, comparison, records, rows)
        return
    options = arguments.compare
    for name in ("losses", "seeds", "label_noise"):
        if not isinstance(options[name], list) or not options[name]:
            raise LabError(f"--{name.replace('_', '-')} needs a list of at least one value, got {options[name]!r}")
    for name in ("data", "data_root", "out", "jobs", "device"):
        if options[name] is None:
            raise LabError(f"--{name.replace('_', '-')} needs a value, got none")
    names = ("data", "data_root", "image_size", "lam", "epochs", "train_fraction", "device")
    settings: dict[str, Any] = {name: options[name] for name in names}
    settings |= {name: list(dict.fromkeys(options[name])) for name in ("losses", "seeds", "label_noise")}
    # through JSON, for plain numbers: the parser's own restricted types cannot be sent to another process
    compare(Comparison.from_dict(json.loads(json.dumps(settings))), path_of(options.out), int(options.jobs), console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    if (sys.argv[1:] if argv is None else list(argv)) == ["doctor"]:  # which needs torch alone
        from ..doctor import main as doctor

        return doctor()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f'largemargin: the command line needs {", ".join(missing)}; install it with: pip install "largemargin[lab]" '
            "(largemargin doctor works without)",
            file=sys.stderr,
        )
        return 2
    from jsonargparse import ArgumentError

    try:
        parser = build_parser()
        try:
            arguments = parser.parse_args(argv)
        except (AssertionError, TypeError, UnicodeDecodeError) as error:  # the parser's own, for odd values in a --config file
            raise LabError(f"the options cannot be read: {error or 'a value in the --config file has the wrong type'}") from error
        run(arguments)
    except (LabError, ArgumentError) as error:
        print(f"largemargin: {' '.join(str(error).split())}", file=sys.stderr)
        return 130 if isinstance(error.__context__, KeyboardInterrupt) else 2
    except KeyboardInterrupt:
        print("largemargin: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
