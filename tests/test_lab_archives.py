"""Archives: read, verified, fetched; whole or not at all."""

import hashlib
import io
import pickle
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
from rich.console import Console

from largemargin.lab import data
from largemargin.lab._torchvision import import_torchvision
from largemargin.lab.arguments.parsers import data_parser
from largemargin.lab.commands import data as command
from largemargin.lab.data.fetch import fetch
from largemargin.lab.data.images import ImageSet
from largemargin.lab.errors import LabError


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def images(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


def mat(labels, seed):
    file = io.BytesIO()
    scipy.io.savemat(file, {"X": images(len(labels), seed).transpose(2, 3, 1, 0), "y": np.array(labels, dtype=np.uint8).reshape(-1, 1)})
    return file.getvalue()


def tar_of(members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Write tiny archives into a folder ``published``, and make torchvision expect their sums."""
    published = tmp_path / "published"
    published.mkdir()
    datasets = import_torchvision().datasets

    def publish(fine_label=99, svhn_label=10, extra=None):
        cls = datasets.CIFAR100
        batches = {
            name: pickle.dumps({"data": images(5, seed).reshape(5, -1), "fine_labels": [0, 1, 2, 98, fine_label]})
            for seed, name in enumerate(("train", "test"))
        }
        batches["meta"] = pickle.dumps({"fine_label_names": [f"class {i}" for i in range(100)]})
        archive = tar_of({f"{cls.base_folder}/{name}": content for name, content in batches.items()} | (extra or {}))
        (published / cls.filename).write_bytes(archive)
        monkeypatch.setattr(cls, "tgz_md5", md5(archive))
        for part in ("train", "test"):
            monkeypatch.setattr(cls, f"{part}_list", [[part, md5(batches[part])]])
        monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(batches["meta"])})
        files = {"train": mat([1, 2, 9, svhn_label], 2), "test": mat([10, 5], 3)}
        split_list = dict(datasets.SVHN.split_list)
        for part, content in files.items():
            url, name, _ = split_list[part]
            (published / name).write_bytes(content)
            split_list[part] = [url, name, md5(content)]
        monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
        return published

    return publish


@pytest.fixture
def mirror(tmp_path):
    """An HTTP server of the folder ``published``."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def end_headers(self):
            self.close_connection = True
            super().end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "published")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def everything_in(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*")) if root.exists() else []


@pytest.mark.parametrize("name", ["cifar100", "svhn"])
def test_what_is_fetched_is_read(publish, mirror, tmp_path, name):
    publish()
    heard = []
    needed = fetch(name, tmp_path / "root", mirror + "/", progress=lambda *news: heard.append(news))
    assert len(needed) == (1 if name == "cifar100" else 2)
    size = (tmp_path / "published" / needed[0]).stat().st_size
    assert (needed[0], size, size) in heard
    loaded = data.load(name, str(tmp_path / "root"), 32)
    assert isinstance(loaded, ImageSet)
    assert np.array_equal(loaded.train_images.numpy(), images(len(loaded.train_labels), 0 if name == "cifar100" else 2))
    if name == "svhn":
        assert loaded.train_labels.tolist() == [1, 2, 9, 0] and loaded.test_labels.tolist() == [0, 5] and loaded.classes[0] == "0"
    else:
        assert loaded.train_labels.tolist() == [0, 1, 2, 98, 99] and loaded.classes[99] == "class 99"
    assert loaded.train_labels.dtype == torch.int64 and loaded.train_images.is_contiguous()
    assert not [path for path in everything_in(tmp_path / "root") if path.startswith(".")]
    assert fetch(name, tmp_path / "root", "http://127.0.0.1:9") == []  # nothing is needed, so no address is asked


def test_archives_can_come_from_files(publish, tmp_path):
    published = publish()
    renamed = tmp_path / "renamed.bin"
    renamed.write_bytes((published / "cifar-100-python.tar.gz").read_bytes())
    fetch("cifar100", tmp_path / "root", given=[renamed])
    fetch("svhn", tmp_path / "root", given=[published / "test_32x32.mat", published / "train_32x32.mat"])
    assert len(data.load("cifar100", str(tmp_path / "root"), 32).train_labels) == 5
    assert len(data.load("svhn", str(tmp_path / "root"), 32).test_labels) == 2


def test_among_several_files_an_archive_is_known_by_its_name(publish, tmp_path):
    names = ["first.bin", "second.bin"]
    for name in names:
        (tmp_path / name).write_bytes((publish() / "cifar-100-python.tar.gz").read_bytes())
    with pytest.raises(LabError, match=r"none of first.bin, second.bin is cifar-100-python.tar.gz"):
        fetch("cifar100", tmp_path / "root", given=[tmp_path / name for name in names])


def test_a_broken_file_is_replaced_and_the_rest_is_left_alone(publish, tmp_path):
    published = publish()
    fetch("cifar100", tmp_path / "root", given=[published / "cifar-100-python.tar.gz"])
    (tmp_path / "root" / "cifar-100-python" / "train").write_bytes(b"broken")
    (tmp_path / "root" / "cifar-100-python" / "notes.txt").write_text("mine")
    assert fetch("cifar100", tmp_path / "root", given=[published / "cifar-100-python.tar.gz"])
    assert data.load("cifar100", str(tmp_path / "root"), 32).train_labels[4] == 99
    assert (tmp_path / "root" / "cifar-100-python" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["cifar100", "svhn"])
@pytest.mark.parametrize("harm", ["changed", "cut", "missing", "no server"])
def test_nothing_is_put_in_place_after_a_failed_fetch(publish, mirror, tmp_path, name, harm):
    published = publish()
    for file in published.iterdir():
        content = file.read_bytes()
        if harm == "changed":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        elif harm == "cut":
            file.write_bytes(content[: len(content) // 2])
        elif harm == "missing":
            file.unlink()
    with pytest.raises(LabError, match={"missing": "404", "no server": "cannot download"}.get(harm, "md5")) as caught:
        fetch(name, tmp_path / "root", "http://127.0.0.1:9" if harm == "no server" else mirror)
    assert "\n" not in str(caught.value)
    assert everything_in(tmp_path / "root") == []


def test_a_download_that_breaks_off_says_so(publish, tmp_path):
    published = publish()

    class Breaking(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write((published / "cifar-100-python.tar.gz").read_bytes()[:100])
            self.close_connection = True

    server = ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with pytest.raises(LabError, match=r"100 of 100000 bytes|IncompleteRead"):
            fetch("cifar100", tmp_path / "root", f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert everything_in(tmp_path / "root") == []


@pytest.mark.parametrize("where", ["while it is read", "at its end"])
def test_an_interrupt_leaves_nothing(publish, tmp_path, where):
    published = publish()

    def interrupt(name, done, total):
        if where == "while it is read" or done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("cifar100", tmp_path / "root", given=[published / "cifar-100-python.tar.gz"], progress=interrupt)
    assert everything_in(tmp_path / "root") == []


def test_an_archive_cannot_write_outside_its_folder(publish, tmp_path):
    published = publish(extra={"../../escaped": b"out", "cifar-100-python/more": b"in"})
    before = everything_in(tmp_path)
    fetch("cifar100", tmp_path / "root", given=[published / "cifar-100-python.tar.gz"])
    folder = "cifar-100-python"
    assert everything_in(tmp_path / "root") == [folder, f"{folder}/meta", f"{folder}/test", f"{folder}/train"]
    assert [name for name in everything_in(tmp_path) if Path(name).parts[0] != "root"] == before


def test_an_archive_with_other_members_is_refused(publish, tmp_path, monkeypatch):
    published = publish()
    monkeypatch.setattr(import_torchvision().datasets.CIFAR100, "test_list", [["test", "0" * 32]])
    with pytest.raises(LabError, match=r"cifar-100-python/test \(wrong md5\)"):
        fetch("cifar100", tmp_path / "root", given=[published / "cifar-100-python.tar.gz"])
    assert everything_in(tmp_path / "root") == []


@pytest.mark.parametrize(("name", "label"), [("cifar100", "100"), ("svhn", "11")])
def test_labels_out_of_range_are_named(publish, tmp_path, name, label):
    published = publish(fine_label=100, svhn_label=11)
    fetch(name, tmp_path / "root", given=sorted(published.glob("*.gz" if name == "cifar100" else "*.mat")))
    with pytest.raises(LabError, match=rf"label {label} is outside") as caught:
        data.load(name, str(tmp_path / "root"), 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_training_never_downloads_but_says_how_to(tmp_path, name):
    with pytest.raises(LabError, match=rf"largemargin data fetch {name} --data-root {tmp_path}"):
        data.load(name, str(tmp_path), 32)


@pytest.mark.parametrize("content", [b"no mat file", b""])
def test_a_file_that_is_no_mat_file_is_one_line(publish, tmp_path, monkeypatch, content):
    published = publish()
    fetch("svhn", tmp_path / "root", given=sorted(published.glob("*.mat")))
    (tmp_path / "root" / "svhn" / "test_32x32.mat").write_bytes(content)
    with pytest.raises(LabError, match="wrong md5"):
        data.load("svhn", str(tmp_path / "root"), 32)
    cls = import_torchvision().datasets.SVHN
    monkeypatch.setattr(cls, "split_list", cls.split_list | {"test": [*cls.split_list["test"][:2], md5(content)]})
    with pytest.raises(LabError, match="not what svhn is") as caught:
        data.load("svhn", str(tmp_path / "root"), 32)
    assert "\n" not in str(caught.value)


def largemargin_data(*arguments):
    """The command's text."""
    output = io.StringIO()
    command.run(data_parser().parse_args([str(argument) for argument in arguments]), Console(file=output, width=200))
    return output.getvalue()


def test_the_command_fetches_lists_and_verifies(publish, mirror, tmp_path):
    publish()
    root = tmp_path / "root"
    with pytest.raises(LabError, match="no data set under"):
        largemargin_data("verify", "--data-root", root)
    assert "checked and put" in largemargin_data("fetch", "cifar100", "--data-root", root, "--mirror", mirror)
    assert "already whole" in largemargin_data("fetch", "cifar100", "--data-root", root, "--mirror", mirror)
    listed = largemargin_data("list", "--data-root", root)
    datasets = import_torchvision().datasets
    rows = {
        name: line for line in listed.splitlines() for name in ("cifar10 ", "cifar100 ", "svhn ", "imagenet ", "places365 ") if name in line
    }
    assert len(rows) == 5 and "present" in rows["cifar100 "] and all("missing" in row for name, row in rows.items() if name != "cifar100 ")
    assert datasets.CIFAR10.tgz_md5 in rows["cifar10 "] and datasets.CIFAR10.filename in rows["cifar10 "]
    assert "cifar-100-python/train: ok" in largemargin_data("verify", "--data-root", root)
    (root / "cifar-100-python" / "test").write_bytes(b"")
    with pytest.raises(LabError, match=r"test \(wrong md5\)"):
        largemargin_data("verify", "cifar100", "--data-root", root)
    with pytest.raises(LabError, match=r"\(missing\)"):
        largemargin_data("verify", "svhn", "--data-root", root)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fetch",), "NAME"),
        (("fetch", "mnist"), "unknown data set"),
        (("fetch", "imagenet"), "owners"),
        (("fetch", "places365"), "val_256"),
        (("list", "--mirror", "http://x"), "for data fetch"),
        (("fetch", "svhn", "--mirror", "http://x", "--from-file", "y"), "one of them"),
        (("fetch", "svhn", "--mirror", "ftp://x"), "http://"),
        (("fetch", "cifar10", "--from-file", "nowhere.tar.gz"), "nowhere.tar.gz"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, arguments, said):
    with pytest.raises(LabError, match=said) as caught:
        largemargin_data(*arguments, "--data-root", tmp_path / "root")
    assert "\n" not in str(caught.value) and everything_in(tmp_path / "root") == []


def test_the_published_sums_are_torchvisions():
    from largemargin.lab.data.archives import archives_of

    cls = import_torchvision().datasets.CIFAR10
    (archive,) = archives_of("cifar10")
    assert (archive.name, archive.url, archive.md5) == (cls.filename, cls.url, cls.tgz_md5)
    assert len(archive.members) == 7
    sums = SimpleNamespace(**{part.name.split("_")[0]: part.md5 for part in archives_of("svhn")})
    assert sums.train == import_torchvision().datasets.SVHN.split_list["train"][2]
