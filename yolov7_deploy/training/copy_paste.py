"""Copy-paste augmentation: objects with an outline are pasted into the same image or into another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from yolov7_deploy.datasets.samples import BoolArray
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import FloatArray, Image
from yolov7_deploy.training.sample import NO_POLYGON, Objects, TrainSample, concatenate

# Values of the official recipe.
MAX_IOA = 0.30  # a pasted box can cover less than this of the area of another box
# Upper limits for the sides of the boxes to paste into, as fractions of the image.
PASTE_SIDES = (0.75,) * 2 + (0.5,) * 4 + (0.25,) * 4 + (0.125,) * 4 + (0.0625,) * 6
SKIP_PROBABILITY = 0.2  # of each box
MIN_PASTE_BOX_PX = 20
MIN_SIDE_PX = 10
MIN_AREA_PX = 20  # 60 values of three channels


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Crop:
    """An object cut out of its image.

    Attributes:
        image: uint8 BGR [h, w, 3].
        mask: bool [h, w], true for the pixels of the object.
        class_id: Class of the object.
    """

    image: Image
    mask: BoolArray
    class_id: int

    def __post_init__(self) -> None:
        if self.image.shape != (*self.mask.shape, 3) or not self.mask.size:
            raise UsageError(
                f"A crop of {self.image.shape} pixels has a mask of {self.mask.shape}.",
                fix="Pass image [h, w, 3] and mask [h, w] of the same window.",
            )


def copy_paste(sample: TrainSample, *, fraction: float, rng: np.random.Generator) -> TrainSample:
    """Paste a fraction of the objects with an outline again, mirrored to the other side of the image.

    An object is skipped if it would cover 30 % of the box of another one. The new box encloses the pasted mask. If
    nothing is pasted, `sample` itself is returned.
    """
    outlined = np.array([i for i, polygon in enumerate(sample.objects.polygons) if len(polygon) > 2], dtype=np.int64)
    chosen = rng.permutation(outlined)[: round(fraction * len(outlined))]
    if not len(chosen):
        return sample
    width = np.float32(sample.image.shape[1])
    mirrored = sample.objects.boxes[chosen] * np.array([-1, 1, -1, 1], np.float32) + np.array([width, 0, width, 0])
    mirrored = mirrored[:, [2, 1, 0, 3]].astype(np.float32)
    free = np.all(box_ioa(mirrored, sample.objects.boxes) < MAX_IOA, axis=1)
    image, boxes, sources = sample.image.copy(), np.zeros((0, 4), np.float32), []
    for index, box in zip(chosen[free], mirrored[free], strict=True):
        masked = polygon_mask(sample.objects.polygons[index], sample.image.shape[:2])
        if masked is None or np.any(box_ioa(box[None], boxes) >= MAX_IOA):
            continue
        (left, top), mask = masked
        window = sample.image[top : top + mask.shape[0], left : left + mask.shape[1]]
        left = sample.image.shape[1] - left - mask.shape[1]
        boxes = np.concatenate([boxes, _overwrite(image, window[:, ::-1], mask[:, ::-1], (left, top))[None]])
        sources.append(index)
    added = Objects(
        boxes=boxes,
        class_ids=sample.objects.class_ids[sources],
        polygons=tuple(_mirror(sample.objects.polygons[index], width) for index in sources),
    )
    return TrainSample(image=image, objects=concatenate(sample.objects, added)) if sources else sample


def paste_in(sample: TrainSample, crops: Sequence[Crop], *, rng: np.random.Generator) -> TrainSample:
    """Paste objects of other images into up to 20 random boxes.

    Each random box gets a random crop, scaled to fit into it, unless it covers 30 % of another box. The new box
    encloses the pasted mask. If nothing is pasted, `sample` itself is returned.
    """
    if not crops:
        return sample
    paste_boxes = random_paste_boxes(sample.image.shape[:2], rng=rng)
    paste_boxes = paste_boxes[np.all(paste_boxes[:, 2:] - paste_boxes[:, :2] > MIN_PASTE_BOX_PX, axis=1)]
    paste_boxes = paste_boxes[np.all(box_ioa(paste_boxes, sample.objects.boxes) < MAX_IOA, axis=1)]
    choices = rng.integers(len(crops), size=len(paste_boxes))
    image, boxes, class_ids = sample.image.copy(), np.zeros((0, 4), np.float32), []
    for box, choice in zip(paste_boxes, choices, strict=True):
        if np.any(box_ioa(box[None], boxes) >= MAX_IOA):
            continue
        scaled = _scale_crop(crops[choice], box)
        if scaled is not None:
            boxes = np.concatenate([boxes, _overwrite(image, *scaled, (int(box[0]), int(box[1])))[None]])
            class_ids.append(crops[choice].class_id)
    added = Objects(boxes=boxes, class_ids=np.array(class_ids, dtype=np.int64), polygons=(NO_POLYGON,) * len(class_ids))
    return TrainSample(image=image, objects=concatenate(sample.objects, added)) if class_ids else sample


def random_paste_boxes(image_hw: tuple[int, int], *, rng: np.random.Generator) -> FloatArray:
    """Return random boxes with whole-pixel corners, float32 [0..20, 4] xyxy, clipped to the image."""
    size = np.array(image_hw[::-1])
    largest = np.maximum(1, (size * np.array(PASTE_SIDES)[:, None]).astype(np.int64))
    sides = rng.integers(1, largest, endpoint=True)
    corners = rng.integers(0, size, size=sides.shape, endpoint=True) - sides // 2
    paste_boxes = np.concatenate([np.maximum(corners, 0), np.minimum(corners + sides, size)], axis=1)
    return paste_boxes[rng.random(len(paste_boxes)) >= SKIP_PROBABILITY].astype(np.float32)


def box_ioa(over: FloatArray, below: FloatArray) -> FloatArray:
    """Return the intersection of each pair of boxes, `over` [N, 4] and `below` [M, 4], divided by the area of `below`.

    Returns:
        float32 [N, M].
    """
    corners = np.minimum(over[:, None, 2:], below[None, :, 2:]) - np.maximum(over[:, None, :2], below[None, :, :2])
    areas = np.prod(below[:, 2:] - below[:, :2], axis=1)
    shared = np.prod(np.maximum(corners, 0), axis=2)
    fractions: FloatArray = shared / np.maximum(areas, np.finfo(np.float32).tiny)
    return fractions


def polygon_mask(polygon: FloatArray, image_hw: tuple[int, ...]) -> tuple[tuple[int, int], BoolArray] | None:
    """Return the mask of the pixels whose centres are inside a polygon [K, 2] (even-odd rule), clipped to the image.

    `cv2.fillPoly` also fills pixels that the outline touches: masks, and so boxes, would be up to a pixel too large.

    Returns:
        x and y of the corner of the mask, and the mask, bool [h, w], with a pixel in each outer row and column; `None`
        if the mask is empty.
    """
    low = np.clip(np.floor(polygon.min(axis=0)), 0, image_hw[::-1]).astype(np.int64)
    width, height = np.clip(np.ceil(polygon.max(axis=0)), 0, image_hw[::-1]).astype(np.int64) - low
    start = polygon.astype(np.float64) - low - 0.5  # the centre of the first pixel is 0, 0
    end = np.roll(start, -1, axis=0)
    # An edge crosses the rows from ceil(upper y) to ceil(lower y) - 1; each crossing inverts the row right of it.
    first, last = (np.clip(np.ceil(f(start[:, 1], end[:, 1])), 0, height).astype(int) for f in (np.minimum, np.maximum))
    counts = last - first
    edge = np.repeat(np.arange(len(start)), counts)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    step = (end[edge] - start[edge]).T
    columns = start[edge, 0] + (rows - start[edge, 1]) * step[0] / step[1]
    columns = np.clip(np.ceil(columns), 0, width).astype(np.int64)
    crossings = np.zeros((height, width + 1), dtype=np.uint8)
    np.bitwise_xor.at(crossings, (rows, columns), 1)
    mask = np.bitwise_xor.accumulate(crossings[:, :width], axis=1).view(np.bool_)
    box = mask_box(mask)
    if box is None:
        return None
    x1, y1, x2, y2 = box
    return (int(low[0]) + x1, int(low[1]) + y1), mask[y1:y2, x1:x2]


def mask_box(mask: BoolArray) -> tuple[int, int, int, int] | None:
    """Return the box around the pixels of a mask, x1, y1, x2, y2 (x2 and y2 exclusive); `None` if it is empty."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(columns) else None


