"""``largemargin doctor``: what is here, who computes, and whether they compute rightly; to paste into a report. Needs torch alone."""

import importlib.util
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from .. import __version__, large_margin_cross_entropy
from ..backends import ladder
from . import NEEDED
from .data import SETS
from .errors import how_to_install
from .run.environment import commit, processor
from .words import counted, printable

BESIDE = (*("numpy", "triton", "torchvision", "accelerate"), *("transformers", "lightning", "pytorch-lightning", "timm", "skorch", "ray"))
# in a process of its own, which an import may end: a line for each package, and why it cannot be imported
IMPORT = """
import importlib, sys
out, sys.stdout = sys.stdout, sys.stderr
for name in sys.argv[1:]:
    print(name, "the import ends Python", sep="\\t", file=out, flush=True)
    reason = ""
    try:
        importlib.import_module(name.replace("-", "_"))
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    print(name, reason, sep="\\t", file=out, flush=True)
"""


def worst_error(backend: str) -> float:
    """The largest error of a loss and its gradient against float64, in roundings of float32 of numbers of size 1 to 16."""
    found = torch.accelerator.current_accelerator(check_available=True)
    device = "cpu" if backend == "cpu" or found is None else found.type
    input = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).to(device)
    target = torch.arange(64, device=device)
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        leaf = input.to(dtype).requires_grad_()
        loss = large_margin_cross_entropy(leaf, target, label_smoothing=0.1, reduction="sum", backend=name)  # type: ignore[arg-type]
        results.append(torch.cat([loss.detach()[None] / 64, *torch.autograd.grad(loss, leaf)[0]]).double())
    return float((results[0] - results[1]).abs().max()) / torch.finfo(torch.float32).eps


def versions_beside() -> dict[str, str]:
    """The packages that change what happens, with their versions; none is imported."""
    found = {}
    for name in BESIDE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def broken(names: list[str]) -> list[str]:
    """A line for each reason why some of these cannot be imported."""
    tried = subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", IMPORT, *names], capture_output=True, text=True, errors="replace")
    reasons = dict(line.split("\t", 1) for line in tried.stdout.splitlines() if "\t" in line)
    lines = []
    for reason in dict.fromkeys(filter(None, reasons.values())):
        those = [name for name in names if reasons.get(name) == reason]
        fix = f"the likely fix: pip install --force-reinstall {' '.join(those)}"
        if "torchvision" in those:
            fix = "torchvision belongs to another torch: install both from the same index, at versions made for each other"
        lines.append(f"cannot be imported  {', '.join(those)}: {reason}; {fix}")
    return lines


def torch_built_for() -> str:
    """What torch was built for beside the CPU."""
    if torch.version.hip:
        return f"for ROCm {torch.version.hip}"
    return f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"


def gpus() -> list[str]:
    """The accelerators that torch can use, with their memory where torch tells."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        return ["none that torch can use"]
    if found.type not in ("cuda", "xpu"):
        return [found.type]
    of_device = torch.get_device_module(found).get_device_properties
    properties = [of_device(index) for index in range(torch.accelerator.device_count())]
    return [f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in properties]


def threads() -> str:
    """How many threads torch takes, of how many processors, and what was set to change it."""
    text = f"{torch.get_num_threads()} on {counted(os.cpu_count() or 1, 'processor')}"
    asked = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    return ", ".join([text, *asked])


def report() -> tuple[list[str], bool]:
    """The lines to print, and whether all that is here works."""
    revision = commit()
    beside = versions_beside()
    known = "" if revision == "unknown" else f", commit {revision[:10]}"
    lines = [
        f"largemargin         {__version__}{known}",
        f"Python              {platform.python_version()}",
        f"system              {platform.platform()}",
        f"processor           {processor()}, {platform.machine()}",
        f"torch               {torch.__version__}, built {torch_built_for()}",
        f"threads             {threads()}",
        *(f"GPU                 {gpu}" for gpu in gpus()),
        f"beside it           {', '.join(f'{name} {version}' for name, version in beside.items()) or 'none'}",
        *broken(list(beside)),
    ]
    fine = True
    lines.append("backend reference   plain torch, on every device: takes what the others do not")
    for name in ("cpu", "triton"):
        module = ladder.load(name)
        if isinstance(module, str):
            lines.append(f"backend {name:11} no: {module}")
            continue
        try:
            error = worst_error(name)
        except Exception as failure:  # whatever it is, it is what the user came to read
            fine = False
            lines.append(f"backend {name:11} {module.describe()}; FAILS: {type(failure).__name__}: {failure}")
            continue
        works = error < 64
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in module.DTYPES)
        fine = fine and works
        lines.append(
            f"backend {name:11} {module.describe()}, takes {dtypes}; {'right' if works else 'WRONG'}: largest error {error:.1f} roundings"
        )
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    lines.append("lab                 " + (f"no: {how_to_install('lab')}" if missing else "installed"))
    here = [name for name, known in SETS.items() if known.folder and Path("data", known.folder).is_dir()]
    lines.append(f"data in ./data      {', '.join(here) or 'none'}")
    return [without_home(line) for line in lines], fine


def without_home(line: str) -> str:
    """The line with ``~`` for the home folder, which has the user's name."""
    return line.replace(os.path.join(os.path.expanduser("~"), ""), os.path.join("~", ""))


def main() -> int:
    """Print the report; the exit status."""
    lines, fine = report()
    print("\n".join(map(printable, lines)))
    return 0 if fine else 1


if __name__ == "__main__":
    raise SystemExit(main())
