"""Training samples and batches, and arithmetic on the objects of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from yolov7_deploy.datasets.samples import IntArray
from yolov7_deploy.image import FloatArray, Image

NO_POLYGON = np.zeros((0, 2), dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Objects:
    """The objects of an image, in pixels of that image.

    Attributes:
        boxes: float32 [N, 4] xyxy.
        class_ids: int64 [N].
        polygons: The outline of each box, float32 [K, 2] xy; [0, 2] if only the box is known.
    """

    boxes: FloatArray
    class_ids: IntArray
    polygons: tuple[FloatArray, ...]

    def __len__(self) -> int:
        return len(self.class_ids)


NO_OBJECTS = Objects(boxes=np.zeros((0, 4), np.float32), class_ids=np.zeros(0, np.int64), polygons=())


def concatenate(first: Objects, second: Objects) -> Objects:
    """Return the objects of `first`, followed by those of `second`."""
    return Objects(
        boxes=np.concatenate([first.boxes, second.boxes]),
        class_ids=np.concatenate([first.class_ids, second.class_ids]),
        polygons=(*first.polygons, *second.polygons),
    )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class FlatObjects:
    """`Objects` with all outlines in one array, so that one operation changes all labels at once.

    Attributes:
        boxes: float32 [N, 4] xyxy.
        class_ids: int64 [N].
        points: float32 [P, 2] xy, the concatenated outlines.
        counts: int64 [N], number of points of each outline; 0 if only the box is known.
    """

    boxes: FloatArray
    class_ids: IntArray
    points: FloatArray
    counts: IntArray

    def __len__(self) -> int:
        return len(self.class_ids)


def flatten(objects: Objects) -> FlatObjects:
    """Return the same objects with all outlines in one array."""
    return FlatObjects(
        boxes=objects.boxes,
        class_ids=objects.class_ids,
        points=np.concatenate([NO_POLYGON, *objects.polygons]),
        counts=np.array([len(polygon) for polygon in objects.polygons], dtype=np.int64),
    )


def unflatten(objects: FlatObjects) -> Objects:
    """Return the same objects with one array per outline (views)."""
    ends = np.cumsum(objects.counts).tolist()
    starts = [0, *ends[:-1]]
    return Objects(
        boxes=objects.boxes,
        class_ids=objects.class_ids,
        polygons=tuple(objects.points[start:end] for start, end in zip(starts, ends, strict=False)),
    )


def merge_on_canvas(parts: Sequence[FlatObjects], corners_xy: Sequence[tuple[int, int]], *, side: int) -> FlatObjects:
    """Return the objects of several images on one canvas [side, side], shifted by the image corners and clipped.

    Outlines are clipped by moving outside points to the border, as in the official program.
    """
    if not parts:
        return flatten(NO_OBJECTS)
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainSample:
    """An image, uint8 BGR [H, W, 3], and its objects."""

    image: Image
    objects: Objects


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """The input of one training step.

    Attributes:
        images: uint8 RGB [B, H, W, 3]; NHWC, so that the device converts layout and type in one pass.
        targets: float32 [N, 6]: index of the image in the batch, class, centre x, centre y, width, height; the last
            four as fractions of image width and height.
        paths: The first image file of each sample, for messages.
        problems: Images that could not be read for this batch and the reason, one message each.
    """

    images: Tensor
    targets: Tensor
    paths: tuple[Path, ...]
    problems: tuple[str, ...] = ()

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory; torch's `DataLoader` calls this method by name."""
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory())