def _overwrite(image: Image, pixels: Image, mask: BoolArray, corner_xy: tuple[int, int]) -> FloatArray:
    """Write the masked pixels into `image`, and return their box."""
    (left, top), (height, width), box = corner_xy, mask.shape, mask_box(mask)
    assert box is not None
    image[top : top + height, left : left + width][mask] = pixels[mask]
    return np.array(box, dtype=np.float32) + np.array([left, top, left, top], dtype=np.float32)


def _scale_crop(crop: Crop, box: FloatArray) -> tuple[Image, BoolArray] | None:
    """Return pixels and mask of the crop, scaled to fit into the box; `None` if they become too small."""
    height, width = crop.mask.shape
    ratio = min(float(box[2] - box[0]) / width, float(box[3] - box[1]) / height)
    size = round(width * ratio), round(height * ratio)
    if min(size) <= MIN_SIDE_PX:
        return None
    mask: BoolArray = cv2.resize(crop.mask.astype(np.uint8) * 255, size) > 127
    if np.count_nonzero(mask) <= MIN_AREA_PX:
        return None
    return cv2.resize(crop.image, size), mask  # type: ignore[return-value]


def _mirror(polygon: FloatArray, width: np.float32) -> FloatArray:
    return np.stack([width - polygon[:, 0], polygon[:, 1]], axis=1).astype(np.float32)
