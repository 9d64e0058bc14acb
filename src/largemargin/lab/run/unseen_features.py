"""Logits of samples in a file that is of no data set of a run: features in an npz file, or a table."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.arrays import unlabelled
from ..data.features import encoded
from ..data.raw_table import read_table
from ..errors import LabError
from .model import Model
from .standard import AT_ONCE, Standard


def predict_features(model: Model, standard: Standard, path: Path, device: torch.device) -> tuple[list[str], NDArray[np.float64]]:
    """What each sample of a file is called, and the logits (N, C). A table needs the columns that the run was trained on."""
    if standard.columns:
        if path.suffix.lower() not in (".csv", ".parquet"):
            raise LabError(f"{path}: the run was trained on a table; give a .csv or .parquet file with its columns")
        table = read_table(path)
        missing = [column.name for column in standard.columns if column.name not in table.cells]
        if missing:
            raise LabError(f"{path} has no column {missing[0]}, which the run was trained on ({len(missing)} are missing); add it")
        values = {name: (table.numbers if words is None else table.words)(name) for name, words in standard.columns}
        features, names = encoded(values, standard.columns), [table.place(row) for row in range(len(table))]
    else:
        features = unlabelled(path)
        names = [str(row) for row in range(len(features))]
    inputs, network = standard(features), model.network.to(device)
    with torch.inference_mode():
        logits = torch.cat([network(part.to(device)).cpu().double() for part in inputs.split(AT_ONCE)]).numpy()
    if not np.isfinite(logits).all():
        raise LabError(f"MODEL {model.path} gives logits that are not finite: its run has diverged; use another run")
    return names, logits
