"""The example of a million classes, with fewer: it learns, goes on on another number of ranks, and ends when a rank dies."""

import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import distributed

pytestmark = pytest.mark.xdist_group("ranks")
EXAMPLE = Path(__file__).parent.parent / "examples" / "million_classes.py"


def started(ranks: int, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(EXAMPLE), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """As torchrun starts one rank, in this process; its threads are given back."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()

    def run(*options):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
        runpy.run_path(str(EXAMPLE), run_name="__main__")

    yield run
    torch.set_num_threads(threads)
    if distributed.is_initialized():  # where the example failed
        distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")  # which it means to replace
def test_it_finds_more_than_before_and_goes_on_on_other_ranks(alone, tmp_path, capsys):
    options = ["--num-classes=3001", "--steps=12", f"--checkpoint={tmp_path}"]
    outputs = [started(2, *options).communicate(timeout=120)[0]]
    alone(*options)
    outputs.append(capsys.readouterr().out)
    found = []
    for output in outputs:
        numbers = re.search(r"recall at 1 of 3001 classes: ([\d.]+)% before, ([\d.]+)% after", output)
        assert numbers, output
        found += [float(number) for number in numbers.groups()]
    assert found[0] < 1 and found[1] == found[2] and found[0] < 30 < found[1] < found[3]


@pytest.mark.slow  # test_sharded.py holds that the survivors end and say why
def test_when_a_rank_is_killed_the_others_end_and_it_is_named():
    process = started(2, "--num-classes=3001", "--steps=1000000")
    kill_if_silent = threading.Timer(60, process.terminate)
    kill_if_silent.start()
    said = line = process.stdout.readline()
    while line and "step 0:" not in said:
        line = process.stdout.readline()
        said += line
    kill_if_silent.cancel()
    named = re.search(r"rank 1 of 2: process (\d+)", said)  # not always at the start of a line: the ranks share one pipe
    assert named, said
    victim = int(named[1])
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)  # they do not wait for its answer until gloo gives up, after half an hour
    assert process.returncode != 0
    root_cause = output[output.index("Root Cause") :]
    assert re.search(r"rank +: 1 ", root_cause) and f"Signal 9 (SIGKILL) received by PID {victim}" in root_cause
