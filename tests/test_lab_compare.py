"""The command ``largemargin compare``, from the statistics to an interrupt in the middle."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from combinations import every
from largemargin.lab import cli
from largemargin.lab.arguments.options import given_fields
from largemargin.lab.arguments.parsers import build_parser
from largemargin.lab.comparison.folder import finished_records, reopen
from largemargin.lab.comparison.plan import Comparison
from largemargin.lab.comparison.table import cells, print_tables, summarise
from largemargin.lab.errors import LabError
from largemargin.lab.queue.runs import run_all
from largemargin.lab.results import RunRecord, result_of
from largemargin.lab.run.methods import LOSSES, SYMBOLS
from largemargin.lab.run.recipe import Recipe

LARGEMARGIN = [sys.executable, "-W", "error", "-m", "largemargin.lab.cli"]
pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.xdist_group("lab_compare")]  # one worker makes its runs


def reopened(out):
    """The comparison on images in a folder."""
    comparison = reopen(out)
    assert isinstance(comparison, Comparison)
    return comparison


def record(loss, seed, error, noise=0.0, margin=1.0, nll=0.1):
    test = {"error": error, "margin": margin, "rho": 0.5, "ece": 2.0, "nll": nll, "margin_histogram": [0] * 160}
    recipe = Recipe(loss=loss, seed=seed, label_noise=noise, **LOSSES[loss]).to_dict()
    return RunRecord.from_dict({"recipe": recipe, "test": test, "seconds": 1.0, "environment": {}})


def test_pairs_are_matched_by_seed_whatever_the_order():
    records = [record("softmax", s, 10.0 + s) for s in (0, 1, 2)] + [record("large_margin", s, 9.0 + s) for s in (2, 0, 1)]
    row = summarise(records)[1]
    assert row.judged.text == "-1.00 (no spread)"
    assert row.mean == 10.0 and row.std == 1.0  # n - 1


def test_only_seeds_that_both_have_are_paired():
    records = [record("softmax", s, 10.0 * s) for s in (0, 1, 2)] + [record("large_margin", s, 10.0 * s + s / 10) for s in (0, 2, 5)]
    row = summarise(records)[1]
    assert row.n == 3 and row.judged.paired.mean == pytest.approx(0.1)  # of seeds 0 and 2


def test_equal_differences_are_no_evidence():
    records = [record("softmax", s, 10.0 + s) for s in (0, 1)] + [record("large_margin", s, 9.9 + s) for s in (0, 1)]
    assert summarise(records)[1].verdict == "inconclusive"


def test_one_seed_has_no_interval_and_a_missing_baseline_no_difference():
    one = summarise([record("softmax", 0, 10.0), record("large_margin", 0, 9.0)])
    assert one[1].judged is None and one[1].std is None
    assert "n/a" in cells(one[1])
    alone = summarise([record("large_margin", s, 9.0 + s) for s in (0, 1)])
    assert alone[0].judged is None


def test_a_diverged_run_is_counted_and_does_not_break_the_table():
    broken = record("softmax", 0, 90.0, margin=None, nll=None)
    assert cells(summarise([broken, record("softmax", 1, 10.0)])[0])[1] == "10.00 (1 diverged)"


def test_recipes_are_every_loss_with_every_seed_at_every_noise():
    comparison = Comparison(seeds=(3, 4), label_noise=(0.0, 0.2), lam=(0.7,), epochs=9)
    recipes = comparison.recipes()
    assert len({recipe.id for recipe in recipes}) == len(recipes) == 12
    assert {recipe.lam for recipe in recipes if recipe.loss == "large_margin"} == {0.7}
    assert all(recipe.lam is None for recipe in recipes if recipe.loss != "large_margin")
    # what does not concern a loss does not make it another run
    others = {recipe.id for recipe in Comparison(seeds=(3, 4), label_noise=(0.0, 0.2), lam=(0.1,), epochs=9).recipes()}
    assert len(others & {recipe.id for recipe in recipes}) == 8


def in_process(*arguments):
    """The command without another process: its exit status and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(arguments)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small comparison, done once."""
    out = tmp_path_factory.mktemp("compare") / "out"
    command = [
        "compare",
        "--seeds",
        "0",
        "1",
        "--epochs",
        "1",
        "--label-noise",
        "0",
        "0.3",
        "--losses",
        "softmax",
        "large_margin",
        "--train-fraction",
        "0.3",
        "--out",
        str(out),
    ]
    return out, command, in_process(*command)


def test_compare_ends_with_a_table_and_its_files(finished):
    out, _, done = finished
    assert done.returncode == 0, done.stderr
    assert "minus softmax [95%]" in done.stdout and "label noise 0.3, 2 seeds" in done.stdout
    assert len(re.findall(r"^\[\d/8\] ", done.stdout, re.MULTILINE)) == 8  # plain lines where there is no terminal
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    records = [json.loads(path.read_text()) for path in (out / "runs").glob("*/result.json")]
    assert len(rows) == len(records) == 8
    by_key = {(r["recipe"]["loss"], r["recipe"]["seed"], r["recipe"]["label_noise"]): r for r in records}
    for row in rows:
        record = by_key[row["loss"], int(row["seed"]), float(row["label_noise"])]
        assert float(row["test_error"]) == record["test"]["error"]
        assert float(row["train_error"]) == record["epochs"][-1]["train_error"]
    assert (out / "report.html").stat().st_size > 10_000
    assert not list(out.rglob("*.pt"))


def test_the_same_command_repeats_nothing(finished):
    out, command, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}
    again = in_process(*command)
    said = " ".join(again.stdout.split())  # long paths wrap the line
    assert again.returncode == 0 and "8 already done" in said and "held a comparison with other options" not in said
    assert before == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*") if path.is_file()}


def test_more_seeds_add_runs_to_those_there(finished, tmp_path):
    out, command, _ = finished
    shutil.copytree(out, tmp_path / "more")
    more = in_process(*[{"0": "0", "1": "2"}.get(word, word) for word in command[:4]], *command[4:-1], str(tmp_path / "more"))
    said = " ".join(more.stdout.split())  # long paths wrap the line
    assert more.returncode == 0 and "8 runs" in said and "4 already done" in said
    assert "held a comparison with other options" in said
    assert len(list((tmp_path / "more" / "runs").glob("*/result.json"))) == 12


def test_report_prints_the_table_again(finished, tmp_path):
    out, _, done = finished
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / "report.html").unlink()
    again = in_process("report", str(tmp_path / "copy"))
    assert again.returncode == 0 and (tmp_path / "copy" / "report.html").is_file()
    assert done.stdout[done.stdout.index("label noise 0, 2 seeds") : done.stdout.index("Test error at")] in again.stdout
    assert (tmp_path / "copy" / "report.html").read_text() == (out / "report.html").read_text()


def test_report_says_that_runs_are_missing(finished, tmp_path):
    out, _, done = finished
    shutil.copytree(out, tmp_path / "copy")
    for path in (tmp_path / "copy" / "runs").glob("*seed1*"):  # of every loss, so that all rows have as many seeds
        shutil.rmtree(path)
    said = " ".join(in_process("report", str(tmp_path / "copy")).stdout.split())
    assert "4 of 8 runs are finished" in said and "are finished" not in done.stdout


def test_an_interrupt_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "out"
    command = [
        "compare",
        "--seeds",
        "0",
        "1",
        "--epochs",
        "8",
        "--train-fraction",
        "0.5",
        "--losses",
        "softmax",
        "large_margin",
        "--jobs",
        "1",
        "--out",
        str(out),
    ]
    process = subprocess.Popen([*LARGEMARGIN, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((out / "runs").glob("*/result.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group hears it
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "kept" in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    kept = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*/result.json")}
    assert 1 <= len(kept) < 4
    assert not list(out.rglob(".*"))  # nothing half-written
    again = in_process(*command)
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    assert len(list((out / "runs").glob("*/result.json"))) == 4


def test_an_image_folder_is_compared(tmp_path):
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(level - 30, level + 30, (14, 18, 3), dtype=np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    command = [
        "compare",
        "--data",
        str(tmp_path / "images"),
        "--image-size",
        "12",
        "--epochs",
        "2",
        "--seeds",
        "0",
        "--losses",
        "modified",
        "large_margin",
    ]
    done = in_process(*command, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "n/a" in done.stdout  # one seed
    report = (tmp_path / "out" / "report.html").read_text()
    for sentence in ("With two classes the large-margin regulariser is 0", "softmax is not among the losses"):
        assert sentence in done.stdout and sentence in report
    records = [json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*/result.json")]
    assert [record["num_train"] for record in records] == [32, 32] and records[0]["classes"] == ["dark", "light"]
    assert not list((tmp_path / "out").rglob("*.pt"))  # the decoded images are gone with the runs that needed them


def test_a_config_file_of_someone_else_is_not_taken_for_ours(tmp_path, capsys):
    (tmp_path / "compare.json").write_text('{"my": "important"}')
    assert cli.main(["compare", "--out", str(tmp_path)]) == 2
    assert (tmp_path / "compare.json").read_text() == '{"my": "important"}'


ODD = ["losses: softmax", "seeds: 0", "seeds: []", "lam: null", "label_noise: null", "data: null", "network: 3"]
ODD += ["jobs: no", "device: 3", "out: null", "recipe: 5", "recipe: {nosuch: 1}", "recipe: {momentum: [1]}"]


@pytest.mark.parametrize("text", ODD)
def test_odd_values_in_a_config_file_get_one_line(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").write_text(text)
    assert cli.main(["compare", "--config", "options.yaml"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["options.yaml"]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_no_number_is_cut_in_the_table(finished, width, tmp_path):
    out, _, _ = finished
    output = io.StringIO()
    _, records = finished_records(reopened(out), out)
    rows = summarise(records)
    print_tables(rows, Console(width=width, file=output))
    text = output.getvalue()
    assert "…" not in text
    for row in rows:
        assert all(cell in text for cell in cells(row))


def test_a_foreign_folder_is_refused_and_left_as_it_was(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert cli.main(["compare", "--out", str(tmp_path)]) == 2
    assert "not of a comparison" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_unwritable_folder_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["compare", "--out", str(tmp_path / "file" / "out")]) == 2
    error = capsys.readouterr().err
    assert "--out" in error and len(error.splitlines()) == 1
    assert cli.main(["compare", "--out", str(tmp_path / "file")]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "--losses", "softmx"], "softmx"),
        (["compare", "--seeds", "-1"], "seeds"),
        (["compare", "--seeds", "no"], "--seeds must be whole numbers from 0 to 4,294,967,295, or auto, got no"),
        (["compare", "--lam", "nan"], "lam"),
        (["compare", "--lam", "inf"], "lam"),
        (["compare", "--label-noise", "1.5"], "--label-noise must be a share from 0 to 1, asymmetric:SHARE or human, got 1.5"),
        (["compare", "--train-fraction", "0"], "--train-fraction must be"),
        (["compare", "--epochs", "0"], "epochs"),
        (["compare", "--jobs", "0"], "jobs"),
        (["compare", "--network", "smal"], "layer13"),
        (["compare", "--network", "timm:"], "timm:NAME"),
        (["compare", "--network", "timm:nosuch"], "nosuch"),
        (["compare", "--network", "vgg16"], "pixels"),
        (["compare", "--executor", "nosuch"], "executor"),
        (["compare", "--validation-fraction", "1"], "--validation-fraction must be"),
        (["compare", "--recipe.nosuch", "1"], "recipe.nosuch"),
        (["compare", "--recipe.epochs", "1"], "recipe.epochs"),
        (["compare", "--recipe.momentum", "2"], "--recipe.momentum must be a share from 0 to 1, got 2"),
        (["compare", "--recipe.weights", "/nosuch.pt"], "/nosuch.pt"),
        (["compare", "--recipe.schedule", "x"], "--recipe.schedule must be one of log, cosine, steps, got x"),
        (["compare", "--recipe.milestones", "x"], "--recipe.milestones must be a list"),
        (["compare", "--recipe.scale", "8"], "cosface, arcface"),
        (["compare", "--image-size", "2"], "--image-size must be"),
        (["compare", "--nosuch"], "--nosuch"),
        (["compare", "--device", "nosuch"], "--device nosuch is no device of torch"),
        (["compare", "--data", "/nosuch"], "/nosuch"),
        (["compare", "--data", "cifar100", "--data-root", "/nosuch"], "/nosuch"),
        (["report", "/nosuch"], "/nosuch"),
        (["nosuch"], "nosuch"),
    ],
)
def test_bad_options_get_one_clear_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("largemargin: ") and len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["report", "--help"], ["--version"]])
def test_help_does_not_import_torch(arguments):
    code = f"""
