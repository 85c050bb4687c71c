"""Mosaics and warps: the fast path matches the slow, obvious one, and boxes match their pixels."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.training_images import dataset_of, labels_of, random_dataset, reader_of, record, star, written
from yolov7_deploy.image import PAD_GREY
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.mosaic import (
    make_mosaic,
    nine_tile_corners,
    paint_canvas,
    random_four_tiles,
    random_layout,
    random_nine_tiles,
    warp_tiles,
)
from yolov7_deploy.training.random_affine import Warp, random_warp, warp_objects, warp_pixels
from yolov7_deploy.training.sample import NO_POLYGON, TrainSample, flatten, unflatten

SIZE = 64
SCALED = Hyperparameters(scale=0.45)  # scale and shift only; from 0.55, so that no image is reduced
ROTATED = Hyperparameters(degrees=20, shear=8, perspective=0.0004, scale=0.5)
MAX_DIFFERENCE = 4  # grey levels: OpenCV rounds coordinates to 1/32 pixel; smooth images change by at most 60 per pixel
EDGE_BLUR_PX = 2  # a warped canvas interpolates across tile edges, over a pixel, which is shown at scale 1.6
EDGE_PX = 1.0  # an edge can be anywhere in the pixel that it cuts
HWS = [(64, 48), (40, 64), (64, 64), (64, 20), (33, 64)]


def scaling(scale, shift=(0, 0), out_hw=(SIZE, SIZE)):
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]], [0, 0, 1]], dtype=np.float64)
    return Warp(matrix=matrix, scale=scale, out_hw=out_hw)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return random_dataset(tmp_path_factory.mktemp("mosaic"), HWS)


@pytest.fixture(scope="module")
def reader(dataset):
    return reader_of(dataset, size=SIZE)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_four_tiles_meet_in_a_point_of_the_inner_half(reader, seed):
    layout = random_four_tiles(reader.store, 2, rng=np.random.default_rng(seed))
    a, b, c, d = layout.tiles
    x, y = d.left, d.top
    assert a.index == 2 and layout.side == 2 * SIZE
    assert SIZE // 2 <= x <= 3 * SIZE // 2 and SIZE // 2 <= y <= 3 * SIZE // 2
    assert (a.left + a.hw[1], a.top + a.hw[0]) == (x, y)
    assert (b.left, b.top + b.hw[0]) == (x, y) and (c.left + c.hw[1], c.top) == (x, y)


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(1, 100)), min_size=9, max_size=9))
def test_nine_tiles_surround_the_first_without_overlap(sides):
    count = np.zeros((500, 500), np.int64)
    corners = nine_tile_corners(sides, 100)
    for (left, top), (h, w) in zip(corners, sides, strict=True):
        count[100 + top : 100 + top + h, 100 + left : 100 + left + w] += 1
    assert count.max() == 1
    assert count.sum() == sum(h * w for h, w in sides)
    assert corners[0] == (100, 100)


def test_the_window_of_nine_tiles_can_be_anywhere_on_their_canvas(reader):
    offsets = np.array(
        [
            (SIZE - tile.left, SIZE - tile.top)
            for seed in range(200)
            for tile in random_nine_tiles(reader.store, 0, rng=np.random.default_rng(seed)).tiles[:1]
        ]
    )
    assert offsets.min() >= 0 and offsets.max() < SIZE
    assert (np.ptp(offsets, axis=0) > 0.9 * SIZE).all()


def test_one_mosaic_in_five_has_nine_tiles_and_all_images_are_used(reader):
    layouts = [random_layout(reader.store, 1, rng=np.random.default_rng(seed)) for seed in range(500)]
    nine = sum(len(layout.tiles) == 9 for layout in layouts)
    assert {len(layout.tiles) for layout in layouts} == {4, 9} and 70 < nine < 130
    assert {layout.tiles[0].index for layout in layouts} == {1}
    assert {tile.index for layout in layouts for tile in layout.tiles} == set(range(len(HWS)))


# --- the fast path and the canvas -------------------------------------------------------------------------------------


def painted(reader, layout, warp):
    """Return the mosaic, painted on the complete canvas and then warped."""
    sample = paint_canvas(reader, layout)
    return TrainSample(image=warp_pixels(sample.image, warp), objects=warp_objects(flatten(sample.objects), warp))


def near_tile_edges(layout, warp, hw):
    """Return the pixels near an edge of a tile, where a warped canvas mixes both sides."""
    near = np.zeros(hw, bool)
    for tile in layout.tiles:
        x1, y1, x2, y2 = tile.visible(layout.side)
        corners = np.array([[x1, y1], [x2, y2]]) * warp.matrix[0, 0] + warp.matrix[:2, 2] - 0.5
        low, high = np.floor(corners).astype(int), np.ceil(corners).astype(int)
        inner, outer = np.zeros(hw, bool), np.zeros(hw, bool)
        (ax, ay), (bx, by) = np.maximum(low[0] - EDGE_BLUR_PX, 0), np.maximum(high[1] + EDGE_BLUR_PX, 0)
        outer[ay : by + 1, ax : bx + 1] = True
        (ax, ay), (bx, by) = np.maximum(high[0] + EDGE_BLUR_PX, 0), np.maximum(low[1] - EDGE_BLUR_PX, 0)
        inner[ay : by + 1, ax : bx + 1] = True
        near |= outer & ~inner
    return near


@pytest.mark.parametrize("seed", range(40))
def test_directly_warped_tiles_match_the_warped_canvas(reader, seed):
    rng = np.random.default_rng(seed)
    fast = make_mosaic(reader, 0, hyp=SCALED, rng=np.random.default_rng(seed))
    layout = random_layout(reader.store, 0, rng=rng)
    warp = random_warp(SCALED, canvas_hw=(layout.side,) * 2, out_hw=(SIZE, SIZE), rng=rng)
    slow = painted(reader, layout, warp)
    np.testing.assert_array_equal(fast.objects.boxes, slow.objects.boxes)
    np.testing.assert_array_equal(fast.objects.class_ids, slow.objects.class_ids)
    different = np.abs(fast.image.astype(int) - slow.image).max(axis=2)
    clear = ~near_tile_edges(layout, warp, (SIZE, SIZE))
    assert clear.any() and different[clear].max() <= MAX_DIFFERENCE


def test_there_are_objects_to_compare(reader):
    counts = [len(make_mosaic(reader, 0, hyp=SCALED, rng=np.random.default_rng(seed)).objects) for seed in range(40)]
    assert np.mean(counts) > 5


def test_a_pixel_belongs_to_the_tile_that_contains_its_centre(tmp_path):
    """With white tiles, each pixel is exactly white or exactly grey, also where two tiles meet."""
    white = np.full((SIZE, SIZE, 3), 255, np.uint8)
    reader = reader_of(dataset_of([record(written(tmp_path / "a.png", white), (SIZE, SIZE))]), size=SIZE)
    for seed in range(30):
        rng = np.random.default_rng(seed)
        layout = random_layout(reader.store, 0, rng=rng)
        warp = random_warp(SCALED, canvas_hw=(layout.side,) * 2, out_hw=(SIZE, SIZE), rng=rng)
        x, y = (np.arange(SIZE) + 0.5 - warp.matrix[:2, 2, None]) / warp.scale  # of centres, on the canvas
        covered = np.zeros((SIZE, SIZE), bool)
        for tile in layout.tiles:
            x1, y1, x2, y2 = tile.visible(layout.side)
            covered |= ((x >= x1) & (x < x2)) & ((y >= y1) & (y < y2))[:, None]
        image = warp_tiles(reader, layout, warp).image
        np.testing.assert_array_equal(image, np.where(covered, 255, PAD_GREY)[:, :, None].repeat(3, axis=2))


def test_a_tile_outside_the_result_is_never_read(dataset, monkeypatch):
    reader = reader_of(dataset, size=SIZE)
    layout = random_four_tiles(reader.store, 0, rng=np.random.default_rng(0))
    read = []
    monkeypatch.setattr(reader, "load_scaled", lambda index, *, scale: read.append(index))
    corner = layout.tiles[3]
    warp_tiles(reader, layout, scaling(2.0, (-2.0 * corner.left, -2.0 * corner.top)))
    assert read == [corner.index]


def test_images_shown_small_are_read_at_reduced_size(dataset, monkeypatch):
    reader = reader_of(dataset, size=SIZE)
    layout = random_four_tiles(reader.store, 0, rng=np.random.default_rng(0))
    scales = []
    monkeypatch.setattr(reader, "load_scaled", lambda index, *, scale: scales.append(scale))
    warp_tiles(reader, layout, scaling(0.3))
    assert scales == [0.3] * 4


@pytest.mark.parametrize("cache_bytes", [0, 10**7])
def test_a_small_mosaic_averages_pixels(tmp_path, cache_bytes):
    """Stripes of one pixel become grey; nearest-neighbour sampling would give black or white."""
    stripes = np.zeros((SIZE, SIZE, 3), np.uint8)
    stripes[:, ::2] = 255
    reader = reader_of(
        dataset_of([record(written(tmp_path / "a.jpg", stripes), (SIZE, SIZE))]), size=SIZE, cache_bytes=cache_bytes
    )
    layout = random_four_tiles(reader.store, 0, rng=np.random.default_rng(0))
    image = warp_tiles(reader, layout, scaling(0.25)).image
    assert image.min() > 100 and image.max() < 155


@pytest.mark.parametrize("make", [warp_tiles, painted])
def test_an_unreadable_tile_is_grey_and_has_no_objects(tmp_path, make):
    dataset = random_dataset(tmp_path, [(SIZE, SIZE)])
    dataset.path(0).write_bytes(b"not an image")
    reader, rng = reader_of(dataset, size=SIZE), np.random.default_rng(0)
    layout = random_layout(reader.store, 0, rng=rng)
    warp = random_warp(SCALED, canvas_hw=(layout.side,) * 2, out_hw=(SIZE, SIZE), rng=rng)
    sample = make(reader, layout, warp)
    assert (sample.image == PAD_GREY).all() and len(sample.objects) == 0
    assert list(reader.problems) == [0] and not reader.has_read


def test_a_rotated_mosaic_uses_the_canvas(reader, monkeypatch):
    monkeypatch.setattr("yolov7_deploy.training.mosaic.warp_tiles", None)
    sample = make_mosaic(reader, 0, hyp=ROTATED, rng=np.random.default_rng(1))
    assert sample.image.shape == (SIZE, SIZE, 3) and len(sample.objects)


def test_copy_paste_adds_objects_to_a_mosaic(reader):
    counts = [
        len(make_mosaic(reader, 0, hyp=replace(SCALED, copy_paste=fraction), rng=np.random.default_rng(seed)).objects)
        for fraction in (0.0, 1.0)
        for seed in range(10)
    ]
    assert sum(counts[10:]) > sum(counts[:10])


# --- boxes and pixels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hyp", [SCALED, Hyperparameters(), ROTATED])
@pytest.mark.parametrize("seed", range(6))
def test_a_box_encloses_the_pixels_of_its_object(tmp_path, hyp, seed):
    """Warp one bright star on black; its box encloses the bright pixels."""
    outline = star(np.random.default_rng(seed), corners=9)
    image = np.zeros((SIZE * 4, SIZE * 4, 3), np.uint8)
    points = (outline * SIZE * 4 * 16 - 8).round().astype(np.int32)
    cv2.fillPoly(image, [points], (255, 255, 255), shift=4)
    black = record(written(tmp_path / "b.png", np.zeros_like(image)), image.shape[:2])
    bright = record(written(tmp_path / "a.png", image), image.shape[:2], labels_of([outline]))
    reader = reader_of(dataset_of([bright, *[black] * 99]), size=SIZE * 4)
    sample = make_mosaic(reader, 0, hyp=hyp, rng=np.random.default_rng(seed))
    bright_px = np.argwhere(sample.image[..., 0] > 190)
    if not len(sample.objects):
        return
    slack = EDGE_PX * max(1.0, 1.1 + hyp.scale)  # size of a pixel of the image in the sample
    np.testing.assert_allclose(
        sample.objects.boxes[0], [*bright_px.min(axis=0)[::-1], *bright_px.max(axis=0)[::-1] + 1], atol=slack + EDGE_PX
    )


def test_an_outline_gives_a_box_at_least_as_tight_as_the_corners(reader):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        warp = random_warp(ROTATED, canvas_hw=(SIZE, SIZE), out_hw=(SIZE, SIZE), rng=rng)
        objects = reader.store.flat_objects(seed % len(HWS))
        scale_boxes = replace(objects, points=NO_POLYGON, counts=np.zeros(len(objects), np.int64))
        tight, loose = (warp_objects(found, replace(warp, scale=0.0)) for found in (objects, scale_boxes))
        for box, class_id in zip(tight.boxes, tight.class_ids, strict=True):
            around = loose.boxes[loose.class_ids == class_id]
            inside = (around[:, :2] <= box[:2] + EDGE_PX / 100).all(1) & (around[:, 2:] >= box[2:] - EDGE_PX / 100).all(
                1
            )
            assert inside.any()


def test_flattened_objects_are_unflattened_unchanged(reader):
    for index in range(len(HWS)):
        objects = reader.store.objects(index)
        back = unflatten(flatten(objects))
        np.testing.assert_array_equal(back.boxes, objects.boxes)
        for one, other in zip(back.polygons, objects.polygons, strict=True):
            np.testing.assert_array_equal(one, other)
