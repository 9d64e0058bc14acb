"""What is printed, and how a command ends: no traceback, no escape code of a file, a status that says what happened."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len
from rich.table import Table

from combinations import every
from largemargin.lab import cli
from largemargin.lab.commands import progress
from largemargin.lab.commands.screen import READER_GONE, Screen
from largemargin.lab.errors import LabError, RunFailed
from largemargin.lab.queue.runs import run_all
from largemargin.lab.results import RunRecord, result_of
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.stopping import by_interrupt
from largemargin.lab.words import counted, printable, short

pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.xdist_group("lab_words")]  # one worker makes its runs

ESCAPES = {
    "colour": "\x1b[31mred",
    "clear": "\x1b[2J",
    "title": "\x1b]0;title\x07",
    "eight-bit": "\x9b31m",
    "return": "a\rb",
    "bell": "\x07",
    "backspace": "abc\b\b\b",
    "right to left": "gpj.\u202eexe",
    "separator": "a\u2028b",
    "surrogate": "\udcff",
}


@every("name", ESCAPES)
def test_what_a_terminal_obeys_is_shown(name):
    assert not set(printable(ESCAPES[name])) & set("\x1b\x9b\x07\r\b\u202e\u2028\udcff")
    assert printable(ESCAPES[name]).isprintable()


@every("text", ["cat", "λ=0.3", "données", "猫", "हिन्दी", "a\u200cb", "a b", "100 %\u00a0"])
def test_what_is_text_stays(text):
    assert printable(text) == text


def screen():
    return Screen(file=io.StringIO(), width=80, color_system=None)


@every("name", ESCAPES)
@every("how", ["print", "plain", "table", "title"])
def test_the_screen_shows_them_wherever_they_stand(name, how):
    console = screen()
    if how == "table":
        table = Table("a", ESCAPES[name])
        table.add_row(ESCAPES[name], "b")
        console.print(table)
    elif how == "title":
        console.print(Table("a", title=ESCAPES[name]))
    else:
        console.print(ESCAPES[name], markup=how == "print", highlight=False)
    assert not set(console.file.getvalue()) & set("\x1b\x9b\x07\r\b\u202e\u2028\udcff")


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [("cp1252", "猫 é λ", r"\u732b é lambda"), ("ascii", "猫 é λ", r"\u732b e lambda"), ("utf-8", "猫 é λ", "猫 é λ")],
)
def test_what_an_encoding_lacks_is_spelled_out_and_keeps_columns_in_line(encoding, text, shown):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Screen(file=terminal, width=80, color_system=None)
    table = Table("name", "number")
    for name in ("cat", text):
        table.add_row(name, "1")
    console.print(table)
    terminal.flush()
    lines = terminal.buffer.getvalue().decode(encoding).splitlines()
    assert shown in lines[4] and len({cell_len(line) for line in lines}) == 1


@pytest.mark.parametrize(
    ("number", "noun", "text"), [(0, "run", "0 runs"), (1, "run", "1 run"), (2, "class", "2 classes"), (1, "class", "1 class")]
)
def test_one_is_singular(number, noun, text):
    assert counted(number, noun) == text


@pytest.mark.parametrize(("number", "text"), [(12.34567, "12.346"), (0.000123, "0.000123"), (0.0, "0.000"), (-0.0512, "-0.0512")])
def test_a_small_number_is_not_printed_as_0(number, text):
    assert short(number) == text


def test_lines_stay_lines():
    console = screen()
    console.print("a\nb")
    assert console.file.getvalue() == "a\nb\n"


ESC = "\x1b]0;owned\x07\x1b[31m"


def test_a_csv_header_is_shown(tmp_path, capsys):
    (tmp_path / "a.csv").write_text(f"label,{ESC}a,b\n0,1,2\n1,1,2\n")
    assert cli.main(["inspect", str(tmp_path / "a.csv")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    (tmp_path / "b.csv").write_text(f"labels,{ESC}a,b\n0,1,2\n")
    assert cli.main(["inspect", str(tmp_path / "b.csv")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def make_folder(root, names=("cat", "dog"), count=5):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / part / name / f"{i}.png")
    return root


def test_paths_and_classes_are_shown(tmp_path, capsys):
    folder = make_folder(tmp_path / f"set{ESC}", (f"cat{ESC}", "dog"))
    (folder / "train" / f"cat{ESC}" / f"a.{ESC}").write_text("")
    (folder / f"other{ESC}").mkdir()
    out = tmp_path / f"out{ESC}"
    command = [
        "compare",
        "--data",
        str(folder),
        "--image-size",
        "8",
        "--epochs",
        "1",
        "--losses",
        "softmax",
        "--seeds",
        "0",
        "--device",
        "cpu",
    ]
    assert cli.main([*command, "--out", str(out)]) == 0
    assert cli.main(["report", str(out)]) == 0
    assert cli.main(["report", str(tmp_path / f"nothing{ESC}")]) == 2
    assert cli.main(["train", f"--{ESC}"]) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "\x07" not in captured.out + captured.err
    assert "\\x1b" in captured.out and "\\x1b" in captured.err


# a terminal that is not UTF-8


CHOOSING = ["compare", "--epochs", "1", "--seeds", "0", "--lam", "0.1", "0.3", "--losses", "softmax", "large_margin"]
CHOOSING += ["--train-fraction", "0.1", "--device", "cpu"]


def test_a_comparison_ends_well_on_a_terminal_that_is_not_utf8(tmp_path, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert cli.main([*CHOOSING, "--out", str(tmp_path / "λ")]) == 0
    terminal.flush()
    assert b"lambda=" in terminal.buffer.getvalue()
    assert "λ=" in (tmp_path / "λ" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "cp437", "latin-1"])
def test_all_processes_of_a_comparison_end_well_in_another_encoding(encoding, tmp_path):
    command = [sys.executable, "-m", "largemargin.lab.cli", *CHOOSING, "--out", str(tmp_path / "λ")]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    assert b"lambda=" in done.stdout
    assert (tmp_path / "λ" / "report.html").is_file()
    assert "λ=" in (tmp_path / "λ" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_machine_without_utf8_writes_the_same_report(tmp_path):
    command = [sys.executable, "-m", "largemargin.lab.cli", "compare", "--epochs", "1", "--seeds", "0", "--losses", "large_margin"]
    command += ["--train-fraction", "0.1", "--device", "cpu", "--out", str(tmp_path / "out")]
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    environment.pop("PYTHONIOENCODING", None)
    done = subprocess.run(command, capture_output=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "ρ̂" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


# records that no run has written


def whole_record():
    test = dict.fromkeys(("error", "nll", "ece", "margin", "rho"), 1.0) | {"margin_histogram": [0, 1]}
    record: dict[str, Any] = {"recipe": Recipe("softmax", 0).to_dict(), "test": test, "validation": None}
    record["epochs"] = [{"epoch": 1, "train_loss": 1.0}]
    record |= {"environment": {}, "classes": ["a", "b"], "seconds": 1.0, "num_train": 1, "num_test": 1, "rho_of_batches": {}}
    return record


def test_a_whole_record_is_taken():
    RunRecord.from_dict(whole_record()).check_complete()


BROKEN = {
    "error is text": {"test": whole_record()["test"] | {"error": "12.3"}},
    "error is a list": {"test": whole_record()["test"] | {"error": [1]}},
    "error is true": {"test": whole_record()["test"] | {"error": True}},
    "nll is text": {"test": whole_record()["test"] | {"nll": "x"}},
    "test is text": {"test": "good"},
    "test is a list": {"test": [1]},
    "validation is text": {"validation": "good"},
    "histogram is text": {"test": whole_record()["test"] | {"margin_histogram": "x"}},
    "histogram of text": {"test": whole_record()["test"] | {"margin_histogram": ["x"]}},
    "epochs is text": {"epochs": "x"},
    "an epoch is text": {"epochs": ["x"]},
    "an epoch's loss is text": {"epochs": [{"train_loss": "x"}]},
    "seconds is text": {"seconds": "x"},
    "classes is text": {"classes": "ab"},
    "environment is text": {"environment": "x"},
    "recipe is text": {"recipe": "x"},
}


@every("kind", BROKEN)
def test_a_record_of_another_form_is_named(kind, tmp_path):
    recipe = Recipe("softmax", 0)
    (tmp_path / recipe.id).mkdir(exist_ok=True)
    (tmp_path / recipe.id / "result.json").write_text(json.dumps(whole_record() | BROKEN[kind]))
    with pytest.raises(LabError, match=r"result\.json is not the record of its run"):
        result_of(recipe, tmp_path)


@every("text", ["[]", "3", "null", '"x"', "[" * 100_000, "\xff"])
def test_a_record_that_is_none_is_named(text, tmp_path):
    recipe = Recipe("softmax", 0)
    (tmp_path / recipe.id).mkdir(exist_ok=True)
    (tmp_path / recipe.id / "result.json").write_text(text, encoding="latin-1")
    with pytest.raises(LabError, match=r"result\.json is not the record of its run"):
        result_of(recipe, tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("words")
    options = ["--epochs", "1", "--train-fraction", "0.1", "--device", "cpu"]
    assert cli.main(["compare", *options, "--losses", "softmax", "--seeds", "0", "--out", str(out / "compare")]) == 0
    assert cli.main(["train", *options, "--out", str(out / "train")]) == 0
    return out, options


@pytest.mark.parametrize("lacking", ["margin", "seconds", "error is text"])
@pytest.mark.parametrize("command", ["report", "compare", "train"])
def test_every_command_names_a_broken_record(command, lacking, finished, capsys):
    out, options = finished
    path = out / "train" / "result.json" if command == "train" else next((out / "compare" / "runs").glob("*/result.json"))
    before = path.read_text()
    record = json.loads(before)
    if lacking == "error is text":
        record["test"]["error"] = "x"
    else:
        (record["test"] if lacking == "margin" else record).pop(lacking)
    path.write_text(json.dumps(record))
    arguments = {
        "report": ["report", str(out / "compare")],
        "compare": ["compare", *options, "--losses", "softmax", "--seeds", "0", "--out", str(out / "compare")],
        "train": ["train", *options, "--out", str(out / "train")],
    }
    capsys.readouterr()
    try:
        assert cli.main(arguments[command]) == 2
    finally:
        path.write_text(before)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("largemargin: ")


# interrupts

AT = [
    "numpy",
    "numpy._core.multiarray",
    "numpy._core._methods",
    "numpy.linalg",
    "numpy.random",
    "torch",
    "torch.nn",
    "torch._C",
    "rich.console",
]
AT += ["jsonargparse", "torchvision", "sklearn.datasets"]


@pytest.mark.parametrize(
    ("command", "module"),
    [
        *(("train", name) for name in ("numpy", "torch", "accelerate")),
        ("compare", "scipy.stats"),
        *(pytest.param("train", name, marks=pytest.mark.slow) for name in AT if name not in ("numpy", "torch")),
        *(pytest.param("compare", name, marks=pytest.mark.slow) for name in (*AT[:2], "matplotlib.figure")),
    ],
)
def test_an_interrupt_in_an_import_ends_in_one_line(command, module, tmp_path):
    code = f"""
    import importlib.abc, os, signal, sys
    from largemargin.lab import cli

    class Interrupting(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == {module!r}:
                sys.meta_path.remove(self)
                os.kill(os.getpid(), signal.SIGINT)

    sys.meta_path.insert(0, Interrupting())
    sys.exit(cli.main([{command!r}, "--device", "cpu", "--epochs", "1", "--train-fraction", "0.1", "--out", {str(tmp_path / "out")!r}]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "largemargin: interrupted\n"


def test_what_an_interrupt_has_broken_is_an_interrupt(monkeypatch, capsys):
    def broken(*_):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise RecursionError("half a module")  # noqa: B904

    monkeypatch.setattr(cli, "run", broken)
    assert cli.main(["report"]) == 130
    assert capsys.readouterr().err == "largemargin: interrupted\n"
    assert not by_interrupt(RecursionError())


def test_train_that_is_interrupted_keeps_its_checkpoint_and_exits_with_130(tmp_path):
    command = [sys.executable, "-m", "largemargin.lab.cli", "train", "--device", "cpu", "--epochs", "5000", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            break
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 130 and "Traceback" not in error
    assert (tmp_path / "out" / "checkpoint.pt").is_file()


# failures


def judged(shell: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """``verdict``, which needs no torch, with its output sent somewhere."""
    (folder / "scores.csv").write_text("method,seed,error\nsoftmax,0,3\nsoftmax,1,4.5\nours,0,2\nours,1,3\n")
    words = ["verdict", str(folder / "scores.csv"), "--baseline", "softmax", "--out", str(folder / "out")]
    command = shlex.join([sys.executable, "-m", "largemargin", *words])
    return subprocess.run(["bash", "-c", shell.format(command)], capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_is_full_ends_in_one_line(tmp_path):
    done = judged("{} > /dev/full", tmp_path)
    assert done.returncode == 2
    assert done.stderr == "largemargin: the output cannot be written: No space left on device; make room, or send it elsewhere\n"


def test_a_process_without_an_output_does_its_work(tmp_path):
    done = judged("{} >&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_reader_that_has_gone_is_no_failed_run(tmp_path):
    done = judged("{} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (READER_GONE, "")


def test_a_failed_run_is_no_usage_error(tmp_path, capsys, monkeypatch):
    command = ["compare", "--losses", "softmax", "--seeds", "0", "--epochs", "1", "--device", "cpu"]
    monkeypatch.setattr(progress, "run_all", lambda *arguments, **options: run_all(*arguments, **options, work="lab_work:nosuch"))
    assert cli.main([*command, "--out", str(tmp_path / "failed")]) == 1
    assert "could not be done" in capsys.readouterr().err


def test_failed_is_told_from_refused(tmp_path):
    recipes = [Recipe("softmax", seed, epochs=1) for seed in (0, 1)]
    with pytest.raises(RunFailed):
        run_all(recipes, tmp_path / "a", 1, lambda *_: None, work="lab_work:fails")
    with pytest.raises(LabError) as caught:
        run_all(recipes, tmp_path / "b", 1, lambda *_: None, work="lab_work:refuses")
    assert not isinstance(caught.value, RunFailed)


def test_the_page_names_the_exit_statuses():
    page = (Path(__file__).parent.parent / "docs" / "compare.md").read_text()
    for status in (0, 1, 2, 130, READER_GONE):
        assert re.search(rf"^\| {status} \|", page, re.MULTILINE), status
