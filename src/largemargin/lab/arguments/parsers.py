"""The options of each command. Help and wrong options cost no import of torch."""

import argparse
import os
from collections.abc import Callable

from jsonargparse import ArgumentParser

from ... import __version__
from ..comparison.plan import Comparison
from ..data import ARCHIVED, STREAMED
from ..directions import LOWER_IS_BETTER, RATES_OF_ERROR
from ..options import NON_NEGATIVE_INT, POSITIVE, POSITIVE_INT
from ..paper.cells import SCALES, TARGETS
from ..queue import EXECUTORS
from ..run.methods import METHODS, OF_SOME_LOSSES
from ..run.recipe import Recipe
from .options import DEVICE_HELP, add_budget, add_eager, add_fields, add_json, add_quiet, new_parser, number_type

# the fields of a recipe that have an option of their own in compare
OWN = "loss seed lam data data_root image_size network epochs device train_fraction label_noise validation_fraction".split()
OWN += ["long_tail", "labels", "target"]
FIGURES = ("fig1", "fig2", "fig4")  # computed at once, without runs
# what the cells of a reproduction are made of
OF_CELLS = ("loss", "seed", "data", "data_root", "train_fraction", "label_noise", "validation_fraction", "weights", *OF_SOME_LOSSES)
COMPARED = "Train the same network under several losses and seeds on the same data; say which is better, and by how much."
JOBS = "runs at a time, each in its own process; with ray, on each GPU; default: {} on the CPU, up to 3 on a GPU"


MODEL_HELP = "the folder of a run, or the model.safetensors in it"


def add_saving(parser: ArgumentParser, everything: bool) -> None:
    """What a run leaves beside its record."""
    old = "the default now, and of no effect: each run keeps its model"
    parser.add_argument("--no-save", action="store_true", help="keep neither the model nor the predictions of a run")
    parser.add_argument("--keep-weights", action="store_true", help=old if everything else argparse.SUPPRESS)


def compare_parser(everything: bool = True) -> ArgumentParser:
    def rare(text: str) -> str:
        return text if everything else argparse.SUPPRESS

    compare = new_parser(COMPARED)
    compare.add_argument("--config", action="config", help="a YAML file with any of these options")
    add_fields(compare, Comparison, everything=everything, unset=False)
    compare.set_defaults(network=None)  # it depends on the data
    own = "package.module:function, your own training loop"
    compare.add_argument("--train", type=str, default=None, metavar="FUNCTION", help=own)
    again = "with --train, keep finished runs where the source of the function has changed since"
    compare.add_argument("--reuse", action="store_true", help=rare(again))
    late = "end a run that takes longer than these seconds; it counts as failed"
    compare.add_argument("--timeout", type=number_type(POSITIVE), default=None, metavar="S", help=rare(late))
    compare.add_argument("--device", type=str, default=None, help=DEVICE_HELP)
    compare.add_argument("--jobs", type=number_type(POSITIVE_INT), default=None, metavar="N", help=JOBS.format(2))
    add_budget(compare, everything)
    compare.add_argument("--executor", choices=EXECUTORS, default="local", metavar="WHERE", help=rare("local or ray"))
    compare.add_argument("--tensorboard", action="store_true", help=rare("write TensorBoard's event files into the folder of each run"))
    add_saving(compare, everything)
    compare.add_argument(
        "--out",
        type=str,
        default="runs/compare",
        metavar="DIR",
        help="the folder of the runs and the report; the same command continues where it stopped",
    )
    add_json(compare, "the table")
    add_quiet(compare, levels=True)
    add_fields(compare, Recipe, "recipe.", OWN, everything)
    return compare


def train_parser(everything: bool = True) -> ArgumentParser:
    train = new_parser("Train one network with one loss. The same command continues an interrupted run.")
    train.add_argument("--config", action="config", help="a YAML file with any of these options")
    add_fields(train, Recipe, leave_out=("loss", "seed", "device"), everything=everything)
    train.add_argument("--device", type=str, default=None, metavar="VALUE", help=DEVICE_HELP)
    train.add_argument("--loss", choices=list(METHODS), default="large_margin", metavar="LOSS", help=" ".join(METHODS))
    train.add_argument(
        "--seed", type=number_type(NON_NEGATIVE_INT), default=0, help="the seed of initial weights, order, augmentation, subset and noise"
    )
    train.add_argument("--out", type=str, default="runs/train", metavar="DIR", help="the folder of this run")
    train.add_argument("--tensorboard", action="store_true", help="write TensorBoard's event files into DIR/events")
    add_eager(train, everything)
    add_saving(train, everything)
    train.add_argument("--keep-checkpoint", action="store_true", help="leave the last checkpoint when the run is done")
    add_quiet(train, levels=True)
    return train


