"""The examples: each runs, and what it finds is what it is there to show."""

import importlib.util
from pathlib import Path

import pytest

from largemargin.lab._torchvision import import_torchvision

FOLDER = Path(__file__).parent.parent / "examples"
needs_digits = pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="needs scikit-learn, which is not installed")


def run(name, **constants):
    """What main() of an example returns, with other constants of the file: fewer seeds, say."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for constant, value in constants.items():
        assert hasattr(module, constant)
        setattr(module, constant, value)
    return module.main()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_example_says_how_to_run_it(path):
    text = path.read_text()
    assert f"examples/{path.name}" in text.split('"""')[1]
    assert 'if __name__ == "__main__":' in text


@needs_digits
def test_image_classification():
    found = run("image_classification", SEEDS=range(1))
    softmax, large_margin = found["softmax"], found["large margin"]
    assert min(softmax["accuracy"], large_margin["accuracy"]) > 0.94
    assert large_margin["rho_hat"] > 2 * softmax["rho_hat"]  # Fig. 3 of the paper
    assert 0 < large_margin["margin"] < softmax["margin"]


@needs_digits
@pytest.mark.slow
def test_segmentation():
    for figures in run("segmentation").values():
        assert figures["error"] < 5 and figures["overlap"] > 80


@needs_digits
def test_mixup():
    found = run("mixup")
    assert found["by probabilities"] == pytest.approx(found["by two calls"], rel=1e-5)
    assert found["plain error"] < 7 and found["mixup error"] < 7


@pytest.mark.slow
def test_language_model():
    found = run("language_model")
    assert found["linear loss"] == pytest.approx(found["plain loss"], rel=1e-4)
    assert found["linear MB"] < found["plain MB"] / 3
    assert found["nll"] < found["nll of frequencies"] - 0.5


@needs_digits
def test_long_tail():
    found = run("long_tail", SEEDS=range(2))
    assert found["large margin"]["error"] < found["softmax"]["error"] < 30
    for plain, adjusted in [("softmax", "softmax, adjusted"), ("large margin", "large margin, adjusted")]:
        assert found[adjusted]["tail error"] < found[plain]["tail error"]


@needs_digits
def test_own_loss():
    found = run("own_loss")
    assert len(found) == 5 and all(figures["error"] < 8 and figures["margin"] > 0 for figures in found.values())
    assert found["focal"]["margin"] < found["softmax"]["margin"]  # it stops pushing rows that are right


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs"),
    [("texts", ()), ("segmentation", ()), ("trainer", ("transformers",)), ("lightning", ("lightning",)), ("skorch", ("skorch",))],
)
def test_own_training_loops_are_compared(name, needs, tmp_path, monkeypatch):
    if needs:  # packages that import torchvision, here and in the processes of the runs
        import_torchvision()
        (tmp_path / "sitecustomize.py").write_text("from largemargin.lab._torchvision import import_torchvision\nimport_torchvision()\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for package in ("sklearn", "cloudpickle", *needs):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"compare_{name}", FOLDER / f"compare_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.main(out=tmp_path / "out", seeds=2)
    assert not result.failures and result.report.is_file()
    assert [row["n"] for row in result.table] == [2] * len(result.table)


@pytest.mark.parametrize("name", ["trainer", "lightning"])
def test_a_script_becomes_a_comparison_in_fewer_than_ten_lines(name):
    assert 0 < (FOLDER / f"compare_{name}.py").read_text().count("# changed") < 10


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(FOLDER / "compare_in_a_notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("large margin" in output.get("data", {}).get("text/html", "") for output in shown)
    assert (tmp_path / "runs" / "notebook" / "own" / "report.html").is_file()
