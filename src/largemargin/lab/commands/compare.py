"""``largemargin compare``: several losses on the user's own problem."""

from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval as Share
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from rich.console import Console

from ..errors import LabError
from ..executors import EXECUTORS
from ..recipe import LOSSES, NETWORKS
from ..stopping import interrupts_end_at_once
from .options import (
    DEVICE_HELP,
    NonNegativeNumber,
    Pixels,
    PositiveShare,
    add_budget,
    add_recipe_fields,
    check_network_name,
    given_budget,
    given_fields,
    given_jobs,
    new_parser,
    path_of,
    plain,
)

HELP = "train the same network under several losses and seeds, and compare"
# the fields of a recipe that have an option of their own here
OWN = "loss seed lam data data_root image_size network epochs device train_fraction label_noise validation_fraction".split()


def parser() -> ArgumentParser:
    compare = new_parser("Train the same network under several losses and seeds on the same data; say which is better, and by how much.")
    compare.add_argument("--config", action="config", help="a YAML file with any of these options")
    compare.add_argument(
        "--data",
        type=str,
        default="digits",
        help="digits (ships with scikit-learn), cifar10, cifar100, svhn, imagenet, places365, or the path of an image folder",
    )
    compare.add_argument("--data-root", type=str, default="data", metavar="DIR", help="where the files of the named data sets are")
    compare.add_argument(
        "--image-size",
        type=Pixels,
        default=None,
        metavar="PIXELS",
        help="images of a folder are resized and cropped to this; default: 32, 224 for imagenet and places365",
    )
    compare.add_argument("--network", type=str, default="small", metavar="NAME", help=" ".join(NETWORKS))
    compare.add_argument(
        "--losses",
        nargs="+",
        choices=list(LOSSES),
        default=["softmax", "label_smoothing", "large_margin"],
        metavar="LOSS",
        help=" ".join(LOSSES),
    )
    compare.add_argument(
        "--lam",
        nargs="+",
        type=NonNegativeNumber,
        default=[0.3],
        metavar="LAMBDA",
        help="the paper's lambda, for the large-margin losses; of several one is chosen on a part of the training set",
    )
    compare.add_argument(
        "--validation-fraction",
        type=OpenUnitInterval,
        default=0.2,
        metavar="SHARE",
        help="the part of the training set that is held out from the runs that choose among several --lam",
    )
    compare.add_argument(
        "--seeds",
        nargs="+",
        type=NonNegativeInt,
        default=[0, 1, 2, 3, 4],
        metavar="SEED",
        help="every loss is run with each seed; runs of one seed are pairs",
    )
    compare.add_argument(
        "--epochs",
        type=PositiveInt,
        default=None,
        metavar="N",
        help="passes over the training set; default: 30 for digits, 120 for imagenet and places365, else 50",
    )
    compare.add_argument(
        "--label-noise",
        nargs="+",
        type=Share,
        default=[0.0],
        metavar="SHARE",
        help="the share of the training labels that is moved to another class; each of several is compared by itself",
    )
    compare.add_argument(
        "--train-fraction", type=PositiveShare, default=1.0, metavar="SHARE", help="train on this share of the training set"
    )
    compare.add_argument("--device", type=str, default=None, help=DEVICE_HELP)
    compare.add_argument(
        "--jobs",
        type=PositiveInt,
        default=None,
        metavar="N",
        help="runs at a time, each a process; with ray, for each GPU; default: 2 on the CPU, up to 3 on a GPU",
    )
    add_budget(compare)
    compare.add_argument("--executor", choices=EXECUTORS, default="local", metavar="WHERE", help="local or ray")
    compare.add_argument("--tensorboard", action="store_true", help="write TensorBoard's event files into the folder of each run")
    compare.add_argument("--keep-weights", action="store_true", help="leave the trained network in the folder of each run")
    compare.add_argument(
        "--out",
        type=str,
        default="runs/compare",
        metavar="DIR",
        help="finished runs are kept here; the same command goes on where it stopped",
    )
    add_recipe_fields(compare, "recipe.", leave_out=OWN)
    return compare


def run(options: Any, console: Console) -> None:
    for name in ("losses", "lam", "seeds", "label_noise"):
        if not isinstance(options[name], list) or not options[name]:
            raise LabError(f"--{name.replace('_', '-')} needs a list of at least one value, got {options[name]!r}")
    for name in ("data", "data_root", "network", "validation_fraction", "out", "executor"):
        if options[name] is None:
            raise LabError(f"--{name.replace('_', '-')} needs a value, got none")
    check_network_name(options.network)
    if not isinstance(options.recipe, Namespace):
        raise LabError(f"recipe: in the --config file needs fields with their values, got {options.recipe!r}")
    names = ("data", "data_root", "image_size", "network", "validation_fraction", "epochs", "train_fraction")
    settings: dict[str, Any] = {name: options[name] for name in names}
    settings |= {name: list(dict.fromkeys(options[name])) for name in ("losses", "lam", "seeds", "label_noise")}
    with interrupts_end_at_once():
        from ..compare import Comparison, compare, device_of

    settings["device"] = options.device or device_of(path_of(options.out))
    comparison = Comparison.from_dict(plain(settings) | {"overrides": given_fields(options.recipe)})
    compare(
        comparison,
        path_of(options.out),
        given_jobs(options),
        console,
        options.executor,
        given_budget(options),
        graph=not options.eager,
        tensorboard=bool(options.tensorboard),
        keep_weights=bool(options.keep_weights),
    )