def reproduce_parser(everything: bool = True) -> ArgumentParser:
    reproduce = new_parser(
        "Compute a table or a figure of the paper and write it beside the paper's numbers. The cells of a table are runs; finished runs "
        "are kept, and shared by all tables of the same folder."
    )
    reproduce.add_argument("target", nargs="?", choices=[*FIGURES, *TARGETS], metavar="TARGET", help=" ".join([*FIGURES, *TARGETS]))
    reproduce.add_argument(
        "--cells",
        nargs="+",
        type=str,
        default=None,
        metavar="NAME",
        help="compute only these cells of the table: names that --list prints, or patterns, '*softmax*' say",
    )
    reproduce.add_argument(
        "--seeds",
        nargs="+",
        type=number_type(NON_NEGATIVE_INT),
        default=None,
        metavar="SEED",
        help="the seeds of each cell; default: 0 1 2, and 0 for ImageNet and Places-365",
    )
    reproduce.add_argument("--jobs", type=number_type(POSITIVE_INT), default=None, metavar="N", help=JOBS.format(1))
    reproduce.add_argument(
        "--scale",
        choices=list(SCALES),
        default=None,
        metavar="SCALE",
        help="full (the paper's) or reduced; default: full, reduced for study",
    )
    reproduce.add_argument("--dry-run", action="store_true", help="print the runs and about how long they take; write nothing")
    reproduce.add_argument("--list", action="store_true", help="print the names of the cells, with the paper's numbers")
    reproduce.add_argument("--data-root", type=str, default="data", metavar="DIR", help="where the data sets are")
    reproduce.add_argument(
        "--out",
        type=str,
        default=None,
        metavar="DIR",
        help="runs and report are kept here; default: runs/paper, runs/figures for fig1 fig2 fig4",
    )
    reproduce.add_argument("--device", type=str, default=None, help=DEVICE_HELP)
    add_budget(reproduce, everything)
    reproduce.add_argument("--executor", choices=EXECUTORS, default="local", metavar="WHERE", help="local or ray")
    add_quiet(reproduce, levels=True)
    add_fields(reproduce, Recipe, "recipe.", (*OF_CELLS, "device"), everything)
    return reproduce


def report_parser(everything: bool = True) -> ArgumentParser:
    report = new_parser(
        "Print the table of a comparison or a reproduction again and write its report anew, from the runs that are finished."
    )
    report.add_argument("out", nargs="?", default="runs/compare", metavar="DIR", help="the folder given as --out")
    add_json(report, "the table")
    add_quiet(report)
    return report


def verdict_parser(everything: bool = True) -> ArgumentParser:
    verdict = new_parser("Say which method is better, and how sure that is, from the scores of finished runs of any origin.")
    verdict.add_argument(
        "scores",
        nargs="?",
        type=str,
        default=None,
        metavar="SCORES",
        help="a CSV file: method, seed, a column for each metric, and optionally data set",
    )
    verdict.add_argument("--baseline", type=str, default=None, metavar="METHOD", help="what the other methods are compared with")
    verdict.add_argument(
        "--metrics", nargs="+", type=str, default=None, metavar="M", help="judge these columns alone; default: all of them"
    )
    verdict.add_argument(
        "--lower-is-better",
        nargs="+",
        type=str,
        default=None,
        metavar="M",
        help=f"more metrics of which lower is better, besides names that end in {' '.join((*LOWER_IS_BETTER, *RATES_OF_ERROR))}",
    )
    verdict.add_argument(
        "--higher-is-better", nargs="+", type=str, default=None, metavar="M", help="metrics with such a name of which higher is better"
    )
    verdict.add_argument(
        "--predictions",
        nargs="+",
        type=str,
        action="append",
        default=None,
        metavar="METHOD=FILE",
        help="instead of SCORES: files of logits and labels, or folders of runs; one for each seed, in the same order: softmax=a.npz b.npz",
    )
    verdict.add_argument(
        "--out", type=str, default="runs/verdict", metavar="DIR", help="report.html, report.md, results.csv and verdict.json"
    )
    add_json(verdict, "the verdicts")
    add_quiet(verdict)
    return verdict


def data_parser(everything: bool = True) -> ArgumentParser:
    data = new_parser("Say which data sets are here, check them against their published md5 sums, or get one; nothing else ever downloads.")
    data.add_argument("action", choices=["list", "verify", "fetch"], metavar="ACTION", help="list verify fetch")
    data.add_argument("name", nargs="?", type=str, default=None, metavar="NAME", help=" ".join([*ARCHIVED, *STREAMED]))
    data.add_argument("--data-root", type=str, default="data", metavar="DIR", help="where data sets are")
    data.add_argument("--mirror", type=str, default=None, metavar="URL", help="fetch from URL/FILE instead of where it is published")
    data.add_argument(
        "--from-file", nargs="+", type=str, default=None, metavar="FILE", help="take the archives from here instead of downloading them"
    )
    add_quiet(data)
    return data


