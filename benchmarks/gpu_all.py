r"""All that a GPU is needed for, in one command and a few minutes: `make gpu`. It takes the Python at hand and installs nothing.

Each part is a process with a limit of time: one that hangs or crashes leaves the others theirs, and time that a part does not take goes to
those after it. The most valuable comes first:

1. tests: the tests that take the device, since the speed of a wrong kernel is of no use.
2. kernels and linear: the loss of logits, which the package is about, and that of features and classifier.
3. training: images a second of the 13-layer network, which say how many runs the rest of the time can buy.
4. cifar100 and human: runs of `largemargin reproduce table2` and, where the labels of CIFAR-100N were fetched, of `reproduce human`, with
   three seeds. They take all the time there is, and any later call goes on with them: they come last.

OUT/gpu has a record of each part and in logs what it printed; OUT/cifar100 and OUT/cifar100n have the runs. The next call leaves out the
parts whose records are finished, unless it says --again, for all of them, or --again PART. Ctrl-C, SIGTERM and the limit of time keep all
that is finished.

The tests need pytest and hypothesis, and the runs jsonargparse, rich and scipy. Where they are not installed, put wheels into the folder
wheels/ of the checkout. For Python 3.12 on Linux this fetches them, and the rivals Liger and cut-cross-entropy, in 39 MiB:

    python3 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
        --platform manylinux_2_28_x86_64 -d wheels jsonargparse pyyaml rich markdown-it-py mdurl pygments scipy \
        pytest iniconfig pluggy hypothesis sortedcontainers pytest-timeout pytest-xdist execnet liger-kernel cut-cross-entropy

They are unpacked for the time of the command, and what is installed comes before them. The rival quack needs far larger ones. Torch,
triton, numpy, matplotlib, torchvision and accelerate must be installed.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gpu_summary

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = Path(__file__).resolve().parent
GRACE = 15.0  # seconds that a part has to write down what it has, and this script for its table
LEAST = 20.0  # seconds of any part: fewer are not worth a start
SEEDS = ("0", "1", "2")
HUMAN_LABELS = Path("cifar-100n", "CIFAR-100_human.pt")  # under --data-root
OF_LAB = ("jsonargparse", "rich", "jinja2", "scipy", "matplotlib", "numpy", "torchvision", "PIL", "accelerate", "safetensors")


class Runs(NamedTuple):
    """What a part that is no benchmark computes of the paper."""

    target: str
    cells: tuple[str, ...]
    folder: str  # under --out

    @property
    def wanted(self) -> int:
        return len(self.cells) * len(SEEDS)


class Part(NamedTuple):
    """What one process does."""

    name: str
    share: float  # of the time, among the parts that are left
    needs: tuple[str, ...]  # modules beside torch
    runs: Runs | None = None


OF_TABLE_2 = Runs("table2", ("table2/softmax", "table2/ours-0.3", "table2/lsr-0.1"), "cifar100")
OF_HUMAN = Runs("human", ("human/softmax", "human/ours-0.3", "human/ours-1", "human/lsr-0.1"), "cifar100n")
PARTS = (
    Part("tests", 3, ("pytest", "pytest_timeout", "hypothesis", "mpmath", "numpy")),
    Part("kernels", 3, ("triton",)),
    Part("linear", 1.5, ("triton",)),
    Part("training", 3, ("numpy", "accelerate")),
    Part("cifar100", 4, OF_LAB, OF_TABLE_2),
    Part("human", 3, OF_LAB, OF_HUMAN),
)


def main() -> int:
    """Do the parts, and print what they found; the exit status, 0 where nothing is left to do."""
    options = parse()
    ends = time.monotonic() + 60 * options.minutes - GRACE
    outcomes: dict[str, str] = {}
    status = 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of the background ignores it, and so would the parts
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with environment() as variables:
            for place, part in enumerate(PARTS):
                outcomes[part.name] = "interrupted"
                outcomes[part.name] = do(part, PARTS[place:], ends, options, variables)
                print(f"{part.name}: {outcomes[part.name]}", flush=True)
    except KeyboardInterrupt:
        status = 130
    table = summary(options, outcomes)
    print("\n" + "\n".join(table))
    return status or int(not all(outcome.startswith(("done", "kept", "skipped")) for outcome in outcomes.values()))


def parse() -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it; default: 8")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: results")
    parser.add_argument("--data-root", type=Path, default=ROOT / "data", metavar="DIR", help="where CIFAR-100 is; default: data")
    parser.add_argument(
        "--again",
        nargs="*",
        choices=names,
        default=None,
        metavar="PART",
        help="measure anew what has a finished record; these parts, or all",
    )
    parser.add_argument("--self-test", action="store_true", help="run every line on the CPU, with tiny work; the numbers mean nothing")
    options = parser.parse_args()
    options.again = [] if options.again is None else options.again or names
    usual = tempfile.mkdtemp() if options.self_test else ROOT / "results"
    options.out, options.data_root = Path(options.out or usual).resolve(), options.data_root.resolve()
    return options


@contextlib.contextmanager
def environment() -> Iterator[dict[str, str]]:
    """The variables of the parts: the package on the path, and the wheels that are not installed, unpacked."""
    with tempfile.TemporaryDirectory() as folder:
        unpacked = []
        for wheel in sorted((ROOT / "wheels").glob("*.whl")):
            if not is_installed(wheel.name.partition("-")[0]):
                zipfile.ZipFile(wheel).extractall(folder)
                unpacked.append(wheel.name.partition("-")[0])
        print(f"from wheels/: {', '.join(unpacked) or 'nothing'}")
        paths = [str(ROOT / "src"), folder, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        sys.path.append(folder)  # where what a part needs is looked for
        yield {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        sys.path.remove(folder)


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def do(part: Part, left: tuple[Part, ...], ends: float, options: argparse.Namespace, variables: dict[str, str]) -> str:
    """Do a part in its share of the time, if there is a reason to; how it ended."""
    if (kept := finished(options.out / "gpu" / f"{part.name}.json")) and part.name not in options.again:
        return f"kept, of {kept['date']} at commit {kept['commit'][:10]}; --again {part.name} measures it anew"
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return f"left out, it needs {', '.join(missing)}: put wheels into wheels/ as {Path(__file__).name} --help says"
    if reason := skipped(part, options):
        return f"skipped, {reason}"
    seconds = ends - time.monotonic()
    if seconds < LEAST:
        return "left out, no time was left"
    limit = max(LEAST, seconds * part.share / sum(each.share for each in left if not skipped(each, options)))
    log = options.out / "gpu" / "logs" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"{part.name}: at most {limit:.0f} s", flush=True)
    started = time.monotonic()
    status = run(command(part, limit, options), limit, log, variables)
    took = f"{time.monotonic() - started:.0f} s"
    if status is None:
        return f"stopped after {took}, what it has is kept"
    if status == 0 and part.runs and not options.self_test and (left_runs := part.runs.wanted - runs_done(options.out, part.runs)) > 0:
        return f"{left_runs} of {part.runs.wanted} runs are left after {took}"
    return f"done in {took}" if status == 0 else f"failed after {took}: {last_line(log)}"


def skipped(part: Part, options: argparse.Namespace) -> str:
    """Why a part is none here, and takes no time; empty for the others."""
    if part.runs != OF_HUMAN or options.self_test or (options.data_root / HUMAN_LABELS).is_file():
        return ""
    return f"--data-root has no {HUMAN_LABELS}; get it: largemargin data fetch cifar100n --from-file {HUMAN_LABELS.name}"


def runs_done(out: Path, runs: Runs) -> int:
    return len(list((out / runs.folder / "runs").glob("*/result.json")))


def finished(path: Path) -> dict[str, Any] | None:
    """A record, if it is there and whole."""
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record if record["finished"] else None


def command(part: Part, limit: float, options: argparse.Namespace) -> list[str]:
    if part.runs:
        words = [sys.executable, "-m", "largemargin", "reproduce", part.runs.target, "--cells", *part.runs.cells, "--seeds", *SEEDS]
        words += ["--recipe.precision", "bfloat16", "--recipe.channels_last", "true", "--recipe.evaluate_every", "5"]
        words += ["--data-root", relative(options.data_root), "--out", relative(options.out / part.runs.folder)]
        words += ["--minutes", f"{max(0.0, limit - GRACE) / 60:.2f}"]
        return [*words, *(["--device", "cpu", "--recipe.width", "0.05", "--dry-run"] if options.self_test else ["--device", "cuda"])]
    script = {"tests": "gpu_tests.py", "kernels": "gpu.py", "linear": "gpu_linear.py", "training": "gpu_training.py"}[part.name]
    words = [sys.executable, str(BENCHMARKS / script), "--out", str(options.out / "gpu" / f"{part.name}.json")]
    words += ["--skip-tests"]  # they are a part of their own, whose record says how they ended
    return [*words, "--self-test"] if options.self_test else words


def relative(path: Path) -> str:
    """The path as a record is to have it: of the checkout, where it lies there."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def run(words: list[str], limit: float, log: Path, variables: dict[str, str]) -> int | None:
    """The exit status, or None where the time was over; then, and at an interrupt, it may write down what it has."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=variables, start_new_session=True)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """Interrupt the process and all that it started, and after a while kill them."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE / 2)


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return (lines or ["it printed nothing"])[-1][:300]


