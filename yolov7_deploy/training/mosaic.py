"""Several images on one canvas, of which a warped part is shown.

What lies where is planned on sizes alone. Then either the canvas is painted and warped, or, where the warp only scales
and shifts, each image that the result shows is warped straight into its rectangle of it: no canvas, nothing decoded
in vain, and images that come out small are decoded small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from yolov7_deploy.image import PAD_GREY, FloatArray, Image
from yolov7_deploy.training.copy_paste import Crop, copy_paste, mask_of_polygon
from yolov7_deploy.training.dataset import ImageReader, ImageStore
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.objects import FlatObjects, flattened, placed, unflattened
from yolov7_deploy.training.random_affine import Warp, draw_warp, warp_objects, warp_pixels
from yolov7_deploy.training.sample import Scene

FOUR_OF_ALL = 0.8  # the others have nine tiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """An image, its size, and where its first pixel lies on the canvas (also outside of it)."""

    index: int
    hw: tuple[int, int]
    left: int
    top: int

    def visible(self, side: int) -> tuple[int, int, int, int]:
        """The part of the canvas [side, side] that it covers: x1, y1, x2, y2."""
        x2, y2 = min(self.left + self.hw[1], side), min(self.top + self.hw[0], side)
        return max(self.left, 0), max(self.top, 0), x2, y2


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Tiles on a square canvas; a later one covers an earlier one."""

    tiles: tuple[Tile, ...]
    side: int


def draw_layout(store: ImageStore, first: int, *, rng: np.random.Generator) -> Layout:
    """A mosaic that begins with image `first`: four of five have four tiles, the others nine."""
    return draw_four(store, first, rng=rng) if rng.random() < FOUR_OF_ALL else draw_nine(store, first, rng=rng)


def draw_four(store: ImageStore, first: int, *, rng: np.random.Generator) -> Layout:
    """Four images that meet in a random point of the inner half of a canvas twice as large as an image."""
    size = store.size
    x, y = (int(value) for value in rng.uniform(size / 2, 3 * size / 2, size=2))
    indices = [first, *rng.integers(len(store), size=3).tolist()]
    sides = [store.hw(index) for index in indices]
    tiles = (
        Tile(index=index, hw=(h, w), left=x if number % 2 else x - w, top=y if number > 1 else y - h)
        for number, (index, (h, w)) in enumerate(zip(indices, sides, strict=True))
    )
    return Layout(tiles=tuple(tiles), side=2 * size)


def draw_nine(store: ImageStore, first: int, *, rng: np.random.Generator) -> Layout:
    """A random window, twice as large as an image, of nine images around the first one."""
    size = store.size
    indices = [first, *rng.integers(len(store), size=8).tolist()]
    offset_x, offset_y = (int(value) for value in rng.uniform(0, size, size=2))
    sides = [store.hw(index) for index in indices]
    tiles = (
        Tile(index=index, hw=hw, left=left - offset_x, top=top - offset_y)
        for index, hw, (left, top) in zip(indices, sides, corners_of_nine(sides, size), strict=True)
    )
    return Layout(tiles=tuple(tiles), side=2 * size)


