"""The computed figures of the paper: their tables are the paper's formulas."""

import csv
import math

import pytest

from largemargin.lab import cli
from largemargin.lab.paper import formulas as figures


def table(path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def run(name, tmp_path, capsys) -> list[list[str]]:
    assert cli.main(["reproduce", name, "--out", str(tmp_path)]) == 0
    assert "Figure" in capsys.readouterr().out
    return table(tmp_path / f"{name}.csv")


def test_figure_1_is_hinge_and_softplus(tmp_path, capsys):
    _, *rows = run("fig1", tmp_path, capsys)
    for row in rows:
        xi, hinge, softplus = map(float, row)
        assert hinge == max(0.0, xi)
        assert softplus == pytest.approx(math.log1p(math.exp(xi)), abs=1e-4)
    assert (tmp_path / "fig1.svg").read_text().startswith("<?xml")


def test_figure_4_has_the_values_of_two_categories(tmp_path, capsys):
    _, *rows = run("fig4", tmp_path, capsys)
    assert [float(row[0]) for row in rows] == [0.6, 0.75, 0.9, 0.99, 0.999]
    for row in rows:
        q, qu, uq, symmetric = map(float, row)
        expected = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q)), -math.log(4 * q * (1 - q)) / 2
        assert (qu, uq) == pytest.approx(expected, abs=6e-5) and symmetric == pytest.approx(sum(expected) / 2, abs=6e-5)


def test_figure_2_says_which_bias_each_method_adds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(figures, "EPOCHS", 2)
    header, *rows = run("fig2", tmp_path, capsys)
    found = {row[0]: dict(zip(header[2:], map(float, row[2:]), strict=True)) for row in rows}
    assert found["crammer singer hinge"]["together"] == found["modified"]["extra"] == 1
    assert found["softmax"]["extra"] == found["large margin"]["extra"] == 0
    assert found["lsoftmax"]["extra"] > 0 and found["gaussian mixture"]["extra"] > 0
    assert found["large margin"]["rho-hat"] > found["softmax"]["rho-hat"]


def test_an_unknown_figure_is_refused(capsys):
    assert cli.main(["reproduce", "fig9"]) == 2
    assert "fig9" in capsys.readouterr().err


def test_an_out_that_can_be_no_folder_is_refused_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(figures.FIGURES, "fig1", lambda: pytest.fail("computed"))
    (tmp_path / "file").touch()
    for out in (str(tmp_path / "file"), "~nobody-of-that-name/x"):
        assert cli.main(["reproduce", "fig1", "--out", out]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [("--dry-run",), ("--list",), ("--cells", "a"), ("--seeds", "1"), ("--jobs", "2"), ("--scale", "full"), ("--recipe.epochs", "3")],
)
def test_options_of_runs_are_refused_where_there_are_none(words, tmp_path, capsys):
    assert cli.main(["reproduce", "fig1", "--out", str(tmp_path / "out"), *words]) == 2
    assert capsys.readouterr().err.startswith(f"largemargin: {words[0]} does not apply to fig1")
    assert not (tmp_path / "out").exists()
