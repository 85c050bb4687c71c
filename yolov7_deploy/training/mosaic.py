"""Mosaic augmentation: several images on one canvas, of which a warped part is the training sample.

The layout depends on image sizes only. The canvas is then painted and warped; or, if the warp only scales and shifts,
each visible image is warped directly into its rectangle of the result. This needs no canvas, decodes only visible
images, and decodes images that are shown small at reduced size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from yolov7_deploy.image import PAD_GREY, FloatArray, Image
from yolov7_deploy.training.copy_paste import Crop, copy_paste, polygon_mask
from yolov7_deploy.training.dataset import ImageReader, ImageStore
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.random_affine import Warp, random_warp, warp_objects, warp_pixels
from yolov7_deploy.training.sample import FlatObjects, TrainSample, flatten, merge_on_canvas, unflatten

FOUR_TILE_PROBABILITY = 0.8  # other mosaics have nine tiles
MIN_CROPS = 30  # as in the official recipe
CROP_FRACTION = 0.5  # of the outlined objects of a mosaic


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """An image, its size, and the position of its first pixel on the canvas, which can be outside of the canvas."""

    index: int
    hw: tuple[int, int]
    left: int
    top: int

    def visible(self, side: int) -> tuple[int, int, int, int]:
        """Return the part of the canvas [side, side] that the tile covers: x1, y1, x2, y2."""
        x2, y2 = min(self.left + self.hw[1], side), min(self.top + self.hw[0], side)
        return max(self.left, 0), max(self.top, 0), x2, y2


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Tiles on a square canvas; later tiles cover earlier ones."""

    tiles: tuple[Tile, ...]
    side: int


def random_layout(store: ImageStore, first: int, *, rng: np.random.Generator) -> Layout:
    """Return a random layout with `first` as its first image; it has four tiles with probability 0.8, else nine."""
    return (
        random_four_tiles(store, first, rng=rng)
        if rng.random() < FOUR_TILE_PROBABILITY
        else random_nine_tiles(store, first, rng=rng)
    )


def random_four_tiles(store: ImageStore, first: int, *, rng: np.random.Generator) -> Layout:
    """Return four tiles that meet in a random point of the inner half of a canvas of twice the image size."""
    size = store.size
    x, y = (int(value) for value in rng.uniform(size / 2, 3 * size / 2, size=2))
    indices = [first, *rng.integers(len(store), size=3).tolist()]
    sizes = [store.hw(index) for index in indices]
    tiles = (
        Tile(index=index, hw=(h, w), left=x if number % 2 else x - w, top=y if number > 1 else y - h)
        for number, (index, (h, w)) in enumerate(zip(indices, sizes, strict=True))
    )
    return Layout(tiles=tuple(tiles), side=2 * size)


def random_nine_tiles(store: ImageStore, first: int, *, rng: np.random.Generator) -> Layout:
    """Return a random window, of twice the image size, of nine tiles around the first image."""
    size = store.size
    indices = [first, *rng.integers(len(store), size=8).tolist()]
    offset_x, offset_y = (int(value) for value in rng.uniform(0, size, size=2))
    sizes = [store.hw(index) for index in indices]
    tiles = (
        Tile(index=index, hw=hw, left=left - offset_x, top=top - offset_y)
        for index, hw, (left, top) in zip(indices, sizes, nine_tile_corners(sizes, size), strict=True)
    )
    return Layout(tiles=tuple(tiles), side=2 * size)


