"""The web page is one file that loads nothing, and its script uses elements that exist."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from yolov7_deploy.serving.requests import PARAMETERS, ROUTES, read_page

MAX_BYTES = 32_000
VOID = {"meta", "link", "input", "br"}
PAGE = read_page()


class Elements(HTMLParser):
    """Collects elements with their attributes, and checks that they are closed in order."""

    def __init__(self):
        super().__init__()
        self.elements, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def elements():
    parser = Elements()
    parser.feed(PAGE)
    parser.close()
    assert parser.open == []
    return parser.elements


def test_the_page_is_small_and_loads_nothing(elements):
    assert len(PAGE.encode()) < MAX_BYTES
    assert not re.search(r"https?:|//[a-z]|@import|url\(|srcset", PAGE.replace("// ", ""))
    loaded = [(tag, a[key]) for tag, a in elements for key in ("src", "href", "action") if key in a]
    assert loaded == [("link", "data:,")]


def test_the_page_has_a_language_a_viewport_and_one_title(elements):
    assert ("html", {"lang": "en"}) in elements
    assert any(a.get("name") == "viewport" and "width=device-width" in a["content"] for _, a in elements)
    assert [tag for tag, _ in elements].count("h1") == 1


def test_every_control_has_a_label(elements):
    labelled = {a["for"] for tag, a in elements if tag == "label"}
    controls = [a for tag, a in elements if tag == "input"]
    assert len(controls) == 3
    assert all(a["id"] in labelled or a.get("aria-label") for a in controls)


def test_ids_are_unique_and_the_script_uses_only_these(elements):
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\bat\("([a-z-]+)"\)', PAGE)) <= set(ids)
    referenced = {a[key] for _, a in elements for key in ("for", "aria-labelledby") if key in a}
    assert referenced <= set(ids)


def test_the_page_has_both_colour_schemes():
    light, dark = (set(re.findall(r"--([a-z-]+):", text)) for text in PAGE.split("@media (prefers-color-scheme: dark)"))
    assert dark and dark <= light
    used = set(re.findall(r"var\(--([a-z-]+)\)", PAGE)) - {"colour"}
    assert used <= light


def test_the_page_calls_routes_that_exist_with_parameters_that_exist():
    assert {f"/{name}" for name in re.findall(r"base \+ \"(\w+)\"|base\}(\w+)", PAGE) for name in name if name} <= set(
        ROUTES
    )
    assert {"conf", "iou"} <= set(PARAMETERS)


def test_foreign_texts_are_never_parsed_as_html():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", PAGE)
