"""The README and docs/: every Python block runs, every name and test they mention is there."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import largemargin

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_every_python_block_runs(page):
    blocks = python_blocks(page)
    if any("distributed" in block for block in blocks):  # a process group is a matter of the whole process
        subprocess.run([sys.executable, "-c", "\n".join(blocks)], check=True, timeout=120)
        return
    namespace = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def test_the_readme_mentions_the_commands_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"\bmake ([a-z-]+)\b(?=[`) ]| *#)", page.read_text())) <= targets, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


def test_every_equation_has_a_name_in_the_code_and_a_test():
    rows = re.findall(r"^\| (\(\d+\)|Sec\. 3) \|(.*)\|$", (ROOT / "docs" / "maths.md").read_text(), re.MULTILINE)
    assert [number for number, _ in rows] == [f"({i})" for i in range(1, 16)] + ["Sec. 3"]
    for number, cells in rows:
        tests = re.findall(r"`(test_\w+)\.(test_\w+)`", cells)
        assert tests, number
        for file, name in tests:
            assert re.search(rf"^def {name}\(", (ROOT / "tests" / f"{file}.py").read_text(), re.MULTILINE), f"{file}.{name}"


def test_the_words_of_the_docs_are_the_words_of_the_code():
    maths = (ROOT / "docs" / "maths.md").read_text()
    assert set(re.findall(r'divergence\(stats, "(\w+)"\)', maths)) == {"symmetric", "kl_qu", "kl_uq"}
    stats = largemargin.row_stats(torch.tensor([1.0, 2.0, 4.0]), torch.tensor(0))
    e, a = stats.neg_entropy, stats.mean_log_q
    expected = {"symmetric": (e - a) / 2, "kl_qu": math.log(2) + e, "kl_uq": -math.log(2) - a}  # the formulas of that page
    for kind, value in expected.items():
        torch.testing.assert_close(largemargin.divergence(stats, kind), value)


def test_the_losses_of_a_line_are_those_of_their_papers(rng):
    page = {}
    for block in python_blocks(ROOT / "docs" / "losses.md"):
        exec(block, page)
    logits = 3 * torch.randn(50, 7, generator=rng, dtype=torch.float64)
    target, counts = torch.randint(7, (50,), generator=rng), torch.tensor([900.0, 400, 200, 100, 50, 20, 10], dtype=torch.float64)
    p, log_p = logits.softmax(1), logits.log_softmax(1)
    p_y, log_p_y = (value.gather(1, target.unsqueeze(1)).squeeze(1) for value in (p, log_p))
    cross_entropy = torch.nn.functional.cross_entropy
    margins = 0.5 * counts**-0.25 / (counts**-0.25).max()
    lowered = 30 * (logits.tanh() - margins * torch.nn.functional.one_hot(target, 7))
    expected = {
        "focal": ((), (-((1 - p_y) ** 2) * log_p_y).mean()),
        "poly1": ((), (-log_p_y + 2 * (1 - p_y)).mean()),
        "confidence_penalty": ((), (-log_p_y + 0.1 * (p * log_p).sum(1)).mean()),
        "logit_adjusted": ((counts,), cross_entropy(logits + (counts / counts.sum()).log(), target)),
        "ldam": ((counts,), cross_entropy(lowered, target)),
        "max_suppression": ((), cross_entropy(logits, target) + 0.1 * (logits.amax(1) - logits.mean(1)).mean()),
    }
    for name, (arguments, value) in expected.items():
        torch.testing.assert_close(
            page[name](logits.tanh() if name == "ldam" else logits, target, *arguments), value, rtol=1e-12, atol=1e-12
        )
