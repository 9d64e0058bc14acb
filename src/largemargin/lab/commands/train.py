"""``largemargin train``: one run, in this process or in all those that a launcher started."""

import os
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt
from rich.console import Console

from ..recipe import LOSSES, Recipe, check_image_size, check_settings, suited_to, unread
from ..stopping import interrupts_end_at_once
from .options import DEVICE_HELP, add_recipe_fields, given_fields, new_parser, path_of

HELP = "train one network with one loss; under torchrun or accelerate launch, in several processes"


def parser() -> ArgumentParser:
    train = new_parser("Train one network with one loss; the same command goes on where it was interrupted.")
    train.add_argument("--config", action="config", help="a YAML file with any of these options")
    add_recipe_fields(train, leave_out=("loss", "seed", "device"))
    train.add_argument("--device", type=str, default=None, metavar="VALUE", help=DEVICE_HELP)
    train.add_argument("--loss", choices=list(LOSSES), default="large_margin", metavar="LOSS", help=" ".join(LOSSES))
    train.add_argument("--seed", type=NonNegativeInt, default=0, help="the seed of initial weights, order, augmentation, subset and noise")
    train.add_argument("--out", type=str, default="runs/train", metavar="DIR", help="the folder of this run")
    train.add_argument("--tensorboard", action="store_true", help="write TensorBoard's event files into DIR/events")
    train.add_argument("--eager", action="store_true", help="on a GPU, do not replay training steps as CUDA graphs: slower, for debugging")
    train.add_argument("--keep-checkpoint", action="store_true", help="leave the last checkpoint when the run is done")
    return train


def run(options: Any, console: Console) -> None:
    with interrupts_end_at_once():
        from ..single import device_of, train_one

    out = path_of(options.out)
    given = {"device": device_of(out), **given_fields(options), "processes": int(os.environ.get("WORLD_SIZE", 1))}
    check_settings([given["loss"]], given)
    check_image_size(given.get("data", "digits"), given.get("image_size"))
    recipe = Recipe(**{**suited_to(given.get("data", "digits"), given.get("image_size")), **LOSSES[given["loss"]], **given})
    main = int(os.environ.get("RANK", 0)) == 0
    console = console if main else Console(quiet=True)
    for line in unread(recipe, given):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    train_one(recipe, out, console, options.tensorboard, options.keep_checkpoint, graph=not options.eager)
