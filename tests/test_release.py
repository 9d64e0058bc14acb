"""`make release` refuses what must not be released."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / ".ci" / "release-check"
CHANGELOG = "# Changelog\n\n## Unreleased\n\n## 1.2.0 - 2030-01-31\n\n### Added\n\n- A loss.\n\n## 1.1.0 - 2029-12-31\n\n- A head.\n"
pytestmark = [
    pytest.mark.skipif(not SCRIPT.exists(), reason="the source distribution has no .ci"),
    pytest.mark.skipif(shutil.which("git") is None, reason="needs git"),
]


class Tree:
    """A repository that can be released, until a test changes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in (".ci", "src/largemargin"):
            (root / folder).mkdir(parents=True)
        shutil.copy(SCRIPT, root / ".ci")
        self.git("init", "--quiet")
        self.write('__version__ = "1.2.0"\n', CHANGELOG)

    def git(self, *words: str) -> None:
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        subprocess.run(["git", *who, *words], cwd=self.root, check=True, capture_output=True)

    def write(self, version: str, changelog: str) -> None:
        (self.root / "src/largemargin/__init__.py").write_text(version)
        (self.root / "CHANGELOG.md").write_text(changelog)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "a commit")

    def check(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.root / ".ci/release-check"], capture_output=True, text=True)

    def refusal(self) -> str:
        done = self.check()
        assert done.returncode == 1 and not done.stdout, done
        return done.stderr


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_a_clean_tree_with_a_written_changelog_is_released(tree):
    done = tree.check()
    assert (done.returncode, done.stdout) == (0, "1.2.0\n"), done.stderr


@pytest.mark.parametrize("name", ["CHANGELOG.md", "new_file.py"])
def test_an_unclean_tree_is_refused(tree, name):
    with (tree.root / name).open("a") as file:
        file.write("\n")
    assert "git status shows changes" in tree.refusal()


def test_a_version_without_a_section_is_refused(tree):
    tree.write('__version__ = "1.3.0"\n', CHANGELOG)
    assert "no heading '## 1.3.0 - YYYY-MM-DD'" in tree.refusal()


def test_a_section_without_a_date_is_refused(tree):
    tree.write('__version__ = "1.2.0"\n', CHANGELOG.replace(" - 2030-01-31", ""))
    assert "no heading" in tree.refusal()


def test_an_empty_section_is_refused(tree):
    tree.write('__version__ = "1.2.0"\n', CHANGELOG.replace("- A loss.\n", ""))
    assert "the section of 1.2.0 in CHANGELOG.md lists no change" in tree.refusal()


def test_a_development_version_is_refused(tree):
    tree.write('__version__ = "1.2.0.dev0"\n', CHANGELOG)
    assert "'1.2.0.dev0'" in tree.refusal()


def test_a_tag_is_of_its_version_and_of_one_commit(tree):
    tree.git("tag", "v1.2.0")
    assert tree.check().returncode == 0
    tree.git("tag", "v1.3.0")
    assert "this commit has the tag v1.3.0" in tree.refusal()
    tree.git("tag", "--delete", "v1.3.0")
    tree.write('__version__ = "1.2.0"\n', CHANGELOG + "- More.\n")
    assert "the tag v1.2.0 is on another commit" in tree.refusal()


def test_make_release_begins_with_the_check():
    rules = (ROOT / "Makefile").read_text()
    assert "\nrelease: release-check " in rules and "\n\t.ci/release-check\n" in rules
