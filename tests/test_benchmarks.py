"""The benchmarks that need a GPU run through without one: every line but those that ask the card itself."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_all  # noqa: E402
import gpu_common  # noqa: E402
import gpu_page  # noqa: E402
import gpu_summary  # noqa: E402
import gpu_training  # noqa: E402

from largemargin.lab.data import human_labels  # noqa: E402

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
        timeout=600,
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
@pytest.mark.timeout(600)
def test_the_kernel_benchmark_runs_through(tmp_path, rivals):
    out = tmp_path / "kernels.json"
    run("gpu.py", "--self-test", "--out", str(out), PYTHONPATH=rivals)
    record = json.loads(out.read_text())
    assert record["finished"] and record["not installed"] == [] and record["commit"] and record["command"]
    rivals_of = {"indices": {"Liger", "quack, gradient in backward", "quack, gradient in forward"}, "probabilities": {"reference"}}
    assert {row["target"] for row in record["rows"]} == set(rivals_of)
    for row in record["rows"]:
        assert not [name for name, found in row["contestants"].items() if "failed" in found]
        assert {"ours", "ours, graph", "ours, compiled", *rivals_of[row["target"]]} <= set(row["contestants"])
        touches = 3 if row["target"] == "indices" else 5
        assert row["contestants"]["ours"]["launches"] == 1 and row["ours / copy bandwidth"] == touches / 2


@pytest.mark.slow
@pytest.mark.timeout(600)
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
@pytest.mark.timeout(600)
def test_the_training_benchmark_runs_through(tmp_path):
    out = tmp_path / "training.json"
    run("gpu_training.py", "--self-test", "--out", str(out))
    record = json.loads(out.read_text())
    assert record["finished"] and record["input alone, images/s"] > 0
    assert len(record["rows"]) == len(gpu_training.WORK.cases) * 2 * 2 and all(row["images/s"] > 0 for row in record["rows"])
    assert record["profile"]["busy"] == 1


def test_the_card_is_busy_while_any_kernel_runs():
    kernels = [gpu_common.Kernel("", *times) for times in ((0, 4), (1, 2), (3, 6), (8, 9))]
    assert gpu_training.busy(kernels) == 7


class Blind(gpu_common.StandIn):
    """A card that cannot be profiled."""

    def kernels(self, step):
        raise RuntimeError("no profiler")


def test_a_run_that_fails_is_said_in_its_row_and_holds_nobody_up():
    work = dataclasses.replace(gpu_training.TINY, at_once=1)
    good = work.cases[0]
    bad = good._replace(recipe=dataclasses.replace(good.recipe, network="nosuch"))
    rates = [rate for case in (bad, good) for _, rate in gpu_training.turns(0, case, True, work, Blind(), multiprocessing.Barrier(1))]
    rows = [gpu_training.row_of(good, True, 2, [1000.0, rate]) for rate in rates]
    assert "nosuch" in rows[0]["failed"] and "images/s" not in rows[0]
    assert rows[1]["images/s"] > 1000 and "failed" not in rows[1]
    assert gpu_training.profile(good, Blind(), 2) == {"failed": "RuntimeError: no profiler"}


OF_EVERY_KIND = """
import pytest

@pytest.fixture
def device(): return "cpu"

