"""The example of fine-tuning a network of timm: weights and folder of its own making, then a comparison."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "finetune_timm.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm, which is not installed")
def test_it_fine_tunes_from_the_weights_it_made(tmp_path):
    done = subprocess.run([sys.executable, str(EXAMPLE), str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "large margin λ=0.3" in done.stdout and (tmp_path / "compared" / "report.html").is_file()
    records = [json.loads(path.read_text()) for path in (tmp_path / "compared" / "runs").glob("*/result.json")]
    assert sorted((record["recipe"]["loss"], record["recipe"]["seed"]) for record in records) == [
        ("large_margin", 0),
        ("large_margin", 1),
        ("large_margin", 2),
        ("softmax", 0),
        ("softmax", 1),
        ("softmax", 2),
    ]
    assert len({record["recipe"]["weights_digest"] for record in records} - {""}) == 1
    assert all(record["test"]["error"] < 20 for record in records)  # of five classes, 80 is chance
