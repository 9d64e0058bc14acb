"""The reproduction of the paper's tables: what is planned, what is done, what is kept."""

import json
import shlex
from functools import partial

import pytest
import torch

from largemargin.lab import cli
from largemargin.lab.commands import dry_run, progress, reproduce
from largemargin.lab.data.images import ImageSet
from largemargin.lab.errors import LabError
from largemargin.lab.paper import cells as paper
from largemargin.lab.paper.plan import MARKER, Reproduction, matching_cells, reopen, unique_recipes
from largemargin.lab.queue import attempt
from largemargin.lab.results import result_of
from largemargin.lab.run import pace
from largemargin.lab.run.pace import Pace
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.run.train import train
from largemargin.lab.words import hours

FULL = paper.SCALES["full"]
QUICK = ("--recipe.network", "small", "--recipe.epochs", "1", "--recipe.batch_size", "8")


def words_of(error: str) -> str:
    assert len(error.strip().splitlines()) == 1
    return error


@pytest.fixture
def images(monkeypatch):
    """A made-up data set for every name, and what asked for it."""
    rng = torch.Generator().manual_seed(0)

    def part(n):
        return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=rng), torch.arange(n) % 4

    (train_images, train_labels), (test_images, test_labels) = part(16), part(8)
    images = ImageSet(train_images, train_labels, test_images, test_labels, tuple("abcd"))
    monkeypatch.setattr(reproduce.data, "load", lambda *_, **__: images)
    return images


@pytest.fixture
def done(monkeypatch, images):
    """Runs are done in this process; the list of those that were."""
    trained = []

    def heard(on_epoch, recipe, row):
        on_epoch(recipe, row["epoch"])

    def run_all(recipes, runs, jobs, on_epoch, executor="local", **_):
        for recipe in recipes:
            if result_of(recipe, runs) is None:
                trained.append(recipe)
                train(recipe, images, runs / recipe.id, partial(heard, on_epoch, recipe))
        return [result_of(recipe, runs) for recipe in recipes]

    monkeypatch.setattr(progress, "run_all", run_all)
    return trained


@pytest.fixture
def written(monkeypatch):
    """What the report is written of."""
    report = pytest.importorskip("largemargin.lab.paper.page")
    calls = []
    monkeypatch.setattr(report, "write", lambda out, entries, scale, command, console: calls.append((entries, scale, command)))
    return calls


@pytest.fixture
def instant(monkeypatch):
    """A dry run that measures nothing."""
    monkeypatch.setattr(dry_run, "pace_of", lambda recipe: Pace(1e-3, 4e-4))


def test_a_dry_run_prints_every_run_and_writes_nothing(tmp_path, monkeypatch, capsys, instant):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", "table2", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for cell in paper.cells("table2"):
        lines = [line.split() for line in printed.splitlines() if line.split()[:1] == [cell.name]]
        assert [line[1] for line in lines] == ["0", "1", "2"]
        assert all(line[2:6] == ["layer13", "cifar100", "50,000", "50"] for line in lines)
    seconds = 21 * (1e-3 * 50_000 * 50 + 4e-4 * 10_000 * 50)
    assert f"21 runs, about {hours(seconds)}" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", paper.TARGETS)
def test_every_target_has_a_dry_run(target, capsys, instant):
    assert cli.main(["reproduce", target, "--dry-run"]) == 0
    assert paper.cells(target)[-1].name in capsys.readouterr().out


def test_a_dry_run_measures_the_network_of_the_recipe(capsys, monkeypatch):
    asked, original = [], pace.measured_pace

    def measured_pace(recipe, images, graph):
        asked.append((recipe, len(images.train_labels)))
        return original(recipe, images, graph)

    monkeypatch.setattr(pace, "measured_pace", measured_pace)
    monkeypatch.setattr(dry_run, "PROBE_SECONDS", 0.01)
    threads = torch.get_num_threads()
    assert cli.main(["reproduce", "table2", "--cells", "table2/ours-0.3", "--scale", "reduced", "--dry-run"]) == 0
    (recipe, count), _ = asked  # two sizes for the three seeds
    assert count == 2
    assert (recipe.network, recipe.width, recipe.precision) == ("layer13", 0.25, "bfloat16")
    assert torch.get_num_threads() == threads
    assert "3 runs" in capsys.readouterr().out


