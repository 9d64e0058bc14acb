"""The tables of docs/reproduce.md are those of the committed records."""

import json
from pathlib import Path
from typing import Any

import pytest

from largemargin.lab.compare import paired_difference, spread
from largemargin.lab.paper_lines import moments

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="the source distribution has no records")
PAGE = (ROOT / "docs" / "reproduce.md").read_text()
NAMES = {
    ("softmax", None): "softmax",
    ("label_smoothing", None): "label smoothing 0.1",
    ("large_margin", 0.3): "ours, λ = 0.3",
    ("large_margin", 1.0): "ours, λ = 1",
}


def runs(study, label_noise=0.0):
    """The records of each loss by seed."""
    found: dict[Any, Any] = {}
    for path in sorted((ROOT / "results" / study / "runs").glob("*/result.json")):
        record = json.loads(path.read_text())
        recipe = record["recipe"]
        if recipe["label_noise"] == label_noise:
            found.setdefault(NAMES[recipe["loss"], recipe["lam"]], {})[recipe["seed"]] = record
    assert found and all(by_seed.keys() == {0, 1, 2} for by_seed in found.values())
    return found


def errors(by_seed):
    return {seed: record["test"]["error"] for seed, record in by_seed.items()}


def minus_softmax(of_study, name):
    pairs = errors(of_study[name]), errors(of_study["softmax"])
    return "" if name == "softmax" else paired_difference(*pairs).text


def text(values, digits=2):
    mean, std = moments(values)
    return spread(mean, std) if digits == 2 else f"{mean:.{digits}f} ± {std:.{digits}f}"


def last(by_seed, name, digits=2):
    return text([record["epochs"][-1][name] for record in by_seed.values()], digits)


def rows_of_the_reduced_study():
    clean, noisy = runs("cifar100-reduced"), runs("cifar100-reduced", label_noise=0.3)
    return [
        (name, *(cell for study in (clean, noisy) for cell in (text(errors(study[name]).values()), minus_softmax(study, name))))
        for name in clean
    ]


def rows_of_50_epochs():
    study = runs("cifar100-reduced-50-epochs")
    return [
        (
            *(name, last(by_seed, "train_error"), text(errors(by_seed).values()), minus_softmax(study, name)),
            *(last(by_seed, "train_rho"), last(by_seed, "asymmetry", 3)),
        )
        for name, by_seed in study.items()
    ]


def rows_of_few_images():
    rows = []
    for name, by_seed in runs("cifar100-few").items():
        tests = [record["test"] for record in by_seed.values()]
        rho = [[epoch["train_rho"] for epoch in record["epochs"]] for record in by_seed.values()]
        lowest = sorted(1 + of_run.index(min(of_run)) for of_run in rho)
        rows.append(
            (
                *(name, last(by_seed, "train_error"), text(errors(by_seed).values())),
                *(text([test["nll"] for test in tests]), text([test["ece"] for test in tests], 1)),
                f"{moments(map(min, rho))[0]:.2f}, {lowest[0]} to {lowest[-1]}",
                *(last(by_seed, "train_rho"), last(by_seed, "asymmetry", 3)),
            )
        )
    return rows


@pytest.mark.parametrize("rows", [rows_of_the_reduced_study, rows_of_50_epochs, rows_of_few_images])
def test_every_row_of_the_page_is_that_of_the_records(rows):
    def plain(line):
        return "|".join(cell.strip() for cell in line.split("|"))

    page = {plain(line) for line in PAGE.splitlines()}
    for row in rows():
        assert plain(f"| {' | '.join(row)} |") in page
