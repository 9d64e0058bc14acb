"""Runs that diverge are named and counted, and no mean, pair, verdict or choice takes them for results."""

import csv
import json
import math

import pytest
import torch

from combinations import every
from largemargin.lab import cli
from largemargin.lab.comparison.choose import choice_cells, choose
from largemargin.lab.comparison.figures import overview
from largemargin.lab.comparison.recommendation import advice
from largemargin.lab.comparison.table import cells, summarise
from largemargin.lab.paper.lines import Line
from largemargin.lab.results import NOT_FINITE, ONE_CLASS, RunRecord
from largemargin.lab.run.evaluate import evaluate
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.stats import paired
from largemargin.lab.verdicts import judge

FINITE = {"error": 10.0, "nll": 0.4, "ece": 2.0, "margin": 3.0, "rho": 0.5, "predicted_classes": 10, "target_classes": 10}
pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.xdist_group("lab_diverged")]  # one worker makes its runs


def record(loss, seed, error=10.0, lam=None, split="test", train_loss=1.0, **changes):
    recipe = Recipe(loss=loss, seed=seed, **LOSSES[loss] | ({} if lam is None else {"lam": lam})).to_dict()
    of_split = {**FINITE, "error": error, **changes}
    epochs = [{"epoch": 1, "train_loss": train_loss, f"{split}_error": error}]
    values = {"recipe": recipe, "test": None, "validation": None, split: of_split, "epochs": epochs, "seconds": 1.0, "classes": list("abc")}
    return RunRecord.from_dict(values | {"environment": {}})


NAN = {"error": 100.0, "nll": None, "margin": None, "ece": None}
CASES = {
    "NaN on disk": (NAN, NOT_FINITE),
    "NaN in memory": ({"nll": math.nan}, NOT_FINITE),
    "inf": ({"nll": math.inf}, NOT_FINITE),
    "margin alone": ({"margin": None}, NOT_FINITE),
    "calibration alone": ({"ece": None}, NOT_FINITE),
    "bias alone": ({"rho": None}, NOT_FINITE),
    "no error": ({"error": None}, NOT_FINITE),
    "training loss": ({"train_loss": None}, NOT_FINITE),
    "one class": ({"predicted_classes": 1}, ONE_CLASS),
    "one class to predict": ({"predicted_classes": 1, "target_classes": 1}, ""),
    "two classes": ({"predicted_classes": 2}, ""),
    "sound": ({}, ""),
}


@every("split", ["test", "validation"])
@every("case", CASES)
def test_what_is_not_finite_or_constant_diverged(case, split):
    changes, reason = CASES[case]
    assert record("softmax", 0, split=split, **changes).why_diverged == reason


def test_a_record_that_does_not_count_its_predictions_is_judged_by_its_numbers():
    test = {name: value for name, value in FINITE.items() if not name.endswith("classes")}
    old = RunRecord.from_dict({"recipe": Recipe("softmax", 0).to_dict(), "test": test, "environment": {}})
    assert old.why_diverged == ""


def test_predictions_are_counted():
    logits, target = torch.eye(3)[[0, 0, 0, 1]], torch.tensor([0, 1, 2, 1])
    assert (evaluate(logits, target).predicted_classes, evaluate(logits, target).target_classes) == (2, 3)
    assert evaluate(logits[:3], target[:3]).predicted_classes == 1
    assert evaluate(torch.zeros(4, 3), target).predicted_classes == 1


def records_with_one_diverged(loss):
    sound = [record("softmax", seed, 20.0 + seed) for seed in range(4)]
    sound += [record("large_margin", seed, 10.0 + seed + seed**2 / 10) for seed in range(4)]
    place = next(i for i, r in enumerate(sound) if r.recipe.loss == loss and r.recipe.seed == 3)
    return [record(loss, 3, **NAN) if i == place else r for i, r in enumerate(sound)]


@pytest.mark.parametrize("loss", ["softmax", "large_margin"])
def test_a_diverged_seed_is_in_no_mean_and_no_pair(loss):
    records = records_with_one_diverged(loss)
    rows = {row.loss: row for row in summarise(records)}
    without = {row.loss: row for row in summarise([r for r in records if not r.why_diverged])}
    assert (rows[loss].n, rows[loss].diverged) == (4, 1)
    for name in ("mean", "std", "others"):
        assert getattr(rows[loss], name) == getattr(without[loss], name)
    assert rows["large_margin"].judged.paired == without["large_margin"].judged.paired
    assert cells(rows[loss])[1].endswith("(1 diverged)")


