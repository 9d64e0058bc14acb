"""The tables of the pages are those of the committed records, and ``largemargin reproduce`` goes on from them."""

import csv
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from largemargin.lab import cli
from largemargin.lab.commands import compare, reproduce
from largemargin.lab.comparison.plan import Comparison
from largemargin.lab.paper.cells import cells
from largemargin.lab.paper.lines import lines_of, number_text
from largemargin.lab.paper.plan import MARKER, reopen, unique_recipes
from largemargin.lab.stats import moments, paired_by_seed, spread
from largemargin.lab.verdicts import Judged, judge

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from studies import OF_LOGITS, STUDIES, commands  # noqa: E402

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
    return spread(mean, std) if digits == 2 else f"{mean:.{digits}f}" + ("" if std is None else f" ± {std:.{digits}f}")


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


class Measured(NamedTuple):
    """A loss under one noise: the runs that did not diverge, as lines of a CSV file by seed, and its verdict beside softmax."""

    kept: dict[int, dict[str, str]]
    diverged: int
    judged: Judged | None

    @property
    def error(self) -> str:
        if not self.kept:
            return "diverged"
        mean = spread(*moments(of_lines(self.kept, "test_error").values()))
        return mean + (f" ({self.diverged} diverged)" if self.diverged else "")

    @property
    def difference(self) -> str:
        """Bold where Holm's correction leaves it."""
        if self.judged is None:
            return ""
        return f"**{self.judged.text}**" if self.judged.verdict in ("better", "worse") else self.judged.text


def of_lines(lines, name):
    return {seed: float(line[name]) for seed, line in lines.items()}


def measured(folder):
    """What results.csv of a comparison says: by the noise, and then by the loss and its lam. Holm's correction runs over all verdicts."""
    found: dict[tuple[str, str], dict[tuple[str, str], dict[int, dict[str, str]]]] = {}
    for line in csv.DictReader((ROOT / "results" / folder / "results.csv").read_text().splitlines()):
        of_noise = found.setdefault((line["label_noise"], line["noise_kind"]), {})
        of_noise.setdefault((line["loss"], line["lam"]), {})[int(line["seed"])] = line
    kept = {
        (noise, loss): {seed: line for seed, line in lines.items() if not line["diverged"]}
        for noise, losses in found.items()
        for loss, lines in losses.items()
    }
    pairs = {}
    for noise, loss in kept:
        lines, baseline = kept[noise, loss], kept[noise, ("softmax", "")]
        if loss[0] != "softmax" and len(lines) > 1:
            pairs[noise, loss] = paired_by_seed(of_lines(lines, "test_error"), of_lines(baseline, "test_error"))
    lost = {(noise, loss): len(found[noise][loss]) - len(kept[noise, loss]) for noise, loss in kept}
    judged = dict(
        zip(pairs, judge([(loss[0], "softmax", paired, lost[noise, loss]) for (noise, loss), paired in pairs.items()]), strict=True)
    )
    return {
        noise: {loss: Measured(kept[noise, loss], lost[noise, loss], judged.get((noise, loss))) for loss in found[noise]} for noise in found
    }


CLEAN, UNIFORM, NEXT = ("0.0", ""), ("0.3", ""), ("0.3", "asymmetric")
HUMAN, AS_MANY = ("0.402", "human"), ("0.402", "")


def of_loss(losses, word):
    return next(found for (name, _), found in losses.items() if name == word)


def rows_of_the_losses_on_digits():
    noisy, tail = measured("digits-noise"), measured("digits-long-tail")
    for word in OF_LOGITS.split():
        found = [of_loss(losses, word) for losses in (noisy[CLEAN], noisy[UNIFORM], noisy[NEXT], tail[CLEAN])]
        yield (f"`{word}`", *("; ".join(filter(None, (one.error, one.difference))) for one in found))


# a study of a part of a data set: how the page calls it, and the column of Table 4 (none: Table 2) that the paper has for it
PARTS = {
    "cifar10-part": ("CIFAR-10, WRN-28-10 × 0.1", "CIFAR-10 WRN-28-10"),
    "svhn-part": ("SVHN, WRN-28-10 × 0.1", "SVHN WRN-28-10"),
    "imagenet-part": ("25 classes of ImageNet, VGG-16-mod × 0.125", "ImageNet VGG-16-mod"),
    "places-part": ("20 categories of Places, VGG-16-mod × 0.125", "Places-365 VGG-16-mod"),
    "cifar100-part": ("CIFAR-100, 13 layers × 0.125", ""),
}
ROWS_OF_THE_PAPER = {"softmax": "softmax", "label_smoothing": "LSR λ=0.1", "large_margin": "ours λ=0.3"}


def rows_of_the_parts():
    for folder, (title, column) in PARTS.items():
        if not (ROOT / "results" / folder).is_dir():
            continue
        printed = {cell.row: cell.paper for cell in cells("table4" if column else "table2") if cell.column == column}
        for (word, lam), found in measured(folder)[CLEAN].items():
            trained = text(of_lines(found.kept, "train_error").values())
            of_paper = number_text(printed.get(ROWS_OF_THE_PAPER[word]))
            yield (title, NAMES[word, float(lam) if lam else None], found.error, found.difference, trained, of_paper)


def rows_of_human_noise():
    usual, strong = measured("human-noise"), measured("human-noise-lam1")
    for losses in (usual, strong):
        for word, lam in losses[HUMAN]:
            if losses is strong and word == "softmax":  # the same runs
                continue
            name = NAMES[word, float(lam) if lam else None]
            found = [losses[noise][word, lam] for noise in (HUMAN, AS_MANY)]
            yield (name, *(cell for one in found for cell in (one.error, one.difference)))


def rows_of_the_losses_on_human_noise():
    for word in OF_LOGITS.split():
        found = of_loss(measured("human-noise-losses")[HUMAN], word)
        yield (f"`{word}`", found.error, found.difference, text(of_lines(found.kept, "test_ece").values(), 1) if found.kept else "")


TABLES = {
    rows_of_the_readme: ROOT / "README.md",
    rows_of_the_full_size: PAGE,
    rows_of_the_reduced_study: PAGE,
    rows_of_50_epochs: PAGE,
    rows_of_few_images: PAGE,
    rows_of_the_losses_on_digits: PAGE,
    rows_of_the_parts: PAGE,
    rows_of_human_noise: PAGE,
    rows_of_the_losses_on_human_noise: PAGE,
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


def planned_comparison(words, monkeypatch):
    found: list[Comparison] = []

    def instead(comparison, *_, **__):
        found.append(comparison)
        return []

    monkeypatch.setattr(compare, "compare", instead)
    assert cli.main([*words[1:], "--device", "cpu"]) == 0
    return found[0]


@pytest.mark.parametrize("folder", [folder for name in STUDIES for folder in STUDIES[name] if (ROOT / "results" / folder).is_dir()])
def test_the_records_of_a_study_are_of_the_command_on_the_page(folder, monkeypatch):
    (words,) = [words for name in STUDIES for words in commands(name) if words[-1] == f"runs/{folder}"]
    kept = json.loads((ROOT / "results" / folder / "compare.json").read_text())["comparison"]
    comparison = planned_comparison(words, monkeypatch)
    assert dataclasses.replace(comparison, data_digest=kept["data_digest"]) == Comparison.from_dict(kept)
    assert shlex.join(words[:-2]) in PAGE.read_text()
    lines = list(csv.DictReader((ROOT / "results" / folder / "results.csv").read_text().splitlines()))
    assert len(lines) == comparison.num_runs