def test_of_the_device_passes(device): pass
def test_of_the_device_fails(device): assert device == "cuda"
def test_of_the_device_errs(device, no_such_fixture): pass
@pytest.mark.skipif(True, reason="needs a GPU")
def test_of_gpus_alone(): pass
def test_of_something_else(): assert False
"""


def test_the_tests_of_the_device_are_chosen_and_the_failures_named(tmp_path):
    (tmp_path / "test_kinds.py").write_text(OF_EVERY_KIND)
    (tmp_path / "test_broken.py").write_text("import no_such_package")
    code = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu_common, gpu_tests, pathlib, pytest
listener = gpu_tests.Listener(gpu_common.Record(pathlib.Path("tests.json"), "Claim."))
status = pytest.main(["-c", "/dev/null", "--rootdir", ".", "-p", "no:cacheprovider", *gpu_tests.OPTIONS, "."], plugins=[listener])
listener.write()
"""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # whatever is installed here, and takes its time to import
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "tests.json").read_text())
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    assert found["failures"]["test_kinds.py::test_of_the_device_fails"].startswith("AssertionError: assert 'cpu' == 'cuda'")
    assert "test_kinds.py::test_of_the_device_errs" in found["failures"]
    assert found["not collected"] == {"test_broken.py": "ModuleNotFoundError: No module named 'no_such_package'"}


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
    assert found["sound"]["ms"] == found["sound"]["us back to back"] == found["sound"]["launches"] == 1
    blind = gpu_common.measure({"sound": lambda: lambda: None}, Blind(), rounds=4, small=True)["sound"]
    assert blind["ms"] == 1 and blind["failed"] == "RuntimeError: no profiler" and "launches" not in blind


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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parts_run_in_one_command_and_are_kept_by_the_next(tmp_path):
    said = run("gpu_all.py", "--self-test", "--out", str(tmp_path))
    assert [name for name in ("tests", "kernels", "linear", "training", "cifar100") if f"\n{name}: done" not in said] == []
    records = gpu_summary.load(tmp_path / "gpu")
    assert sorted(records) == sorted(gpu_summary.RECORDS) and all(record["finished"] for record in records.values())
    assert "busy 100% of the time" in gpu_page.section(records)
    said = run("gpu_all.py", "--self-test", "--out", str(tmp_path))
    assert said.count(": kept, of 20") == 4 and said.count("measures it anew") == 4


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Let the parts be small scripts: by name, their code."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def replace(**codes):
        monkeypatch.setattr(gpu_all, "PARTS", tuple(gpu_all.Part(name, 1, ()) for name in codes))
        monkeypatch.setattr(gpu_all, "command", lambda part, limit, options: [sys.executable, "-c", codes[part.name]])
        monkeypatch.setattr(gpu_all, "LEAST", 0.0)
        monkeypatch.setattr(gpu_all, "GRACE", 10.0)
        monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--out", str(tmp_path), "--minutes", "0.3"])

    yield replace
    for number, handler in before.items():
        signal.signal(number, handler)


WAITS = """
import pathlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    pathlib.Path(OUT, "begun").touch()
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(OUT, "kept").touch()
"""


def test_a_part_that_crashes_or_hangs_leaves_the_others_theirs(parts, tmp_path, capsys):
    parts(tests="raise MemoryError('of the card')", kernels=f"OUT = {str(tmp_path)!r}\n{WAITS}", linear="print('fine')")
    assert gpu_all.main() == 1
    said = capsys.readouterr().out
    assert "s: MemoryError: of the card" in said and "kernels: stopped after" in said and "linear: done in" in said
    assert (tmp_path / "kept").is_file()


def test_an_interrupt_ends_the_parts_and_leaves_the_table(parts, tmp_path, capsys):
    parts(tests=f"OUT = {str(tmp_path)!r}\n{WAITS}", kernels="print('never')")

    def interrupt():
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert gpu_all.main() == 130
    assert (tmp_path / "kept").is_file()
    said = capsys.readouterr().out
    assert "tests: interrupted" in said and "one run" in said and "kernels: " not in said


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    options = argparse.Namespace(out=tmp_path, again=[])
    part = gpu_all.Part("cifar100", 1, ("torch", "no_such_package"))
    assert gpu_all.do(part, (part,), 1e9, options, {}).startswith("left out, it needs no_such_package: put wheels into wheels/")


