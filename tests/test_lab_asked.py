"""What is asked for is done, or said not to be: help, weights, ties, shares of the training set."""

import argparse
import dataclasses
import subprocess
import sys

import pytest
import torch

from combinations import every
from largemargin.lab import cli
from largemargin.lab.arguments.options import BY_DATA
from largemargin.lab.arguments.parsers import COMMANDS, build_parser
from largemargin.lab.comparison.choose import choose, ties
from largemargin.lab.comparison.plan import Comparison
from largemargin.lab.data import suited_to
from largemargin.lab.errors import LabError
from largemargin.lab.options import options_of as options_of_a_class
from largemargin.lab.results import RunRecord
from largemargin.lab.run.evaluate import Evaluation
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.optimizer import learning_rates
from largemargin.lab.run.recipe import AUGMENTATIONS, SCHEDULES, Recipe, unread
from largemargin.lab.run.rows import check_shares, choose_rows
from largemargin.lab.run.streams import training_transform

SHORT = ["--epochs", "1", "--device", "cpu"]
TWO = ["compare", *SHORT, "--losses", "softmax", "--seeds", "0", "1", "--train-fraction", "0.1"]
pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.xdist_group("lab_asked")]  # one worker makes its runs

# help


def options_of(parser, command=""):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, of_command in action.choices.items():
                yield from options_of(of_command, name)
        else:
            yield command, action


OPTIONS = list(options_of(build_parser()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help(command):
    bare = [action.dest for name, action in OPTIONS if name == command and action.help in (None, "", argparse.SUPPRESS)]
    assert not bare
    assert sum(name == command for name, _ in OPTIONS) >= 1


def test_every_field_of_a_recipe_has_help():
    assert options_of_a_class(Recipe).keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert all(option.help for cls in (Recipe, Comparison) for option in options_of_a_class(cls).values())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_most_people_set_and_help_all_the_rest(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    shown = {}
    for level in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, level])
        shown[level] = capsys.readouterr().out
    assert len(shown["--help"].splitlines()) <= 75
    dests = {action.option_strings[-1] for name, action in OPTIONS if name == command and action.option_strings}
    assert all(dest in shown["--help-all"] for dest in dests)


def test_the_printed_help_says_something_of_every_option():
    done = subprocess.run([sys.executable, "-m", "largemargin.lab.cli", "train", "--help-all"], capture_output=True, text=True, timeout=100)
    text = " ".join(done.stdout.split())
    for words in ("--epochs N passes over the training set", "--device VALUE cpu, cuda", "--schedule VALUE how the learning rate"):
        assert words in text


def test_the_defaults_that_depend_on_the_data_are_named():
    changed = {name for data in ("digits", "cifar10", "svhn", "imagenet", "a folder") for name in suited_to(data)}
    assert changed == set(BY_DATA)


# weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("asked")
    assert (
        cli.main(["compare", *SHORT, "--losses", "softmax", "--seeds", "0", "1", "--train-fraction", "0.1", "--out", str(out / "a")]) == 0
    )
    assert cli.main(["train", *SHORT, "--train-fraction", "0.1", "--out", str(out / "b")]) == 0
    return out


def test_what_finished_runs_did_not_keep_is_said(finished, capsys):
    command = [
        "compare",
        *SHORT,
        "--losses",
        "softmax",
        "--seeds",
        "0",
        "1",
        "--train-fraction",
        "0.1",
        "--out",
        str(finished / "a"),
        "--tensorboard",
    ]
    assert cli.main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 finished runs have no events" in said and "rm -r" in said
    for path in (finished / "a" / "runs").iterdir():
        assert str(path) in said
    assert cli.main(command[:-1]) == 0
    assert "rm -r" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--keep-checkpoint", "--tensorboard"])
def test_train_says_it_too(option, finished, capsys):
    assert cli.main(["train", *SHORT, "--train-fraction", "0.1", "--out", str(finished / "b"), option]) == 0
    said = capsys.readouterr().out
    assert "1 finished run has no" in said and f"rm -r {finished / 'b'}" in " ".join(said.split())


def test_train_says_that_its_model_is_gone(finished, capsys):
    (finished / "b" / "model.safetensors").unlink()
    assert cli.main(["train", *SHORT, "--train-fraction", "0.1", "--out", str(finished / "b")]) == 0
    assert "1 finished run has no model.safetensors" in " ".join(capsys.readouterr().out.split())


# ties


def records(errors):
    return [
        RunRecord(
            Recipe("large_margin", seed, **LOSSES["large_margin"] | {"lam": lam}), validation=Evaluation(error, 1.0, 0, 0, 0, [], 2, 2)
        )
        for lam, of_seeds in errors.items()
        for seed, error in enumerate(of_seeds)
    ]


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ({0.1: [5.0], 0.3: [5.0], 1.0: [5.0]}, ["lam 0.1, 0.3 and 1 are equally good for large margin"]),
        ({0.3: [5.0], 0.1: [5.0], 1.0: [6.0]}, ["lam 0.1 and 0.3 are equally good for large margin"]),
        ({0.1: [0.1, 0.2, 0.3], 1.0: [0.3, 0.2, 0.1]}, ["lam 0.1 and 1 are equally good for large margin"]),
        ({0.1: [6.0], 0.3: [5.0], 1.0: [6.0]}, []),
    ],
)
def test_ties_in_the_choice_are_said(errors, said):
    found = ties(choose(records(errors)))
    assert [sentence.partition(":")[0] for sentence in found] == said
    assert all("the smallest was taken" in sentence for sentence in found)


