"""Drawing never fails or modifies its input, and labels are readable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yolov7_deploy import visualize
from yolov7_deploy.errors import ImageError
from yolov7_deploy.image import read_image
from yolov7_deploy.visualize import (
    _covered_pixels,
    _find_label_rect,
    _label_size,
    class_colour,
    draw_boxes,
    draw_style,
    text_colour,
    write_image,
)

READABLE_CONTRAST = 4.5  # WCAG 2, level AA
DISTANCE_OF_20, DISTANCE_OF_80 = 20, 10  # Euclidean distance in 0..255 BGR: easy to distinguish, and distinguishable


def luminance(colour):
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.0722 * linear[0] + 0.7152 * linear[1] + 0.2126 * linear[2]


@pytest.mark.parametrize("classes,distance", [(20, DISTANCE_OF_20), (80, DISTANCE_OF_80)])
def test_colours_of_classes_differ(classes, distance):
    colours = np.array([class_colour(i) for i in range(classes)], dtype=float)
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)) > distance


@given(st.integers(0, 10_000))
def test_label_text_contrasts_with_its_background(class_id):
    background = class_colour(class_id)
    light, dark = sorted((luminance(background), luminance(text_colour(background))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= READABLE_CONTRAST


@settings(max_examples=60, deadline=None)
@given(
    hw=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    boxes=st.lists(st.tuples(*[st.floats(-50, 400, width=32)] * 4), max_size=6),
    label=st.text(max_size=20),
)
def test_any_box_on_any_image_can_be_drawn(hw, boxes, label):
    image = np.full((*hw, 3), 7, dtype=np.uint8)
    array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    drawn = draw_boxes(image, array, labels=[label] * len(boxes), class_ids=list(range(len(boxes))))
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (image == 7).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_boxes_that_are_not_numbers_do_not_stop_the_drawing(value):
    boxes = np.array([[value, 0, 10, 10]], dtype=np.float32)
    draw_boxes(np.zeros((50, 50, 3), dtype=np.uint8), boxes, labels=["x"], class_ids=[0])


@pytest.mark.parametrize("shape", [(40, 60), (40, 60, 1), (40, 60, 4)])
def test_grey_and_transparent_images_are_drawn_in_colour(shape):
    boxes = np.array([[5, 5, 30, 30]], dtype=np.float32)
    assert draw_boxes(np.zeros(shape, dtype=np.uint8), boxes, labels=["x"], class_ids=[0]).shape == (40, 60, 3)


@given(
    hw=st.tuples(st.integers(20, 800), st.integers(20, 800)),
    corner=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    far=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_labels_stay_inside_the_image(hw, corner, far):
    xs, ys = sorted((corner[0], far[0])), sorted((corner[1], far[1]))
    rect = tuple(int(v) for v in (xs[0] * (hw[1] - 1), ys[0] * (hw[0] - 1), xs[1] * (hw[1] - 1), ys[1] * (hw[0] - 1)))
    style = draw_style(hw)
    width, height, _ = _label_size("person 0.87", style)
    label_rect = _find_label_rect("person 0.87", rect, taken=[], hw=hw, style=style)
    if width > hw[1] or height > hw[0]:
        assert label_rect is None
    else:
        assert label_rect is not None
        assert 0 <= label_rect[0] < label_rect[2] <= hw[1]
        assert 0 <= label_rect[1] < label_rect[3] <= hw[0]


def test_labels_of_boxes_with_the_same_corner_do_not_overlap():
    hw, style = (480, 640), draw_style((480, 640))
    first = _find_label_rect("person 0.9", (100, 100, 500, 400), taken=[], hw=hw, style=style)
    second = _find_label_rect("tie 0.8", (100, 100, 300, 300), taken=[first], hw=hw, style=style)
    assert _covered_pixels(second, np.array([first])) == 0


def test_lines_and_text_grow_with_the_image():
    small, large = draw_style((240, 320)), draw_style((2160, 3840))
    assert small.line < large.line
    assert small.text_scale < large.text_scale
    assert small.line >= 1


def test_the_same_input_gives_the_same_bytes():
    boxes = np.array([[5, 5, 90, 80], [20, 30, 60, 70]], dtype=np.float32)
    images = [draw_boxes(np.zeros((100, 100, 3), np.uint8), boxes, labels=["a", "b"], class_ids=[3, 4]) for _ in "12"]
    assert np.array_equal(*images)


def test_the_better_of_two_equal_boxes_is_drawn_on_top():
    boxes = np.array([[10, 10, 90, 90]] * 2, dtype=np.float32)
    drawn = draw_boxes(np.zeros((100, 100, 3), np.uint8), boxes, labels=["", ""], class_ids=[1, 2])
    assert tuple(drawn[50, 10].tolist()) == class_colour(1)


def test_a_written_image_replaces_the_old_one_without_leaving_a_temporary_file(tmp_path):
    for value in (10, 200):
        write_image(tmp_path / "a.PNG", np.full((5, 5, 3), value, dtype=np.uint8))
    assert (read_image(tmp_path / "a.PNG") == 200).all()
    assert [path.name for path in tmp_path.iterdir()] == ["a.PNG"]


def test_an_image_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match="cannot be written"):
        write_image(tmp_path / "file" / "a.png", np.zeros((5, 5, 3), np.uint8))


def test_labels_that_are_not_unicode_are_drawn_and_such_suffixes_refused(tmp_path):
    image = np.zeros((60, 200, 3), dtype=np.uint8)
    drawn = draw_boxes(image, np.array([[5, 30, 50, 50]]), labels=["\udcff\x1b\x00"], class_ids=[0])
    assert drawn.any()
    with pytest.raises(ImageError, match="cannot write"):
        write_image(tmp_path / "a.\udcff", image)


@pytest.mark.parametrize(
    ("text", "drawn"),
    [
        ("cat 0.50", "cat 0.50"),
        ("Löwe naïve", "Lowe naive"),
        ("кошка 0.85", "????? 0.85"),
        ("猫 ½ ²", "? ? 2"),
        ("고양이", "???"),
        ("bad \ud800", r"bad \ud800"),
    ],
)
def test_opencv_4_draws_one_ascii_character_for_each_letter_and_warns_once(monkeypatch, caplog, text, drawn):
    monkeypatch.setattr(visualize, "DRAWS_UNICODE", False)
    visualize._warn_ascii_only.cache_clear()
    assert [visualize.drawable_text(text) for _ in range(3)] == [drawn] * 3
    assert len(caplog.records) == (0 if text.isascii() or text[-1] == "\ud800" else 1)


@pytest.mark.skipif(not visualize.DRAWS_UNICODE, reason="this OpenCV draws ASCII only")
def test_opencv_5_draws_every_letter(caplog):
    assert visualize.drawable_text("кошка 猫") == "кошка 猫"
    image = np.full((60, 200, 3), 255, dtype=np.uint8)
    boxes = np.array([[5, 30, 150, 55]], dtype=np.float32)
    drawn_images = [draw_boxes(image, boxes, labels=[label], class_ids=[0]) for label in ("кошка", "собак", "?????")]
    assert all((a != b).any() for a, b in itertools.combinations(drawn_images, 2))
    assert caplog.records == []
