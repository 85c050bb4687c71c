"""The web page in a browser: an image is dropped, boxes appear, sliders filter, and errors are shown.

Needs the Python package playwright, and Chromium as an executable (Debian: `apt-get install chromium`).
"""

from __future__ import annotations

import base64

import cv2
import pytest

from tests.support.browser import CHROMIUM, CONTRAST, SIZES, open_browser
from tests.support.page_server import MAX_BYTES, serve_page
from yolov7_deploy.datasets.synthetic import generate_image
from yolov7_deploy.detector import Detector
from yolov7_deploy.hub import bundled_weights

DROP = """([data, name]) => {
    const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
    const transfer = new DataTransfer();
    transfer.items.add(new File([bytes], name));
    for (const type of ["dragover", "drop"])
        document.getElementById("drop").dispatchEvent(
            new DragEvent(type, {dataTransfer: transfer, bubbles: true, cancelable: true}));
}"""

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
def detector():
    with Detector(bundled_weights(), img=320, device="cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def server(detector):
    with serve_page(detector) as served:
        yield served


@pytest.fixture
def page(browser, server):
    opened = browser.new_page(viewport=dict(zip(("width", "height"), SIZES["desktop"], strict=True)))
    errors = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
    opened.on("request", lambda request: errors.append(request.url) if is_foreign(request.url, server[0]) else None)
    opened.goto(server[0])
    opened.locator("#model", has_text="classes").wait_for()
    yield opened
    opened.close()
    assert errors == []


def is_foreign(url, own):
    return not url.startswith((own, "blob:", "data:"))


@pytest.fixture(scope="module")
def image():
    return generate_image(3, split="val", size=320, seed=0)[0]


def drop(page, data, name="shapes.png"):
    page.evaluate(DROP, [base64.b64encode(data).decode(), name])


def drop_image(page, image):
    drop(page, cv2.imencode(".png", image)[1].tobytes())
    page.locator("#status", has_text="object").wait_for()


def boxes(page):
    """Return x1, y1, x2, y2 of the boxes on the page, in pixels of an image of 320 x 320."""
    return page.evaluate(
        """() => {
            const stage = document.querySelector('#stage img').getBoundingClientRect(), scale = 320 / stage.width;
            return [...document.querySelectorAll('.box')].map((box) => {
                const at = box.getBoundingClientRect();
                return [at.left - stage.left, at.top - stage.top, at.right - stage.left, at.bottom - stage.top]
                    .map((value) => value * scale);
            });
        }"""
    )


def set_slider(page, name, value, *, event="change"):
    page.evaluate(
        """([name, value, event]) => {
            const slider = document.getElementById(name);
            slider.value = value;
            slider.dispatchEvent(new Event('input', {bubbles: true}));
            slider.dispatchEvent(new Event(event, {bubbles: true}));
        }""",
        [name, value, event],
    )


def test_a_dropped_image_gets_the_boxes_of_the_detector_where_they_belong(page, detector, image):
    drop_image(page, image)
    expected = detector(image)
    shown = boxes(page)
    assert len(shown) == len(expected) > 0
    for ours, theirs in zip(shown, expected.boxes.tolist(), strict=True):
        assert ours == pytest.approx(theirs, abs=1.5)
    labels = page.locator(".box span").all_inner_texts()
    assert labels == [f"{one.class_name} {one.score:.2f}" for one in expected]
    assert page.locator("#found button b").all_inner_texts() == list(expected.names)


def test_the_confidence_slider_filters_in_the_browser_and_asks_only_below_the_served_value(
    page, server, detector, image
):
    drop_image(page, image)
    asked = len(server[1])
    set_slider(page, "conf", 0.7)
    assert len(boxes(page)) == len(detector(image, conf=0.7))
    assert len(server[1]) == asked
    set_slider(page, "conf", 0.05)
    page.locator(".box").nth(len(detector(image, conf=0.05)) - 1).wait_for()
    assert len(boxes(page)) == len(detector(image, conf=0.05))
    assert server[1][asked:] == ["conf=0.05&iou=0.45"]


def test_the_iou_slider_asks_again(page, server, image):
    drop_image(page, image)
    asked = len(server[1])
    with page.expect_response("**/detect?*"):
        set_slider(page, "iou", 0.9)
    assert server[1][asked:] == ["conf=0.25&iou=0.9"]


def test_a_class_can_be_hidden_with_the_keyboard(page, image):
    drop_image(page, image)
    before = len(boxes(page))
    box = page.locator("#classes input").first
    box.focus()
    page.keyboard.press("Space")
    assert 0 <= len(boxes(page)) < before
    assert page.evaluate("document.activeElement.type") == "checkbox"
    page.keyboard.press("Space")
    assert len(boxes(page)) == before


def test_everything_can_be_reached_with_the_tab_key(page, image):
    drop_image(page, image)
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("(document.activeElement.id || document.activeElement.tagName)"))
    assert {"file", "conf", "iou", "command", "SUMMARY", "BUTTON"} - {"command"} <= set(reached)


def test_a_file_that_is_not_an_image_shows_the_message_of_the_server(page):
    drop(page, b"no image", "notes.txt")
    page.wait_for_selector("#alert p")
    assert "not an image" in page.locator("#alert").inner_text()
    assert page.locator(".box").count() == 0
    assert page.locator(".hint").is_visible()


def test_an_image_that_only_the_server_can_read_is_listed(page, detector, image):
    drop(page, cv2.imencode(".tiff", image)[1].tobytes(), "scan.tiff")
    page.locator("#status", has_text="cannot show the format").wait_for()
    assert page.locator("#found button b").all_inner_texts() == list(detector(image).names)
    assert page.locator(".box").count() == 0


def test_a_file_that_is_too_large_shows_the_limit(page):
    drop(page, bytes(MAX_BYTES + 1), "large.png")
    page.wait_for_selector("#alert p")
    assert "more than 1 MB" in page.locator("#alert").inner_text()


@pytest.mark.parametrize("hw", [(900, 300), (300, 900), (600, 600)])
def test_an_image_of_any_shape_fits_the_screen_without_distortion(page, hw):
    drop_image(page, cv2.resize(generate_image(3, split="val", size=320, seed=0)[0], hw[::-1]))
    shown = page.locator("#stage img").bounding_box()
    assert shown["height"] <= SIZES["desktop"][1] - 200
    assert shown["width"] / shown["height"] == pytest.approx(hw[1] / hw[0], rel=0.02)


def test_labels_of_better_boxes_are_above_those_of_worse_ones(page, image):
    drop_image(page, image)
    set_slider(page, "conf", 0.01)
    page.wait_for_function("document.querySelectorAll('.box').length > 5")
    order = page.evaluate("[...document.querySelectorAll('.box')].map((box) => Number(getComputedStyle(box).zIndex))")
    assert order == sorted(set(order), reverse=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_wider_than_the_screen_and_texts_have_contrast(browser, server, image, scheme, size, tmp_path):
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto(server[0])
    page.locator("#model", has_text="classes").wait_for()
    drop_image(page, image)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(CONTRAST) >= 4.5
    page.close()