def inspect_parser(everything: bool = True) -> ArgumentParser:
    inspect = new_parser("Analyse the predictions of a run, or a file of logits: overall, class by class, and the worst rows.")
    inspect.add_argument(
        "file",
        type=str,
        metavar="FILE",
        help=".npz with arrays logits (N, C) and labels (N,), or .csv with a column label and a column of logits for each class",
    )
    inspect.add_argument(
        "--probabilities", action="store_true", help="the numbers are probabilities, not logits: their logarithms are taken"
    )
    inspect.add_argument("--top", type=number_type(POSITIVE_INT), default=10, metavar="N", help="how many rows to list")
    inspect.add_argument(
        "--classes", choices=["worst", "all"], default="worst", metavar="WHICH", help="worst (the 20 of the largest error) or all"
    )
    add_json(inspect, "shares in [0, 1] and nats")
    add_quiet(inspect)
    return inspect


def predict_parser(everything: bool = True) -> ArgumentParser:
    predict = new_parser("Predict new images or rows with the model of a run: a line for each, with the class and its probability.")
    predict.add_argument("model", type=str, metavar="MODEL", help=MODEL_HELP)
    predict.add_argument(
        "images",
        nargs="+",
        type=str,
        metavar="IMAGES",
        help="files of images, or folders, with the folders in them; for a run on features one table or .npz file",
    )
    predict.add_argument("--out", type=str, default=None, metavar="FILE", help="write CSV here; default: a table on the terminal")
    predict.add_argument("--top", type=number_type(POSITIVE_INT), default=1, metavar="K", help="name the K most probable classes")
    predict.add_argument(
        "--calibrate",
        type=str,
        default=None,
        metavar="FOLDER",
        help=(
            "fit a temperature for the probabilities on labelled images that the run was not trained on: a sub-folder for each class, "
            "with the classes' names"
        ),
    )
    predict.add_argument(
        "--device", type=str, default=None, help="cpu, cuda, cuda:1, mps, ...; default: cuda where torch sees a GPU, else cpu"
    )
    add_quiet(predict)
    return predict


def export_parser(everything: bool = True) -> ArgumentParser:
    export = new_parser("Write a run's network as a program for any number of images, and check that it gives the same logits.")
    export.add_argument("model", type=str, metavar="MODEL", help=MODEL_HELP)
    export.add_argument(
        "--out", type=str, default=None, metavar="FILE", help="the program of torch.export; default: model.pt2 beside MODEL"
    )
    export.add_argument("--onnx", action="store_true", help="write ONNX too, beside it; needs onnx, onnxscript and onnxruntime")
    add_quiet(export)
    return export


def doctor_parser(everything: bool = True) -> ArgumentParser:
    return new_parser("Check the installation, and the results of every backend on this machine. It has no options.")


COMMANDS: dict[str, tuple[str, Callable[[bool], ArgumentParser]]] = {
    "compare": ("train the same network under several losses and seeds, and compare", compare_parser),
    "train": ("train one network with one loss, with torchrun or accelerate launch in several processes", train_parser),
    "reproduce": ("compute a table or a figure of the paper", reproduce_parser),
    "verdict": ("say which method is better, from the scores of finished runs of any origin", verdict_parser),
    "report": ("print and write the report of a comparison or a reproduction again", report_parser),
    "data": ("list, verify or fetch the data sets", data_parser),
    "predict": ("predict new images or rows with the model of a run", predict_parser),
    "export": ("write the model of a run as a torch.export program, or as ONNX", export_parser),
    "inspect": ("analyse the predictions of a run, or a file of logits", inspect_parser),
    "doctor": ("check the installation, and the results of every backend", doctor_parser),
}


def build_parser(everything: bool = True) -> ArgumentParser:
    """The whole command line; without ``everything``, its help shows what most people set."""
    # jsonargparse adds --print_completion where shtab is installed, if it is told to; an older version needs no telling
    os.environ.setdefault("JSONARGPARSE_ADD_PRINT_COMPLETION_ARGUMENT", "true")
    top = new_parser("Large-margin softmax cross-entropy: compare losses on your own data.", prog="largemargin", version=__version__)
    commands = top.add_subcommands(dest="command", metavar="COMMAND")
    for name, (text, parser) in COMMANDS.items():
        commands.add_subcommand(name, parser(everything), help=text)
    return top
