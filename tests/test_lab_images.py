"""Images are what a viewer shows, what is left out is said, and memory is bounded."""

import io
import os
import tracemalloc
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from rich.console import Console

from combinations import every
from largemargin.lab import cli, data
from largemargin.lab.commands.progress import reading_images
from largemargin.lab.data.decode import read_image
from largemargin.lab.data.images import ImageSet
from largemargin.lab.errors import LabError
from largemargin.lab.run.feeds import EVALUATED_AT_ONCE, InMemory, evaluated_at_once
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.run.streams import feed_of

ORIENTATION = 0x0112


def noise(seed, size=(18, 14), mode="RGB"):
    shape = (size[1], size[0], len(mode)) if len(mode) > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def make_folder(root, parts=("",), classes=("cat", "dog"), count=6):
    """Different pictures everywhere."""
    seed = 0
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                noise(seed).save(root / part / name / f"{i}.png")
                seed += 1
    return root


def notes_of(folder, streamed=False):
    return "\n".join(data.load(str(folder), "data", 8, streamed).notes)


# what a viewer shows


@every("orientation", range(10))
@every("suffix", ["jpg", "png", "webp", "tif"])
def test_the_exif_orientation_is_respected(orientation, suffix, tmp_path):
    image = noise(0, (60, 40))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"a.{suffix}"
    image.save(path, exif=exif)
    picture = read_image(path)
    with Image.open(path) as file:
        shown = ImageOps.exif_transpose(file).convert("RGB")
    assert np.array_equal(picture.image, shown)
    assert picture.image.size == ((40, 60) if 5 <= orientation <= 8 else (60, 40))
    assert picture.turned == (2 <= orientation <= 8) or suffix == "tif"  # Pillow turns a TIFF itself


def test_broken_exif_data_turn_nothing(tmp_path):
    noise(0).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    with warnings.catch_warnings(action="ignore"):  # Pillow's own
        assert read_image(tmp_path / "a.jpg").image.size == (18, 14)


def transparent(mode):
    """A picture in which the left half cannot be seen, whatever colour lies under it."""
    image = Image.new("RGBA", (8, 8), (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 4, 8))
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([200, 0, 0, 10, 20, 30])
        palette.paste(0, (0, 0, 4, 8))
        return palette, {"transparency": 0}
    if mode == "RGB with a transparent colour":
        rgb = Image.new("RGB", (8, 8), (10, 20, 30))
        rgb.paste((200, 0, 0), (0, 0, 4, 8))
        return rgb, {"transparency": (200, 0, 0)}
    return image.convert(mode), {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with a transparent colour"])
def test_what_is_transparent_is_white(mode, tmp_path):
    image, options = transparent(mode)
    image.save(tmp_path / "a.png", **options)
    picture = read_image(tmp_path / "a.png")
    pixels = np.asarray(picture.image)
    assert picture.was_transparent and (pixels[:, :4] == 255).all()
    assert (pixels[:, 4:] == (np.full(3, pixels[0, 4, 0]) if mode == "LA" else [10, 20, 30])).all()


def test_half_transparent_pixels_are_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 100, 200, 128)).save(tmp_path / "a.png")
    pixel = np.asarray(read_image(tmp_path / "a.png").image)[0, 0].astype(float)
    np.testing.assert_allclose(pixel, 255 + (np.array([0, 100, 200]) - 255) * 128 / 255, atol=1)


