"""The reduced studies of docs/measured.md: `python benchmarks/studies.py NAME` prints the commands of one and runs them.

Each is `largemargin compare` with parts of the data and short schedules, for two cores of a CPU. The runs are kept in runs/FOLDER, and what
the page says comes from results/FOLDER. The data are read from data/: see docs/measured.md.
"""

import argparse
import shlex
import subprocess
import sys

# the losses that are functions of the logits, without those that have a classifier of their own
OF_LOGITS = (
    "softmax label_smoothing large_margin modified modified_large_margin multiclass_hinge crammer_singer_hinge hard_margin_softplus "
    "gce sce nce_rce taylor confidence_penalty maxsup focal dual_focal poly1 mbls logit_adjusted ldam"
)
FAST = "--recipe.schedule cosine --recipe.precision bfloat16 --recipe.channels_last true --recipe.evaluate_every 100"
SHORT = f"--recipe.batch_size 32 {FAST}"
LAYER13 = f"--data cifar100 --network layer13 --recipe.width 0.125 --recipe.batch_size 64 {FAST}"
HUMAN = f"{LAYER13} --train-fraction 0.1 --epochs 20 --recipe.crop_padding 0"
VGG = f"--image-size 64 --network vgg16_mod --recipe.width 0.125 --epochs 30 --recipe.learning_rate 0.004 --recipe.crop_padding 0 {SHORT}"
WRN = f"--network wrn28_10 --recipe.width 0.1 {SHORT}"

STUDIES = {  # by name: the options of each command by the folder of its runs
    "digits": {
        "digits-noise": f"--losses {OF_LOGITS} --label-noise 0 0.3 asymmetric:0.3",
        "digits-long-tail": f"--losses {OF_LOGITS} --long-tail 20",
    },
    "human": {
        "human-noise": f"{HUMAN} --label-noise human 0.402 --seeds 0 1 2",
        "human-noise-lam1": f"{HUMAN} --label-noise human 0.402 --seeds 0 1 2 --losses softmax large_margin --lam 1",
    },
    "cifar10": {"cifar10-part": f"--data cifar10 --train-fraction 0.02 --epochs 25 {WRN}"},
    "svhn": {"svhn-part": f"--data svhn --unverified --train-fraction 0.4 --epochs 15 {WRN}"},
    "imagenet": {"imagenet-part": f"--data data/tiny-imagenet-25 --train-fraction 0.1 {VGG}"},
    "places": {"places-part": f"--data data/miniplaces-20 {VGG}"},
    "cifar100": {"cifar100-part": f"{LAYER13} --train-fraction 0.1 --epochs 20"},
    "human-losses": {"human-noise-losses": f"{HUMAN} --label-noise human --seeds 0 1 2 --losses {OF_LOGITS}"},
}


def commands(name: str) -> list[list[str]]:
    """The commands of a study."""
    return [["largemargin", "compare", *shlex.split(options), "--out", f"runs/{folder}"] for folder, options in STUDIES[name].items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--print", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args()
    for words in commands(options.name):
        print(shlex.join(words), flush=True)
        if not options.print and (status := subprocess.run([sys.executable, "-m", *words]).returncode):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
