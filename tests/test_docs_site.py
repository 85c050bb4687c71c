"""The documentation site builds in strict mode, and every link, anchor and image of the built pages exists."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from yolov7_deploy import __all__ as public_names

ROOT = Path(__file__).parent.parent
NEEDED = ("mkdocs", "material", "mkdocstrings")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="the site needs: pip install 'yolov7-deploy[docs]'",
    ),
]


class Page(HTMLParser):
    """Links, sources and anchors of a built page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(value for name, value in values.items() if name == "id")
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        if "src" in values:
            self.loaded.add(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon"):
            self.loaded.add(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    """Every built page by its path."""
    return {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}


def target_of(page: Path, address: str) -> tuple[Path, str]:
    """Return the file and the anchor that a relative address of a page means."""
    parts = urlsplit(address)
    file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    return (file / "index.html" if file.is_dir() else file), unquote(parts.fragment)


def test_every_internal_link_and_anchor_exists(pages):
    broken = []
    for path, page in pages.items():
        for address in page.links:
            if urlsplit(address).scheme or address in ("", "#"):
                continue
            file, anchor = target_of(path, address)
            is_known = file.exists() if file not in pages else not anchor or anchor in pages[file].anchors
            if not is_known:
                broken.append(f"{path.parent.name}: {address}")
    assert broken == []


def test_everything_that_a_page_loads_is_part_of_the_site(pages):
    foreign = [address for page in pages.values() for address in page.loaded if urlsplit(address).scheme == "https"]
    assert foreign == []
    missing = [
        address for path, page in pages.items() for address in page.loaded if not target_of(path, address)[0].exists()
    ]
    assert missing == []


def test_the_python_reference_has_every_public_name(site, pages):
    anchors = pages[site / "api" / "index.html"].anchors
    assert {f"yolov7_deploy.{name}" for name in public_names if name != "__version__"} - anchors == set()


def test_files_outside_of_docs_are_pages(site):
    for name in ("security", "changelog", "contributing", "examples"):
        assert (site / name / "index.html").is_file()
