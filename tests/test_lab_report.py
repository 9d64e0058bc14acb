"""The page ``report.html``: whole in itself, and right in a browser."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from largemargin.lab import cli

pytest.importorskip("jsonargparse", reason="needs jsonargparse, which is not installed, for the command line")

pytestmark = pytest.mark.xdist_group("report")  # one worker makes the page
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    assert cli.main(["compare", "--seeds", "0", "1", "--epochs", "2", "--label-noise", "0", "0.3", "--out", str(out)]) == 0
    return out / "report.html"


def test_the_page_needs_nothing_from_outside(page):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!#|data:image/)', text)
    assert not re.findall(r"@import|url\((?!#)", text)
    assert "<script" not in text


def test_the_page_holds_the_table_and_every_figure(page):
    text = page.read_text()
    assert text.count("<svg") == 11  # the overview, and for each share of noise three figures, classes and calibration
    for words in ("label smoothing ε=0.1", "large margin λ=0.3", "minus softmax [95%]", "Learning curves", "log(C − 1)", "seeds"):
        assert words in text
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL).lower()


def test_tags_are_closed_in_order(page):
    class Checker(HTMLParser):
        void = frozenset({"meta", "br", "img", "link", "hr", "input"})

        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            if tag not in self.void:
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(page.read_text())
    assert not checker.open


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium), which is not installed")
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_renders_in_a_browser_without_console_errors(page, width, tmp_path):
    # the page itself has no script: this copy measures what was laid out and writes it where --dump-dom shows it
    probe = """<script>
      const svgs = [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
      const seen = svgs.filter(box => box.width > 200 && box.height > 80).length;
      const fits = document.documentElement.scrollWidth <= innerWidth;
      document.body.dataset.probe = [seen, fits, document.querySelectorAll("table:not(.words) tbody tr").length].join();
    </script></body>"""
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", probe))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-sync",
    ]
    command += [
        "--disable-component-update",
        "--enable-logging=stderr",
        f"--window-size={width},1600",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    done = subprocess.run([*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found and found.group(1) == "11,true,6"  # every figure has a size, nothing sticks out sideways, every row is there
