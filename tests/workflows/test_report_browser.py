"""The page of a deployment report in a browser: it loads, prints and reads well, and names stay names.

Needs the Python package playwright, and Chromium as an executable (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import pytest

from tests.support.browser import CHROMIUM, CONTRAST, SIZES, open_browser
from tests.support.report_files import CLASS, IMAGE, SIZE, swap_channels, write_hostile_shapes
from yolov7_deploy import export, report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A report of a right and of a wrong file in every installed runtime, with measured speeds."""
    folder = tmp_path_factory.mktemp("browser")
    data = write_hostile_shapes(folder / "shapes", images=6)
    export("yolov7-tiny-shapes", folder / "good.onnx", img=SIZE, verify=False)
    swap_channels(folder / "good.onnx", folder / "swapped.onnx")
    files = [folder / "good.onnx", folder / "swapped.onnx"]
    return report("yolov7-tiny-shapes", files, data, folder / "report.html", stage_limit=2, duration_s=0.1)


def open_page(browser, result, *, size="desktop", scheme="light"):
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.problems = []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("dialog", lambda dialog: (page.problems.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: page.problems.append(request.url) if "http" in request.url[:5] else None)
    page.goto(result.path.as_uri())
    return page


@pytest.fixture
def page(browser, result):
    opened = open_page(browser, result)
    yield opened
    opened.close()
    assert opened.problems == []


def test_every_image_loads(page, result):
    images = page.locator("main img")
    assert images.count() == 2 * len(result.images) > 0
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


def test_every_link_of_the_navigation_leads_to_its_section(page):
    links = page.locator("nav a")
    for index in range(links.count()):
        links.nth(index).click()
        target = links.nth(index).get_attribute("href")
        assert (
            page.evaluate("(id) => document.querySelector(id).getBoundingClientRect().top", target)
            < SIZES["desktop"][1]
        )
        assert page.url.endswith(target)


def test_names_that_are_markup_are_shown(page):
    shown = page.locator("body").inner_text()
    assert CLASS in shown and IMAGE in shown


def test_what_is_wrong_is_seen_without_scrolling_on_a_phone(browser, result):
    page = open_page(browser, result, size="phone")
    box = page.locator("#verdict h2").bounding_box()
    assert box["y"] + box["height"] < SIZES["phone"][1]
    red, green, blue = page.evaluate(
        "getComputedStyle(document.querySelector('#verdict h2')).color.match(/\\d+/g).map(Number)"
    )
    assert red > 2 * max(green, blue)
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_screen_and_texts_have_contrast(browser, result, scheme, size):
    page = open_page(browser, result, size=size, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    assert page.evaluate(CONTRAST) >= 4.5
    assert page.problems == []
    page.close()


def test_charts_have_all_labels_inside(page):
    outside = page.evaluate(
        """() => [...document.querySelectorAll("svg")].flatMap((svg) => {
            const frame = svg.getBoundingClientRect();
            return [...svg.querySelectorAll("text")].filter((text) => {
                const box = text.getBoundingClientRect();
                return box.left < frame.left - 2 || box.right > frame.right + 2
                    || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
            }).map((text) => text.textContent);
        })"""
    )
    assert outside == []


def test_everything_that_scrolls_can_be_reached_with_the_tab_key(page):
    assert page.evaluate(
        """() => [...document.querySelectorAll("*")].every((element) => {
            const style = getComputedStyle(element);
            const scrolls = /auto|scroll/.test(style.overflowX) && element.scrollWidth > element.clientWidth;
            return !scrolls || element.tabIndex === 0;
        })"""
    )
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"


def test_it_prints_on_pages_without_cutting_tables(browser, result):
    page = open_page(browser, result)
    page.set_viewport_size({"width": 703, "height": 1000})  # A4 without the margins of the page, at 96 dots per inch
    page.emulate_media(media="print")
    wide = page.evaluate(
        """() => [...document.querySelectorAll("table, figure, svg")].filter(
            (element) => element.getBoundingClientRect().right > document.documentElement.clientWidth + 1
        ).map((element) => element.textContent.trim().slice(0, 60))"""
    )
    assert wide == []
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.close()
