"""What reaches the standard output, by ``--json`` and ``--quiet``, and what the command line says without a command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from largemargin import __version__
from largemargin.lab import cli
from largemargin.lab.arguments.parsers import COMMANDS

OLD = Path(__file__).parent / "old_runs"
RUNS = ["--losses", "softmax", "large_margin", "--seeds", "0", "1", "--epochs", "1", "--device", "cpu"]


@pytest.fixture
def commands(tmp_path):
    """Words by the name of a command, over runs that are there and a file of logits."""
    out = str(shutil.copytree(OLD, tmp_path / "out"))
    np.savez(tmp_path / "logits.npz", logits=np.eye(3, dtype=np.float32), labels=np.arange(3))
    return {"compare": ["compare", *RUNS, "--out", out], "report": ["report", out], "inspect": ["inspect", str(tmp_path / "logits.npz")]}


@pytest.mark.parametrize("command", ["compare", "report", "inspect"])
def test_json_is_one_document_and_nothing_else(command, commands, capsys):
    assert cli.main([*commands[command], "--json"]) == 0
    document, said = capsys.readouterr()
    assert isinstance(json.loads(document), dict)
    assert ("softmax" in said) == (command != "inspect")  # what is said otherwise goes to the standard error


def test_the_rows_of_json_are_those_of_the_table(commands, capsys):
    assert cli.main([*commands["report"], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["loss"] for row in document["rows"]] == ["softmax", "large_margin"] and document["runs"] == {"finished": 4, "planned": 4}
    softmax, ours = document["rows"]
    assert softmax["verdict"] is None and ours["verdict"] == "inconclusive"
    assert ours["judged"]["paired"]["mean"] == pytest.approx(ours["error"] - softmax["error"])


@pytest.mark.parametrize("command", ["compare", "report", "inspect"])
def test_quiet_prints_nothing(command, commands, capsys):
    assert cli.main([*commands[command], "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_quiet_still_says_what_is_wrong(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("largemargin: ")


def test_without_a_command_there_is_help(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(command in printed for command in COMMANDS)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out.split() == ["largemargin", __version__]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_and_options(shell, capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        cli.main([f"--print_completion=shtab-{shell}"])
    script = capsys.readouterr().out
    assert "label-noise" in script and "reproduce" in script