def test_a_list_has_the_names_and_the_numbers(capsys):
    assert cli.main(["reproduce", "table4", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(cell.name in printed for cell in paper.cells("table4"))
    assert "4.60 ± 0.05" in printed and "collapsed" in printed


def test_cells_are_chosen_by_name_and_by_pattern():
    assert [cell.name for cell in matching_cells("table2", ("table2/softmax",), FULL)] == ["table2/softmax"]
    assert [cell.column for cell in matching_cells("table1", ("*/0.[12]",), FULL)] == ["0.1", "0.2"] * 3
    both = matching_cells("table3", ("table3b/softmax/*", "table3a/softmax/*"), FULL)
    assert [cell.table for cell in both] == ["table3a"] * 5 + ["table3b"] * 5  # in the order of the paper
    assert matching_cells("table2", (), FULL) == paper.cells("table2")


def test_a_cell_that_is_not_there_is_refused_with_the_names(capsys):
    assert cli.main(["reproduce", "table2", "--cells", "table2/sofmax", "--dry-run"]) == 2
    error = words_of(capsys.readouterr().err)
    assert "--cells table2/sofmax" in error and "table2/softmax" in error
    with pytest.raises(LabError, match="nothing/"):
        matching_cells("table1", ("table1/*", "nothing/*"), FULL)


def test_the_reduced_scale_leaves_the_large_data_sets_out_and_says_so(capsys, instant):
    assert cli.main(["reproduce", "table4", "--scale", "reduced", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.count("is left out") == 24
        and "table4/lsm/svhn-wrn-28-10" in printed
        and "table4/lsm/imagenet-vgg-16 is left out" in printed
    )
    assert cli.main(["reproduce", "table4", "--scale", "reduced", "--dry-run", "--cells", "table4/lsm/*"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("is left out") == 3 and "table4/lsm/imagenet-mobilenet is left out" in printed
    assert "6 runs" in printed and "places" not in printed
    for pattern in ("table4/lsm/imagenet-vgg-16", "table4/*/imagenet-*"):  # named, and a pattern of nothing that is left
        assert cli.main(["reproduce", "table4", "--scale", "reduced", "--dry-run", "--cells", pattern]) == 2
        assert "--scale reduced" in words_of(capsys.readouterr().err)


def test_the_study_is_reduced_unless_told_otherwise():
    assert Reproduction("study").of_scale.name == "reduced"
    assert Reproduction("study", scale="full").of_scale.name == "full"
    assert Reproduction("table2").of_scale.name == "full"


def test_runs_are_unique_and_seed_by_seed():
    runs = unique_recipes([*Reproduction("table2").plan(), *Reproduction("fig3").plan()])
    assert len(runs) == 21 and [run.seed for run in runs] == [0] * 7 + [1] * 7 + [2] * 7


def test_cells_cannot_be_bent_into_others(capsys):
    assert cli.main(["reproduce", "table2", "--recipe.lam", "3"]) == 2
    assert "--recipe.lam" in words_of(capsys.readouterr().err)


@pytest.mark.parametrize("given", [("network", "bogus"), ("network", "timm:"), ("network", "small", "width", "0.5"), ("dropout", "0.5")])
def test_a_field_is_named_with_the_value_given(given, tmp_path, capsys):
    options = [word if i % 2 else f"--recipe.{word}" for i, word in enumerate(given)]
    assert cli.main(["reproduce", "table2", "--dry-run", *options]) == 2
    assert f"{given[-2]} {given[-1]}" in words_of(capsys.readouterr().err)


def test_device_is_an_option_of_its_own(tmp_path, capsys, done, written):
    command = ["reproduce", "table2", "--cells", "*/softmax", "--seeds", "0", "--out", str(tmp_path / "out"), *QUICK]
    assert cli.main([*command, "--device", "cpu"]) == 0
    assert [recipe.device for recipe in done] == ["cpu"] and "--device cpu" in written[0][2]
    capsys.readouterr()
    assert cli.main([*command, "--device", "nonsense"]) == 2
    assert "device nonsense" in words_of(capsys.readouterr().err)
    assert cli.main(["reproduce", "fig2", "--device", "cpu"]) == 2
    assert "--device" in words_of(capsys.readouterr().err)


def test_without_data_the_command_that_gets_it_is_named(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["reproduce", "table2", "--data-root", str(tmp_path), "--out", str(out)]) == 2
    assert "largemargin data fetch cifar100" in words_of(capsys.readouterr().err)
    assert not out.exists()


def test_a_device_that_is_not_here_and_a_folder_of_something_else_are_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert cli.main(["reproduce", "table2", "--out", str(tmp_path)]) == 2
    assert "mine" not in words_of(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert cli.main(["reproduce", "table2", "--device", "nonsense", "--out", str(tmp_path / "out")]) == 2
    assert "device nonsense" in words_of(capsys.readouterr().err)


def test_a_small_reproduction_is_done_once_and_shared_between_targets(tmp_path, capsys, done, written):
    out = tmp_path / "out"
    rest = ["--seeds", "0", "1", "--device", "cpu", "--out", str(out), *QUICK]
    command = ["reproduce", "table2", "--cells", "*/softmax", "*/ours-0.3", *rest]
    assert cli.main(command) == 0
    assert [recipe.seed for recipe in done] == [0, 0, 1, 1] and {recipe.network for recipe in done} == {"small"}
    ((entries, scale, line),) = written
    assert [entry.cell.name for entry in entries] == ["table2/softmax", "table2/ours-0.3"]
    assert scale.name == "full"
    for entry in entries:
        assert [record.recipe.seed for record in entry.records] == [0, 1]
        assert list(entry.recipes) == [record.recipe for record in entry.records]
    assert "differs from the recipe of the cells: network small" in capsys.readouterr().out

    assert reopen(out) == (entries, scale, line)
    assert json.loads((out / MARKER).read_text())["overrides"] == {"network": "small", "epochs": 1, "batch_size": 8}

    assert cli.main(["reproduce", "fig3", *rest]) == 0
    assert [recipe.loss for recipe in done[4:]] == ["label_smoothing"] * 2  # the others were there
    assert "4 already done" in capsys.readouterr().out


def test_human_labels_that_are_missing_stop_before_the_first_run(tmp_path, capsys, done):
    command = ["reproduce", "human", "--data-root", str(tmp_path), "--out", str(tmp_path / "out"), *QUICK]
    assert cli.main(command) == 2
    assert "largemargin data fetch cifar100n" in words_of(capsys.readouterr().err)
    assert not done and not (tmp_path / "out").exists()


def test_a_part_of_a_table_finds_the_baseline_that_is_in_its_folder(tmp_path, done, written):
    out = tmp_path / "out"
    rest = ["--seeds", "0", "1", "--out", str(out), *QUICK]
    assert cli.main(["reproduce", "table1", "--cells", "table1/d-q-u/0.1", *rest]) == 0
    assert [entry.cell.name for entry in written[-1][0]] == ["table1/d-q-u/0.1"]
    assert cli.main(["reproduce", "table2", "--cells", "table2/softmax", *rest]) == 0
    count = len(done)
    assert cli.main(["reproduce", "table1", "--cells", "table1/d-q-u/0.1", *rest]) == 0
    entries, *_ = written[-1]
    assert [(entry.cell.name, len(entry.records)) for entry in entries] == [("table1/softmax", 2), ("table1/d-q-u/0.1", 2)]
    assert len(done) == count == 4 and reopen(out)[0] == entries
    assert cli.main(["reproduce", "table3a", "--cells", "table3a/ours-0.3/0.9", *rest]) == 0
    assert len(written[-1][0]) == 1  # the softmax that is there is of another setting


@pytest.mark.slow
def test_a_reproduction_goes_through_the_queue_to_its_report(tmp_path, capsys, images):
    out = tmp_path / "out"
    decoded = attempt.decoded_images(Recipe(loss="softmax", seed=0, data_digest=images.digest()), out / "runs")
    images.save(decoded)  # what the processes of the runs read in place of files
    (out / MARKER).touch()
    command = ["reproduce", "table2", "--cells", "*/softmax", "*/ours-0.3", "--seeds", "0", "1", "--jobs", "2", "--out", str(out), *QUICK]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "28.62" in printed and "27.27" in printed
    assert len(list((out / "runs").glob("*/result.json"))) == 4
    entries, *_ = reopen(out)
    assert all(len(entry.records) == 2 for entry in entries)


def test_within_minutes_the_runs_that_are_left_are_counted(tmp_path, capsys, done, written, monkeypatch):
    every_run = progress.run_all
    monkeypatch.setattr(progress, "run_all", lambda recipes, *rest, **options: every_run(recipes[:1], *rest, **options))
    command = ["reproduce", "table2", "--cells", "*/softmax", "--seeds", "0", "1", "--minutes", "5", "--out", str(tmp_path / "out"), *QUICK]
    assert cli.main(command) == 0
    assert len(done) == 1 and "1 of 2 runs left" in capsys.readouterr().out


def test_the_command_that_is_kept_computes_the_same(tmp_path, capsys, done, written):
    out = tmp_path / "a folder"
    assert cli.main(["reproduce", "table3a", "--cells", "*/0.5", "--seeds", "3", "--scale", "reduced", "--out", str(out), *QUICK]) == 0
    count = len(done)
    *_, line = written[0]
    assert shlex.split(line)[0] == "largemargin"
    assert cli.main(shlex.split(line)[1:]) == 0
    assert len(done) == count == 4 and written[1] == written[0]


def test_what_failed_is_said_after_the_report_of_the_rest(tmp_path, capsys, done, written, monkeypatch):
    def run_all(recipes, *rest, run_all=progress.run_all, **named):
        run_all(recipes[:1], *rest, **named)
        raise LabError("1 of 2 runs could not be done: too bad")

    monkeypatch.setattr(progress, "run_all", run_all)
    command = ["reproduce", "table2", "--cells", "*/softmax", "*/ours-0.3", "--seeds", "0", "--out", str(tmp_path / "out"), *QUICK]
    assert cli.main(command) == 2
    assert "too bad" in words_of(capsys.readouterr().err)
    ((entries, *_),) = written
    assert [len(entry.records) for entry in entries] == [1, 0]


def test_an_interrupt_says_what_is_kept(tmp_path, capsys, images, monkeypatch):
    def run_all(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "run_all", run_all)
    assert cli.main(["reproduce", "table2", "--seeds", "0", "--out", str(tmp_path / "out"), *QUICK]) == 130
    assert "0 of 7 runs are done" in words_of(capsys.readouterr().err)


@pytest.mark.parametrize("text", ["", "{}", '{"largemargin": "compare"}', '{"largemargin": "reproduce", "target": "table9"}'])
def test_a_folder_of_something_else_cannot_be_reopened(tmp_path, text):
    (tmp_path / MARKER).write_text(text)
    with pytest.raises(LabError, match="not the folder of a reproduction"):
        reopen(tmp_path)


def test_the_report_of_a_folder_of_neither_kind_says_so(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "not the folder of a comparison or a reproduction" in words_of(capsys.readouterr().err)


def test_without_a_target_its_names_are_printed(capsys):
    assert cli.main(["reproduce"]) == 2
    said = words_of(capsys.readouterr().err)
    assert said.startswith("largemargin: TARGET is missing") and all(f" {name}" in said for name in ("fig1", "table2", "study"))
