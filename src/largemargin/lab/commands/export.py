"""``largemargin export``: the model of a run as a program."""

from typing import Any

from rich.console import Console

from ..arguments.options import path_of
from ..run.export import export_onnx, export_program
from ..run.model import load


def run(options: Any, console: Console) -> None:
    model = load(path_of(options.model))
    out = path_of(options.out) if options.out is not None else model.path.with_name("model.pt2")
    export_program(model, out)
    console.print(f"{out}: a program of torch.export, checked: it gives the logits of the network", markup=False, highlight=False)
    if options.onnx:
        onnx = out.with_suffix(".onnx")
        export_onnx(model, onnx)
        console.print(f"{onnx}: ONNX, checked: it gives the logits of the network", markup=False, highlight=False)
