"""CIFAR-100N: the labels that people gave to the training images of CIFAR-100, 40.2% of them wrong (Wei et al., ICLR 2022)."""

import hashlib
import io
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import LabError
from ..files import write_atomically

FILE = "cifar-100n/CIFAR-100_human.pt"  # under the data root
SHA256 = "bd2d80409754d420292d622e15e25248ba21e37d27429efac49c8da723f44394"
TERMS = "CC BY-NC 4.0, Wei et al., ICLR 2022"


def human_labels(root: Path, labels: Tensor) -> Tensor:
    """The human labels of the training set of CIFAR-100, int64 (50000,), in the order of its true ``labels``."""
    again = f"largemargin data fetch cifar100n --data-root {root} --from-file CIFAR-100_human.pt"
    path = root / FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LabError(f"--label-noise human: no {path} ({error.strerror}); get it: {again}") from error
    check_sum(content, str(path))
    arrays = arrays_of(content)
    if not torch.equal(arrays["clean_label"], labels):
        raise LabError(f"--label-noise human: the true labels in {path} are not those of these training images; it is for cifar100 alone")
    return arrays["noisy_label"]


def put(source: Path, root: Path) -> None:
    """Copy the published file under the data root."""
    try:
        content = source.read_bytes()
    except OSError as error:
        raise LabError(f"--from-file {source}: {error.strerror}; expected CIFAR-100_human.pt") from error
    check_sum(content, str(source))
    path = root / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise LabError(f"{path} cannot be written: {error.strerror}") from error


def state(root: Path) -> str:
    """``ok``, ``missing`` or ``wrong sha256``."""
    path = root / FILE
    if not path.is_file():
        return "missing"
    return "ok" if hashlib.sha256(path.read_bytes()).hexdigest() == SHA256 else "wrong sha256"


def check_sum(content: bytes, source: str) -> None:
    """Refuse what is not the published file."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise LabError(f"{source} has sha256 {found}; CIFAR-100_human.pt is published with {SHA256}. Nothing was changed")


def arrays_of(content: bytes) -> dict[str, Tensor]:
    """The int64 arrays of the published file by name.

    The file is a pickle. Nothing of it is executed: its strings are read one after the other, and the bytes of an array follow its name.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickle = archive.read("CIFAR-100_human/data.pkl")
    found: dict[str, Tensor] = {}
    name = ""
    for opcode, value, _ in pickletools.genops(pickle):
        if opcode.name != "BINUNICODE" or not isinstance(value, str):
            continue
        if value.endswith("_label"):
            name = value
        elif name and len(value) > 1000:  # the bytes, each as a character of latin-1
            found[name] = torch.from_numpy(np.frombuffer(value.encode("latin-1"), dtype="<i8").astype(np.int64))
            name = ""
    return found