def test_a_tie_is_printed_and_in_the_report(tmp_path, capsys):
    command = [
        "compare",
        *SHORT,
        "--losses",
        "softmax",
        "large_margin",
        "--lam",
        "0.1",
        "0.1000001",
        "--seeds",
        "0",
        "--train-fraction",
        "0.1",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(command) == 0
    assert "equally good" in " ".join(capsys.readouterr().out.split())
    assert "equally good" in (tmp_path / "report.html").read_text()


# shares of the training set


@pytest.mark.parametrize("fraction", ["1e-9", "0.001", "0.007"])
@pytest.mark.parametrize("command", ["compare", "train"])
def test_a_share_with_fewer_samples_than_classes_is_refused(command, fraction, tmp_path, capsys):
    assert cli.main([command, *SHORT, "--train-fraction", fraction, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "train_fraction" in said and "of 1198 training images leaves" in said and "10 classes" in said
    assert not (tmp_path / "out").exists()


def test_a_validating_run_needs_as_many_too(tmp_path, capsys):
    command = ["compare", *SHORT, "--train-fraction", "0.01", "--lam", "0.1", "1", "--validation-fraction", "0.5"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "validation_fraction" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_smallest_share_that_is_taken():
    enough = Recipe("softmax", 0, train_fraction=0.1)
    check_shares(enough, 100, 10)
    assert len(choose_rows(enough, torch.arange(100) % 10, 10).training) == 10
    with pytest.raises(LabError, match="leaves 9"):
        check_shares(dataclasses.replace(enough, train_fraction=0.09), 100, 10)


@pytest.mark.parametrize(("options", "said"), [([], "1198 training"), (["--train-fraction", "0.1"], "120 of 1198 training")])
@pytest.mark.parametrize("command", ["compare", "train"])
def test_the_number_of_training_images_is_that_of_the_runs(command, options, said, tmp_path, capsys):
    losses = ["--losses", "softmax", "--seeds", "0"] if command == "compare" else []
    assert cli.main([command, *SHORT, *options, *losses, "--out", str(tmp_path / "out")]) == 0
    assert f"digits: {said} and 599 test images of 10 classes" in capsys.readouterr().out


# fields that nothing reads

SCHEDULING = {"milestones": (1,), "step_factor": 0.5, "final_factor": 0.5}
AUGMENTING = {"crop_padding": 2, "flip": True, "crop_fill": "reflect"}


@every("name", SCHEDULING)
@every("schedule", SCHEDULES)
def test_a_field_that_changes_no_learning_rate_is_said_to_change_nothing(schedule, name):
    given = Recipe("softmax", 0, epochs=3, schedule=schedule, milestones=(2,))
    changed = dataclasses.replace(given, **{name: SCHEDULING[name]})
    assert bool(unread(changed, [name])) == (learning_rates(changed) == learning_rates(given))


@every("name", AUGMENTING)
@every("crop_padding", [0, 1])
@every("augmentation", AUGMENTATIONS)
def test_a_field_that_changes_no_augmentation_is_said_to_change_nothing(augmentation, crop_padding, name):
    given = Recipe("softmax", 0, augmentation=augmentation, crop_padding=crop_padding)
    changed = dataclasses.replace(given, **{name: AUGMENTING[name]})
    assert bool(unread(changed, [name])) == (repr(training_transform(changed)) == repr(training_transform(given)))


MILESTONES = "milestones (1,) changes nothing: it is for schedule steps"
FILL = "crop_fill reflect changes nothing: it is for augmentation shift with a crop_padding above 0"


def test_compare_names_options_that_change_nothing(tmp_path, capsys):
    options = [
        "--recipe.milestones",
        "[1]",
        "--recipe.crop_fill",
        "reflect",
        "--validation-fraction",
        "0.4",
        "--recipe.final_factor",
        "0.1",
    ]
    command = ["compare", *SHORT, "--losses", "softmax", "--seeds", "0", "--train-fraction", "0.1", *options]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert MILESTONES in printed and FILL in printed and printed.count("changes nothing") == 3
    assert "validation_fraction 0.4 changes nothing: it is for a choice among several lam" in printed


def test_train_names_options_that_change_nothing(tmp_path, capsys):
    options = ["--milestones", "[1]", "--crop-fill", "reflect", "--validation-fraction", "0.4"]  # train reads the last
    assert cli.main(["train", *SHORT, "--train-fraction", "0.1", *options, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert MILESTONES in printed and FILL in printed and printed.count("changes nothing") == 2
