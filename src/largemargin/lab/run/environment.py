"""What the numbers of a run depend on beside its recipe."""

import platform
import subprocess
from pathlib import Path

import torch

from ... import __version__
from ..errors import LabError
from .recipe import Recipe


def environment(recipe: Recipe) -> dict[str, str | int]:
    of_a_process = {"processes": recipe.processes, "batch_of_a_process": -(-recipe.batch_size // recipe.processes)}
    return environment_of(recipe.device, recipe.threads) | of_a_process


def environment_of(device: str, threads: int) -> dict[str, str | int]:
    """The software and the machine."""
    return {
        "largemargin": __version__,
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "threads": threads,
    }


def default_device() -> str:
    """``cuda`` where torch sees a GPU of that kind, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_label(device: str) -> str:
    """The device, a GPU with its name; raises LabError if torch has no such device here."""
    check_device(device)
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.startswith("cuda") else device


def check_device(device: str) -> None:
    """Raises LabError if torch has no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it was not built for
        kind, reason = device.partition(":")[0], str(error).splitlines()[0]
        if kind in reason.partition(" device type")[0].removeprefix("Expected one of ").split(", ") or not reason.startswith(
            "Expected one"
        ):
            raise LabError(f"--device {device} cannot be used here: {reason}; give --device cpu") from error
        raise LabError(f"--device {device} is no device of torch; give cpu, cuda, cuda:1 or mps") from error


def processor() -> str:
    """The CPU's name, or its architecture where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit of the code, where it runs from its own checkout."""
    source = Path(__file__)
    git = ("git", "-C", str(source.parent))
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", source.name], check=True, capture_output=True)  # not the user's repository
        return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
