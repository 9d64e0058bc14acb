"""From a run to a prediction: the commands predict and export, and the line by which compare leads to them."""

import contextlib
import copy
import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from largemargin import lab
from largemargin.lab import cli
from largemargin.lab.commands.next import advised, next_command
from largemargin.lab.comparison.table import Row, summarise
from largemargin.lab.errors import LabError
from largemargin.lab.logits import temperature
from largemargin.lab.predictions import Predictions
from largemargin.lab.results import RunRecord
from largemargin.lab.run import export
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.stats import paired_by_seed
from largemargin.lab.verdicts import judge

CLASSES = ("blue", "green", "red")
pytestmark = [pytest.mark.usefixtures("forked_workers"), pytest.mark.xdist_group("lab_predict")]  # one worker makes its runs


def picture(c, seed):
    """Noise with more of one colour; what colour that is, a network learns at once."""
    pixels = np.random.default_rng(seed).integers(0, 160, (12, 16, 3), dtype=np.uint8)
    pixels[..., 2 - c] += 70
    return Image.fromarray(pixels)


def make_folder(root, count, first_seed):
    for c, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(count):
            picture(c, first_seed + 100 * c + i).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "images", 20, 0)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data") / "unseen", 5, 1000)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    command = ["train", "--data", images, "--image-size", 8, "--epochs", 3, "--batch-size", 16, "--loss", "softmax", "--device", "cpu"]
    assert cli.main([str(word) for word in [*command, "--out", out]]) == 0
    return out


def answered(*words):
    return cli.main(["predict", *map(str, words), "--device", "cpu"])


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def logits_of(run, files):
    network, transform, _ = lab.load(run)
    with torch.no_grad():
        return network(torch.stack([transform(Image.open(file)) for file in files])).double()


# predict


def test_a_line_of_the_csv_is_the_softmax_of_the_network(run, unseen, tmp_path):
    assert answered(run, unseen, "--out", tmp_path / "a.csv", "--top", 3) == 0
    rows = rows_of(tmp_path / "a.csv")
    assert [row["file"] for row in rows] == [str(unseen / name / f"{i}.png") for name in CLASSES for i in range(5)]
    for row, logits in zip(rows, logits_of(run, [row["file"] for row in rows]), strict=True):
        best = logits.argsort(descending=True)
        assert [row["prediction"], row["class_2"], row["class_3"]] == [CLASSES[c] for c in best]
        found = [float(row[name]) for name in ("probability", "probability_2", "probability_3")]
        assert found == pytest.approx(logits.softmax(-1)[best].tolist(), abs=1e-5)


def test_columns_are_as_many_as_asked_for_and_no_more_than_classes(run, unseen, tmp_path):
    for top, columns in ((None, 3), (2, 5), (99, 7)):
        assert answered(run, unseen, "--out", tmp_path / "a.csv", *(("--top", top) if top else ())) == 0
        first = (tmp_path / "a.csv").read_text().splitlines()[0]
        assert first.startswith("file,prediction,probability") and len(first.split(",")) == columns


def test_the_size_of_a_batch_changes_nothing(run, unseen, tmp_path, monkeypatch):
    assert answered(run, unseen, "--out", tmp_path / "a.csv") == 0
    monkeypatch.setattr("largemargin.lab.run.unseen.evaluated_at_once", lambda *_: 4)
    assert answered(run, unseen, "--out", tmp_path / "b.csv") == 0
    for row, other in zip(rows_of(tmp_path / "a.csv"), rows_of(tmp_path / "b.csv"), strict=True):
        assert row["prediction"] == other["prediction"]
        assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=1e-4)


def test_files_and_folders_may_be_mixed_and_each_image_comes_once(run, unseen, tmp_path):
    nested = make_folder(tmp_path / "a" / "b", 1, 5)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "a" / ".hidden.png").write_bytes(b"")
    given = [unseen / "red" / "1.png", tmp_path / "a", unseen / "red" / "1.png", nested / "red"]
    assert answered(run / "model.safetensors", *given, "--out", tmp_path / "out.csv") == 0
    expected = [unseen / "red" / "1.png", *(nested / name / "0.png" for name in CLASSES)]
    assert [row["file"] for row in rows_of(tmp_path / "out.csv")] == list(map(str, expected))