def test_human_labels_are_a_part_where_they_were_fetched(monkeypatch, tmp_path):
    options = argparse.Namespace(out=tmp_path / "out", again=[], data_root=tmp_path, self_test=False)
    part = next(part for part in gpu_all.PARTS if part.name == "human")
    assert gpu_all.do(part, (part,), 1e9, options, {}).startswith("skipped, --data-root has no cifar-100n")
    tests, limits = gpu_all.PARTS[0], []
    monkeypatch.setattr(gpu_all, "command", lambda part, limit, options: limits.append(limit))
    monkeypatch.setattr(gpu_all, "run", lambda *_: None)
    for left in ((tests,), (tests, part)):  # what is skipped takes no time from the others
        gpu_all.do(tests, left, time.monotonic() + 1000, options, {})
    assert limits[1] == pytest.approx(limits[0], rel=1e-2)
    monkeypatch.undo()
    (tmp_path / human_labels.FILE).parent.mkdir()
    (tmp_path / human_labels.FILE).touch()
    asked: list[list[str]] = []

    def run(words, *_):
        asked.append(words)
        return 0

    monkeypatch.setattr(gpu_all, "run", run)
    outcome = gpu_all.do(part, (part,), time.monotonic() + 1000, options, {})
    assert outcome.startswith("12 of 12 runs are left") and asked[0][2:5] == ["largemargin", "reproduce", "human"]


def test_wheels_are_unpacked_where_their_packages_are_not_installed(monkeypatch, tmp_path):
    (tmp_path / "wheels").mkdir()
    for name in ("torch", "no_such_package"):
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
    monkeypatch.setattr(gpu_all, "ROOT", tmp_path)
    with gpu_all.environment() as variables:
        source, unpacked, *_ = variables["PYTHONPATH"].split(os.pathsep)
        assert source == str(tmp_path / "src") and os.listdir(unpacked) == ["no_such_package"]
        assert gpu_all.importlib.util.find_spec("no_such_package")
    assert not os.path.exists(unpacked)


MEASURED: dict[str, dict[str, Any]] = {
    "tests": {"passed": 1234, "failed": 61, "not collected": {}, "failures": {f"tests/test_a.py::test_{i}": "" for i in range(61)}},
    "kernels": {
        "not installed": ["quack"],
        "rows": [
            {"shape": [8192, 32000], "dtype": "bfloat16", "ours / copy bandwidth": 0.86, "contestants": {}},
            {"shape": [8192, 128256], "dtype": "bfloat16", "ours / copy bandwidth": 0.84, "contestants": {}},
            {"shape": [4096, 1000], "dtype": "float32", "contestants": {"ours": {"us back to back": 60.0, "launches": 3}}},
            {"shape": [128, 100], "dtype": "bfloat16", "contestants": {"ours": {"us back to back": 120.4, "launches": 12}}},
            {"shape": [128, 100], "dtype": "float32", "contestants": {"ours": {"failed": "RuntimeError"}}},
            {
                "shape": [4096, 1000],
                "dtype": "float32",
                "target": "probabilities",
                "contestants": {"ours": {"us back to back": 70.0, "launches": 5}},
            },
        ],
    },
    "linear": {
        "rows": [{"rows, width, classes": [4096, 512, 1_000_000], "ours / three products": 1.58, "bound / ours": 0.9, "contestants": {}}]
    },
    "training": {
        "rows": [
            {"case": "bfloat16, channels last", "graph": True, "at once": 1, "images/s": 61_234.0},
            {"case": "bfloat16, channels last", "graph": True, "at once": 4, "images/s": 71_234.0},
            {"case": "bfloat16, channels last", "graph": False, "at once": 4, "failed": "OutOfMemoryError"},
        ]
    },
}


