"""Harder training sets: human and asymmetric noise, long tails, second labels; and data from arrays and unverified files."""

import hashlib
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from largemargin.lab import cli, data
from largemargin.lab.comparison.folder import reopen
from largemargin.lab.data import human_labels as human
from largemargin.lab.data.arrays import array_set
from largemargin.lab.data.folders import listed_folder
from largemargin.lab.data.images import ImageSet
from largemargin.lab.errors import LabError
from largemargin.lab.results import RunRecord
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.run.rows import choose_rows, long_tail, move_to_the_next_class


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_asymmetric_noise_moves_exactly_so_many_labels_to_the_next_class(noise):
    labels = torch.arange(1000) % 7
    moved = move_to_the_next_class(labels, noise, 7, generator())
    assert sorted(((moved - labels) % 7).tolist()) == [0] * (1000 - round(noise * 1000)) + [1] * round(noise * 1000)
    assert torch.equal(moved, move_to_the_next_class(labels, noise, 7, generator()))


def test_a_long_tail_has_exponential_class_sizes():
    labels = torch.arange(500).repeat(10) % 10
    kept = long_tail(labels, 100.0, 10, generator())
    counts = labels[kept].bincount(minlength=10)
    assert counts.tolist() == [round(500 * 100 ** (-c / 9)) for c in range(10)] and counts[0] == 500 and counts[-1] == 5
    assert torch.equal(kept, kept.unique()) and torch.equal(kept, long_tail(labels, 100.0, 10, generator()))
    assert torch.equal(long_tail(labels, 1.0, 10, generator()), torch.arange(5000))


def test_a_long_tail_leaves_every_class_a_sample():
    labels = torch.tensor([0] * 5 + [1, 2])
    assert labels[long_tail(labels, 1000.0, 3, generator())].bincount(minlength=3).tolist() == [5, 1, 1]


def test_a_recipe_without_them_is_the_run_it_was():
    """Runs of earlier versions are found again: the name of a run does not change."""
    assert Recipe(loss="softmax", seed=0).id == Recipe(loss="softmax", seed=0, noise_kind=None, long_tail=None).id
    assert Recipe(loss="softmax", seed=0).id == "softmax-noise0-seed0-" + Recipe(loss="softmax", seed=0).id[-8:]
    ids = {
        Recipe(loss="softmax", seed=0, label_noise=0.3, noise_kind=kind, long_tail=t).id
        for kind in (None, "asymmetric")
        for t in (None, 10.0)
    }
    assert len(ids) == 4


def test_runs_of_a_seed_train_on_the_same_samples_and_labels_whatever_the_loss():
    labels = torch.arange(300) % 3
    rows = [
        choose_rows(Recipe(loss=loss, seed=4, label_noise=0.2, noise_kind="asymmetric", long_tail=5.0), labels, 3)
        for loss in ("softmax", "large_margin")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))
    assert (rows[0].training_labels != labels[rows[0].training]).sum() == round(0.2 * len(rows[0].training))


def published(clean, noisy):
    """A file as that of CIFAR-100N is written: a pickle of protocol 2 in a zip archive."""
    pickled = pickle.dumps({"clean_label": np.asarray(clean), "noisy_label": np.asarray(noisy)}, protocol=2)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("CIFAR-100_human/data.pkl", pickled)
    return file.getvalue()