def test_without_out_a_table_is_printed_and_progress_is_on_standard_error(run, unseen, capsys):
    assert answered(run, unseen / "red" / "0.png") == 0
    captured = capsys.readouterr()
    assert "0.png" in captured.out and "prediction" in captured.out and any(name in captured.out for name in CLASSES)
    assert "1 image" in captured.err and "read" not in captured.out


def test_broken_images_are_all_named_and_the_others_are_predicted(run, unseen, tmp_path, capsys):
    broken = [tmp_path / f"{i}.png" for i in range(12)]
    for path in broken:
        path.write_bytes(b"")
    assert answered(run, unseen, *broken, tmp_path / "missing.png", "--out", tmp_path / "a.csv") == 2
    said = capsys.readouterr().err
    assert all(str(path) in said for path in [*broken, tmp_path / "missing.png"]) and "13 of 28 images could not be read" in said
    assert len(rows_of(tmp_path / "a.csv")) == 15


def test_names_cannot_act_on_the_terminal(run, tmp_path, capsys):
    picture(0, 0).save(tmp_path / "a\x1b[31m[b].png")
    (tmp_path / "b\x1b[31m.png").write_bytes(b"")
    assert answered(run, tmp_path) == 2
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err and "[b].png" in captured.out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["{run}", "{empty}"], "is a folder without images"),
        (["{empty}", "{unseen}"], "holds no model.safetensors"),
        (["{run}", "{unseen}", "--out", "{unseen}"], "cannot be written"),
        (["{run}", "{unseen}", "--calibrate", "{empty}/no"], "is no folder"),
        (["{run}", "{unseen}", "--calibrate", "{empty}"], "holds no images"),
        (["{run}", "{unseen}", "--calibrate", "{data}"], "has the sub-folder unseen, and the run has no such class"),
    ],
)
def test_what_cannot_be_done_gets_one_line(given, said, run, unseen, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    places = {"run": run, "empty": tmp_path / "empty", "unseen": unseen, "data": unseen.parent}
    assert answered(*(word.format(**places) for word in given)) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_run_that_diverged_predicts_nothing(run, unseen, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    from largemargin.lab.run import model

    tensors, metadata = model._read(run / "model.safetensors")
    assert tensors.keys() == load_file(run / "model.safetensors").keys()
    save_file({name: value * (torch.nan if name == "classifier.bias" else 1) for name, value in tensors.items()}, tmp_path / "a", metadata)
    assert answered(tmp_path / "a", unseen) == 2
    assert "has diverged" in capsys.readouterr().err


# calibration


def test_the_temperature_is_the_one_that_makes_the_labels_likeliest():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4000, 5))
    labels = np.array([rng.choice(5, p=row) for row in temperature.probabilities(logits)])
    for scale in (0.2, 1.0, 7.0):  # the logits of a network that is too unsure, right, too sure
        fitted = temperature.fit(scale * logits, labels)
        assert fitted.temperature == pytest.approx(scale, rel=0.1)
        around = [temperature.nll(scale * logits, labels, fitted.temperature * factor) for factor in (0.99, 1.01)]
        assert fitted.nll_after <= min(around) and fitted.nll_after <= fitted.nll_before


def test_a_temperature_changes_no_prediction(run, unseen, tmp_path, capsys):
    calibration = make_folder(tmp_path / "labelled", 3, 3000)
    (calibration / "red" / "0.png").rename(calibration / "blue" / "wrong.png")  # else none would be best
    assert answered(run, unseen, "--out", tmp_path / "a.csv") == 0
    assert answered(run, unseen, "--out", tmp_path / "b.csv", "--calibrate", calibration) == 0
    said = capsys.readouterr().err
    assert "temperature" in said and "warning" not in said
    scale = float(said.partition("temperature ")[2].split(",")[0])
    for row, logits in zip(rows_of(tmp_path / "b.csv"), logits_of(run, sorted(unseen.rglob("*.png"))), strict=True):
        assert float(row["probability"]) == pytest.approx((logits / scale).softmax(-1).max().item(), abs=2e-3)
    assert [row["prediction"] for row in rows_of(tmp_path / "a.csv")] == [row["prediction"] for row in rows_of(tmp_path / "b.csv")]


