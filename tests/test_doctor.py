"""The command that says who computes."""

import subprocess
import sys

import pytest

from largemargin import doctor
from largemargin._backends import cpu, ladder


def test_doctor_names_every_backend_and_checks_it(capsys):
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert "backend reference" in said
    assert ("right: off by" in said) == (not isinstance(ladder.load("cpu"), str))


def test_doctor_says_why_a_backend_is_not_there(monkeypatch):
    monkeypatch.setattr(ladder, "load", lambda name: f"{name} is not here")
    lines, fine = doctor.report()
    assert fine and "backend cpu         no: cpu is not here" in lines and "backend triton      no: triton is not here" in lines


def test_doctor_fails_when_a_kernel_is_wrong(monkeypatch):
    if cpu.why_not():
        pytest.skip(cpu.why_not())
    monkeypatch.setattr(doctor, "worst_error", lambda name: 1e6)
    lines, fine = doctor.report()
    assert not fine and any("WRONG: off by 1000000.0 roundings" in line for line in lines)


def test_doctor_needs_none_of_the_lab():
    code = """
import importlib.util, sys
lab = ("jsonargparse", "rich", "sklearn", "scipy", "matplotlib", "jinja2", "torchvision", "PIL")
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in lab else found(name, *rest)
from largemargin.lab.cli import main
status = main(["doctor"])
assert not set(lab) & set(sys.modules)
sys.exit(status)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "backend cpu" in done.stdout and 'no: pip install "largemargin[lab]"' in done.stdout