def test_human_labels_are_read_without_executing_the_pickle(monkeypatch, tmp_path):
    clean, noisy = np.arange(3000) % 100, np.arange(3000) * 7 % 100
    content = published(clean, noisy)
    path = tmp_path / human.FILE
    path.parent.mkdir()
    path.write_bytes(content)
    monkeypatch.setattr(human, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(pickle, "loads", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    found = human.human_labels(tmp_path, torch.from_numpy(clean))
    assert found.dtype == torch.int64 and found.tolist() == noisy.tolist()
    with pytest.raises(LabError, match="not those of these training images"):
        human.human_labels(tmp_path, torch.from_numpy(noisy))


def test_the_file_is_put_where_training_reads_it(monkeypatch, tmp_path, capsys):
    content = published(np.arange(2000) % 100, np.zeros(2000, np.int64))
    (tmp_path / "given.pt").write_bytes(content)
    fetch = ["data", "fetch", "cifar100n", "--data-root", str(tmp_path / "root"), "--from-file", str(tmp_path / "given.pt")]
    assert cli.main(fetch) == 2 and not (tmp_path / "root").exists()  # not the published file
    monkeypatch.setattr(human, "SHA256", hashlib.sha256(content).hexdigest())
    assert cli.main(["data", "verify", "cifar100n", "--data-root", str(tmp_path / "root")]) == 2
    assert cli.main(fetch) == 0 and human.state(tmp_path / "root") == "ok"
    assert "CC BY-NC 4.0" in capsys.readouterr().out
    assert cli.main(["data", "verify", "cifar100n", "--data-root", str(tmp_path / "root")]) == 0


def test_another_file_is_refused_before_it_is_opened(tmp_path):
    path = tmp_path / human.FILE
    path.parent.mkdir()
    path.write_bytes(published([1] * 3000, [2] * 3000))
    with pytest.raises(LabError, match="published with bd2d8040"):
        human.human_labels(tmp_path, torch.ones(3000, dtype=torch.int64))
    with pytest.raises(LabError, match="data fetch cifar100n"):
        human.human_labels(tmp_path / "elsewhere", torch.ones(3))


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "d" / part / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (8, 8), (i * 50, 9, 9)).save(tmp_path / "d" / part / name / f"{i}.png")
    return tmp_path / "d"


@pytest.mark.parametrize("prefix", ["train/", ""])
def test_second_labels_replace_the_training_labels_alone(folder, prefix, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(f"image,label\n{prefix}cat/0.png,dog\n{prefix}cat/1.png,cat\n{prefix}dog/0.png,dog\n{prefix}dog/1.png,dog\n")
    before = listed_folder(folder)
    after = listed_folder(folder, str(path))
    assert before.train_labels.tolist() == [0, 0, 1, 1] and after.train_labels.tolist() == [1, 0, 1, 1]
    assert torch.equal(after.test_labels, before.test_labels) and after.digest() != before.digest()
    assert "1 of 4 training labels differ from the folders (25.0%)" in after.notes[-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\n", "the columns file, label; expected image and label"),
        ("image,label\ncat/0.png,dog\n", "no label for 3 training images, train/cat/1.png say"),
        ("image,label\ncat/0.png,cow\n", "'cow', which is no class"),
        ("image,label\ncat/0.png,dog\ncat/0.png,dog\n", "line 3 names cat/0.png a second time"),
        ("image,label\ncat/0.png,\n", "line 2 has no image or no label"),
        ("image,label\ncat/0.png,dog\ncat/1.png,dog\ndog/0.png,dog\ndog/1.png,dog\nx.png,dog\n", "x.png is no training image"),
    ],
)
def test_second_labels_that_do_not_fit_get_one_clear_line(folder, tmp_path, text, words):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(LabError, match="--labels") as error:
        listed_folder(folder, str(tmp_path / "labels.csv"))
    assert words in str(error.value)


IMAGES = np.random.default_rng(0).integers(0, 256, (20, 6, 6, 3)).astype(np.uint8)
LABELS = np.arange(20) % 2


def saved(tmp_path, **arrays):
    np.savez(tmp_path / "set.npz", **arrays)
    return tmp_path / "set.npz"


@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHW"])
def test_arrays_are_images_in_any_layout(layout, tmp_path):
    pixels = {"NHWC": IMAGES, "NCHW": IMAGES.transpose(0, 3, 1, 2), "NHW": IMAGES[..., 0]}[layout]
    found = array_set(saved(tmp_path, train_x=pixels, train_y=LABELS, test_x=pixels[:4], test_y=LABELS[:4], more=np.arange(3)))
    assert isinstance(found, ImageSet)
    channels = 1 if layout == "NHW" else 3
    assert found.train_images.shape == (20, channels, 6, 6) and found.classes == ("0", "1")
    assert torch.equal(found.train_images, torch.from_numpy(IMAGES.transpose(0, 3, 1, 2)[:, :channels].copy()))
    assert found.test_labels.tolist() == LABELS[:4].tolist()


def test_a_split_says_which_samples_are_which(tmp_path):
    split = np.array(["train"] * 15 + ["TEST"] * 5)
    found = array_set(saved(tmp_path, x=IMAGES, y=np.array(["no", "yes"])[LABELS], split=split))
    assert (len(found.train_labels), len(found.test_labels), found.classes) == (15, 5, ("no", "yes"))


def test_without_a_split_a_stratified_fifth_is_held_out(tmp_path):
    found = array_set(saved(tmp_path, x=IMAGES, y=LABELS))
    assert found.test_labels.bincount().tolist() == [2, 2] and len(found.train_labels) == 16


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": IMAGES}, "expected train_x, train_y, test_x and test_y, or x and y"),
        ({"x": IMAGES.astype(float), "y": LABELS}, "images are uint8 with 3 or 4 dimensions"),
        ({"x": IMAGES, "y": LABELS[:3]}, "y has the shape (3,)"),
        ({"x": IMAGES, "y": LABELS * 1.5}, "labels must be integers or names"),
        ({"x": IMAGES[:, :, :4], "y": LABELS}, "the networks take square ones"),
        ({"x": IMAGES, "y": LABELS, "split": np.array(["train"] * 19 + ["val"])}, "split holds 'val'"),
        ({"x": IMAGES, "y": np.zeros(20, int)}, "found 1 class"),
        ({"train_x": IMAGES, "train_y": LABELS, "test_x": IMAGES[:1], "test_y": np.array([2])}, "class 2 has test samples and no training"),
        ({"x": IMAGES, "y": np.array([{}] * 20, dtype=object)}, "without pickled objects"),
    ],
)
def test_arrays_that_do_not_fit_get_one_clear_line(arrays, words, tmp_path):
    with pytest.raises(LabError) as error:
        array_set(saved(tmp_path, **arrays))
    assert words in str(error.value)