@pytest.mark.parametrize(
    ("logits", "said"), [([[2.0, 0], [0, 2]], "classifies all of them rightly"), ([[0.0, 2], [2, 0]], "does no better on them than chance")]
)
def test_where_no_temperature_is_best_that_is_said(logits, said):
    with pytest.raises(LabError, match=said):
        temperature.fit(np.array(logits), np.array([0, 1]))


def test_images_that_the_run_was_trained_on_do_not_calibrate_it(run, images, unseen, tmp_path, capsys):
    copies = tmp_path / "copies"
    (copies / "red").mkdir(parents=True)
    for path in (images / "red").iterdir():
        (copies / "red" / f"copy-{path.name}").write_bytes(path.read_bytes())
    held_out = sum(name.startswith("red") for name in Predictions.load(run / "predictions.npz").ids)
    assert answered(run, unseen, "--calibrate", copies) == 2
    assert f"was trained on {20 - held_out} of 20 images" in " ".join(capsys.readouterr().err.split())


def test_where_that_cannot_be_told_there_is_a_warning(run, unseen, tmp_path, capsys):
    from largemargin.lab.run.model import load
    from largemargin.lab.run.unseen import check_not_trained_on

    model = load(run)
    assert check_not_trained_on(model, sorted(unseen.rglob("*.png"))) == ""
    for elsewhere in ("digits", str(tmp_path / "gone")):
        moved = model._replace(recipe=Recipe("softmax", 0, data=elsewhere))
        assert "cannot be told" in check_not_trained_on(moved, sorted(unseen.rglob("*.png")))


# export


@pytest.mark.parametrize("loss", ["softmax", "cosface"])
def test_a_program_gives_the_logits_of_the_network_for_any_number_of_images(loss, run, images, tmp_path, capsys):
    if loss != "softmax":
        command = [
            "train",
            "--data",
            images,
            "--image-size",
            8,
            "--epochs",
            1,
            "--loss",
            loss,
            "--device",
            "cpu",
            "--out",
            tmp_path / "run",
        ]
        assert cli.main([str(word) for word in command]) == 0
        run = tmp_path / "run"
    out = tmp_path / "program.pt2"
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    assert "checked" in capsys.readouterr().out
    facts = {"largemargin.json": ""}
    program = torch.export.load(out, extra_files=facts).module()
    network, transform, classes = lab.load(run)
    for count in (1, 5):
        inputs = torch.stack([transform(picture(i % 3, i)) for i in range(count)])
        torch.testing.assert_close(program(inputs), network(inputs), rtol=1e-4, atol=1e-4)
    facts = json.loads(facts["largemargin.json"])
    assert tuple(facts["classes"]) == classes and facts["mean"] == list(transform.mean)  # type: ignore[attr-defined]