def summary(options: argparse.Namespace, outcomes: dict[str, str]) -> list[str]:
    """All that was found, in the space of a terminal of 80 columns and 24 lines."""
    records = gpu_summary.load(options.out / "gpu")
    machine: dict[str, Any] = next((record["machine"] for record in records.values()), {})
    found = gpu_summary.figures(records)
    for title, runs in (("CIFAR-100, Table 2", OF_TABLE_2), ("CIFAR-100N", OF_HUMAN)):
        done = runs_done(options.out, runs)
        found.append(gpu_summary.Figure(title, f"{done} runs", f"{runs.wanted} runs", done >= runs.wanted))
    head = f"{machine.get('gpu', 'no GPU')}, torch {machine.get('torch', 'unknown')}; records: {options.out / 'gpu'}"
    lines = [head[:80], *gpu_summary.lines(found)]
    absent = sorted({name for record in records.values() for name in record.get("not installed", [])})
    lines += [f"rivals that are not installed: {', '.join(absent)}"[:80]] if absent else []
    lines += [f"{name}: {outcome}"[:80] for name, outcome in outcomes.items() if not outcome.startswith(("done", "kept"))]
    lines += [f"failed: {re.sub('.*::', '', name)}"[:80] for name in records.get("tests", {}).get("failures", {})]
    more = len(lines) - 23
    return lines if more <= 0 else [*lines[:22], f"and {more + 1} lines more: see tests.json"]


if __name__ == "__main__":
    sys.exit(main())
