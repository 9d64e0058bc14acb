"""The model that a run leaves: it is the network that was measured, and a file can do no harm."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from largemargin import lab
from largemargin.lab import data
from largemargin.lab.data.images import digits
from largemargin.lab.errors import LabError
from largemargin.lab.predictions import Predictions
from largemargin.lab.run import model, train
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.recipe import Recipe

CLASSES = ("cat", "dog", "emu")
ORIENTATION = 0x0112


def picture(seed, size=(30, 20)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of several kinds: turned by EXIF, grey, transparent."""
    root = tmp_path_factory.mktemp("images")
    for part in ("train", "test"):
        for c, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(6):
                picture(100 * c + i + 50 * (part == "test")).save(root / part / name / f"{i}.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture(1000, (40, 25)).save(root / "test" / "cat" / "turned.jpg", exif=exif)
    picture(1001).convert("L").save(root / "test" / "cat" / "grey.png")
    picture(1002).convert("RGBA").rotate(30, expand=True).save(root / "test" / "dog" / "transparent.png")
    return root


def recipe_of(folder, kind="softmax", **changes):
    return Recipe(kind, 0, data=str(folder), **{"image_size": 16, "epochs": 1, **LOSSES[kind], **changes})


def trained(recipe, out, **options):
    images = data.load(recipe.data, recipe.data_root, recipe.image_size, recipe.streamed)
    train.train(recipe, images, out, save=True, **options)
    return out


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return trained(recipe_of(folder), tmp_path_factory.mktemp("runs") / "softmax")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    return trained(Recipe("softmax", 0, epochs=1, train_fraction=0.2), tmp_path_factory.mktemp("runs") / "digits")


def logits_of(network, inputs):
    with torch.no_grad():
        return network(torch.stack(list(inputs))).numpy()


def test_importing_the_lab_imports_nothing_heavy():
    code = "import sys, largemargin.lab as lab; print(callable(lab.load), [n for n in ('torch', 'numpy', 'PIL') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["True", "[]"], done.stderr


# the network and the pixels are those of the held-out set


@pytest.mark.parametrize(
    "kind", [{}, {"augmentation": "inception"}, {"channels_last": True}], ids=["in memory", "streamed", "channels last"]
)
def test_a_file_gives_the_logits_that_the_run_saved_for_it(kind, folder, tmp_path):
    network, transform, classes = lab.load(trained(recipe_of(folder, **kind), tmp_path / "run"))
    saved = Predictions.load(tmp_path / "run" / "predictions.npz")
    assert classes == CLASSES and set(saved.ids) >= {"test/cat/turned.jpg", "test/cat/grey.png", "test/dog/transparent.png"}
    logits = logits_of(network, (transform(Image.open(folder / name)) for name in saved.ids))
    np.testing.assert_allclose(logits, saved.logits, rtol=1e-4, atol=1e-5)
    assert [classes[label] for label in saved.labels] == [name.split("/")[1] for name in saved.ids]


def test_a_grey_digit_gives_the_logits_that_the_run_saved_for_it(digits_run):
    network, transform, classes = lab.load(digits_run)
    saved, images = Predictions.load(digits_run / "predictions.npz"), digits().test_images
    logits = logits_of(network, (transform(Image.fromarray(image[0].numpy())) for image in images))
    np.testing.assert_allclose(logits, saved.logits, rtol=1e-4, atol=1e-5)
    assert saved.ids.tolist() == list(range(len(images))) and classes == tuple("0123456789")


@pytest.mark.parametrize("loss", ["lsoftmax", "gaussian_mixture", "noisy_softmax", "super_symmetric", "cosface", "center"])
def test_the_classifier_of_every_method_comes_back(loss, folder, tmp_path):
    network, transform, _ = lab.load(trained(recipe_of(folder, loss), tmp_path / "run"))
    saved = Predictions.load(tmp_path / "run" / "predictions.npz")
    logits = logits_of(network, (transform(Image.open(folder / name)) for name in saved.ids))
    np.testing.assert_allclose(logits, saved.logits, rtol=1e-4, atol=1e-4)


def test_a_model_is_given_in_eval_mode_with_inputs_of_the_size_of_the_run(run):
    network, transform, _ = lab.load(run)
    assert not network.training
    assert transform(picture(7)).shape == (3, 16, 16) and transform(picture(7).convert("L")).shape == (3, 16, 16)


def test_the_folder_and_the_file_are_the_same_model(run):
    (first, *_), (second, *_) = lab.load(run), lab.load(str(run / "model.safetensors"))
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_loading_draws_no_random_numbers(run):
    before = torch.get_rng_state()
    lab.load(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_record_says_the_same_as_the_metadata(run):
    _, metadata = model._read(run / "model.safetensors")
    record = json.loads((run / "result.json").read_text())
    assert json.loads(metadata["recipe"]) == record["recipe"] and json.loads(metadata["classes"]) == record["classes"]
    assert json.loads(metadata["commit"]) == record["environment"]["commit"]
    assert json.loads(metadata["largemargin"]) == record["environment"]["largemargin"]


def test_a_model_needs_neither_its_folder_nor_its_data(run, tmp_path):
    (tmp_path / "alone.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    network, transform, classes = lab.load(tmp_path / "alone.safetensors")
    assert network(transform(picture(0)).unsqueeze(0)).shape == (1, len(classes))


# what is saved


def test_the_saved_error_is_that_of_the_record(run):
    record = json.loads((run / "result.json").read_text())
    assert 100 * Predictions.load(run / "predictions.npz").wrong.mean() == pytest.approx(record["test"]["error"])


def test_the_size_that_is_said_is_about_that_of_the_files(run, folder):
    said = model.kept_bytes(recipe_of(folder), data.load(str(folder), "", 16))
    files = sum((run / name).stat().st_size for name in ("model.safetensors", "predictions.npz"))
    assert 0.8 * files < said < 1.1 * files


def test_a_run_that_chooses_lam_saves_nothing(folder, tmp_path):
    trained(recipe_of(folder, validation_fraction=0.5), tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "run" / "predictions.npz").exists()


def test_a_run_that_was_stopped_after_its_last_epoch_saves_the_same(folder, tmp_path):
    out = trained(recipe_of(folder), tmp_path / "run", keep_checkpoint=True)
    before = Predictions.load(out / "predictions.npz").logits
    for name in ("result.json", "model.safetensors", "predictions.npz"):
        (out / name).unlink()
    trained(recipe_of(folder), out)
    assert np.array_equal(Predictions.load(out / "predictions.npz").logits, before) and (out / "model.safetensors").is_file()


def test_names_of_files_change_no_digest(folder):
    images = data.load(str(folder), "", 16)
    assert len(images.test_files) == len(images.test_labels)
    assert images.digest() == data.images.ImageSet(**vars(images) | {"test_files": ()}).digest()


def test_half_precision_holds_the_logits_of_a_diverged_run(tmp_path, monkeypatch):
    monkeypatch.setattr("largemargin.lab.predictions.HALF_ABOVE", 0)
    Predictions(np.array([[1e6, -np.inf, np.nan]]), np.array([0]), np.array([0])).save(tmp_path / "a.npz")
    logits = Predictions.load(tmp_path / "a.npz").logits
    assert logits.dtype == np.float16 and logits[0, :2].tolist() == [65504, -65504] and np.isnan(logits[0, 2])


# networks of earlier versions


def as_before(run, folder):
    """The folder of the run as an earlier version left it."""
    folder.mkdir()
    for name in ("result.json", "recipe.json", "training_set.npz"):
        (folder / name).write_bytes((run / name).read_bytes())
    save_file(load_file(run / "model.safetensors"), folder / "network.safetensors")
    return folder


@pytest.mark.parametrize("given", ["", "network.safetensors"])
@pytest.mark.parametrize("which", ["run", "digits_run"])
def test_the_network_of_an_earlier_version_is_the_same_model(which, given, tmp_path, request):
    run = request.getfixturevalue(which)
    old, new = lab.load(as_before(run, tmp_path / "old") / given), lab.load(run)
    assert old[1] == new[1] and old[2] == new[2]
    assert all(torch.equal(value, new[0].state_dict()[name]) for name, value in old[0].state_dict().items())


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda old, images: (old / "result.json").unlink(), "which would, cannot be read"),
        (lambda old, images: (images / "train" / "cat" / "0.png").unlink(), "has changed"),
        (lambda old, images: images.rename(images.with_name("elsewhere")), "no such folder"),
    ],
    ids=["no record", "other data", "no data"],
)
def test_it_is_refused_where_its_folder_or_its_data_do_not_tell_the_rest(break_it, said, tmp_path):
    images = tmp_path / "images"
    for name in ("cat", "dog"):
        (images / "train" / name).mkdir(parents=True)
        (images / "test" / name).mkdir(parents=True)
        for i in range(4):
            picture(i).save(images / "train" / name / f"{i}.png")
            picture(i + 10).save(images / "test" / name / f"{i}.png")
    loaded = data.load(str(images), "", 16)
    recipe = recipe_of(images, data_digest=loaded.digest())
    old = as_before(trained(recipe, tmp_path / "run"), tmp_path / "old")
    break_it(old, images)
    with pytest.raises(LabError, match=said):
        lab.load(old)


