"""``largemargin doctor``: what is here, who computes, and whether they compute rightly. Needs torch alone."""

import importlib.util
import platform

import torch

from . import __version__
from ._backends import ladder
from .functional import large_margin_cross_entropy
from .lab import NEEDED


def worst_error(backend: str) -> float:
    """The largest error of a loss and its gradient against float64, in roundings of float32 of numbers of size 1 to 16."""
    found = torch.accelerator.current_accelerator()
    device = "cpu" if backend == "cpu" or found is None else found.type
    input = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).to(device)
    target = torch.arange(64, device=device)
    results = []
    for dtype, name in ((torch.float32, backend), (torch.float64, "reference")):
        leaf = input.to(dtype).requires_grad_()
        loss = large_margin_cross_entropy(leaf, target, label_smoothing=0.1, reduction="sum", backend=name)  # type: ignore[arg-type]
        results.append(torch.cat([loss.detach()[None] / 64, *torch.autograd.grad(loss, leaf)[0]]).double())
    return float((results[0] - results[1]).abs().max()) / torch.finfo(torch.float32).eps


def report() -> tuple[list[str], bool]:
    """The lines to print, and whether all that is here works."""
    lines = [f"largemargin {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {', '.join(gpus) or 'no GPU'}")
    fine = True
    lines.append("backend reference   plain torch, on every device")
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
        fine = fine and works
        lines.append(f"backend {name:11} {module.describe()}; {'right' if works else 'WRONG'}: off by {error:.1f} roundings at most")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    lines.append("lab                 " + ('no: pip install "largemargin[lab]"' if missing else "installed"))
    return lines, fine


def main() -> int:
    """Print the report; the exit status."""
    lines, fine = report()
    print("\n".join(lines))
    return 0 if fine else 1
