"""The README and docs/: every Python block runs, every name and test they mention is there."""

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import forked
import largemargin
from combinations import every
from largemargin.lab._torchvision import import_torchvision
from largemargin.lab.arguments.parsers import COMMANDS, build_parser
from row_losses import OTHERS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FRAMEWORKS = {"transformers", "accelerate", "lightning", "skorch", "sklearn", "timm", "torchmetrics", "trl", "fastai", "monai", "keras"}
FRAMEWORKS |= {"sentence_transformers", "opacus"}


def name_of(page):
    return str(page.relative_to(ROOT))


def python_blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def commands_on(page):
    """What follows ``largemargin`` in the commands of a page, in blocks and in the text; not where words are to be filled in."""
    text = page.read_text().replace("\\\n", "")
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`(largemargin [^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    inline = [" ".join(code.split()) for code in inline if not re.search(r"\.\.\.|[A-Z]{3}|--help", code)]
    lines = [line for block in blocks for line in block.splitlines()] + inline
    return [match[1] for line in lines if (match := re.match(r"(?:torchrun .* -m )?largemargin (.*)", line))]


@pytest.mark.parametrize("page", [page for page in PAGES if commands_on(page)], ids=name_of)
def test_every_command_is_understood(page):
    parser = build_parser()
    for command in commands_on(page):
        words = shlex.split(command, comments=True)
        assert words[0] in COMMANDS
        if len(words) > 2 or command.startswith("reproduce "):  # shorter ones are names of commands
            parser.parse_args(words)


def missing(error):
    """The framework that an import did not find, or None."""
    names = (getattr(each, "name", None) or "" for each in (error, error.__cause__))
    return next((name for name in names if name.partition(".")[0] in FRAMEWORKS), None)


@pytest.mark.filterwarnings("ignore")  # of the frameworks
def test_the_integrations_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import_torchvision()  # which some of them import
    blocks = python_blocks(DOCS / "integrations.md")
    modules = {path.stem for path in (ROOT / "src/largemargin/integrations").glob("[a-z]*.py")}
    assert modules == set(re.findall(r"largemargin\.integrations\.(\w+)", "".join(blocks)))
    namespace: dict[str, Any] = {}
    not_here = []
    for block in blocks:
        try:
            exec(compile(block, "docs/integrations.md", "exec"), namespace)
        except ImportError as error:
            if missing(error) is None:
                raise
            not_here.append(missing(error))
    if not_here:
        pytest.skip(f"without {', '.join(not_here)}; the other blocks have run")


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page) and page.name != "integrations.md"], ids=name_of)
def test_every_python_block_runs(page, tmp_path, monkeypatch, forked_workers):  # each run of a comparison has a process of its own
    monkeypatch.chdir(tmp_path)  # some leave runs
    blocks = python_blocks(page)
    if any("distributed" in block for block in blocks):  # a process group is a matter of the whole process
        forked.assert_runs("\n".join(blocks))
        return
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)


def test_the_readme_mentions_the_commands_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"\bmake ([a-z-]+)\b(?=[`) ]| *#)", page.read_text())) <= targets, page


@every("page", PAGES)
def test_links_to_files_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)):
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


def test_the_losses_page_has_a_row_for_every_other_loss():
    rows = re.findall(r"^\| `(\w+)` \|", (DOCS / "losses.md").read_text(), re.MULTILINE)
    assert rows == [*(case.name for case in OTHERS), "two_way_multilabel"]


@pytest.mark.parametrize(("page", "count"), [("losses.md", 5), ("heads.md", 7)])
def test_every_loss_has_its_formula_gradient_pitfalls_and_source(page, count):
    sections = re.split(r"^## ", (DOCS / page).read_text(), flags=re.MULTILINE)
    described = [section for section in sections if "**Formula.**" in section]
    assert len(described) == count and "**Shapes.**" in sections[0]
    for section in described:
        assert re.findall(r"^\*\*(Formula|Gradient|Pitfalls|Source)\.\*\*", section, re.MULTILINE) == [
            "Formula",
            "Gradient",
            "Pitfalls",
            "Source",
        ]
        assert "```python" in section and "$$" in section


def test_every_example_is_listed():
    listed = re.findall(r"\]\(\.\./examples/(\w+)\.py\)", (DOCS / "examples.md").read_text())
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "examples").glob("*.py"))


def test_the_tests_that_pages_name_are_there():
    for page in PAGES:
        for file, name in re.findall(r"`(test_\w+)(?:\.(test_\w+))?`", page.read_text()):
            text = (ROOT / "tests" / f"{file}.py").read_text()
            assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), f"{page}: {file}.{name}"