@every("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
def test_opaque_images_keep_their_pixels(mode, tmp_path):
    image = noise(0).convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    picture = read_image(path)
    with Image.open(path) as file:
        assert np.array_equal(picture.image, file.convert("RGB"))
    assert not picture.was_transparent and not picture.turned


def test_turned_and_transparent_images_are_counted(tmp_path):
    make_folder(tmp_path / "set")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    noise(100).save(tmp_path / "set" / "cat" / "turned.jpg", exif=exif)
    noise(101, mode="RGBA").save(tmp_path / "set" / "dog" / "glass.png")
    said = notes_of(tmp_path / "set")
    assert "1 image turned upright" in said and "1 image with transparency laid on white" in said
    assert notes_of(make_folder(tmp_path / "plain")) == ""


@pytest.mark.parametrize("suffix", ["tif", "webp", "png"])
def test_files_of_several_frames_are_counted(suffix, tmp_path):
    make_folder(tmp_path / "set")
    first, *others = [noise(seed) for seed in (100, 101, 102)]
    first.save(tmp_path / "set" / "cat" / f"stack.{suffix}", save_all=True, append_images=others)
    assert "1 file of several frames or pages: only the first was read" in notes_of(tmp_path / "set")


def test_the_preview_in_a_photograph_is_no_frame(tmp_path):
    make_folder(tmp_path / "set")
    noise(100).save(tmp_path / "set" / "cat" / "phone.jpg", "MPO", save_all=True, append_images=[noise(101)])
    assert notes_of(tmp_path / "set") == ""


# what is left out


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("parts", [("",), ("train", "test")])
def test_what_is_not_read_is_counted_by_class_and_split(parts, streamed, tmp_path):
    folder = make_folder(tmp_path / "set", parts)
    cat = folder / parts[0] / "cat"
    for i in range(25):
        (cat / f"phone{i}.HEIC").write_bytes(b"heic")
    for name in ("a.avif", "b.gif", "c.jfif", "notes.txt", "LICENSE", ".hidden.png", ".DS_Store", "Thumbs.db"):
        (cat / name).write_bytes(b"other")
    (tmp_path / "elsewhere").mkdir()
    (cat / "link").symlink_to(tmp_path / "elsewhere")
    (cat / ".ipynb_checkpoints").mkdir()
    (folder / parts[0] / "readme.md").write_text("of this set")
    (folder / parts[0] / ".emu").mkdir()
    said = notes_of(folder, streamed)
    assert f"{parts[0]}/cat: 6 images read, left out: 25 .heic".lstrip("/") in said
    for what in (
        "1 .avif",
        "1 .gif",
        "1 .jfif",
        "1 .txt",
        "1 file without a suffix",
        "1 hidden file",
        "1 linked folder",
        "1 hidden folder",
    ):
        assert what in said, what
    assert "dog" not in said and ".db" not in said
    assert ".emu/, 1 file beside the class folders" in said


def test_a_class_without_an_image_says_what_it_holds(tmp_path):
    folder = make_folder(tmp_path / "set")
    (folder / "emu").mkdir()
    (folder / "emu" / "a.heic").write_bytes(b"heic")
    with pytest.raises(LabError, match=r"emu holds no image .* but 1 \.heic"):
        data.load(str(folder), "data", 8)


def test_many_classes_are_counted_after_the_first(tmp_path):
    folder = make_folder(tmp_path / "set", classes=[f"class{i:02}" for i in range(15)], count=5)
    for i in range(15):
        (folder / f"class{i:02}" / "a.gif").write_bytes(b"gif")
    said = notes_of(folder)
    assert len(said.splitlines()) == 11 and "in 5 more class folders: 5 .gif" in said


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("parts", [("seg_train", "seg_test"), ("seg_train/seg_train", "seg_test/seg_test"), ("training_set", "test_set")])
def test_parts_that_are_taken_for_classes_are_named(parts, streamed, tmp_path):
    said = notes_of(make_folder(tmp_path, parts=parts), streamed)
    first, second = sorted(part.partition("/")[0] for part in parts)
    assert f"warning: {first}, {second} are taken for classes" in said and "(cat, dog)" in said


@pytest.mark.parametrize(
    ("parts", "classes"),
    [
        (("cat", "dog"), ("images",)),
        (("cat",), ("indoors", "outdoors")),
        (("train", "test"), ("cat", "dog")),
        (("",), ("a/p1", "a/p2", "b/p3")),
    ],
)
def test_folders_in_a_class_are_part_of_it(parts, classes, tmp_path):
    make_folder(tmp_path, parts=parts, classes=classes)
    if parts == ("cat",):
        make_folder(tmp_path, classes=("dog",))
    assert "taken for classes" not in notes_of(tmp_path)


@pytest.mark.parametrize("other", ["val", "validation", "extra"])
def test_a_part_that_is_not_read_is_named(other, tmp_path):
    folder = make_folder(tmp_path / "set", ("train", "test", other))
    (folder / "labels.csv").write_text("name,label")
    said = notes_of(folder)
    assert f"{other}/, 1 file not read: training images are those of train/, test images those of test/" in said
    assert notes_of(make_folder(tmp_path / "both", ("train", "val"))) == ""


# the same picture twice


@pytest.mark.parametrize("held_out", ["test", "val"])
@pytest.mark.parametrize("streamed", [False, True])
def test_pictures_of_both_parts_are_counted(held_out, streamed, tmp_path):
    folder = make_folder(tmp_path / "set", ("train", held_out))
    for i in range(3):
        (folder / held_out / "cat" / f"copy{i}.png").write_bytes((folder / "train" / "cat" / f"{i}.png").read_bytes())
    assert "warning: 3 of 15 test images are in the training set too" in notes_of(folder, streamed)


def test_the_same_pixels_in_another_file_are_the_same_picture(tmp_path):
    folder = make_folder(tmp_path / "set", ("train", "test"))
    noise(0).save(folder / "test" / "dog" / "again.bmp")
    assert "warning: 1 of 13 test images" in notes_of(folder)


def test_copies_are_found_where_a_fifth_is_held_out(tmp_path):
    folder = make_folder(tmp_path / "set", count=10)
    for name in ("cat", "dog"):
        for i in range(10):
            (folder / name / f"copy{i}.png").write_bytes((folder / name / f"{i}.png").read_bytes())
    assert "test images are in the training set too" in notes_of(folder)


@pytest.mark.parametrize("streamed", [False, True])
def test_different_pictures_of_one_size_are_no_duplicates(streamed, tmp_path):
    folder = tmp_path / "set"
    for part in ("train", "test"):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for i in range(3):  # uncompressed, so all files have one size; they differ in one pixel in the middle
                image = Image.new("RGB", (90, 90))
                image.putpixel((45, 45), (i, len(part), ord(name)))
                image.save(folder / part / name / f"{i}.bmp")
    assert notes_of(folder, streamed) == ""
    (folder / "test" / "a" / "copy.bmp").write_bytes((folder / "train" / "b" / "1.bmp").read_bytes())
    assert "1 of 7 test images" in notes_of(folder, streamed)


# broken files


def test_all_broken_files_are_named_at_once(tmp_path):
    folder = make_folder(tmp_path / "set")
    for i in range(13):
        (folder / "cat" / f"broken{i:02}.jpg").write_bytes(b"" if i % 2 else b"no image")
    with pytest.raises(LabError) as caught:
        data.load(str(folder), "data", 8)
    said = str(caught.value)
    assert said.startswith("cannot read 13 of 25 images: ") and "; and 3 more; mend or remove them" in said
    assert sum(f"broken{i:02}.jpg" in said for i in range(13)) == 10
    for i in range(10, 13):
        (folder / "cat" / f"broken{i:02}.jpg").unlink()
    with pytest.raises(LabError) as caught:
        data.load(str(folder), "data", 8)
    assert " more" not in str(caught.value)


def test_all_files_that_are_gone_are_named_at_once(tmp_path):
    folder = make_folder(tmp_path / "set", ("train", "test"))
    files = data.load(str(folder), "data", 8, streamed=True)
    for name in ("train/cat/0.png", "test/dog/1.png"):
        (folder / name).unlink()
    with pytest.raises(LabError, match=r"cannot read 2 of 24 images: .*train/cat/0\.png.*test/dog/1\.png"):
        files.digest()


# what is said


def test_compare_and_train_print_what_is_left_out(here, tmp_path, capsys):
    folder = make_folder(tmp_path / "set", ("train", "test"))
    (folder / "train" / "cat" / "a.heic").write_bytes(b"heic")
    options = ["--data", str(folder), "--image-size", "8", "--epochs", "1", "--device", "cpu"]
    commands = [
        ["compare", *options, "--losses", "softmax", "--seeds", "0", "--out", str(tmp_path / "compare")],
        ["train", *options, "--out", str(tmp_path / "train")],
    ]
    for command in commands:
        assert cli.main(command) == 0
        said = capsys.readouterr().out
        assert "train/cat: 6 images read, left out: 1 .heic" in said and "reading 24 images" in said


@pytest.mark.parametrize("terminal", [False, True])
def test_decoding_is_shown(terminal):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=80)
    with reading_images(console) as on_image:
        for i in range(1, 41):
            on_image(i, 40)
    text = screen.getvalue()
    assert ("40/40" in text) == terminal and ("reading 40 images" in text) != terminal


