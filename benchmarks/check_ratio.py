"""The guard of continuous integration: on one thread no shape takes more than twice the committed multiple of F.cross_entropy's time.

The best of 20 interleaved steps each. `--commit` writes the multiples of this machine to results/bench/one_thread.json.
"""

import json
import sys

import torch
import torch.nn.functional as F

from common import RESULTS, interleaved, machine, ours, problem, refuse_if_wrong, write
from largemargin.backends import cpu

SHAPES = ((128, 100), (256, 1000), (64, 10000), (2, 19, 64, 64))
ROUNDS = 20
LIMIT = 2.0


def main() -> int:
    """Measure, and compare or commit; the exit status."""
    torch.set_num_threads(1)
    if cpu.why_not():
        print(f"the CPU kernel is not here, nothing to check: {cpu.why_not()}")
        return 1
    measured = {}
    for shape in SHAPES:
        input, target = problem(shape, torch.float32)
        best = {name: min(values) for name, values in interleaved({"theirs": F.cross_entropy, "ours": ours}, input, target, ROUNDS).items()}
        measured["x".join(map(str, shape))] = round(best["ours"] / best["theirs"], 3)
    path = RESULTS / "one_thread.json"
    if sys.argv[1:] == ["--commit"]:
        refuse_if_wrong()
        write("one_thread", {"claim": __doc__.splitlines()[0], "machine": machine(), "ratio": measured}, path)
        return 0
    committed = json.loads(path.read_text())["ratio"]
    slow = [name for name, found in measured.items() if found > LIMIT * committed[name]]
    for name, found in measured.items():
        print(f"{name:16} {found:6.2f} of F.cross_entropy; committed {committed[name]:.2f}{'  TOO SLOW' if name in slow else ''}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
