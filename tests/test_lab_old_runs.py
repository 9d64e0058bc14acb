"""Runs that an earlier version made stay what they are: ``old_runs`` was made by commit b7a6f5f.

By ``largemargin compare --losses softmax large_margin --seeds 0 1 --epochs 1 --device cpu --out old_runs``; the files of the report, which
every command writes anew, were removed.
"""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

from largemargin.lab import cli
from largemargin.lab.run.recipe import Recipe

OLD = Path(__file__).parent / "old_runs"
RUNS = sorted((OLD / "runs").iterdir())
OPTIONS = ["--losses", "softmax", "large_margin", "--seeds", "0", "1", "--epochs", "1", "--device", "cpu"]


@pytest.fixture
def out(tmp_path):
    return shutil.copytree(OLD, tmp_path / "out")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def given(recipe):
    """Its fields that are set: a later version has more, which are not."""
    return {name: value for name, value in recipe.items() if value is not None}


@pytest.mark.parametrize("folder", RUNS, ids=lambda folder: folder.name)
def test_a_recipe_has_the_identity_that_it_had(folder):
    written = json.loads((folder / "recipe.json").read_text())
    recipe = Recipe(**written)
    assert recipe.id == folder.name and given(recipe.to_dict()) == given({**written, "milestones": ()})


def test_compare_goes_on_from_old_runs_without_training(out, capsys):
    before = files(out / "runs")
    assert cli.main(["compare", *OPTIONS, "--out", str(out)]) == 0
    assert "4 already done" in " ".join(capsys.readouterr().out.split())
    assert files(out / "runs") == before


def test_report_reads_old_runs(out, capsys):
    records = [json.loads((folder / "result.json").read_text()) for folder in RUNS]
    assert {record["environment"]["commit"][:7] for record in records} == {"b7a6f5f"}
    assert cli.main(["report", str(out)]) == 0
    printed, lines = capsys.readouterr().out, (out / "results.csv").read_text().splitlines()
    errors = sorted(record["test"]["error"] for record in records)
    assert sorted(float(line.split(",")[lines[0].split(",").index("test_error")]) for line in lines[1:]) == errors
    assert f"{sum(r['test']['error'] for r in records if r['recipe']['loss'] == 'softmax') / 2:.2f}" in printed
    assert (out / "report.html").is_file()


def test_a_run_that_is_missing_is_trained_as_it_was(out, here):
    (missing,) = [folder for folder in (out / "runs").iterdir() if folder.name.startswith("large_margin-noise0-seed1")]
    shutil.rmtree(missing)
    assert cli.main(["compare", *OPTIONS, "--out", str(out)]) == 0
    now, then = (json.loads((folder / missing.name / "result.json").read_text()) for folder in (out / "runs", OLD / "runs"))
    assert given(now["recipe"]) == given(then["recipe"]) and now["classes"] == then["classes"]
    assert now["test"]["error"] == pytest.approx(then["test"]["error"], abs=1.0)  # another processor rounds otherwise
