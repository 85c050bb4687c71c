"""Random warps: the matrix, the boxes of warped objects, and that pixels and points are warped alike."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.training_images import smooth, star
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.random_affine import Warp, random_warp, visible_boxes, warp_objects, warp_pixels
from yolov7_deploy.training.sample import NO_POLYGON, FlatObjects, Objects, flatten, merge_on_canvas

SIZE = 64
MAX_DIFFERENCE = 4  # grey levels: OpenCV rounds coordinates to 1/32 pixel; smooth images change by at most 60 per pixel
STEP_PX = 0.05  # between points along an outline


def flat(boxes, polygons):
    polygons = tuple(np.asarray(polygon, np.float32).reshape(-1, 2) for polygon in polygons)
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return flatten(Objects(boxes=boxes, class_ids=np.arange(len(boxes)), polygons=polygons))


def scaling(scale, shift=(0, 0), out_hw=(SIZE, SIZE)):
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]], dtype=np.float64)
    return Warp(matrix=matrix, scale=scale, out_hw=out_hw)


def slow_visible_box(polygon, hw):
    """Return the box of densely sampled points on the outline, and of the image corners inside it."""
    points = []
    for start, end in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        parts = np.linspace(0, 1, 2 + int(np.linalg.norm(end - start) / STEP_PX))[:, None]
        points.append(start + parts * (end - start))
    points = np.concatenate(points)
    limit = np.array(hw[::-1], dtype=float)
    corners = np.array([[0, 0], [limit[0], 0], [0, limit[1]], limit])
    outline = polygon.astype(np.float32).reshape(-1, 1, 2)
    inside = [cv2.pointPolygonTest(outline, corner.tolist(), False) > 0 for corner in corners]
    found = np.concatenate([points[((points >= 0) & (points <= limit)).all(axis=1)], corners[inside]])
    return np.concatenate([found.min(axis=0), found.max(axis=0)]) if len(found) else np.zeros(4)


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_visible_boxes_match_densely_sampled_outlines(seed):
    rng, hw = np.random.default_rng(seed), (40, 60)
    counts = rng.integers(3, 12, 6)
    polygons = [star(rng, count) * rng.uniform(20, 300) + rng.uniform(-60, 40, 2) for count in counts]
    found = visible_boxes(np.concatenate(polygons), counts, hw)
    slow = np.array([slow_visible_box(polygon, hw) for polygon in polygons])
    touching = (np.minimum(found, slow)[:, 2:] - np.minimum(found, slow)[:, :2]).min(axis=1) < STEP_PX
    np.testing.assert_allclose(found[~touching], slow[~touching], atol=STEP_PX)
    assert (found >= 0).all() and (found <= [60, 40, 60, 40]).all()


def test_an_object_that_fills_the_image_keeps_its_box():
    square = np.array([[-10, -10], [100, -10], [100, 100], [-10, 100]], dtype=float)
    np.testing.assert_array_equal(visible_boxes(square, np.array([4]), (40, 60)), [[0, 0, 60, 40]])


def test_an_object_across_an_image_border_is_clipped_to_it():
    band = np.array([[-10, -10], [20, -10], [20, 100], [-10, 100]], dtype=float)
    np.testing.assert_array_equal(visible_boxes(band, np.array([4]), (40, 60)), [[0, 0, 20, 40]])


def test_an_object_around_the_image_but_not_on_it_has_no_box():
    """A frame, as one outline with an inner and an outer loop."""
    outer = [[-10, -10], [100, -10], [100, 100], [-10, 100], [-10, -10]]
    inner = [[-5, -5], [-5, 90], [90, 90], [90, -5], [-5, -5]]
    frame = np.array(outer + inner, dtype=float)
    np.testing.assert_array_equal(visible_boxes(frame, np.array([len(frame)]), (40, 60)), [[0, 0, 0, 0]])


def test_objects_with_an_outline_have_a_lower_area_threshold():
    """One twentieth of both objects remains: enough for an outline, too little for a box."""
    box = [0, 0, 40, 40]
    square = [[0, 0], [40, 0], [40, 40], [0, 40]]
    found = warp_objects(flat([box, box], [square, NO_POLYGON]), scaling(1, (-20, -36)))
    assert found.class_ids.tolist() == [0]
    np.testing.assert_allclose(found.boxes, [[0, 0, 20, 4]])
    assert found.polygons == (NO_POLYGON,) or len(found.polygons[0]) == 0


@pytest.mark.parametrize(
    ("box", "is_visible"),
    [
        ([0, 0, 10, 10], True),
        ([0, 0, 2, 10], False),
        ([0, 0, 2.1, 10], True),
        ([0, 0, 10, 2], False),
        ([0, 0, 60, 2.9], False),  # 20 times as long as wide
        ([0, 0, 57, 2.9], True),
        ([63, 0, 73, 10], False),  # one tenth is visible, but only one pixel wide
        ([60, 0, 100.5, 10], False),
        ([60, 0, 99.5, 10], True),
    ],
)
def test_objects_too_small_thin_or_hidden_are_dropped(box, is_visible):
    assert len(warp_objects(flat([box], [NO_POLYGON]), scaling(1))) == is_visible


def test_objects_behind_the_horizon_are_dropped():
    tilted = Warp(matrix=np.array([[1, 0, 0], [0, 1, 0], [-0.02, 0, 1.0]]), scale=1.0, out_hw=(SIZE, SIZE))
    box, square = [30, 10, 60, 40], [[30, 10], [60, 10], [60, 40], [30, 40]]
    assert len(warp_objects(flat([box, box], [square, NO_POLYGON]), tilted)) == 0
    near, small = [5, 10, 25, 40], [[5, 10], [25, 10], [25, 40], [5, 40]]
    assert len(warp_objects(flat([near, near], [small, NO_POLYGON]), tilted)) == 2


def test_no_objects_are_warped_to_no_objects():
    assert len(warp_objects(merge_on_canvas([], [], side=10), scaling(1))) == 0
    assert len(warp_objects(flat([], []), scaling(1))) == 0


# --- the matrix -------------------------------------------------------------------------------------------------------


def test_the_official_presets_only_scale_and_shift():
    warp = random_warp(Hyperparameters(), canvas_hw=(128, 128), out_hw=(SIZE, SIZE), rng=np.random.default_rng(0))
    assert warp.is_axis_aligned
    for field in ("degrees", "shear", "perspective"):
        changed = replace(Hyperparameters(), **{field: 0.001})
        assert not random_warp(
            changed, canvas_hw=(128, 128), out_hw=(SIZE, SIZE), rng=np.random.default_rng(0)
        ).is_axis_aligned


def test_scale_and_translation_have_the_official_ranges():
    hyp = Hyperparameters(scale=0.5, translate=0.2)
    warps = [
        random_warp(hyp, canvas_hw=(120, 100), out_hw=(60, 80), rng=np.random.default_rng(seed)) for seed in range(500)
    ]
    scales = np.array([warp.scale for warp in warps])
    centres = np.array([warp.matrix @ [50, 60, 1] for warp in warps])[:, :2] / [80, 60]
    assert 0.5 <= scales.min() < 0.52 and 1.58 < scales.max() <= 1.6
    assert (centres.min(axis=0) >= 0.3).all() and (centres.max(axis=0) <= 0.7).all()
    assert (np.ptp(centres, axis=0) > 0.38).all()


def test_areas_grow_with_the_square_of_the_scale():
    hyp = Hyperparameters(degrees=30, scale=0.5)
    for seed in range(10):
        warp = random_warp(hyp, canvas_hw=(100, 100), out_hw=(50, 50), rng=np.random.default_rng(seed))
        assert np.linalg.det(warp.matrix[:2, :2]) == pytest.approx(warp.scale**2)


def test_pixel_centres_are_warped_to_pixel_centres():
    image = smooth((40, 50), 0)
    doubled = warp_pixels(image, scaling(2, out_hw=(80, 100)), replicate=True)
    slow = cv2.resize(image, (100, 80), interpolation=cv2.INTER_LINEAR)
    assert np.abs(doubled.astype(int) - slow).max() <= MAX_DIFFERENCE


def test_merged_objects_are_shifted_and_clipped_to_the_canvas():
    part = flat([[0, 0, 10, 10]], [[[0, 0], [10, 0], [10, 10]]])
    found = merge_on_canvas([part, part], [(5, 6), (15, -4)], side=20)
    assert isinstance(found, FlatObjects)
    np.testing.assert_array_equal(found.boxes, [[5, 6, 15, 16], [15, 0, 20, 6]])
    np.testing.assert_array_equal(found.points[3:], [[15, 0], [20, 0], [20, 6]])
    np.testing.assert_array_equal(part.boxes, [[0, 0, 10, 10]])
