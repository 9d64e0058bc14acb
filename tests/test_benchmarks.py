"""The benchmarks that need a GPU run through without one: every line but those that ask the card itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_common  # noqa: E402
import gpu_training  # noqa: E402

# as far as the benchmarks use them
RIVALS = {
    "liger_kernel/transformers.py": """
import torch
from torch.nn import CrossEntropyLoss as LigerCrossEntropyLoss

class LigerFusedLinearCrossEntropyLoss:
    def __call__(self, classifier, features, target):
        return torch.nn.functional.cross_entropy(features @ classifier.t(), target)
""",
    "cut_cross_entropy/__init__.py": """
def linear_cross_entropy(features, classifier, target):
    raise RuntimeError("this kernel does not compile\\nhere")
""",
    "quack/cross_entropy.py": """
from torch.nn.functional import cross_entropy

def cross_entropy_fwd(logits, target, return_dx):
    return cross_entropy(logits, target), logits
""",
}


def run(script, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def rivals(tmp_path):
    """A folder for PYTHONPATH that has every rival."""
    for name, source in RIVALS.items():
        file = tmp_path / "rivals" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return str(tmp_path / "rivals")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_kernel_benchmark_runs_through(tmp_path, rivals):
    out = tmp_path / "kernels.json"
    run("gpu.py", "--self-test", "--out", str(out), PYTHONPATH=rivals)
    record = json.loads(out.read_text())
    assert record["finished"] and record["not installed"] == [] and record["commit"] and record["command"]
    for row in record["rows"]:
        assert not [name for name, found in row["contestants"].items() if "failed" in found]
        assert {"ours", "ours, graph", "ours, compiled", "Liger", "quack, gradient in backward", "quack, gradient in forward"} <= set(
            row["contestants"]
        )
        assert row["contestants"]["ours"]["launches"] == 1 and row["ours / copy bandwidth"] == 1.5


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_linear_benchmark_runs_through_and_a_rival_that_fails_is_recorded(tmp_path, rivals):
    out = tmp_path / "linear.json"
    run("gpu_linear.py", "--self-test", "--out", str(out), PYTHONPATH=rivals)
    record = json.loads(out.read_text())
    assert record["finished"] and record["not installed"] == []
    for row in record["rows"]:
        failed = {name: found["failed"] for name, found in row["contestants"].items() if "failed" in found}
        assert failed == {"cut-cross-entropy": "RuntimeError: this kernel does not compile"}
        assert row["ours / three products"] == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_training_benchmark_runs_through(tmp_path):
    out = tmp_path / "training.json"
    run("gpu_training.py", "--self-test", "--out", str(out))
    record = json.loads(out.read_text())
    assert record["finished"] and record["input alone, images/s"] > 0
    assert len(record["rows"]) == 3 * 2 * 2 and all(row["images/s"] > 0 for row in record["rows"])
    assert record["profile"]["busy"] == 1


def test_the_card_is_busy_while_any_kernel_runs():
    kernels = [gpu_common.Kernel("", *times) for times in ((0, 4), (1, 2), (3, 6), (8, 9))]
    assert gpu_training.busy(kernels) == 7


def test_a_contestant_that_fails_leaves_the_others_their_turns():
    calls = {"sound": 0, "tires": 0}

    def step(name):
        calls[name] += 1
        if name == "tires" and calls[name] == 2:
            raise MemoryError("after one step")

    def cannot_be_made():
        raise ImportError("no such rival")

    makers = {"absent": cannot_be_made, "tires": lambda: lambda: step("tires"), "sound": lambda: lambda: step("sound")}
    found = gpu_common.measure(makers, gpu_common.StandIn(), rounds=4, small=True)
    assert found["absent"] == {"failed": "ImportError: no such rival"}
    assert found["tires"] == {"failed": "MemoryError: after one step"} and calls["tires"] == 2
    assert calls["sound"] == gpu_common.WARM_UP + 4 + 3  # its memory, its steps in a row and its kernels
    assert found["sound"]["ms"] == found["sound"]["us back to back"] == 1


def test_an_interrupted_benchmark_leaves_what_it_has(tmp_path):
    record = gpu_common.Record(tmp_path / "gpu" / "kernels.json", "A claim.")
    record.write(rows=[1])
    found = json.loads(record.path.read_text())
    assert found["rows"] == [1] and found["finished"] is False
    record.write(rows=[1, 2])
    record.finish()
    found = json.loads(record.path.read_text())
    assert found["rows"] == [1, 2] and found["finished"] is True
    assert [path.name for path in record.path.parent.iterdir()] == ["kernels.json"]