import sys
from largemargin.lab.cli import main
try:
    main({arguments!r})
except SystemExit as stop:
    assert not stop.code, stop.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "largemargin" in done.stdout


def test_without_the_extra_the_install_line_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "jsonargparse" else object())
    assert cli.main(["compare"]) == 2
    said = capsys.readouterr().err
    assert "pip install 'largemargin[lab]'" in said and "pip install -e '.[lab]'" in said


def test_reproduce_does_without_what_it_never_imports(monkeypatch, capsys):
    found, absent = cli.importlib.util.find_spec, ("sklearn", "tensorboard")
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name, *rest: None if name in absent else found(name, *rest))
    assert cli.main(["reproduce", "table2", "--list"]) == 0
    assert cli.main(["compare"]) == 2
    assert "needs sklearn, tensorboard;" in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path):
    good, bad = Recipe(loss="softmax", seed=0, epochs=1), Recipe(loss="softmax", seed=1, epochs=1, network="nosuch")
    with pytest.raises(LabError, match=f"1 of 2 runs could not be done.*nosuch.*{bad.id}"):
        run_all([bad, good], tmp_path, 1, lambda *_: None)
    assert result_of(good, tmp_path) is not None
    assert "Traceback" in (tmp_path / bad.id / "error.txt").read_text()


