"""How long a comparison takes, said before its first run."""

import dataclasses
import json

import pytest
import torch
from rich.console import Console

from largemargin.lab import cli, data
from largemargin.lab.commands import compare, estimate
from largemargin.lab.comparison.plan import Comparison
from largemargin.lab.queue.budget import Budget, Cost
from largemargin.lab.run import pace
from largemargin.lab.run.pace import Pace
from largemargin.lab.run.recipe import Recipe

ONE = Recipe(loss="softmax", seed=0, epochs=10)
SECOND_AN_IMAGE = Pace(training=1.0, evaluation=0.5)
SMALL = Comparison(losses=("softmax", "large_margin"), seeds=(0, 1), epochs=1, train_fraction=0.1)
pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "data", 8)  # 1,198 for training and 599 for testing


@pytest.fixture
def paced(monkeypatch):
    monkeypatch.setattr(estimate, "pace_of_one_batch", lambda *_: SECOND_AN_IMAGE)


def seconds(digits, **changes):
    (found,) = estimate.durations([dataclasses.replace(ONE, **changes)], digits, SECOND_AN_IMAGE)
    return found


def test_a_run_takes_as_long_as_its_images(digits):
    assert seconds(digits) == 10 * (1198 + 599 / 2)
    assert seconds(digits, evaluate_every=4) == 10 * 1198 + 3 * 599 / 2  # after 4, 8 and 10 epochs
    assert seconds(digits, train_fraction=0.5) == 10 * (599 + 599 / 2)
    assert seconds(digits, validation_fraction=0.5) == 10 * (599 + 599 / 2)  # it measures itself on the other half
    assert 10 * 599 / 2 + 1198 < seconds(digits, long_tail=20.0) < seconds(digits) / 2
    assert seconds(digits, label_noise=0.4, noise_kind="human") == seconds(digits)


@pytest.mark.parametrize(
    ("jobs", "cores", "device", "said"),
    [
        (1, 4, "cpu", "about 1.7 h for 4 runs"),
        (2, 4, "cpu", "about 49.9 min for 4 runs"),
        (8, 4, "cpu", "about 25.0 min for 4 runs"),
        (8, 2, "cpu", "about 49.9 min for 4 runs"),  # four processes on two cores
        (2, 4, "cuda", "about 1.7 h for 4 runs"),  # two runs share one GPU
    ],
)
def test_runs_at_a_time_share_the_work(digits, paced, monkeypatch, tmp_path, jobs, cores, device, said):
    monkeypatch.setattr(estimate, "num_cores", lambda: cores)
    recipes = [dataclasses.replace(ONE, epochs=1, seed=seed, device=device) for seed in range(4)]  # of 1,497.5 s each
    line = estimate.how_long(recipes, digits, tmp_path, jobs, graph=True)
    assert line == f"{said} (measured: 1.28e+05 ms a step of 128 images)"


def test_a_choice_of_lam_counts_the_runs_that_choose():
    choosing = dataclasses.replace(SMALL, lam=(0.1, 0.3, 1.0))
    assert len(SMALL.all_recipes()) == SMALL.num_runs == 4
    assert len(choosing.all_recipes()) == 2 * 3 + 4
    assert sum(bool(recipe.validation_fraction) for recipe in choosing.all_recipes()) == 2 * 3


def test_the_measured_step_is_that_of_the_recipe(digits, monkeypatch):
    asked = []

    def measured(recipe, images, graph):
        asked.append((recipe, len(images.train_labels), graph))
        return Pace(0.01, 0.01)

    monkeypatch.setattr(pace, "measured_pace", measured)
    recipe = dataclasses.replace(ONE, network="layer13", label_noise=0.4, noise_kind="human", long_tail=20.0)
    pace.pace_of_one_batch(pace.with_any_samples(recipe), digits.few, seconds=0.5)
    plain = dataclasses.replace(ONE, network="layer13")
    assert asked == [(plain, 2, False), (plain, 50, True)]  # half a second of a hundred images a second


def test_a_comparison_says_how_long_it_takes_before_it_starts(tmp_path, capsys):
    threads = torch.get_num_threads()
    command = ["compare", "--losses", "softmax", "--seeds", "0", "--epochs", "1", "--train-fraction", "0.1", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "ms a step of 128 images)" in line]
    assert len(said) == 1 and said[0].startswith("about ") and " for 1 run (measured: " in said[0]
    assert lines.index(said[0]) < next(number for number, line in enumerate(lines) if line.startswith("1 run of 1 epoch on digits"))
    assert torch.get_num_threads() == threads
    assert cli.main(command) == 0
    assert "a step of" not in capsys.readouterr().out  # nothing is left to do


def test_an_estimate_changes_no_run(tmp_path):
    for name, console in (("quiet", Console(quiet=True)), ("told", Console(width=140))):
        compare.compare(dataclasses.replace(SMALL, seeds=(0,)), tmp_path / name, 1, console)
    left = {
        name: {path.parent.name: json.loads(path.read_text())["test"] for path in (tmp_path / name).glob("runs/*/result.json")}
        for name in ("quiet", "told")
    }
    assert len(left["told"]) == 2 and left["told"] == left["quiet"]


def test_who_does_not_read_an_estimate_does_not_wait_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "how_long", lambda *_: pytest.fail("measured"))
    one = dataclasses.replace(SMALL, losses=("softmax",), seeds=(0,))
    compare.compare(one, tmp_path / "quiet", 1, Console(quiet=True))
    budget = Budget(10_000, measure=lambda *_: Cost(0.0, 0.0))
    compare.compare(one, tmp_path / "minutes", 1, Console(width=140), budget=budget)


def test_a_step_that_fails_is_told_and_the_runs_go_on(digits, monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(estimate, "pace_of_one_batch", fails)
    line = estimate.how_long([ONE], digits, tmp_path, 1, graph=True)
    assert line == "how long the runs take could not be measured: RuntimeError: out of memory and more"
