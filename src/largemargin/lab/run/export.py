"""A model as a program that runs without this package: of ``torch.export``, or in ONNX. Each is checked before it is kept."""

import dataclasses
import importlib.util
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LabError
from ..files import write_atomically
from .model import Model

NEEDED = ("onnx", "onnxscript", "onnxruntime")  # of which the last checks the file
TOLERANCE = 1e-3  # of logits, relative to the largest: kernels sum in another order
CHECKED = (1, 3)  # sizes of batches


def facts_of(model: Model) -> str:
    """What one has to know to use a program, in JSON."""
    pixels = model.pixels
    return json.dumps({"classes": model.classes, "in_channels": pixels.in_channels, **dataclasses.asdict(pixels)})


def export_program(model: Model, out: Path) -> None:
    """Write a program of ``torch.export`` that takes inputs (N, channels, H, W) for any N."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's own, of its internals
            program = _program(model)
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.pt2"
                torch.export.save(program, path, extra_files={"largemargin.json": facts_of(model)})
                again = torch.export.load(path).module()
                content = path.read_bytes()
    except Exception as error:  # torch raises many types for a network that it cannot export
        raise _cannot(model, "torch.export", error) from error
    _check(model, "torch.export", lambda inputs: again(inputs))
    _write(out, content)


def export_onnx(model: Model, out: Path) -> None:
    """Write the network in ONNX."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise LabError(f"--onnx needs {', '.join(missing)}; install it with: pip install {' '.join(missing)}")
    import onnxruntime

    try:
        with warnings.catch_warnings(action="ignore"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            program: Any = torch.onnx.export(_program(model), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"])
            program.model.metadata_props["largemargin"] = facts_of(model)
            program.save(path, external_data=False)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            content = path.read_bytes()
    except Exception as error:  # of torch, onnxscript or onnxruntime
        raise _cannot(model, "ONNX", error) from error
    _check(model, "ONNX", lambda inputs: torch.from_numpy(session.run(None, {"images": inputs.numpy()})[0]))
    _write(out, content)


def _program(model: Model) -> Any:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model.network, (_inputs(model, 2),), dynamic_shapes=({0: batch},))


def _inputs(model: Model, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, *model.pixels.input_shape, generator=generator)


@torch.no_grad()
def _check(model: Model, kind: str, program: Any) -> None:
    """Raises LabError where the program does not give the network's logits."""
    for count in CHECKED:
        inputs = _inputs(model, count)
        ours, theirs = model.network(inputs).numpy(), program(inputs).detach().numpy()
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=0, atol=TOLERANCE * max(1.0, float(abs(ours).max()))):
            raise LabError(
                f"MODEL {model.path}: its program of {kind} gives other logits than the network for {count} images; it is not kept"
            )


def _cannot(model: Model, kind: str, error: Exception) -> LabError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return LabError(
        f"MODEL {model.path}: the network {model.recipe.network} with the loss {model.recipe.loss} cannot be written for {kind}: {reason}"
    )


def _write(out: Path, content: bytes) -> None:
    try:
        write_atomically(out, lambda file: file.write(content))
    except OSError as error:
        raise LabError(f"--out {out} cannot be written: {error.strerror or error}; choose another file") from error