def test_a_broken_checkpoint_is_named(tmp_path):
    recipe = Recipe(loss="softmax", seed=0, epochs=1)
    (tmp_path / recipe.id).mkdir()
    (tmp_path / recipe.id / "checkpoint.pt").write_bytes(b"half a checkpoint")
    with pytest.raises(LabError, match=r"checkpoint\.pt is not a checkpoint that can be read"):
        run_all([recipe], tmp_path, 1, lambda *_: None)


def test_a_broken_record_is_named(tmp_path):
    recipe = Recipe(loss="softmax", seed=0)
    (tmp_path / recipe.id).mkdir()
    (tmp_path / recipe.id / "result.json").write_text("{")
    with pytest.raises(LabError, match=r"result\.json is not the record"):
        result_of(recipe, tmp_path)


def test_options_can_come_from_a_file(tmp_path):
    (tmp_path / "options.yaml").write_text("seeds: [0, 7]\nlam: [0.5]\nlabel_noise: [0.1]\n")
    parsed = build_parser().parse_args(["compare", "--config", str(tmp_path / "options.yaml"), "--lam", "1"])
    assert parsed.compare.seeds == [0, 7] and parsed.compare.lam == [1] and parsed.compare.label_noise == [0.1]


def test_options_of_the_recipe_come_from_a_file_and_from_the_command_line(tmp_path):
    (tmp_path / "options.yaml").write_text("network: layer13\nrecipe:\n  learning_rate: 0.02\n  milestones: [2, 4]\n  schedule: steps\n")
    command = ["compare", "--config", str(tmp_path / "options.yaml"), "--recipe.learning_rate", "0.5"]
    options = build_parser().parse_args(command).compare
    assert options.network == "layer13" and given_fields(options.recipe) == {
        "learning_rate": 0.5,
        "milestones": [2, 4],
        "schedule": "steps",
    }