def test_the_table_says_what_was_reached_in_the_space_of_a_terminal(tmp_path):
    for name, record in MEASURED.items():
        path = tmp_path / "gpu" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"finished": name != "tests", "machine": {"gpu": "NVIDIA H200", "torch": "2.11.0"}, **record}))
    lines = gpu_all.summary(argparse.Namespace(out=tmp_path), {"cifar100": "failed after 3 s: " + 100 * "x"})
    assert len(lines) == 23 and max(map(len, lines)) <= 80 and "NVIDIA H200" in lines[0]
    found = {line[:27].strip(): line[27:].split("  ") for line in lines}
    said = {name: (cells[0].strip(), cells[-1].strip()) for name, cells in found.items()}
    assert said["tests of the device"] == ("1234 passed, 61 failed so far", "MISSED")
    assert said["8192x32000 bfloat16"] == ("86% of copy bandwidth", "reached")
    assert said["8192x128256 bfloat16"] == ("84% of copy bandwidth", "MISSED")
    assert said["4096x1000 float32, eager"] == ("60 us, 3 launches", "reached")
    assert said["128x100 bfloat16, eager"] == ("120 us, 12 launches", "MISSED")
    assert said["128x100 float32, eager"] == ("not measured", "60 us")
    assert said["4096x1000 float32, soft"] == ("70 us, 5 launches", "MISSED")
    assert said["4096x1000 bfloat16, soft"] == ("not measured", "4 launches")
    assert said["linear 4096x512x1000000"] == ("1.58 products, 90% of bound", "MISSED")
    assert said["13-layer network, one run"] == ("61,234 images/s", "reached")
    assert said["13-layer network, several"][0] == "71,234 images/s, 4 at once"
    assert said["CIFAR-100, Table 2"] == ("0 runs", "MISSED")
    assert lines[-1].startswith("and ") and any(line.startswith("cifar100: failed after 3 s") for line in lines)


def test_the_page_shows_what_was_measured_and_the_errors_of_what_failed():
    common = {"finished": True, "claim": "Claim.", "date": "2026-01-01T", "commit": 40 * "a"}
    machine = {"gpu": "NVIDIA H200", "processor": "", "threads": 1, "torch": "2.11.0", "python": "3.12"}
    added = {"copy GB/s": 3000.0, "input alone, images/s": 1e6}
    ours = {
        "ours": {"ms": 1.5, "MiB beside inputs and gradients": 500, "us back to back": 59.4, "launches": 3},
        "Liger": {"failed": "OutOfMemoryError: of 80 GB"},
    }
    rows = [{**row, "contestants": ours} for row in MEASURED["kernels"]["rows"]]
    records = {name: {**common, **added, "machine": machine, **record} for name, record in MEASURED.items()}
    records["kernels"] |= {"rows": rows, "finished": False}
    page = gpu_page.section(records)
    assert "| 13-layer network, one run | 61,234 images/s | 60,000/s | reached |" in page
    assert (
        f"| ours |{6 * ' 1.5 (500) |'}" in page
        and f"| Liger |{6 * ' OutOfMemoryError |'}" in page
        and f"| ours |{6 * ' 59.4, 3 |'}" in page
    )
    assert "| bfloat16, channels last | graph | 61,234 | 71,234 |" in page
    assert "| bfloat16, channels last | eager | – | OutOfMemoryError |" in page
    assert page.count("was stopped before its end") == 1 and page.count("Not installed: quack.") == 1
    assert "has not been timed" not in page and "has not been timed" in gpu_page.section({})


def test_the_page_of_the_cpu_has_the_script_that_training_is_compared_with_and_every_shape_that_is_slower():
    report = pytest.importorskip("report", reason="needs matplotlib", exc_type=ImportError)
    names = ("the script, 0 workers", "the script, 2 workers", "the lab, float32, channels last")
    rates = {name: {"images per second": 30.0, "times the script": 1.0} for name in names}
    for compared, other in (names[:2], names[1::-1]):
        page = report.training_page({"input alone": {}, "training": rates, "compared with": compared})
        assert f"| {compared} |" in page and f"| {names[2]} |" in page and other not in page
    ratios = {(32, 10): 1.4, (256, 1000): 0.8, (512, 10): 0.8}
    calls = {shape: {way: {"ratio": ratio} for way in report.WAYS} for shape, ratio in ratios.items()}
    calls[256, 1000]["ours, reduction none"] = {"ratio": 1.1}
    plain, other = report.slower_page({"rows": [{"shape": shape, "against F.cross_entropy": of} for shape, of in calls.items()]}).split(
        "\n"
    )
    assert "32×10" in plain and "256×1000" not in plain
    assert "256×1000" in other and "32×10" not in other and "512×10" not in other


def test_without_any_record_the_table_says_that_nothing_was_measured(tmp_path):
    lines = gpu_all.summary(argparse.Namespace(out=tmp_path), {})
    assert len(lines) <= 23 and sum("not measured" in line for line in lines) == len(gpu_summary.figures({}))
