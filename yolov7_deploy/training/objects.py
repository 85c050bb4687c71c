"""Objects with all their outlines in one array, so that arithmetic on labels is a step for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yolov7_deploy.datasets.samples import IntArray
from yolov7_deploy.image import FloatArray
from yolov7_deploy.training.sample import NO_OBJECTS, Objects


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FlatObjects:
    """What `Objects` says, with the outlines one behind the other.

    Attributes:
        boxes: float32 [N, 4] xyxy.
        class_ids: int64 [N].
        points: float32 [P, 2] xy, the outline of the first object, then that of the second, and so on.
        counts: int64 [N], how many points each has; 0 where only a box is known.
    """

    boxes: FloatArray
    class_ids: IntArray
    points: FloatArray
    counts: IntArray

    def __len__(self) -> int:
        return len(self.class_ids)


def flattened(objects: Objects) -> FlatObjects:
    """The same objects with their outlines in one array."""
    return FlatObjects(
        boxes=objects.boxes,
        class_ids=objects.class_ids,
        points=np.concatenate([np.zeros((0, 2), np.float32), *objects.polygons]),
        counts=np.array([len(polygon) for polygon in objects.polygons], dtype=np.int64),
    )


def unflattened(objects: FlatObjects) -> Objects:
    """The same objects with an array for each outline (views)."""
    ends = np.cumsum(objects.counts).tolist()
    starts = [0, *ends[:-1]]
    return Objects(
        boxes=objects.boxes,
        class_ids=objects.class_ids,
        polygons=tuple(objects.points[start:end] for start, end in zip(starts, ends, strict=False)),
    )


def placed(parts: Sequence[FlatObjects], corners_xy: Sequence[tuple[int, int]], *, side: int) -> FlatObjects:
    """The objects of several images on one canvas [side, side]: moved to their image's corner, cut at its border.

    Outlines are cut by moving the points outside to the border, as the official program does.
    """
    if not parts:
        return flattened(NO_OBJECTS)
    shift = np.repeat(np.array(corners_xy, np.float32).reshape(-1, 2), [len(part) for part in parts], axis=0)
    counts = np.concatenate([part.counts for part in parts])
    boxes = np.concatenate([part.boxes for part in parts]) + np.concatenate([shift, shift], axis=1)
    points = np.concatenate([part.points for part in parts]) + np.repeat(shift, counts, axis=0)
    return FlatObjects(
        boxes=np.clip(boxes, 0, side, out=boxes),
        class_ids=np.concatenate([part.class_ids for part in parts]),
        points=np.clip(points, 0, side, out=points),
        counts=counts,
    )