def corners_of_nine(sides: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Left and top of nine images of the given (height, width): the first at (size, size), the others around it.

    They go round from above the first one to the right, as in the official program.
    """
    right, bottom = size + sides[0][1], size + sides[0][0]
    corners = []
    for number, (h, w) in enumerate(sides):
        before_h, before_w = sides[max(0, number - 1)]
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


def mosaic_scene(
    reader: ImageReader, first: int, *, hyp: Hyperparameters, rng: np.random.Generator, is_plain: bool = False
) -> Scene:
    """A warped mosaic, uint8 BGR [size, size], that begins with image `first`.

    Args:
        reader: Where images come from; a tile that cannot be read stays grey.
        first: Index of an image; the others are random.
        hyp: How far the warp goes, and the fraction of `copy_paste`.
        rng: Of every choice.
        is_plain: Paint and warp the whole canvas also where it is not needed.
    """
    size = reader.store.size
    layout = draw_layout(reader.store, first, rng=rng)
    warp = draw_warp(hyp, canvas_hw=(layout.side, layout.side), out_hw=(size, size), rng=rng)
    if warp.is_upright and not hyp.copy_paste and not is_plain:
        return warp_tiles(reader, layout, warp)
    scene = paint(reader, layout)
    if hyp.copy_paste:
        scene = copy_paste(scene, fraction=hyp.copy_paste, rng=rng)
    return Scene(image=warp_pixels(scene.image, warp), objects=warp_objects(flattened(scene.objects), warp))


def paint(reader: ImageReader, layout: Layout) -> Scene:
    """The whole canvas, with the objects of the tiles that could be read."""
    canvas = np.full((layout.side, layout.side, 3), PAD_GREY, dtype=np.uint8)
    read = []
    for tile in layout.tiles:
        x1, y1, x2, y2 = tile.visible(layout.side)
        image = reader.resized(tile.index) if x1 < x2 and y1 < y2 else None
        if image is not None:
            canvas[y1:y2, x1:x2] = image[y1 - tile.top : y2 - tile.top, x1 - tile.left : x2 - tile.left]
            read.append(tile)
    return Scene(image=canvas, objects=unflattened(_objects(reader.store, read, layout.side)))


def warp_tiles(reader: ImageReader, layout: Layout, warp: Warp) -> Scene:
    """What `warp` shows of the canvas, without painting it; only for a warp that is upright.

    A pixel belongs to the tile in which its centre lies, so that tiles meet without a seam, where the canvas would
    mix the pixels on both sides.
    """
    height, width = warp.out_hw
    image = np.full((height, width, 3), PAD_GREY, dtype=np.uint8)
    read = []
    for tile in layout.tiles:
        x1, y1, x2, y2 = _window(tile.visible(layout.side), warp)
        found = reader.image(tile.index, scale=warp.scale) if x1 < x2 and y1 < y2 else None
        if found is not None:
            pixels, (factor_x, factor_y) = found
            straight = warp.after((1 / factor_x, 1 / factor_y), (tile.left, tile.top))
            straight.matrix[:2, 2] -= x1, y1
            window = Warp(matrix=straight.matrix, scale=warp.scale, out_hw=(y2 - y1, x2 - x1))
            warp_pixels(pixels, window, out=image[y1:y2, x1:x2], replicate=True)
            read.append(tile)
    return Scene(image=image, objects=warp_objects(_objects(reader.store, read, layout.side), warp))


def _window(box: tuple[int, int, int, int], warp: Warp) -> tuple[int, int, int, int]:
    """The pixels of the result whose centres lie in a box of the canvas: x1, y1, x2, y2."""
    (height, width), edges = warp.out_hw, []
    for axis, value in zip((0, 1, 0, 1), box, strict=True):
        edges.append(math.ceil(value * float(warp.matrix[axis, axis]) + float(warp.matrix[axis, 2]) - 0.5))
    x1, y1, x2, y2 = edges
    return max(0, x1), max(0, y1), min(width, x2), min(height, y2)


def _objects(store: ImageStore, tiles: Sequence[Tile], side: int) -> FlatObjects:
    parts = [store.flat_objects(tile.index) for tile in tiles]
    return placed(parts, [(tile.left, tile.top) for tile in tiles], side=side)


ENOUGH = 30  # numbers of the official recipe
TAKEN = 0.5  # of the outlined objects of a mosaic


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cutting:
    """Where an object is: its image, the part of that in sight (x1, y1, x2, y2), and its outline there."""

    index: int
    part: tuple[int, int, int, int]
    polygon: FloatArray
    class_id: int


class Crops(Sequence[Crop]):
    """Crops that are read when they are asked for: of thirty that are at hand a scene takes about five."""

    def __init__(self, reader: ImageReader, cuttings: Sequence[Cutting]) -> None:
        self._reader = reader
        self._cuttings = cuttings
        self._images: dict[int, Image | None] = {}
        self._made: dict[int, Crop] = {}

    def __len__(self) -> int:
        return len(self._cuttings)

    @overload
    def __getitem__(self, index: int) -> Crop: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Crop]: ...
    def __getitem__(self, index: int | slice) -> Crop | Sequence[Crop]:
        """One crop; of an image that cannot be read, one without a pixel of an object."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._made:
            self._made[index] = self._cut(self._cuttings[index])
        return self._made[index]

    def _cut(self, cutting: Cutting) -> Crop:
        if cutting.index not in self._images:
            self._images[cutting.index] = self._reader.resized(cutting.index)
        image = self._images[cutting.index]
        x1, y1, x2, y2 = cutting.part
        found = mask_of_polygon(cutting.polygon - np.array([x1, y1], np.float32), (y2 - y1, x2 - x1))
        if image is None or found is None:
            return Crop(image=np.zeros((1, 1, 3), np.uint8), mask=np.zeros((1, 1), np.bool_), class_id=cutting.class_id)
        (left, top), mask = found
        window = image[y1 + top :, x1 + left :][: mask.shape[0], : mask.shape[1]]
        return Crop(image=window, mask=mask, class_id=cutting.class_id)


def draw_crops(reader: ImageReader, *, rng: np.random.Generator) -> Crops:
    """At least 30 random objects with an outline, half of those in each of several mosaics that are never painted.

    None where a first mosaic gives none, and fewer where outlines are so rare that thirty mosaics hold fewer.
    """
    cuttings: list[Cutting] = []
    for _ in range(ENOUGH):
        layout = draw_four(reader.store, int(rng.integers(len(reader.store))), rng=rng)
        found = [cutting for tile in layout.tiles for cutting in _cuttings(reader, tile, layout.side)]
        cuttings += [found[i] for i in rng.permutation(len(found))[: round(TAKEN * len(found))]]
        if not 0 < len(cuttings) < ENOUGH:
            break
    return Crops(reader, cuttings)


def _cuttings(reader: ImageReader, tile: Tile, side: int) -> list[Cutting]:
    """The outlined objects of a tile of which a pixel at least is in sight."""
    x1, y1, x2, y2 = (edge - corner for edge, corner in zip(tile.visible(side), (tile.left, tile.top) * 2, strict=True))
    objects = unflattened(reader.store.flat_objects(tile.index))
    boxes = np.clip(objects.boxes, [x1, y1, x1, y1], [x2, y2, x2, y2])
    in_sight = np.all(boxes[:, 2:] - boxes[:, :2] >= 1, axis=1)
    return [
        Cutting(index=tile.index, part=(x1, y1, x2, y2), polygon=polygon, class_id=class_id)
        for polygon, class_id, seen in zip(objects.polygons, objects.class_ids.tolist(), in_sight, strict=True)
        if len(polygon) and seen
    ]