def nine_tile_corners(sizes: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return left and top of nine tiles with these (height, width): the first at (size, size), the others around it.

    They are arranged clockwise, starting above the first one, as in the official program.
    """
    right, bottom = size + sizes[0][1], size + sizes[0][0]
    corners = []
    for number, (h, w) in enumerate(sizes):
        before_h, before_w = sizes[max(0, number - 1)]
        corners.append(
            (
                (size, size),
                (size, size - h),
                (size + before_w, size - h),
                (right, size),
                (right, size + before_h),
                (right - w, bottom),
                (right - before_w - w, bottom),
                (size - w, bottom - h),
                (size - w, bottom - before_h - h),
            )[number]
        )
    return corners


def make_mosaic(reader: ImageReader, first: int, *, hyp: Hyperparameters, rng: np.random.Generator) -> TrainSample:
    """Return a warped mosaic, uint8 BGR [size, size, 3].

    Args:
        reader: Source of the images; an unreadable tile remains grey.
        first: Index of the first image; the others are random.
        hyp: Ranges of the warp, and the fraction for `copy_paste`.
        rng: Random number generator for all choices.
    """
    size = reader.store.size
    layout = random_layout(reader.store, first, rng=rng)
    warp = random_warp(hyp, canvas_hw=(layout.side, layout.side), out_hw=(size, size), rng=rng)
    if warp.is_axis_aligned and not hyp.copy_paste:
        return warp_tiles(reader, layout, warp)
    sample = paint_canvas(reader, layout)
    if hyp.copy_paste:
        sample = copy_paste(sample, fraction=hyp.copy_paste, rng=rng)
    return TrainSample(image=warp_pixels(sample.image, warp), objects=warp_objects(flatten(sample.objects), warp))


def paint_canvas(reader: ImageReader, layout: Layout) -> TrainSample:
    """Return the whole canvas, with the objects of the readable tiles."""
    canvas = np.full((layout.side, layout.side, 3), PAD_GREY, dtype=np.uint8)
    readable = []
    for tile in layout.tiles:
        x1, y1, x2, y2 = tile.visible(layout.side)
        image = reader.load_resized(tile.index) if x1 < x2 and y1 < y2 else None
        if image is not None:
            canvas[y1:y2, x1:x2] = image[y1 - tile.top : y2 - tile.top, x1 - tile.left : x2 - tile.left]
            readable.append(tile)
    return TrainSample(image=canvas, objects=unflatten(_objects(reader.store, readable, layout.side)))


def warp_tiles(reader: ImageReader, layout: Layout, warp: Warp) -> TrainSample:
    """Return the same as painting the canvas and warping it, but without the canvas; for axis-aligned warps only.

    A pixel belongs to the tile that contains its centre, so that tiles are not blended at their edges; a warped canvas
    would interpolate between the pixels on both sides.
    """
    height, width = warp.out_hw
    image = np.full((height, width, 3), PAD_GREY, dtype=np.uint8)
    readable = []
    for tile in layout.tiles:
        x1, y1, x2, y2 = _window(tile.visible(layout.side), warp)
        scaled = reader.load_scaled(tile.index, scale=warp.scale) if x1 < x2 and y1 < y2 else None
        if scaled is not None:
            pixels, (factor_x, factor_y) = scaled
            direct = warp.after((1 / factor_x, 1 / factor_y), (tile.left, tile.top))
            direct.matrix[:2, 2] -= x1, y1
            window = Warp(matrix=direct.matrix, scale=warp.scale, out_hw=(y2 - y1, x2 - x1))
            warp_pixels(pixels, window, out=image[y1:y2, x1:x2], replicate=True)
            readable.append(tile)
    return TrainSample(image=image, objects=warp_objects(_objects(reader.store, readable, layout.side), warp))


def _window(box: tuple[int, int, int, int], warp: Warp) -> tuple[int, int, int, int]:
    """Return the pixels of the result whose centres are in a box of the canvas: x1, y1, x2, y2."""
    (height, width), edges = warp.out_hw, []
    for axis, value in zip((0, 1, 0, 1), box, strict=True):
        edges.append(math.ceil(value * float(warp.matrix[axis, axis]) + float(warp.matrix[axis, 2]) - 0.5))
    x1, y1, x2, y2 = edges
    return max(0, x1), max(0, y1), min(width, x2), min(height, y2)


def _objects(store: ImageStore, tiles: Sequence[Tile], side: int) -> FlatObjects:
    parts = [store.flat_objects(tile.index) for tile in tiles]
    return merge_on_canvas(parts, [(tile.left, tile.top) for tile in tiles], side=side)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CropRegion:
    """An object to crop: index of its image, visible part of the image (x1, y1, x2, y2), and outline in the image."""

    index: int
    visible: tuple[int, int, int, int]
    polygon: FloatArray
    class_id: int


class LazyCrops(Sequence[Crop]):
    """Crops that are read on access: a sample uses about five of thirty."""

    def __init__(self, reader: ImageReader, regions: Sequence[CropRegion]) -> None:
        self._reader = reader
        self._crop_regions = regions
        self._images: dict[int, Image | None] = {}
        self._crops: dict[int, Crop] = {}

    def __len__(self) -> int:
        return len(self._crop_regions)

    @overload
    def __getitem__(self, index: int) -> Crop: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Crop]: ...
    def __getitem__(self, index: int | slice) -> Crop | Sequence[Crop]:
        """Return a crop; if its image cannot be read, its mask is empty."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._crops:
            self._crops[index] = self._cut(self._crop_regions[index])
        return self._crops[index]

    def _cut(self, region: CropRegion) -> Crop:
        if region.index not in self._images:
            self._images[region.index] = self._reader.load_resized(region.index)
        image = self._images[region.index]
        x1, y1, x2, y2 = region.visible
        masked = polygon_mask(region.polygon - np.array([x1, y1], np.float32), (y2 - y1, x2 - x1))
        if image is None or masked is None:
            return Crop(image=np.zeros((1, 1, 3), np.uint8), mask=np.zeros((1, 1), np.bool_), class_id=region.class_id)
        (left, top), mask = masked
        window = image[y1 + top :, x1 + left :][: mask.shape[0], : mask.shape[1]]
        return Crop(image=window, mask=mask, class_id=region.class_id)


def random_crops(reader: ImageReader, *, rng: np.random.Generator) -> LazyCrops:
    """Return at least 30 random objects with an outline: half of those in each of as many mosaic layouts as it takes.

    The result is empty if the first layout has none, and shorter than 30 if thirty layouts together have fewer.
    """
    regions: list[CropRegion] = []
    for _ in range(MIN_CROPS):
        layout = random_four_tiles(reader.store, int(rng.integers(len(reader.store))), rng=rng)
        available = [region for tile in layout.tiles for region in _crop_regions(reader, tile, layout.side)]
        regions += [available[i] for i in rng.permutation(len(available))[: round(CROP_FRACTION * len(available))]]
        if not 0 < len(regions) < MIN_CROPS:
            break
    return LazyCrops(reader, regions)


def _crop_regions(reader: ImageReader, tile: Tile, side: int) -> list[CropRegion]:
    """Return the outlined objects of a tile with at least one visible pixel."""
    x1, y1, x2, y2 = (edge - corner for edge, corner in zip(tile.visible(side), (tile.left, tile.top) * 2, strict=True))
    objects = unflatten(reader.store.flat_objects(tile.index))
    boxes = np.clip(objects.boxes, [x1, y1, x1, y1], [x2, y2, x2, y2])
    is_visible = np.all(boxes[:, 2:] - boxes[:, :2] >= 1, axis=1)
    return [
        CropRegion(index=tile.index, visible=(x1, y1, x2, y2), polygon=polygon, class_id=class_id)
        for polygon, class_id, visible in zip(objects.polygons, objects.class_ids.tolist(), is_visible, strict=True)
        if len(polygon) and visible
    ]
