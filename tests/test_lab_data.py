"""Data sets and the seeded ways to make them harder."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from largemargin.lab import data
from largemargin.lab._torchvision import import_torchvision
from largemargin.lab.data.folders import image_folder
from largemargin.lab.data.images import ImageSet, channel_moments, digits
from largemargin.lab.errors import LabError
from largemargin.lab.run.rows import pollute_labels, subsample


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_digits_are_split_by_thirds_and_stratified():
    images = digits()
    assert images.train_images.shape == (1198, 1, 8, 8) and images.test_images.shape == (599, 1, 8, 8)
    assert images.train_images.dtype == torch.uint8 and images.train_images.max() == 255
    shares = [torch.bincount(labels, minlength=10) / len(labels) for labels in (images.train_labels, images.test_labels)]
    assert (shares[0] - shares[1]).abs().max() < 0.002
    assert torch.equal(images.test_labels, digits().test_labels)  # one split for every run


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3, 1.0])
def test_pollution_moves_exactly_the_asked_number_of_labels_to_other_classes(noise):
    labels = torch.arange(1000) % 7
    before = labels.clone()
    polluted = pollute_labels(labels, noise, 7, generator())
    assert torch.equal(labels, before)
    assert (polluted != labels).sum() == round(noise * 1000)
    assert polluted.min() >= 0 and polluted.max() < 7
    assert torch.equal(polluted, pollute_labels(labels, noise, 7, generator()))
    if noise:
        assert not torch.equal(polluted, pollute_labels(labels, noise, 7, generator(1)))


def test_pollution_is_uniform_over_the_other_classes():
    labels = torch.zeros(60_000, dtype=torch.long)
    counts = torch.bincount(pollute_labels(labels, 1.0, 7, generator()), minlength=7)
    assert counts[0] == 0
    assert (counts[1:] - 10_000).abs().max() < 5 * 10_000**0.5  # five standard deviations of a count


def test_subsample_draws_the_asked_number_without_replacement():
    chosen = subsample(1000, 0.25, generator())
    assert len(chosen) == len(chosen.unique()) == 250 and torch.equal(chosen, chosen.sort().values)
    assert torch.equal(subsample(1000, 1.0, generator()), torch.arange(1000))
    assert len(subsample(10, 0.001, generator())) == 1


def test_channel_moments_are_those_of_the_pixels():
    images = torch.randint(0, 256, (50, 3, 4, 5), generator=generator(), dtype=torch.uint8)
    mean, std = channel_moments(images)
    torch.testing.assert_close(mean, images.double().mean((0, 2, 3)).float())
    torch.testing.assert_close(std, images.double().std((0, 2, 3), correction=0).float())


@pytest.fixture
def cifar_files(tmp_path, monkeypatch):
    """CIFAR archives of the published layout, tiny, with their own md5 sums."""
    sets = {}
    rng = np.random.default_rng(0)
    for name, cls, fine in (
        ("cifar10", import_torchvision().datasets.CIFAR10, b"labels"),
        ("cifar100", import_torchvision().datasets.CIFAR100, b"fine_labels"),
    ):
        folder = tmp_path / cls.base_folder
        folder.mkdir()

        def write(file, content, folder=folder):
            (folder / file).write_bytes(pickle.dumps(content))
            return hashlib.md5((folder / file).read_bytes()).hexdigest()

        def batch(n, fine=fine):
            return {b"data".decode(): rng.integers(0, 256, (n, 3072), dtype=np.uint8), fine.decode(): rng.integers(0, 10, n).tolist()}

        train_list = [[file, write(file, batch(6))] for file, _ in cls.train_list]
        test_list = [[file, write(file, batch(4))] for file, _ in cls.test_list]
        meta = dict(cls.meta)
        meta["md5"] = write(meta["filename"], {meta["key"]: [f"class{i}" for i in range(10)]})
        for attribute, value in (("train_list", train_list), ("test_list", test_list), ("meta", meta)):
            monkeypatch.setattr(cls, attribute, value)
        sets[name] = (folder, train_list)
    return tmp_path, sets


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_from_the_standard_batches(cifar_files, name):
    root, sets = cifar_files
    folder, train_list = sets[name]
    images = data.load(name, str(root), 32)
    assert isinstance(images, ImageSet)
    assert images.train_images.shape == (6 * len(train_list), 3, 32, 32) and images.test_images.shape == (4, 3, 32, 32)
    first = pickle.loads((folder / train_list[0][0]).read_bytes())
    assert np.array_equal(images.train_images[0].numpy().ravel(), first["data"][0])
    assert images.train_labels[:6].tolist() == first.get("labels", first.get("fine_labels"))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_with_a_wrong_md5_or_no_files_says_so(cifar_files, name, tmp_path):
    root, sets = cifar_files
    folder, train_list = sets[name]
    (folder / train_list[0][0]).write_bytes(b"broken")
    with pytest.raises(LabError, match="md5"):
        data.load(name, str(root), 32)
    with pytest.raises(LabError, match="--data-root"):
        data.load(name, str(tmp_path / "elsewhere"), 32)


def save_image(path: Path, color, size=(20, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten images each, no split."""
    for i in range(10):
        save_image(tmp_path / "set" / "cat" / f"{i}.png", (200, i, 0))
        save_image(tmp_path / "set" / "dog" / f"{i}.jpg", (0, i, 200))
    return tmp_path / "set"


