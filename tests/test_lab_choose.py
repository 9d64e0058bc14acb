"""The choice of lam by `largemargin compare`: on a part of the training set, never on the test set."""

import csv
import dataclasses
import json
import re
import shutil

import pytest
import torch

from largemargin.lab import cli, data
from largemargin.lab.comparison.choose import choose, chosen_of
from largemargin.lab.comparison.folder import finished_records, reopen
from largemargin.lab.comparison.plan import Comparison
from largemargin.lab.data.images import ImageSet
from largemargin.lab.results import RunRecord
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.recipe import Recipe

COMMAND = ["compare", "--losses", "softmax", "large_margin", "--lam", "0.1", "1", "--seeds", "0", "1"]
COMMAND += ["--epochs", "2", "--label-noise", "0", "0.3", "--train-fraction", "0.3", "--device", "cpu"]  # runs are repeated bit for bit


pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.xdist_group("lab_choose")]  # one worker makes its runs


def reopened(out):
    """The comparison on images in a folder."""
    comparison = reopen(out)
    assert isinstance(comparison, Comparison)
    return comparison


def record(loss, seed, lam, error, noise=0.0):
    recipe = Recipe(loss=loss, seed=seed, label_noise=noise, **LOSSES[loss] | {"lam": lam}).to_dict()
    return RunRecord.from_dict({"recipe": recipe, "test": None, "validation": {"error": error}, "environment": {}})


