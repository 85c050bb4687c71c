"""Copy-paste and paste-in: the pasted pixels, their boxes, and the limit for covering other objects."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.errors import UsageError
from yolov7_deploy.training.copy_paste import (
    MAX_IOA,
    Crop,
    box_ioa,
    copy_paste,
    mask_box,
    paste_in,
    polygon_mask,
    random_paste_boxes,
)
from yolov7_deploy.training.sample import NO_OBJECTS, NO_POLYGON, Objects, TrainSample

ROUNDING = 1e-6  # of float32 fractions


def objects_of(polygons, class_ids=None):
    polygons = tuple(np.asarray(polygon, np.float32) for polygon in polygons)
    boxes = [[*polygon.min(axis=0), *polygon.max(axis=0)] for polygon in polygons]
    ids = np.arange(len(polygons)) if class_ids is None else np.asarray(class_ids)
    return Objects(boxes=np.array(boxes, np.float32).reshape(-1, 4), class_ids=ids.astype(np.int64), polygons=polygons)


def noise(hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=(*hw, 3), dtype=np.uint8)


def random_polygon(rng, hw, corners=12):
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radii = rng.uniform(3, 30, corners)
    centre = rng.uniform(0, 1, 2) * hw[::-1]
    return (centre + np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]).astype(np.float32)


def square(x, y, side):
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side]]


def slow_mask(polygon, hw):
    """Test every pixel centre against every edge."""
    mask = np.zeros(hw, bool)
    for row in range(hw[0]):
        for column in range(hw[1]):
            x, y = column + 0.5, row + 0.5
            for (x1, y1), (x2, y2) in zip(polygon.astype(float), np.roll(polygon, -1, 0).astype(float), strict=True):
                if (y1 > y) != (y2 > y) and x >= (x2 - x1) * (y - y1) / (y2 - y1) + x1:
                    mask[row, column] ^= True
    return mask


@pytest.mark.parametrize("seed", range(8))
def test_a_mask_has_the_pixels_whose_centres_are_inside(seed):
    rng, hw = np.random.default_rng(seed), (40, 50)
    polygon = random_polygon(rng, hw)
    expected, canvas = slow_mask(polygon, hw), np.zeros(hw, bool)
    found = polygon_mask(polygon, hw)
    if found is not None:
        (left, top), mask = found
        canvas[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
    np.testing.assert_array_equal(canvas, expected)


def test_a_square_with_integer_corners_is_filled_exactly():
    corner, mask = polygon_mask(np.array(square(10, 5, 8), np.float32), (40, 40))
    assert corner == (10, 5) and mask.shape == (8, 8) and mask.all()


@pytest.mark.parametrize("polygon", [square(100, 5, 8), square(-50, -50, 8), square(3.6, 3.6, 0.3)])
def test_an_outline_without_a_pixel_in_the_image_has_no_mask(polygon):
    assert polygon_mask(np.array(polygon, np.float32), (40, 40)) is None


boxes = st.lists(st.lists(st.integers(0, 30), min_size=4, max_size=4), max_size=6)


@given(boxes, boxes)
def test_ioa_matches_counted_pixels(over, below):
    def corners(rows):
        array = np.array(rows, np.float32).reshape(-1, 4)
        array[:, 2:] = array[:, :2] + array[:, 2:] + 1
        return array

    def painted(box):
        canvas = np.zeros((70, 70), bool)
        canvas[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        return canvas

    over, below = corners(over), corners(below)
    expected = [[(painted(a) & painted(b)).sum() / painted(b).sum() for b in below] for a in over]
    np.testing.assert_allclose(box_ioa(over, below), np.reshape(expected, (len(over), len(below))), atol=ROUNDING)


def test_copies_are_mirrored_pixels_with_mirrored_outlines():
    sample = TrainSample(image=noise((60, 100)), objects=objects_of([[[5, 10], [25, 10], [5, 40]]], [7]))
    pasted = copy_paste(sample, fraction=1.0, rng=np.random.default_rng(0))
    mask = slow_mask(sample.objects.polygons[0], (60, 100))[:, ::-1]
    np.testing.assert_array_equal(pasted.image, np.where(mask[..., None], sample.image[:, ::-1], sample.image))
    assert pasted.objects.class_ids.tolist() == [7, 7]
    np.testing.assert_array_equal(pasted.objects.polygons[1], [[95, 10], [75, 10], [95, 40]])
    np.testing.assert_array_equal(pasted.objects.boxes[1], mask_box(mask))


def test_a_copy_that_would_hide_another_object_is_skipped():
    centred = objects_of([square(40, 20, 20)])
    sample = TrainSample(image=noise((60, 100)), objects=centred)
    assert copy_paste(sample, fraction=1.0, rng=np.random.default_rng(0)) is sample


def test_copies_do_not_hide_each_other():
    sample = TrainSample(image=noise((60, 100)), objects=objects_of([square(5, 10, 20), square(7, 12, 20)]))
    assert len(copy_paste(sample, fraction=1.0, rng=np.random.default_rng(0)).objects) == 3


@pytest.mark.parametrize(("fraction", "copies"), [(0.0, 0), (0.2, 1), (0.5, 2), (1.0, 5)])
def test_the_fraction_applies_to_objects_with_an_outline(fraction, copies):
    outlined = objects_of([square(5, 12 * i + 1, 9) for i in range(5)])
    boxed = Objects(boxes=np.array([[5, 70, 20, 79]], np.float32), class_ids=np.array([9]), polygons=(NO_POLYGON,))
    objects = Objects(
        boxes=np.concatenate([boxed.boxes, outlined.boxes]),
        class_ids=np.concatenate([boxed.class_ids, outlined.class_ids]),
        polygons=boxed.polygons + outlined.polygons,
    )
    pasted = copy_paste(
        TrainSample(image=noise((80, 100)), objects=objects), fraction=fraction, rng=np.random.default_rng(1)
    )
    assert len(pasted.objects) == 6 + copies
    assert 9 not in pasted.objects.class_ids[6:]


def crop_of(hw=(50, 80), class_id=3, seed=5):
    mask = np.zeros(hw, bool)
    mask[2:-2, 3:-3] = True
    return Crop(image=noise(hw, seed), mask=mask, class_id=class_id)


@pytest.mark.parametrize("seed", range(6))
def test_pasted_objects_do_not_hide_others(seed):
    rng = np.random.default_rng(seed)
    before = objects_of([square(*rng.integers(0, 400, 2), 60) for _ in range(5)])
    sample = TrainSample(image=np.full((480, 480, 3), 7, np.uint8), objects=before)
    after = paste_in(sample, [crop_of(), crop_of((90, 40), 4)], rng=rng).objects
    for count in range(len(before), len(after)):
        assert np.all(box_ioa(after.boxes[count][None], after.boxes[:count]) < MAX_IOA)
    np.testing.assert_array_equal(after.boxes[: len(before)], before.boxes)


@pytest.mark.parametrize("seed", range(6))
def test_boxes_of_pasted_objects_enclose_exactly_the_changed_pixels(seed):
    sample = TrainSample(image=np.zeros((200, 240, 3), np.uint8), objects=NO_OBJECTS)
    white = Crop(image=np.full((50, 80, 3), 255, np.uint8), mask=crop_of().mask, class_id=3)
    pasted = paste_in(sample, [white], rng=np.random.default_rng(seed))
    expected = np.zeros((200, 240), bool)
    for x1, y1, x2, y2 in pasted.objects.boxes.astype(int):
        expected[y1:y2, x1:x2] = True
    assert len(pasted.objects) and set(pasted.objects.class_ids.tolist()) == {3}
    assert pasted.objects.boxes.dtype == np.float32
    np.testing.assert_array_equal(pasted.image[..., 0] > 0, expected)


def test_only_masked_pixels_are_pasted():
    mask = np.zeros((40, 40), bool)
    mask[:, :20] = True
    crop = Crop(image=np.full((40, 40, 3), 255, np.uint8), mask=mask, class_id=0)
    sample = TrainSample(image=np.zeros((300, 300, 3), np.uint8), objects=NO_OBJECTS)
    pasted = paste_in(sample, [crop], rng=np.random.default_rng(0))
    widths, heights = (pasted.objects.boxes[:, 2:] - pasted.objects.boxes[:, :2]).T
    np.testing.assert_allclose(widths * 2, heights, atol=1)


@pytest.mark.parametrize("hw", [(5, 5), (21, 300)])
def test_small_images_get_no_object(hw):
    sample = TrainSample(image=noise(hw), objects=NO_OBJECTS)
    assert paste_in(sample, [crop_of()], rng=np.random.default_rng(0)) is sample


def test_crops_that_become_too_small_are_skipped():
    sample = TrainSample(image=noise((300, 300)), objects=NO_OBJECTS)
    thread = Crop(image=noise((4, 400)), mask=np.ones((4, 400), bool), class_id=0)
    nearly_empty = Crop(image=noise((40, 40)), mask=np.eye(40, dtype=bool) & (np.arange(40) < 1), class_id=0)
    for crops in ([], [thread], [nearly_empty]):
        assert paste_in(sample, crops, rng=np.random.default_rng(0)) is sample


def test_paste_boxes_have_integer_corners_and_the_official_sizes():
    drawn = [random_paste_boxes((100, 200), rng=np.random.default_rng(seed)) for seed in range(200)]
    paste_boxes = np.concatenate(drawn)
    assert np.all(paste_boxes[:, :2] >= 0) and np.all(paste_boxes[:, 2:] <= [200, 100])
    assert np.all(paste_boxes == np.round(paste_boxes)) and np.all(
        (paste_boxes[:, 2:] - paste_boxes[:, :2]) <= [150, 75]
    )
    assert len(paste_boxes) / len(drawn) == pytest.approx(16, rel=0.03)  # four fifths of 20


def test_pasting_is_deterministic_and_does_not_change_its_inputs():
    objects = objects_of([square(5, 6, 20), square(5, 40, 25)])
    sample, crop = TrainSample(image=noise((200, 200)), objects=objects), crop_of()
    before = sample.image.copy(), objects.boxes.copy(), crop.image.copy()

    def both(seed):
        once = copy_paste(sample, fraction=0.5, rng=np.random.default_rng(seed))
        return paste_in(once, [crop], rng=np.random.default_rng(seed))

    one, other = both(3), both(3)
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.objects.boxes, other.objects.boxes)
    for kept, now in zip(before, (sample.image, objects.boxes, crop.image), strict=True):
        np.testing.assert_array_equal(kept, now)


def test_a_crop_and_its_mask_have_one_size():
    with pytest.raises(UsageError, match="mask"):
        Crop(image=noise((5, 6)), mask=np.ones((6, 5), bool), class_id=0)