# memory


@every("batch_size", [1, 8, 128, 500, 4000])
@every("image_size", [8, 28, 32, 33, 64, 96, 224, 1024])
def test_evaluation_holds_no_more_than_a_batch_of_large_images(image_size, batch_size):
    size = evaluated_at_once(Recipe("softmax", 0, batch_size=batch_size), image_size)
    assert 1 <= size <= EVALUATED_AT_ONCE
    if image_size <= 32:
        assert size == EVALUATED_AT_ONCE
    else:
        assert size <= batch_size or size * image_size**2 <= EVALUATED_AT_ONCE * 32 * 32


@pytest.mark.parametrize("validation_fraction", [0.0, 0.5])
def test_an_evaluation_comes_in_such_parts(validation_fraction, tmp_path):
    images, labels = torch.zeros(50, 3, 64, 64, dtype=torch.uint8), torch.arange(50) % 2
    recipe = Recipe("softmax", 0, batch_size=8, data="folder", validation_fraction=validation_fraction)
    feed = feed_of(recipe, ImageSet(images, labels, images.repeat(8, 1, 1, 1), labels.repeat(8), ("a", "b")), torch.device("cpu"))
    parts = [len(target) for _, target in feed.held_out()]
    assert sum(parts) == feed.num_held_out and max(parts) <= 125


def test_there_is_one_copy_of_the_images(tmp_path):
    folder = make_folder(tmp_path / "set")
    images = data.load(str(folder), "data", 8)
    assert isinstance(images, ImageSet)
    assert images.train_images.untyped_storage().data_ptr() == images.test_images.untyped_storage().data_ptr()
    feed = feed_of(Recipe("softmax", 0, data=str(folder)), images, torch.device("cpu"))
    assert isinstance(feed, InMemory)
    assert feed.images.data_ptr() == images.train_images.data_ptr()
    images.save(tmp_path / "images.pt")
    assert os.path.getsize(tmp_path / "images.pt") < images.train_images.nbytes + images.test_images.nbytes + 10_000
    assert ImageSet.saved(tmp_path / "images.pt").digest() == images.digest()


def test_a_digest_copies_nothing():
    images = torch.zeros(100, 3, 64, 64, dtype=torch.uint8)
    whole = ImageSet(images, torch.zeros(100, dtype=torch.int64), images[:10], torch.zeros(10, dtype=torch.int64), ("a", "b"))
    tracemalloc.start()
    whole.digest()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < images.nbytes / 10
