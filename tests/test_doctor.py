"""The command that says who computes."""

import functools
import importlib.util
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from largemargin import __version__
from largemargin.backends import cpu, ladder
from largemargin.lab import doctor


@pytest.fixture(scope="module")
def worst_error():
    """The check of a backend, done once: Triton's interpreter takes seconds for it."""
    return functools.cache(doctor.worst_error)


@pytest.fixture(autouse=True)
def checked_once(monkeypatch, worst_error):
    monkeypatch.setattr(doctor, "worst_error", worst_error)


@pytest.fixture(autouse=True)
def nothing_beside(request, monkeypatch):
    """Importing all that is beside torch takes seconds: only the tests of that do it."""
    if "packages" not in request.fixturenames:
        monkeypatch.setattr(doctor, "BESIDE", ())


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """A function that installs a package with the given code, and has doctor look at it and its like alone."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(doctor, "BESIDE", ())

    def install(name, code):
        module = name.replace("-", "_")
        (tmp_path / f"{module}-1.0.dist-info").mkdir()
        (tmp_path / f"{module}-1.0.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.setattr(doctor, "BESIDE", (*doctor.BESIDE, name))

    return install


def test_doctor_names_every_backend_and_checks_it(capsys):
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert "backend reference" in said
    assert ("right: largest error" in said) == (not isinstance(ladder.load("cpu"), str))


def test_doctor_says_why_a_backend_is_not_there(monkeypatch):
    monkeypatch.setattr(ladder, "load", lambda name: f"{name} is not here")
    lines, fine = doctor.report()
    assert fine and "backend cpu         no: cpu is not here" in lines and "backend triton      no: triton is not here" in lines


def test_doctor_fails_when_a_kernel_is_wrong(monkeypatch):
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    monkeypatch.setattr(doctor, "worst_error", lambda name: 1e6)
    lines, fine = doctor.report()
    assert not fine and any("WRONG: largest error 1000000.0 roundings" in line for line in lines)


def test_doctor_says_what_a_report_of_a_bug_needs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(doctor, "commit", lambda: "0123456789abcdef")
    said = dict(line.split(maxsplit=1) for line in doctor.report()[0] if not line.startswith(("backend", "data")))
    assert said["largemargin"] == f"{__version__}, commit 0123456789"
    assert said["Python"] == platform.python_version()
    assert said["torch"].startswith(f"{torch.__version__}, built ")
    assert said["threads"] == f"{torch.get_num_threads()} on {os.cpu_count()} processors, OMP_NUM_THREADS=2"
    assert platform.machine() in said["processor"] and "GPU" in said


def test_an_installed_package_has_no_commit(monkeypatch):
    monkeypatch.setattr(doctor, "commit", lambda: "unknown")
    assert doctor.report()[0][0].split() == ["largemargin", __version__]


def broken() -> list[str]:
    lines, fine = doctor.report()
    assert fine
    return [line.removeprefix("cannot be imported").strip() for line in lines if line.startswith("cannot be imported")]


def test_doctor_sees_a_torchvision_of_another_torch_and_whom_it_takes_along(packages):
    packages("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    packages("pytorch-lightning", "import torchvision")
    packages("ray", "")
    assert broken() == [
        "torchvision, pytorch-lightning: RuntimeError: operator torchvision::nms does not exist; torchvision belongs to another torch: "
        "install both from the same index, at versions made for each other"
    ]


def test_doctor_sees_any_package_that_cannot_be_imported(packages):
    packages("accelerate", "")
    packages("timm", "print('hello')\nraise ImportError('cannot import name x')")
    packages("skorch", "import os\nos.abort()")
    assert broken() == [
        "timm: ImportError: cannot import name x; the likely fix: pip install --force-reinstall timm",
        "skorch: the import ends Python; the likely fix: pip install --force-reinstall skorch",
    ]


def test_doctor_is_silent_about_what_can_be_imported_or_is_not_there(packages, monkeypatch):
    packages("ray", "import warnings\nwarnings.warn('old')")
    monkeypatch.setattr(doctor, "BESIDE", (*doctor.BESIDE, "no-such-package"))
    assert broken() == []


def test_doctor_tells_versions_without_importing_what_has_them(packages, monkeypatch):
    monkeypatch.setattr(doctor, "BESIDE", ("numpy", "lightning", "timm"))
    versions = {"timm": "1.0.20", "lightning": "2.5.0"}

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)
    assert doctor.versions_beside() == {"lightning": "2.5.0", "timm": "1.0.20"}
    versions.clear()
    assert doctor.versions_beside() == {}


def test_doctor_lists_gpus_with_their_memory(monkeypatch):
    class Properties:
        name, total_memory = "NVIDIA H100 80GB HBM3", 79 * 2**30

    class Device:
        get_device_properties = staticmethod(lambda index: Properties)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Device)
    assert doctor.gpus() == ["NVIDIA H100 80GB HBM3, 79 GiB"] * 2
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    assert doctor.gpus() == ["mps"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert doctor.gpus() == ["none that torch can use"]


def test_doctor_lists_the_data_sets_under_data(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert doctor.report()[0][-1] == "data in ./data      none"
    for folder in ("svhn", "cifar-100-python", "cifar-10-batches-py.part"):
        Path("data", folder).mkdir(parents=True)
    assert doctor.report()[0][-1] == "data in ./data      cifar100, svhn"


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="the folders' names are torchvision's")
def test_the_folders_are_those_that_the_lab_reads():
    from largemargin.lab.data import ARCHIVED, SETS
    from largemargin.lab.data.archives import archives_of

    for data in ARCHIVED:
        assert {name.split("/")[0] for archive in archives_of(data) for name, _ in archive.members} == {SETS[data].folder}


def test_doctor_hides_the_name_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.setattr(ladder, "load", lambda name: f"{tmp_path / 'lib' / name} could not be loaded")
    said = "\n".join(doctor.report()[0])
    assert str(tmp_path) not in said and f"no: {Path('~', 'lib', 'cpu')} could not" in said


def test_doctor_needs_none_of_the_lab():
    code = """
import importlib.util, sys
lab = ("jsonargparse", "rich", "sklearn", "scipy", "matplotlib", "jinja2", "torchvision", "PIL")
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in lab else found(name, *rest)
heavy = ("torchvision", "transformers", "lightning", "timm", "skorch", "ray", "accelerate")
from largemargin.lab import doctor
from largemargin.lab.cli import main
doctor.BESIDE = ("torchvision",)
status = main(["doctor"])
assert not {*lab, *heavy} & set(sys.modules)
sys.exit(status)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "backend cpu" in done.stdout and "no: pip install 'largemargin[lab]'" in done.stdout
