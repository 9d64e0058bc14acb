"""The ``results.csv`` that a comparison writes, as a table of scores: its losses are the methods."""

from pathlib import Path

from ..errors import LabError
from ..tables import Rows
from ..words import listed

METHOD, SEED = "method", "seed"
LOSS, DIVERGED, DATA = "loss", "diverged", "data"
NOISE = ("label_noise", "noise_kind")
SIGNS = {LOSS, SEED, "seconds", DIVERGED}  # columns that every such file has
SCORE = "test_"  # begins the name of a score


def is_of_a_comparison(table: Rows) -> bool:
    return set(table.names) >= SIGNS and METHOD not in table.names and any(name.startswith(SCORE) for name in table.names)


def as_scores(path: Path, table: Rows) -> Rows:
    """The methods, seeds, data sets and scores alone; raises LabError for runs that diverged, and for several kinds of label noise."""
    at = {name: i for i, name in enumerate(table.names)}
    for line, row in zip(table.lines, table.rows, strict=True):
        if why := row[at[DIVERGED]]:
            raise LabError(f"{path}, line {line}: this run diverged ({why}); repeat it, or remove its seed for all losses")
    noise = dict.fromkeys(" ".join(row[at[name]] for name in NOISE if name in at).strip() for row in table.rows)
    if len(noise) > 1:
        raise LabError(f"{path}: its label noise is {listed(list(noise))}; keep the rows of one kind and share")
    kept = [i for name, i in at.items() if name in (LOSS, SEED, DATA) or name.startswith(SCORE)]
    names = [METHOD if table.names[i] == LOSS else table.names[i] for i in kept]
    return table._replace(names=names, rows=[[row[i] for i in kept] for row in table.rows])