def test_onnx_gives_the_logits_of_the_network(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert cli.main(["export", str(run), "--out", str(tmp_path / "a.pt2"), "--onnx"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    network, transform, _ = lab.load(run)
    inputs = torch.stack([transform(picture(i % 3, i)) for i in range(4)])
    (logits,) = session.run(None, {"images": inputs.numpy()})
    np.testing.assert_allclose(logits, network(inputs).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_a_program_of_other_logits_is_not_kept(run, tmp_path, monkeypatch, capsys):
    program_of = export._program

    def of_another(model):
        changed = copy.deepcopy(model.network)
        changed.classifier.bias.data[0] += 1
        return program_of(model._replace(network=changed))

    monkeypatch.setattr(export, "_program", of_another)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "a.pt2")]) == 2
    assert "gives other logits" in capsys.readouterr().err and not list(tmp_path.iterdir())


# the line that leads here, and what runs keep


@pytest.fixture(scope="module")
def compared(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    command = [
        "compare",
        "--data",
        str(images),
        "--image-size",
        "8",
        "--epochs",
        "1",
        "--seeds",
        "0",
        "--losses",
        "softmax",
        "large_margin",
    ]
    command += ["--jobs", "1", "--device", "cpu", "--out", str(out)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert cli.main(command) == 0
    return command, out, said.getvalue()


def test_compare_says_what_it_keeps_and_ends_with_a_command_that_works(compared, unseen, capsys):
    _, out, said = compared
    assert "each run keeps about 0.4 MB" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("to use the best run of softmax: largemargin predict ") and last.endswith(" IMAGES")
    folder = last.split()[-2]
    assert folder.startswith(f"{out}/runs/softmax-")
    assert answered(folder, unseen) == 0


def test_finished_runs_without_a_model_are_said_once_and_stay_as_they_are(compared, capsys):
    command, out, _ = compared
    removed = {}
    for path in (out / "runs").glob("*/model.safetensors"):
        removed[path] = path.read_bytes()
        path.unlink()
    try:
        assert cli.main(command) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("2 finished runs have no model.safetensors") == 1 and "rm -r" in said and "largemargin predict" not in said
        assert not list((out / "runs").glob("*/model.safetensors"))
        assert cli.main([*command, "--no-save"]) == 0
        assert "rm -r" not in capsys.readouterr().out
    finally:
        for path, content in removed.items():
            path.write_bytes(content)


def test_a_network_of_an_earlier_version_counts_as_a_model(compared, capsys):
    command, out, _ = compared
    paths = list((out / "runs").glob("*/model.safetensors"))
    try:
        for path in paths:
            path.rename(path.with_name("network.safetensors"))
        assert cli.main([*command, "--keep-weights"]) == 0
        said = capsys.readouterr().out
        assert "finished runs have no" not in said and "--keep-weights is the default now" in said and "largemargin predict" in said
    finally:
        for path in paths:
            path.with_name("network.safetensors").rename(path)


def test_no_save_keeps_neither(tmp_path, capsys):
    command = ["train", "--epochs", "1", "--train-fraction", "0.1", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert cli.main([*command, "--no-save", "--keep-weights"]) == 2
    assert cli.main([*command, "--no-save"]) == 0
    assert "keeps about" not in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"recipe.json", "result.json", "metrics.csv", "training_set.npz"}


def record(loss, seed, error, noise=0.0):
    test = {"error": error, "margin": 1.0, "rho": 1.0, "ece": 1.0, "nll": 1.0}
    recipe = Recipe(loss, seed, label_noise=noise, **LOSSES[loss]).to_dict()
    return RunRecord.from_dict({"recipe": recipe, "test": test, "epochs": [{"train_loss": 1.0}], "environment": {}})


def records(errors, noise=0.0):
    return [record(loss, seed, error, noise) for loss, of_seeds in errors.items() for seed, error in enumerate(of_seeds)]


@pytest.mark.parametrize(
    ("errors", "loss"),
    [
        ({"softmax": [10.0, 11, 12], "large_margin": [5.0, 6.1, 7]}, "large_margin"),
        ({"softmax": [10.0, 11, 12], "large_margin": [9.0, 11, 11]}, "softmax"),  # less, and not by more than chance
        ({"softmax": [10.0, 11, 12], "large_margin": [15.0, 16.1, 17]}, "softmax"),
        ({"softmax": [10.0, 11, 12], "label_smoothing": [7.0, 8.1, 9], "large_margin": [5.0, 6.1, 7]}, "large_margin"),
        ({"label_smoothing": [7.0, 8.1, 9], "large_margin": [8.0, 9, 10]}, "label_smoothing"),  # nothing to be better than
    ],
)
def test_the_recommended_loss_is_the_best_of_those_that_are_better_than_softmax(errors, loss):
    assert advised(summarise(records(errors) + records({"softmax": [1.0, 1, 1]}, noise=0.3))).loss == loss


def test_the_best_run_is_that_of_least_error_among_those_with_a_model(tmp_path):
    found = records({"softmax": [10.0, 9.0, 12.0, 8.0]})
    folders = [tmp_path / each.recipe.id for each in found]
    assert next_command(summarise(found), found, tmp_path) == []
    for folder in folders[:3]:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
    (line,) = next_command(summarise(found), found, tmp_path)
    assert str(folders[1]) in line


def test_a_diverged_loss_is_not_recommended():
    nan = float("nan")
    pairs = paired_by_seed({0: 1.0, 1: 1.1, 2: 1.2}, {0: 5.0, 1: 5.1, 2: 5.25})
    (better,) = judge([("b", "a", pairs, 3)])
    rows = [
        Row("a", "softmax", 0.0, 3, 0, 5.0, 0.1, None, {}),
        Row("b", "large_margin", 0.0, 3, 3, nan, None, better, {}),
    ]
    assert advised(rows).loss == "softmax"
    assert advised([row for row in rows if row.diverged]) is None