def records_of(out):
    return [json.loads(path.read_text()) for path in sorted((out / "runs").glob("*/result.json"))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison that chose, done once."""
    out = tmp_path_factory.mktemp("choose") / "out"
    assert cli.main([*COMMAND, "--out", str(out)]) == 0
    return out


def test_the_least_mean_error_over_seeds_is_chosen_for_each_loss_and_noise():
    errors = {
        ("large_margin", 0.0): ([5, 9], [6, 6], [9, 5]),
        ("large_margin", 0.2): ([5, 5], [6, 6], [4, 7]),
        ("modified_large_margin", 0.0): ([3, 3], [2, 3], [1, 1]),
    }
    records = [
        record(loss, seed, lam, error, noise)
        for (loss, noise), of_lam in errors.items()
        for lam, of_seed in zip((0.1, 0.3, 1.0), of_lam, strict=True)
        for seed, error in enumerate(of_seed)
    ]
    assert chosen_of(choose(records)) == {
        ("large_margin", 0.0): 0.3,
        ("large_margin", 0.2): 0.1,
        ("modified_large_margin", 0.0): 1.0,
    }


@pytest.mark.parametrize("lams", [(0.1, 1.0), (1.0, 0.1)])
def test_of_equals_the_smaller_lam_is_chosen(lams):
    # 0.1 + 0.2 is not 0.3 in floating point: sums of the same errors in another order are equals too
    records = [
        record("large_margin", seed, lam, error)
        for lam in lams
        for seed, error in enumerate((0.1, 0.2, 0.3) if lam == 1 else (0.3, 0.2, 0.1))
    ]
    assert choose(records)[0].lam == 0.1


def test_with_one_lam_nothing_is_held_out():
    comparison = Comparison(lam=(0.5,))
    assert not comparison.choosing and not comparison.validating_recipes()
    assert {recipe.evaluate_every for recipe in comparison.recipes()} == {1}
    assert {recipe.validation_fraction for recipe in comparison.recipes()} == {0.0}


def test_losses_without_lam_are_not_trained_for_the_choice():
    comparison = Comparison(losses=("softmax", "label_smoothing", "large_margin"), lam=(0.1, 1.0), seeds=(0, 1))
    validating = comparison.validating_recipes()
    assert len({recipe.id for recipe in validating}) == 4 and {recipe.loss for recipe in validating} == {"large_margin"}
    assert {recipe.loss for recipe in comparison.recipes()} == {"softmax", "label_smoothing"}  # before the choice
    runs = comparison.recipes({("large_margin", 0.0): 1.0})
    assert len(runs) == comparison.num_runs and {recipe.lam for recipe in runs} == {None, 1.0}


def test_validating_runs_never_see_the_test_set_and_the_others_see_it_once(finished):
    records = records_of(finished)
    validating = [record for record in records if record["recipe"]["validation_fraction"]]
    compared = [record for record in records if not record["recipe"]["validation_fraction"]]
    assert len(validating) == len(compared) == 8
    for record in validating:
        assert record["test"] is None and record["validation"] is not None
        assert not [name for row in record["epochs"] for name in row if name.startswith("test")]
        assert record["num_train"] == compared[0]["num_train"] - round(0.2 * compared[0]["num_train"])
    for record in compared:
        assert [row["test_error"] is None for row in record["epochs"]] == [True, False]


def test_the_runs_compared_have_the_chosen_lam(finished):
    validating, compared = finished_records(reopened(finished), finished)
    chosen = chosen_of(choose(validating))
    assert len(chosen) == 2 and len(compared) == 8
    for record in compared:
        assert record.recipe.lam == chosen.get((record.recipe.loss, record.recipe.label_noise))


def test_the_test_labels_have_no_part_in_the_choice(finished, tmp_path, monkeypatch):
    """The same data with other test labels and images: every validating run gives the same numbers."""
    from largemargin.lab.run.train import train

    digits = data.load("digits", "", 32)
    assert isinstance(digits, ImageSet)
    other = dataclasses.replace(digits, test_labels=digits.test_labels.roll(7), test_images=torch.zeros_like(digits.test_images))
    validating, _ = finished_records(reopened(finished), finished)
    again = []
    for record in validating:
        recipe = dataclasses.replace(record.recipe, data_digest=other.digest())
        if recipe.seed == 0:
            again.append(RunRecord.from_dict(train(recipe, other, tmp_path / recipe.id)))
            assert again[-1].validation == record.validation and again[-1].epochs == record.epochs
    of_seed = [record for record in validating if record.recipe.seed == 0]
    assert len(again) == 4 and chosen_of(choose(again)) == chosen_of(choose(of_seed))


def test_a_second_time_nothing_is_repeated(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*")}
    assert cli.main([*COMMAND, "--out", str(finished)]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*")}
    said = " ".join(capsys.readouterr().out.split())
    assert "8 validating runs" in said and said.count("8 already done") == 2


def test_a_choice_that_lacks_a_run_is_not_made(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    comparison = reopened(tmp_path / "out")
    missing = next(recipe for recipe in comparison.validating_recipes() if recipe.loss == "large_margin" and recipe.label_noise == 0.3)
    shutil.rmtree(tmp_path / "out" / "runs" / missing.id)
    validating, compared = finished_records(comparison, tmp_path / "out")
    assert ("large_margin", 0.3) not in chosen_of(choose(validating)) and len(validating) == 4 and len(compared) == 6
    assert cli.main(["report", str(tmp_path / "out")]) == 0
    assert "2 still missing" in (tmp_path / "out" / "report.html").read_text()


def test_the_choice_is_told(finished, capsys):
    assert cli.main(["report", str(finished)]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"chosen *$", said, re.MULTILINE)) == 2 and "The test set had no part in it" in " ".join(said.split())
    page = (finished / "report.html").read_text()
    assert page.count(">chosen<") == 2 and "The test set had no part in it" in page
    tables = re.findall(r'<table(?: class="choice")?>.*?</table>', page, re.DOTALL)  # without those of confusions
    assert sum(len(re.findall("<tr>", table)) - 1 for table in tables) == 4 + 4  # the runs compared, and the choices
    rows = list(csv.DictReader((finished / "choice.csv").read_text().splitlines()))
    assert len(rows) == 8 and len((finished / "results.csv").read_text().splitlines()) == 1 + 8
    by_key = {
        (r["recipe"]["loss"], r["recipe"]["lam"], r["recipe"]["seed"], r["recipe"]["label_noise"]): r
        for r in records_of(finished)
        if r["validation"]
    }
    for row in rows:
        key = row["loss"], float(row["lam"]), int(row["seed"]), float(row["label_noise"])
        assert float(row["validation_error"]) == by_key[key]["validation"]["error"]
