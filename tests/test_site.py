"""The documentation site: it is built without a warning, needs no network, and nothing on it leads nowhere."""

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import largemargin
from largemargin import heads

pytest.importorskip("mkdocs", reason="needs mkdocs-material, which is not installed")
pytest.importorskip("material")

pytestmark = pytest.mark.xdist_group("site")  # one worker builds it
ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "image": "href", "use": "href"}


class Page(HTMLParser):
    """The ids, links and loaded resources of a page, and the words of its article that are no code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[Any] = set()
        self.links: list[Any] = []
        self.loads: list[Any] = []
        self.tags: list[Any] = []
        self.words: list[Any] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids.update(value for name in ("id", "name") if (value := found.get(name)))
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag in LOADS and found.get(LOADS[tag]):
            self.loads.append(found[LOADS[tag]])
        if tag in ("article", "code", "pre", "script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if self._inside == ["article"]:
            self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    # no proxy leads anywhere: whoever would load something fails
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment = {**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_page_of_docs_is_built(site, pages):
    built = {path.relative_to(site).with_suffix("").as_posix() for path in pages}
    assert {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.rglob("*.md")} | {"404"} == built


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert [load for load in page.loads if urlsplit(load).scheme not in ("", "data") or load.startswith("//")] == [], path
        assert not re.search(r"<style[^>]*>[^<]*(?:@import|url\(\s*[\"']?(?:https?:)?//)", path.read_text()), path
    sheets = list(site.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        assert not re.search(r"@import|url\(\s*(?![\"']?(?:data:|#))", sheet.read_text()), sheet


def test_internal_links_and_resources_resolve(site, pages):
    for path, page in pages.items():
        for link in [*page.links, *page.loads]:
            address = urlsplit(link)
            if address.scheme or path.name == "404.html":  # whose links begin at the root of a server
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(site)}: {link}"
            if address.fragment and target in pages:
                assert unquote(address.fragment) in {*pages[target].ids, "__search"}, f"{path.relative_to(site)}: {link}"


def test_formulas_are_mathml(site, pages):
    for path, page in pages.items():
        words = " ".join(page.words)
        assert not re.search(r"\$|\\[a-zA-Z(\[]|:math:|:func:|\.\. math::", words), path
    for source in DOCS.rglob("*.md"):
        if "::: " not in source.read_text():
            text = re.sub(r"^```.*?^```|`[^`\n]+`", "", source.read_text(), flags=re.MULTILINE | re.DOTALL)
            formulas = re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text, re.DOTALL)
            built = pages[site / source.relative_to(DOCS).with_suffix(".html")]
            assert built.tags.count("math") == len(formulas), source
    assert pages[site / "api.html"].tags.count("math") > 40


def test_every_public_name_is_on_the_page_of_the_api(site, pages):
    ids = pages[site / "api.html"].ids
    assert {f"largemargin.{name}" for name in largemargin.__all__} <= ids
    assert {f"largemargin.heads.{name}" for name in heads.__all__} <= ids
    for module in (largemargin.metrics, largemargin.schedules):
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__ and name[0] != "_"}
        assert {f"{module.__name__}.{name}" for name in own - {"check_schedule"}} <= ids


def test_the_search_has_every_page(site):
    index = (site / "search" / "search_index.js").read_text()  # read by a script tag, so that it works from file:// too
    for word in ("L-Softmax", "fuse_large_margin_loss", "weights_only"):
        assert word in index


def test_the_menu_has_five_groups_and_every_page(site, pages):
    text = (site / "index.html").read_text()
    assert len(re.findall(r'<li class="md-tabs__item', text)) == 5
    home = {(site / urlsplit(link).path).resolve() for link in pages[site / "index.html"].links if not urlsplit(link).scheme}
    assert {path for path in pages if path.name != "404.html"} <= home


def test_pages_have_a_dark_palette_and_code_can_be_copied(site):
    text = (site / "index.html").read_text()
    assert {"default", "slate"} == set(re.findall(r'data-md-color-scheme="(\w+)" data-md-color-primary', text.partition("<form")[2]))
    assert '"content.code.copy"' in text


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium), which is not installed")
def test_no_page_is_wider_than_a_phone(site, tmp_path):
    # one page has all others in frames of the width of a phone, and writes down those that are wider
    names = sorted(path.name for path in site.glob("*.html") if path.name != "404.html")
    frames = "".join(f'<iframe src="{name}" width="390" height="844"></iframe>' for name in names)
    probe = """<script>addEventListener("load", () => {
      const frames = [...document.querySelectorAll("iframe")];
      const wide = frames.filter(frame => frame.contentDocument.documentElement.scrollWidth > 390);
      document.body.dataset.probe = [frames.length, ...wide.map(frame => frame.getAttribute("src"))].join();
    });</script>"""
    page = site / "phone_probe.html"
    page.write_text(f"<!doctype html><title>probe</title><body>{frames}{probe}</body>")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--allow-file-access-from-files"]
    command += ["--disable-background-networking", f"--user-data-dir={tmp_path}", "--dump-dom", page.as_uri()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    finally:
        page.unlink()
    found = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert found and found[1] == str(len(names)), done.stdout[-300:] + done.stderr[-300:]
