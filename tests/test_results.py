"""The tables of the pages are those of the committed records, and ``largemargin reproduce`` goes on from them."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from largemargin.lab import cli
from largemargin.lab.commands import reproduce
from largemargin.lab.paper.lines import lines_of, number_text
from largemargin.lab.paper.plan import MARKER, reopen, unique_recipes
from largemargin.lab.stats import moments, paired_by_seed, spread

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "results").is_dir(), reason="the source distribution has no records")
PAGE = ROOT / "docs" / "measured.md"
FULL_SIZE = ROOT / "results" / "cifar100"
NAMES = {
    ("softmax", None): "softmax",
    ("label_smoothing", None): "label smoothing 0.1",
    ("large_margin", 0.3): "ours, λ = 0.3",
    ("large_margin", 1.0): "ours, λ = 1",
}


def runs(study, label_noise=0.0, seeds=(0, 1, 2)):
    """The records of each loss by seed."""
    found: dict[Any, Any] = {}
    for path in sorted((ROOT / "results" / study / "runs").glob("*/result.json")):
        record = json.loads(path.read_text())
        recipe = record["recipe"]
        if recipe["label_noise"] == label_noise:
            found.setdefault(NAMES[recipe["loss"], recipe["lam"]], {})[recipe["seed"]] = record
    assert found and all(by_seed.keys() == set(seeds) for by_seed in found.values())
    return found


def errors(by_seed):
    return {seed: record["test"]["error"] for seed, record in by_seed.items()}


def minus_softmax(of_study, name):
    pairs = errors(of_study[name]), errors(of_study["softmax"])
    if name == "softmax":
        return ""
    paired = paired_by_seed(*pairs)
    return f"{paired.mean:+.2f} [{paired.over_seeds.low:+.2f}, {paired.over_seeds.high:+.2f}]"


def text(values, digits=2):
    mean, std = moments(values)
    return spread(mean, std) if digits == 2 else f"{mean:.{digits}f} ± {std:.{digits}f}"


def last(by_seed, name, digits=2):
    return text([record["epochs"][-1][name] for record in by_seed.values()], digits)


def full_size():
    """Each loss with its line of the report and the record of its one run."""
    entries, scale, _ = reopen(FULL_SIZE)
    lines = {NAMES[line.entry.recipes[0].loss, line.entry.recipes[0].lam]: line for line in lines_of(entries, scale)}
    return [(name, lines[name], record) for name, of_seed in runs("cifar100", seeds=[0]).items() for record in of_seed.values()]


def signed(difference):
    return "" if difference is None else f"{difference:+.2f}"


def rows_of_the_full_size():
    rows = []
    for name, line, record in full_size():
        test, rho = record["test"], [epoch["train_rho"] for epoch in record["epochs"]]
        lowest = f"{min(rho):.2f} in epoch {1 + rho.index(min(rho))}"
        of_test = (line.ours, signed(line.pairs.get(0)), f"{test['nll']:.2f}", f"{test['ece']:.1f}", f"{test['margin']:.2f}")
        rows.append((name, *of_test, f"{record['epochs'][-1]['train_error']:.2f}", lowest, f"{rho[-1]:.2f}"))
    return rows


def rows_of_the_readme():
    return [
        (
            *(name.replace("ours", "large margin"), line.ours, number_text(line.cell.paper), number_text(line.cell.port)),
            f"{record['test']['nll']:.2f}",
            f"{record['test']['ece']:.1f}",
        )
        for name, line, record in full_size()
    ]


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
                last(by_seed, "train_rho"),
            )
        )
    return rows


TABLES = {
    rows_of_the_readme: ROOT / "README.md",
    rows_of_the_full_size: PAGE,
    rows_of_the_reduced_study: PAGE,
    rows_of_50_epochs: PAGE,
    rows_of_few_images: PAGE,
}


@pytest.mark.parametrize(("rows", "page"), TABLES.items(), ids=[rows.__name__ for rows in TABLES])
def test_every_row_of_the_page_is_that_of_the_records(rows, page):
    def plain(line):
        return "|".join(cell.strip() for cell in line.split("|"))

    lines = {plain(line) for line in page.read_text().splitlines()}
    for row in rows():
        assert plain(f"| {' | '.join(row)} |") in lines


def planned(command, folder, monkeypatch):
    """The names of the runs that a command of ``largemargin reproduce`` plans in a folder."""
    found, device = [], reproduce.device_of(folder)
    digests = json.loads((folder / MARKER).read_text())["digests"]
    monkeypatch.setattr(reproduce, "device_of", lambda out: device)
    monkeypatch.setattr(reproduce, "reproduce", lambda reproduction, *_, **__: found.append(reproduction))
    assert cli.main(shlex.split(command)[1:]) == 0
    return {recipe.id for recipe in unique_recipes(found[0].plan(digests))}


@pytest.mark.parametrize("marker", sorted((ROOT / "results").glob("*/reproduce.json")), ids=lambda marker: marker.parent.name)
def test_reproduce_goes_on_from_the_committed_runs(marker, monkeypatch):
    content = json.loads(marker.read_text())
    done = {folder.name for folder in (marker.parent / "runs").iterdir()}
    assert done and done <= planned(content["command"], marker.parent, monkeypatch)


def test_the_command_of_the_full_size_plans_exactly_its_runs(monkeypatch):
    (command,) = re.findall(r"^largemargin reproduce table2 .*--seeds 0 .*bfloat16.*$", PAGE.read_text(), re.MULTILINE)
    assert planned(command, FULL_SIZE, monkeypatch) == {folder.name for folder in (FULL_SIZE / "runs").iterdir()}
