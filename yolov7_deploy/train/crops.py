"""Objects of other pictures for paste-in, cut out only when one is really pasted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from yolov7_deploy.image import FloatArray, Image
from yolov7_deploy.train.flat_objects import unflattened
from yolov7_deploy.train.mosaic import Tile, draw_four
from yolov7_deploy.train.paste import Crop, mask_of_polygon
from yolov7_deploy.train.reader import PictureReader

ENOUGH = 30  # numbers of the official recipe
TAKEN = 0.5  # of the outlined objects of a mosaic


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cutting:
    """Where an object is: its picture, the part of that in sight (x1, y1, x2, y2), and its outline there."""

    index: int
    part: tuple[int, int, int, int]
    polygon: FloatArray
    class_id: int


class Crops(Sequence[Crop]):
    """Crops that are read when they are asked for: of thirty that are at hand a scene takes about five."""

    def __init__(self, reader: PictureReader, cuttings: Sequence[Cutting]) -> None:
        self._reader = reader
        self._cuttings = cuttings
        self._pictures: dict[int, Image | None] = {}
        self._made: dict[int, Crop] = {}

    def __len__(self) -> int:
        return len(self._cuttings)

    @overload
    def __getitem__(self, index: int) -> Crop: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Crop]: ...
    def __getitem__(self, index: int | slice) -> Crop | Sequence[Crop]:
        """One crop; of a picture that cannot be read, one without a pixel of an object."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index not in self._made:
            self._made[index] = self._cut(self._cuttings[index])
        return self._made[index]

    def _cut(self, cutting: Cutting) -> Crop:
        if cutting.index not in self._pictures:
            self._pictures[cutting.index] = self._reader.resized(cutting.index)
        image = self._pictures[cutting.index]
        x1, y1, x2, y2 = cutting.part
        found = mask_of_polygon(cutting.polygon - np.array([x1, y1], np.float32), (y2 - y1, x2 - x1))
        if image is None or found is None:
            return Crop(image=np.zeros((1, 1, 3), np.uint8), mask=np.zeros((1, 1), np.bool_), class_id=cutting.class_id)
        (left, top), mask = found
        window = image[y1 + top :, x1 + left :][: mask.shape[0], : mask.shape[1]]
        return Crop(image=window, mask=mask, class_id=cutting.class_id)


def draw_crops(reader: PictureReader, *, rng: np.random.Generator) -> Crops:
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


def _cuttings(reader: PictureReader, tile: Tile, side: int) -> list[Cutting]:
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