def test_image_folder_holds_out_a_stratified_fifth(folder):
    images = image_folder(folder, 8)
    assert images.classes == ("cat", "dog")
    assert torch.bincount(images.train_labels).tolist() == [8, 8] and torch.bincount(images.test_labels).tolist() == [2, 2]
    assert images.train_images.shape == (16, 3, 8, 8)
    reds = images.train_images[images.train_labels == 0].float().mean((0, 2, 3))
    assert abs(reds[0] - 200) <= 1 and reds[2] <= 1
    assert torch.equal(images.test_images, image_folder(folder, 8).test_images)  # one split for every run


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_image_folder_takes_a_split_that_is_there(tmp_path, held_out):
    for part, n in (("train", 3), (held_out, 2)):
        for name in ("a", "b"):
            for i in range(n):
                save_image(tmp_path / part / name / f"{i}.png", (i, i, i))
    images = image_folder(tmp_path, 8)
    assert len(images.train_labels) == 6 and len(images.test_labels) == 4


def test_image_folder_converts_to_rgb_and_crops_the_centre(tmp_path):
    wide = Image.new("RGB", (30, 10), (0, 0, 0))
    wide.paste((255, 255, 255), (10, 0, 20, 10))  # the middle third is white
    for part in ("train", "test"):
        (tmp_path / part / "wide").mkdir(parents=True)
        wide.save(tmp_path / part / "wide" / "0.png")
        save_image(tmp_path / part / "grey" / "0.png", 100, mode="L")
        save_image(tmp_path / part / "grey" / "1.png", (1, 2, 3, 4), mode="RGBA")
    images = image_folder(tmp_path, 10)
    assert images.train_images[images.train_labels == 1].min() == 255
    assert images.train_images[0].unique().tolist() == [100] and images.train_images[1, :, 0, 0].tolist() == [251, 251, 251]  # on white


@pytest.mark.parametrize(("content", "said"), [(b"", "empty file"), (b"not an image", "cannot identify"), (None, "")])
def test_a_broken_image_is_named(folder, content, said):
    broken = folder / "dog" / "3.jpg"
    if content is None:  # truncated in the middle
        noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(broken)
        content = broken.read_bytes()[:2000]
    broken.write_bytes(content)
    with pytest.raises(LabError, match=r"dog/3\.jpg") as caught:
        image_folder(folder, 8)
    assert said in str(caught.value)


def test_folders_that_are_no_data_set_are_refused(folder, tmp_path):
    with pytest.raises(LabError, match="no such folder"):
        data.load(str(tmp_path / "nowhere"), "data", 8)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(LabError, match="link: a link to nowhere, which is not there"):
        data.load(str(tmp_path / "link"), "data", 8)
    with pytest.raises(LabError, match="found 0 sub-folders"):
        image_folder(folder / "cat", 8)
    (folder / "empty").mkdir()
    with pytest.raises(LabError, match="empty holds no image"):
        image_folder(folder, 8)
    save_image(folder / "empty" / "0.png", (0, 0, 0))
    with pytest.raises(LabError, match="too few images"):
        image_folder(folder, 8)


def test_classes_of_train_and_test_must_agree(tmp_path):
    for part, names in (("train", "ab"), ("test", "ac")):
        for name in names:
            save_image(tmp_path / part / name / "0.png", (0, 0, 0))
    with pytest.raises(LabError, match="b, c"):
        image_folder(tmp_path, 8)


def test_a_saved_set_is_the_set(folder, tmp_path):
    images = image_folder(folder, 8)
    images.save(tmp_path / "images.pt")
    saved = ImageSet.saved(tmp_path / "images.pt")
    assert saved.classes == images.classes and torch.equal(saved.train_images, images.train_images)
    assert saved.digest() == images.digest()


def test_the_digest_changes_with_the_data(folder):
    before = image_folder(folder, 8)
    assert before.digest() == image_folder(folder, 8).digest() != image_folder(folder, 9).digest()
    save_image(folder / "cat" / "0.png", (0, 255, 0))
    assert image_folder(folder, 8).digest() != before.digest()


def test_more_than_eight_bits_are_refused_rather_than_clipped(folder):
    Image.fromarray(np.full((10, 10), 3000, dtype=np.uint16)).save(folder / "cat" / "0.png")
    with pytest.raises(LabError, match=r"cat/0\.png.*8 bits"):
        image_folder(folder, 8)


@pytest.mark.parametrize("names", [("train", "valid"), ("Train", "Test"), ("train",)])
def test_half_a_split_is_not_taken_for_classes(tmp_path, names):
    for name in names:
        for label in "ab":
            save_image(tmp_path / name / label / "0.png", (0, 0, 0))
    with pytest.raises(LabError, match="looks like a part of a split"):
        image_folder(tmp_path, 8)
