"""What the training loop is fed: from memory, and from files."""

import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from largemargin.lab import data
from largemargin.lab._torchvision import import_torchvision
from largemargin.lab.data import crops
from largemargin.lab.data.folders import FileSet
from largemargin.lab.data.images import ImageSet, channel_moments
from largemargin.lab.errors import LabError
from largemargin.lab.run import streams
from largemargin.lab.run.feeds import InMemory, order_of
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.run.rows import choose_rows, load_rows, save_rows
from largemargin.lab.run.streams import feed_of

CPU = torch.device("cpu")


def augment(images, crop_padding, flip, fill, generator):
    return crops.apply_moves(images, crops.draw_moves(len(images), crop_padding, flip, generator), crop_padding, fill)


def recipe_of(**fields):
    return Recipe(**({"loss": "softmax", "data": "digits", "seed": 3, "batch_size": 10, "epochs": 1} | fields))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def image_set(n=23, held_out=12, size=8, channels=3, classes=4):
    images = torch.randint(0, 256, (n + held_out, channels, size, size), generator=generator(), dtype=torch.uint8)
    labels = torch.arange(n + held_out) % classes
    return ImageSet(images[:n], labels[:n], images[n:], labels[n:], tuple("abcdefgh"[:classes]))


# crops


@pytest.mark.parametrize("crop_fill", ["mean", "reflect"])
def test_every_augmented_image_is_a_window_of_the_padded_image_of_torchvision(crop_fill):
    images = torch.randint(0, 256, (300, 3, 7, 6), generator=generator(), dtype=torch.uint8)
    before = images.clone()
    fill = torch.tensor([7.9, 9.2, 250.5])  # as RandomCrop(fill=...) gets it: the fraction cut off
    moves = crops.draw_moves(300, 2, True, generator(1))
    moved = crops.apply_moves(images, moves, 2, fill if crop_fill == "mean" else None)
    pad = import_torchvision().transforms.v2.functional.pad
    padded = pad(images, 2, fill=[7, 9, 250]) if crop_fill == "mean" else pad(images, 2, padding_mode="reflect")
    for image, result, top, left, mirrored in zip(padded, moved, *moves, strict=True):
        window = image[:, top : top + 7, left : left + 6]
        assert torch.equal(result, window.flip(-1) if mirrored else window)
    assert torch.equal(images, before)
    same = augment(images, 2, True, fill if crop_fill == "mean" else None, generator(1))
    assert torch.equal(same, moved)


def test_augment_moves_each_image_as_a_whole():
    images = torch.randint(1, 256, (64, 2, 6, 5), generator=generator(), dtype=torch.uint8)
    fill = torch.tensor([7.0, 9.0])
    moved = augment(images, 2, False, fill, generator(1))
    offsets = set()
    for image, result in zip(images, moved, strict=True):
        padded = fill.to(torch.uint8).view(2, 1, 1).repeat(1, 10, 9)
        padded[:, 2:8, 2:7] = image
        found = [(y, x) for y in range(5) for x in range(5) if torch.equal(padded[:, y : y + 6, x : x + 5], result)]
        assert found, "the result is no crop of the padded image"
        offsets.add(found[0])
    assert len(offsets) > 12  # of 25, over 64 draws


def test_augment_mirrors_about_half_of_the_images_and_can_be_off():
    images = torch.randint(0, 256, (400, 1, 4, 4), generator=generator(), dtype=torch.uint8)
    result = augment(images, 0, True, torch.zeros(1), generator(1))
    mirrored = torch.tensor([torch.equal(r, i.flip(-1)) for r, i in zip(result, images, strict=True)])
    same = torch.tensor([torch.equal(r, i) for r, i in zip(result, images, strict=True)])
    assert (mirrored | same).all() and 150 < mirrored.sum() < 250
    assert torch.equal(augment(images, 0, False, torch.zeros(1), generator(1)), images)


def test_crops_and_mirror_images_are_uniform():
    from scipy.stats import chisquare

    moves = crops.draw_moves(32_400, 4, True, generator())
    cells = (moves.top * 9 + moves.left) * 2 + moves.mirrored
    counts = torch.bincount(cells, minlength=162)
    assert len(counts) == 162 and chisquare(counts.numpy()).pvalue > 0.001
    assert not crops.draw_moves(100, 4, False, generator()).mirrored.any()


def test_reflection_needs_more_pixels_than_it_reflects():
    with pytest.raises(LabError, match="reflect needs larger images"):
        augment(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), 4, False, None, generator())


# in memory