@pytest.mark.parametrize("line", ["lam: 0.3", "seeds: 0", "label_noise: 0.1", "losses: softmax"])
def test_one_value_for_a_list_in_a_config_file_is_told_to_be_a_list(line, tmp_path, capsys):
    (tmp_path / "options.yaml").write_text(line)
    assert cli.main(["compare", "--config", str(tmp_path / "options.yaml"), "--out", str(tmp_path / "out")]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "is a list there" in said and ": ;" not in said


def test_the_printed_config_is_one_that_can_be_given(tmp_path, capsys):
    command = ["compare", "--lam", "0.1", "1", "--network", "mobilenet", "--recipe.momentum", "0.5"]
    with pytest.raises(SystemExit):
        build_parser().parse_args([*command, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    again = build_parser().parse_args(["compare", "--config", str(tmp_path / "printed.yaml")]).compare
    given = build_parser().parse_args(command).compare
    assert {**vars(again), "config": None} == {**vars(given), "config": None}


def test_a_setting_of_a_loss_is_given_to_the_losses_that_have_it():
    losses = ("softmax", "label_smoothing", "multiclass_hinge", "arcface", "cosface")
    overrides = {"margin": 0.25, "scale": 16.0, "label_smoothing": 0.05, "momentum": 0.5}
    recipes = {r.loss: r for r in Comparison(losses=losses, seeds=(0,), overrides=overrides).recipes()}
    for loss, recipe in recipes.items():
        for name in SYMBOLS:
            assert getattr(recipe, name) == (overrides[name] if name in LOSSES[loss] else None)
    assert {recipe.momentum for recipe in recipes.values()} == {0.5}
    plain = {r.loss: r for r in Comparison(losses=losses, seeds=(0,), overrides={"scale": 16.0}).recipes()}
    assert plain["arcface"].margin == LOSSES["arcface"]["margin"]  # what is not given stays


def test_a_comparison_passes_through_json_and_those_of_one_lam_still_open(tmp_path):
    comparison = Comparison(lam=(0.1, 1.0), network="mobilenet", overrides={"milestones": [1, 2], "schedule": "steps"})
    assert Comparison.from_dict(json.loads(json.dumps(vars(comparison)))) == comparison
    old = {"data": "digits", "losses": ["softmax", "large_margin"], "lam": 0.5, "seeds": [0], "label_noise": [0.0], "device": "cpu"}
    (tmp_path / "compare.json").write_text(json.dumps({"largemargin": "compare", "comparison": old}))
    assert [recipe.lam for recipe in reopened(tmp_path).recipes()] == [None, 0.5]


def test_the_file_on_the_page_is_understood(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "compare.md").read_text()
    (tmp_path / "options.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    build_parser().parse_args(["compare", "--config", str(tmp_path / "options.yaml")])


def test_each_run_keeps_its_model_and_its_events_where_that_is_asked(tmp_path):
    command = ["compare", "--epochs", "1", "--seeds", "0", "--losses", "softmax", "--network", "layer13", "--recipe.width", "0.03"]
    refused = in_process(*command, "--out", str(tmp_path / "out"))  # digits are too small for it
    assert refused.returncode == 2 and "layer13" in refused.stderr and not (tmp_path / "out").exists()
    command = [*command[:-4], "--network", "mobilenet", "--train-fraction", "0.05", "--keep-weights", "--tensorboard"]
    done = in_process(*command, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "out" / "runs").iterdir()
    assert (run / "model.safetensors").is_file() and list((run / "events").rglob("events.out.tfevents.*"))
    text = (tmp_path / "out" / "report.html").read_text()
    assert "mobilenet" in text


@every("loss", LOSSES)
def test_rho_is_no_margin_of_a_cosine(loss):
    label = Recipe(loss, 0, **LOSSES[loss]).loss_label
    assert ("m=" in label) == (loss in ("lsoftmax", "cosface", "arcface", "subcenter_arcface", "sphereface", "mbls")) and not (
        "s=" in label and "ρ" in label
    )