# what is no model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "is not there"),
        (lambda path: path.mkdir(), "holds no model.safetensors"),
        (lambda path: (path / "runs").mkdir(parents=True), "holds several runs"),
        (lambda path: (path.mkdir(), (path / "result.json").write_text("{}")), "kept no model"),
        (lambda path: path.write_bytes(b""), "no whole file of safetensors"),
        (lambda path: path.write_bytes(b"\xff" * 100), "no whole file of safetensors"),
    ],
    ids=["nothing", "empty folder", "comparison", "without a model", "empty file", "noise"],
)
def test_what_is_no_model_is_refused(make, said, tmp_path):
    make(tmp_path / "given")
    with pytest.raises(LabError, match=said):
        lab.load(tmp_path / "given")


def test_a_file_that_is_cut_short_is_refused(run, tmp_path):
    (tmp_path / "a.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(LabError, match="no whole file"):
        lab.load(tmp_path / "a.safetensors")


class Hostile:
    """Leaves a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("write", ["pickle", "torch", "numpy"])
def test_no_file_is_unpickled(write, folder, tmp_path):
    hostile = Hostile(tmp_path / "executed")
    for name in ("model.safetensors", "network.safetensors", "predictions.npz", "checkpoint.pt"):
        path = tmp_path / name
        if write == "pickle":
            path.write_bytes(pickle.dumps(hostile))
        elif write == "torch":
            torch.save({"recipe": hostile}, path)
        else:
            with path.open("wb") as file:
                np.savez(file, logits=np.array([hostile], dtype=object), labels=np.array([hostile], dtype=object), ids=np.zeros(1))
    for name in ("model.safetensors", "network.safetensors"):
        with pytest.raises(LabError):
            lab.load(tmp_path / name)
    with pytest.raises(LabError):
        Predictions.load(tmp_path / "predictions.npz")
    with pytest.raises(LabError):
        trained(recipe_of(folder), tmp_path)  # which would go on from the checkpoint
    assert not (tmp_path / "executed").exists()


HOSTILE = {
    "not JSON": {"classes": "["},
    "deep JSON": {"recipe": "[" * 100_000},
    "a recipe of another kind": {"recipe": "3"},
    "an unknown field": {"recipe": json.dumps({"loss": "softmax", "seed": 0, "surprise": 1})},
    "an unknown loss": {"recipe": json.dumps({"loss": "os.system", "seed": 0})},
    "an unknown network": {"recipe": json.dumps({"loss": "softmax", "seed": 0, "network": "os:system"})},
    "a network of the wrong type": {"recipe": json.dumps({"loss": "softmax", "seed": 0, "network": 3})},
    "another network": {"recipe": json.dumps({"loss": "softmax", "seed": 0, "network": "mobilenet"})},
    "a huge network": {"recipe": json.dumps({"loss": "softmax", "seed": 0, "network": "layer13", "width": 1e6})},
    "another classifier": {"recipe": json.dumps({"loss": "cosface", "seed": 0, "scale": 30.0, "margin": 0.35})},
    "settings that a loss lacks": {"recipe": json.dumps({"loss": "cosface", "seed": 0})},
    "too many classes": {"classes": json.dumps(["a", "b", "c", "d"])},
    "classes that are no names": {"classes": "[1, 2, 3]"},
    "a huge image": {"image_size": "[1000000000, 1000000000]"},
    "no image": {"image_size": "[0, 16]"},
    "a huge resize": {"resize": "1000000000"},
    "one channel": {"in_channels": "1"},
    "no spread": {"std": "[1, 1, 0]"},
    "no number": {"mean": "[NaN, 0, 0]"},
    "a huge number": {"mean": f"[1{'0' * 400}, 0, 0]"},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_metadata_get_one_line(kind, run, tmp_path):
    path = run / "model.safetensors"
    save_file(load_file(path), tmp_path / "bad.safetensors", model._read(path)[1] | HOSTILE[kind])
    with pytest.raises(LabError):
        lab.load(tmp_path / "bad.safetensors")


def test_metadata_that_are_missing_are_named(run, tmp_path):
    path = run / "model.safetensors"
    metadata = {name: value for name, value in model._read(path)[1].items() if name != "mean"}
    save_file(load_file(path), tmp_path / "bad.safetensors", metadata)
    with pytest.raises(LabError, match="mean"):
        lab.load(tmp_path / "bad.safetensors")