def test_unverified_files_of_svhn_are_read_and_named(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    (tmp_path / "svhn-first").mkdir()
    for part, count in (("train", 4), ("test", 2)):
        content = {"X": np.full((32, 32, 3, count), 7, np.uint8), "y": np.array([[10], [1], [2], [9]][:count])}
        scipy_io.savemat(tmp_path / "svhn-first" / f"{part}_32x32.mat", content)
    found = data.load("svhn", str(tmp_path), 32, unverified=True)
    assert isinstance(found, ImageSet)
    assert found.train_labels.tolist() == [0, 1, 2, 9] and found.test_images.shape == (2, 3, 32, 32)
    assert "not the published ones" in found.notes[0]
    with pytest.raises(LabError, match="point --data-root at its files"):
        data.load("svhn", str(tmp_path), 32)
    with pytest.raises(LabError, match="pickles, which may execute code"):
        data.load("cifar10", str(tmp_path), 32, unverified=True)


def small(monkeypatch, errors):
    """A comparison whose runs have these errors, without training: seeds are added as its verdicts ask."""
    from largemargin.lab.commands import compare, comparing

    made: list[int] = []

    def train_none(recipes, *_, **__):
        made.extend(recipe.seed for recipe in recipes)

    def finished(comparison, out):
        test = {"margin": 1.0, "rho": 1.0, "ece": 1.0, "nll": 1.0, "margin_histogram": [0] * 160}
        records = [
            RunRecord.from_dict(
                {"recipe": recipe.to_dict(), "test": test | {"error": errors(recipe)}, "epochs": [{"train_loss": 1.0}], "environment": {}}
            )
            for recipe in comparison.recipes()
        ]
        return [], records

    monkeypatch.setattr(comparing, "run_with_progress", train_none)
    for module in (compare, comparing):
        monkeypatch.setattr(module, "finished_records", finished)
    monkeypatch.setattr(compare, "print_and_write", lambda comparison, *_, **__: comparison)
    monkeypatch.setattr(compare, "next_command", lambda *_: [])
    return made


@pytest.mark.parametrize(
    ("difference", "seeds"),
    [(lambda seed: 5.0 + 0.1 * seed, 5), (lambda seed: (-1) ** seed, 20), (lambda seed: 1.0 + 1.2 * (-1) ** seed, 15)],
    ids=["clear", "none", "small"],
)
def test_seeds_are_added_until_the_verdict_is_clear(monkeypatch, tmp_path, difference, seeds):
    made = small(monkeypatch, lambda recipe: 10.0 + recipe.seed % 3 + (difference(recipe.seed) if recipe.loss == "large_margin" else 0.0))
    command = ["compare", "--losses", "softmax", "large_margin", "--seeds", "auto", "--epochs", "1", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0
    assert max(made) == seeds - 1
    assert reopen(tmp_path / "out").max_seeds == 20 and len(reopen(tmp_path / "out").seeds) == seeds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seeds", "auto", "3"], "--seeds auto stands alone"),
        (["--seeds", "auto", "--max-seeds", "4"], "--max-seeds must be at least 5"),
        (["--max-seeds", "9"], "--max-seeds 9 is for --seeds auto"),
        (["--label-noise", "symmetric:0.3"], "asymmetric:SHARE or human"),
        (["--label-noise", "human"], "--label-noise human: no "),
        (["--labels", "x.csv"], "--labels x.csv is for the images of a folder"),
        (["--unverified"], "--unverified is for svhn"),
    ],
)
def test_bad_seeds_and_noise_get_one_clear_line(options, words, tmp_path, capsys):
    assert cli.main(["compare", *options, "--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