def test_a_loss_with_a_diverged_run_is_not_called_better():
    records = records_with_one_diverged("large_margin")
    row = summarise(records)[1]
    assert row.judged.paired.over_seeds.high < 0 and row.verdict == "inconclusive"
    assert "better" not in cells(row) and "stay with softmax" in " ".join(advice(summarise(records)))
    assert summarise(records_with_one_diverged("softmax"))[1].verdict == "better"


def test_a_loss_with_a_diverged_run_can_be_worse():
    records = [record("softmax", seed, 10.0 + seed**2 / 10) for seed in range(4)]
    records += [record("large_margin", seed, 30.0 + seed) for seed in range(3)] + [record("large_margin", 3, **NAN)]
    assert summarise(records)[1].verdict == "worse"


def test_the_verdict_of_the_reproduction_follows_the_same_rule():
    difference = paired([-2.0, -2.1, -1.9])
    values = dict(entry=None, errors={0: 1.0}, best={}, baseline=None, pairs={}, command="", full_size=True)
    verdicts = [Line(**values, diverged=n, judged=judge([("ours", "softmax", difference, n)])[0]).verdict for n in (0, 1)]
    assert verdicts == ["better", "inconclusive"]


def test_where_all_diverged_no_number_is_shown():
    row = summarise([record("softmax", seed, **NAN) for seed in (0, 1)])[0]
    assert cells(row)[1] == "diverged" and "100" not in " ".join(cells(row)[1:])
    assert "nan" not in " ".join(cells(row))
    assert "diverged" in overview([row])


def test_a_lambda_that_diverges_is_not_chosen():
    records = [record("large_margin", seed, 9.0, lam=0.1, split="validation") for seed in (0, 1)]
    records += [record("large_margin", 0, 1.0, lam=1.0, split="validation")]
    records += [record("large_margin", 1, lam=1.0, split="validation", **NAN)]
    (choice,) = choose(records)
    assert choice.lam == 0.1 and [line[3] for line in choice_cells([choice])][1] == "1.00 (1 diverged)"


def test_a_choice_of_diverged_runs_alone_is_still_told():
    records = [record("large_margin", 0, lam=lam, split="validation", **NAN) for lam in (0.1, 1.0)]
    (choice,) = choose(records)
    assert choice.lam == 0.1 and {line[3] for line in choice_cells([choice])} == {"diverged"}


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """All runs diverge: the learning rate is absurd."""
    out = tmp_path_factory.mktemp("diverged") / "out"
    command = ["compare", "--epochs", "1", "--losses", "softmax", "large_margin", "--seeds", "0", "1", "--recipe.learning_rate", "1e10"]
    assert cli.main([*command, "--out", str(out)]) == 0
    return out


def test_diverged_runs_are_named_in_table_csv_and_report(diverged, capsys):
    assert cli.main(["report", str(diverged)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    page = (diverged / "report.html").read_text()
    for text in (said, page):
        assert "4 of 4 runs diverged" in text and "100.00" not in text
    rows = list(csv.DictReader((diverged / "results.csv").read_text().splitlines()))
    assert len(rows) == 4 and all(row["diverged"] for row in rows)


def test_one_diverged_run_among_sound_ones_is_named(diverged, tmp_path, capsys):
    command = [
        "compare",
        "--epochs",
        "1",
        "--losses",
        "softmax",
        "large_margin",
        "--seeds",
        "0",
        "1",
        "--train-fraction",
        "0.1",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(command) == 0
    path = next(path for path in (tmp_path / "runs").glob("large_margin*seed1*/result.json"))
    broken = json.loads(path.read_text())
    broken["test"] |= NAN
    path.write_text(json.dumps(broken))
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 4 runs diverged: large margin λ=0.3, label noise 0, seed 1" in said and "(1 diverged)" in said
    page = (tmp_path / "report.html").read_text()
    assert "1 of 4 runs diverged" in page and "Margins" in page


def test_train_says_that_its_run_diverged(tmp_path, capsys):
    command = ["train", "--epochs", "1", "--learning-rate", "1e10", "--device", "cpu", "--out", str(tmp_path / "one")]
    for _ in range(2):
        assert cli.main(command) == 0
        assert "diverged" in capsys.readouterr().out
