"""``largemargin train``: one run in one folder."""

import json

import pytest

from combinations import every
from largemargin.lab import cli
from largemargin.lab.errors import LabError
from largemargin.lab.files import UNFINISHED
from largemargin.lab.queue.locks import Lock
from largemargin.lab.run.methods import LOSSES, OF_SOME_LOSSES, check_settings, has_setting
from largemargin.lab.stopping import Stopped

pytest.importorskip("jsonargparse", reason="needs jsonargparse, which is not installed, for the command line")

SHORT = ["train", "--data", "digits", "--epochs", "2", "--train-fraction", "0.2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("single") / "run"
    assert cli.main([*SHORT, "--loss", "large_margin", "--lam", "0.5", "--out", str(out)]) == 0
    return out


def test_a_run_leaves_its_record_its_metrics_and_its_weights(finished):
    assert {path.name for path in finished.iterdir()} == {
        "metrics.csv",
        "model.safetensors",
        "predictions.npz",
        "recipe.json",
        "result.json",
        "training_set.npz",
    }
    record = json.loads((finished / "result.json").read_text())
    assert record["recipe"]["lam"] == 0.5 and record["num_train"] == round(0.2 * 1198)
    assert record["recipe"] == json.loads((finished / "recipe.json").read_text())


def test_the_same_command_repeats_nothing(finished, capsys):
    before = (finished / "result.json").stat().st_mtime_ns
    assert cli.main([*SHORT, "--loss", "large_margin", "--lam", "0.5", "--out", str(finished)]) == 0
    assert "finished" in capsys.readouterr().out
    assert (finished / "result.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lam", "0.3"], "lam 0.5 there, 0.3 here"),
        (["--lam", "0.5", "--threads", "2"], "threads 1 there, 2 here"),
        (["--lam", "0.5", "--seed", "1"], "seed 0 there, 1 here"),
    ],
)
def test_a_folder_of_another_run_is_refused(finished, arguments, said, capsys):
    before = sorted((path.name, path.read_bytes()) for path in finished.iterdir())
    assert cli.main([*SHORT, "--loss", "large_margin", *arguments, "--out", str(finished)]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert before == sorted((path.name, path.read_bytes()) for path in finished.iterdir())


@every("setting", OF_SOME_LOSSES)
def test_a_setting_of_another_loss_is_refused(setting, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    having = [loss for loss in LOSSES if has_setting(loss, setting)]
    others = [loss for loss in LOSSES if loss not in having]
    assert having and others
    for loss in others:
        with pytest.raises(LabError, match=f"{setting} is a setting of {', '.join(having)}, and not of {loss};"):
            check_settings([loss], [setting])
    value = "kl_qu" if setting == "divergence" else "1"
    assert cli.main([*SHORT, "--loss", others[0], f"--{setting.replace('_', '-')}", value]) == 2
    assert f"and not of {others[0]}" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


@every(
    "arguments, said",
    [
        (["--loss", "softmx"], "softmx"),
        (["--network", "layer14"], "layer13"),
        (["--network", "layer13"], "12 pixels"),  # digits have 8
        (["--momentum", "2"], "momentum"),
        (["--lam", "-1"], "lam"),
        (["--lam", "inf"], "lam"),
        (["--loss", "cosface", "--scale", "0"], "scale"),
        (["--loss", "lsoftmax", "--angular-multiplier", "0"], "--angular-multiplier must be a whole number from 1 to 4"),
        (["--dropout", "1"], "dropout"),
        (["--weight-decay", "-1"], "--weight-decay must be"),
        (["--image-size", "64"], "image_size 64"),
        (["--seed", "-1"], "seed"),
        (["--out", "/proc/no/run"], "/proc/no/run"),
        (["--precision", "float8"], "precision"),
        (["--data", "/nosuch"], "/nosuch"),
        (["--weights", "/nosuch"], "/nosuch"),
    ],
)
def test_bad_options_get_one_line_and_leave_nothing(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*SHORT, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("largemargin: ") and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["[1]", '{"loss": "softmax", "seed": 0, "of_another_version": 1}', "{"])
def test_a_recipe_that_is_none_is_refused_in_one_line(recipe, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(recipe)
    assert cli.main([*SHORT, "--out", str(tmp_path)]) == 2
    assert "not of a run" in capsys.readouterr().err
    assert cli.main([*SHORT, "--out", str(tmp_path / "recipe.json")]) == 2  # no folder at all
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_validating_run_that_is_finished_says_so(tmp_path, capsys):
    for _ in range(2):
        assert cli.main([*SHORT, "--validation-fraction", "0.2", "--out", str(tmp_path / "run")]) == 0
    assert "finished: validation error" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_was_killed_while_it_wrote_its_first_file_is_begun_again(tmp_path):
    (tmp_path / f".recipe.json.abc{UNFINISHED}").touch()
    assert cli.main([*SHORT, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "result.json").is_file() and not list(tmp_path.glob(f".*{UNFINISHED}"))


def test_a_foreign_folder_is_left_as_it_was(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.main([*SHORT, "--out", str(tmp_path)]) == 2
    assert "not of a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_commands_do_not_share_a_folder(tmp_path, capsys):
    with Lock.take(tmp_path / "run"):
        assert cli.main([*SHORT, "--out", str(tmp_path / "run")]) == 2
    assert "another process is training there" in capsys.readouterr().err
    assert cli.main([*SHORT, "--out", str(tmp_path / "run")]) == 0


def test_a_run_told_to_stop_says_how_it_goes_on(tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise Stopped

    monkeypatch.setattr("largemargin.lab.commands.train.train", stop)
    with pytest.raises(SystemExit) as stopped:
        cli.main([*SHORT, "--out", str(tmp_path / "run")])
    assert stopped.value.code == 143
    assert "Run the same command to continue" in " ".join(capsys.readouterr().out.split())