@pytest.mark.parametrize("crop_fill", ["mean", "reflect"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_rows_of_all_processes_are_the_batch_of_one(world, crop_fill):
    recipe = recipe_of(crop_padding=2, flip=True, crop_fill=crop_fill)
    whole = list(InMemory(recipe, image_set(), CPU).training(4))
    parts = [list(InMemory(recipe, image_set(), CPU, rank, world).training(4)) for rank in range(world)]
    assert [batch.size for batch in whole] == [10, 10, 3]
    for step, batch in enumerate(whole):
        for rank in range(world):
            assert torch.equal(batch.images[rank::world], parts[rank][step].images)
            assert torch.equal(batch.target[rank::world], parts[rank][step].target) and parts[rank][step].size == batch.size


def test_an_epoch_goes_on_from_its_middle_and_no_epoch_is_another():
    feed = InMemory(recipe_of(crop_padding=2, flip=True), image_set(), CPU)
    whole, rest = list(feed.training(1)), list(feed.training(1, first_step=1))
    assert len(rest) == 2 and all(torch.equal(a.images, b.images) for a, b in zip(whole[1:], rest, strict=True))
    assert not torch.equal(whole[0].images, next(feed.training(2)).images)


def test_memory_is_normalized_by_the_training_set():
    images = image_set()
    feed = InMemory(recipe_of(), images, CPU)
    mean, std = channel_moments(images.train_images)
    order = order_of(recipe_of(), 23, 0)
    expected = (images.train_images.float() - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1)
    assert torch.equal(torch.cat([batch.images for batch in feed.training(0)]), expected[order])
    assert torch.equal(torch.cat([batch.target for batch in feed.training(0)]), images.train_labels[order])
    assert torch.equal(torch.cat([target for _, target in feed.held_out()]), images.test_labels)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_memory_format_is_the_recipes(channels_last):
    feed = InMemory(recipe_of(crop_padding=1, flip=True, channels_last=channels_last), image_set(), CPU)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert next(feed.training(0)).images.is_contiguous(memory_format=layout)
    assert next(feed.held_out())[0].is_contiguous(memory_format=layout)
    other = InMemory(recipe_of(crop_padding=1, flip=True), image_set(), CPU)
    assert torch.equal(next(feed.training(0)).images, next(other.training(0)).images)


@pytest.mark.parametrize("crop_fill", ["mean", "reflect"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_feed_of_a_device_is_that_of_the_cpu(channels_last, crop_fill, device):
    recipe = recipe_of(crop_padding=2, flip=True, crop_fill=crop_fill, channels_last=channels_last, label_noise=0.3)
    assert_same_feeds(InMemory(recipe, image_set(), device), InMemory(recipe, image_set(), CPU), device)


def assert_same_feeds(feed, on_cpu, device):
    ours = [(batch.images, batch.target) for batch in feed.training(2)] + list(feed.held_out())
    theirs = [(batch.images, batch.target) for batch in on_cpu.training(2)] + list(on_cpu.held_out())
    for (images, target), (same_images, same_target) in zip(ours, theirs, strict=True):
        assert images.device.type == target.device.type == device.type
        assert images.stride() == same_images.stride()
        torch.testing.assert_close(images.cpu(), same_images, rtol=1e-6, atol=1e-6)
        assert torch.equal(target.cpu(), same_target)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_shares_of_the_held_out_part_are_the_part(world):
    recipe = recipe_of(validation_fraction=0.3, label_noise=0.2)
    feeds = [InMemory(recipe, image_set(), CPU, rank, world) for rank in range(world)]
    targets = [torch.cat([target for _, target in feed.held_out()]) for feed in feeds if len(feed.held_out_labels)]
    assert torch.equal(torch.cat(targets), feeds[0].rows.validation_labels)
    assert feeds[0].num_held_out == round(0.3 * 23) and feeds[0].split == "validation"
    assert not set(feeds[0].rows.training.tolist()) & set(feeds[0].rows.validation.tolist())


def test_all_held_out_is_refused():
    with pytest.raises(LabError, match="leaves none"):
        InMemory(recipe_of(validation_fraction=1.0), image_set(), CPU)


def test_rows_are_stored_with_the_run(tmp_path):
    rows = choose_rows(recipe_of(validation_fraction=0.3, label_noise=0.5, train_fraction=0.8), image_set().train_labels, 4)
    save_rows(rows, tmp_path / "run" / "training_set.npz")
    with np.load(tmp_path / "run" / "training_set.npz") as arrays:
        assert sorted(arrays) == ["training", "training_labels", "validation", "validation_labels"]
    assert all(torch.equal(a, b) for a, b in zip(rows, load_rows(tmp_path / "run" / "training_set.npz"), strict=True))


def test_inception_is_not_for_images_in_memory():
    with pytest.raises(LabError, match="augmentation inception"):
        feed_of(recipe_of(augmentation="inception"), image_set(), CPU)


# from files


@pytest.fixture
def folder(tmp_path):
    """Two classes, 7 training and 3 test images each, of noise."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("test", 3)):
        for name in ("a", "b"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / name / f"{i}.png")
    return tmp_path / "set"


def streamed_recipe(folder, **fields):
    return recipe_of(**({"data": str(folder), "image_size": 16, "batch_size": 4, "augmentation": "inception"} | fields))


def streamed(folder, rank=0, world=1, workers=0, device=CPU, **fields):
    files = data.load(str(folder), "data", 16, streamed=True)
    return streams.Streamed(streamed_recipe(folder, **fields), files, device, rank, world, workers)


def test_a_streamed_folder_lists_what_a_decoded_one_holds(folder):
    files, images = data.load(str(folder), "data", 16, streamed=True), data.load(str(folder), "data", 16)
    assert isinstance(files, FileSet) and files.classes == images.classes
    assert torch.equal(files.train_labels, images.train_labels) and torch.equal(files.test_labels, images.test_labels)
    assert isinstance(feed_of(streamed_recipe(folder), files, CPU), streams.Streamed)
    assert isinstance(feed_of(recipe_of(), images, CPU), InMemory)


def test_the_digest_of_files_changes_with_names_sizes_and_labels(folder):
    def digest():
        return data.load(str(folder), "data", 16, streamed=True).digest()

    first = digest()
    assert first == digest() and len(first) == 12
    (folder / "train" / "a" / "0.png").rename(folder / "train" / "a" / "00.png")
    renamed = digest()
    with open(folder / "train" / "a" / "00.png", "ab") as file:
        file.write(b"more")
    longer = digest()
    (folder / "test" / "a" / "0.png").rename(folder / "test" / "b" / "10.png")
    assert len({first, renamed, longer, digest()}) == 4


@pytest.mark.parametrize("augmentation", ["inception", "shift"])
def test_workers_and_a_resumed_epoch_give_the_same_images(folder, augmentation):
    fields = {"augmentation": augmentation, "crop_padding": 2, "flip": True}
    whole = list(streamed(folder, **fields).training(1))
    feed = streamed(folder, workers=2, **fields)
    next(feed.training(1))  # given up in its middle
    resumed = list(feed.training(1, first_step=1))
    assert [batch.size for batch in whole] == [4, 4, 4, 2]
    for one, other in zip(whole[1:], resumed, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.target, other.target)
    assert not torch.equal(whole[0].images, next(feed.training(2)).images)
    one, other = (torch.cat([images for images, _ in feed.held_out()]) for feed in (feed, streamed(folder, **fields)))
    assert torch.equal(one, other)


def test_a_worker_that_is_started_afresh_reads_the_same_images(folder, tmp_path):
    # as the loader's workers are in a run of a comparison; torchvision may import only by import_torchvision()
    _, loader = streamed(folder)._training
    (tmp_path / "dataset").write_bytes(pickle.dumps(loader.dataset))
    code = "import pickle, sys; sys.stdout.buffer.write(pickle.dumps(pickle.load(open(sys.argv[1], 'rb'))[1, 3]))"
    read = subprocess.run([sys.executable, "-c", code, tmp_path / "dataset"], check=True, stdout=subprocess.PIPE)
    image, label = pickle.loads(read.stdout)
    here, expected = loader.dataset[1, 3]
    assert torch.equal(image, here) and label == expected


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_streamed_feed_of_a_device_is_that_of_the_cpu(folder, channels_last, device):
    fields = {"channels_last": channels_last, "label_noise": 0.3}
    assert_same_feeds(streamed(folder, device=device, **fields), streamed(folder, **fields), device)


def test_the_border_of_a_random_crop_has_the_mean_colour():
    black = Image.new("RGB", (8, 8))
    moved = streams.training_transform(recipe_of(image_size=8, crop_padding=8, crop_fill="mean", flip=False))(black)
    colours = {
        tuple(pixel)
        for pixel in (moved.flatten(1).t() * torch.tensor(streams.STD) + torch.tensor(streams.MEAN)).mul(255).round().int().tolist()
    }
    assert (124, 116, 104) in colours or (123, 116, 103) in colours


def test_an_image_is_augmented_alike_wherever_it_stands(folder):
    few, many = (torch.cat([batch.images for batch in streamed(folder, batch_size=n).training(0)]) for n in (3, 14))
    assert torch.equal(few, many)


def test_streamed_rows_of_all_processes_are_the_batch_of_one(folder):
    fields = {"batch_size": 13, "label_noise": 0.3}  # the last batch has one row, none of the second process
    whole = list(streamed(folder, **fields).training(0))
    for rank in range(2):
        for batch, part in zip(whole, streamed(folder, rank, 2, **fields).training(0), strict=True):
            assert torch.equal(batch.images[rank::2], part.images) and torch.equal(batch.target[rank::2], part.target)
            assert part.size == batch.size and part.images.shape[1:] == (3, 16, 16)


def test_reading_draws_nothing_from_the_global_generator(folder):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    list(streamed(folder).training(0))
    list(streamed(folder).held_out())
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_held_out_files_are_shared_in_order(folder, world):
    files = data.load(str(folder), "data", 16, streamed=True)
    parts = [list(streamed(folder, rank, world).held_out()) for rank in range(world)]
    targets = torch.cat([target for part in parts for _, target in part])
    images = torch.cat([images for part in parts for images, _ in part])
    assert isinstance(files, FileSet) and torch.equal(targets, files.test_labels)
    transforms = import_torchvision().transforms
    old = transforms.Compose(
        [transforms.Resize(18), transforms.CenterCrop(16), transforms.ToTensor(), transforms.Normalize(streams.MEAN, streams.STD)]
    )
    for image, name in zip(images, files.test_files, strict=True):
        torch.testing.assert_close(image, old(Image.open(folder / name)))


def test_streamed_validation_is_of_the_training_files_with_their_noise(folder):
    feed = streamed(folder, validation_fraction=0.5, label_noise=0.5)
    assert feed.split == "validation" and feed.num_held_out == 7
    assert torch.equal(torch.cat([target for _, target in feed.held_out()]), feed.rows.validation_labels)
    trained = torch.cat([batch.target for batch in feed.training(0)])
    assert torch.equal(trained, feed.rows.training_labels[order_of(feed.recipe, 7, 0)])


def test_lighting_is_the_principal_components_times_a_tenth():
    torch.manual_seed(0)
    shifts = torch.stack([streams.Lighting()(torch.zeros(3, 1, 1)).flatten() for _ in range(20_000)])
    vectors, values = torch.tensor(streams.EIGENVECTORS), torch.tensor(streams.EIGENVALUES)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), atol=1e-3, rtol=0)
    along = shifts @ vectors  # uncorrelated, with these deviations
    torch.testing.assert_close(along.std(0), 0.1 * values, rtol=0.03, atol=0)
    constant = streams.Lighting()(torch.zeros(3, 4, 5))
    assert torch.equal(constant, constant[:, :1, :1].expand(3, 4, 5))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_in_one_line(folder, workers):
    broken = folder / "train" / "b" / "3.png"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(LabError, match=r"b/3\.png") as caught:
        list(streamed(folder, workers=workers).training(0))
    assert "\n" not in str(caught.value)
    broken.unlink()
    with pytest.raises(LabError, match=r"b/4\.png"):
        files = data.load(str(folder), "data", 16, streamed=True)
        (folder / "train" / "b" / "4.png").unlink()
        files.digest()


@pytest.mark.parametrize(("name", "classes"), [("imagenet", ("n01", "n02")), ("places365", ("a/abbey", "a/arch/outdoor"))])
def test_streamed_sets_are_train_and_val(tmp_path, name, classes):
    with pytest.raises(LabError, match=f"no folder .*{name}/train"):
        data.load(name, str(tmp_path), 224)
    for part in ("train", "val", "test"):  # the last without labels
        for label in classes if part != "test" else [""]:
            (tmp_path / name / part / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / name / part / label / "0.jpg")
    files = data.load(name, str(tmp_path), 224)
    assert files.classes == classes and files.train_labels.tolist() == files.test_labels.tolist() == [0, 1]
    assert isinstance(files, FileSet) and files.train_files == tuple(f"train/{label}/0.jpg" for label in classes)


def test_sizes_other_than_224_keep_the_proportion(folder):
    recipe = dataclasses.replace(streamed_recipe(folder), image_size=224)
    resize, crop = streams.evaluation_transform(recipe).transforms[:2]
    assert resize.size == [256] and tuple(crop.size) == (224, 224)
    assert streams.training_transform(recipe)(Image.new("RGB", (50, 60))).shape == (3, 224, 224)


def test_equal_images_are_augmented_each_in_its_own_way(folder):
    for part in (folder / "train").iterdir():
        for file in part.iterdir():
            file.write_bytes((folder / "train" / "a" / "0.png").read_bytes())
    images = torch.cat([batch.images for batch in streamed(folder).training(0)])
    assert len({image.numpy().tobytes() for image in images}) == 14
