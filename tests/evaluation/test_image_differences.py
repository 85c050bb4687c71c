"""Objects on which two detectors differ: matching down to low scores, and the order of objects."""

from __future__ import annotations

import pytest

from yolov7_deploy.evaluation.image_differences import image_differences


def row(image_id, box_xywh, score, category_id=1):
    return {"image_id": image_id, "category_id": category_id, "bbox": list(map(float, box_xywh)), "score": score}


BOX = (10, 20, 40, 40)


def test_equal_detections_have_no_difference():
    rows = [row(7, BOX, 0.9), row(7, (100, 100, 30, 30), 0.4, 2)]
    (objects,) = image_differences(rows, [dict(one) for one in rows]).values()
    assert [one.value for one in objects] == [0.0, 0.0]
    assert [one.box_px for one in objects] == [0.0, 0.0]


def test_a_score_that_crosses_the_threshold_is_a_small_difference():
    ((found,),) = image_differences([row(1, BOX, 0.26)], [row(1, BOX, 0.24)]).values()
    assert found.reference is not None and found.reference.shown
    assert found.other is not None and not found.other.shown
    assert found.value == pytest.approx(0.02)


def test_an_object_that_one_does_not_detect_differs_by_its_score():
    found = image_differences([row(1, BOX, 0.8)], [row(1, (200, 200, 40, 40), 0.7)])[1]
    assert [one.value for one in found] == [0.8, 0.7]
    assert found[0].other is None and found[0].box_px is None
    assert found[1].reference is None


def test_another_class_is_not_the_same_object():
    found = image_differences([row(1, BOX, 0.8, 1)], [row(1, BOX, 0.8, 2)])[1]
    assert sorted((one.category_id, one.reference is None) for one in found) == [(1, False), (2, True)]


def test_a_box_that_moved_differs_by_its_overlap():
    moved = (10, 20, 40, 30)  # three quarters of the box
    ((found,),) = image_differences([row(1, BOX, 0.8)], [row(1, moved, 0.8)]).values()
    assert found.iou == pytest.approx(0.75) and found.value == pytest.approx(0.25**2)
    assert found.box_px == 10


def test_objects_with_low_scores_in_both_are_not_listed():
    assert image_differences([row(1, BOX, 0.2)], [row(1, BOX, 0.01)]) == {1: ()}


def test_the_second_class_of_a_box_is_not_listed():
    """Multi-label NMS gives both classes of a box; a Detector shows the best one."""
    both = [row(1, BOX, 0.8, 1), row(1, BOX, 0.5, 2)]
    assert [one.category_id for one in image_differences(both, both[:1])[1]] == [1]


def test_the_largest_difference_comes_first_and_images_are_separate():
    reference = [row(1, BOX, 0.9), row(1, (100, 100, 30, 30), 0.9), row("b", BOX, 0.5)]
    other = [row(1, BOX, 0.8), row(1, (100, 100, 30, 30), 0.4), row("b", BOX, 0.5)]
    found = image_differences(reference, other)
    assert [round(one.value, 3) for one in found[1]] == [0.5, 0.1]
    assert [one.value for one in found["b"]] == [0.0]


def test_an_image_in_which_only_one_detects_anything_is_listed():
    assert [one.value for one in image_differences([], [row(3, BOX, 0.6)])[3]] == [0.6]
    assert image_differences([], []) == {}
