"""Objects with an outline once more in the same image, or in another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from yolov7_deploy.datasets.samples import BoolArray
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import FloatArray, Image
from yolov7_deploy.training.sample import NO_POLYGON, Objects, Scene, joined

# The numbers of the official recipe.
MAX_HIDDEN = 0.30  # of an object that was there before
SLOTS = (0.75,) * 2 + (0.5,) * 4 + (0.25,) * 4 + (0.125,) * 4 + (0.0625,) * 6  # largest sides, in those of the image
SKIPPED = 0.2  # probability that nothing is tried for a slot
MIN_SLOT_PX = 20
MIN_SIDE_PX = 10
MIN_AREA_PX = 20  # 60 values of three channels


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Crop:
    """One object cut out of its image.

    Attributes:
        image: uint8 BGR [h, w, 3].
        mask: bool [h, w], which pixels are the object's.
        class_id: Its class.
    """

    image: Image
    mask: BoolArray
    class_id: int

    def __post_init__(self) -> None:
        if self.image.shape != (*self.mask.shape, 3) or not self.mask.size:
            raise UsageError(
                f"A crop of {self.image.shape} pixels has a mask of {self.mask.shape}.",
                fix="Give image [h, w, 3] and mask [h, w], cut out of the same place.",
            )


def copy_paste(scene: Scene, *, fraction: float, rng: np.random.Generator) -> Scene:
    """A fraction of the objects with an outline a second time, mirrored to the other side of the image.

    One is left out where it would hide 30 % of the box of another object. A box is that of the pasted mask. Without
    anything pasted the scene comes back as it is.
    """
    outlined = np.array([i for i, polygon in enumerate(scene.objects.polygons) if len(polygon) > 2], dtype=np.int64)
    chosen = rng.permutation(outlined)[: round(fraction * len(outlined))]
    if not len(chosen):
        return scene
    width = np.float32(scene.image.shape[1])
    mirrored = scene.objects.boxes[chosen] * np.array([-1, 1, -1, 1], np.float32) + np.array([width, 0, width, 0])
    mirrored = mirrored[:, [2, 1, 0, 3]].astype(np.float32)
    free = np.all(hidden_fractions(mirrored, scene.objects.boxes) < MAX_HIDDEN, axis=1)
    image, boxes, sources = scene.image.copy(), np.zeros((0, 4), np.float32), []
    for index, box in zip(chosen[free], mirrored[free], strict=True):
        found = mask_of_polygon(scene.objects.polygons[index], scene.image.shape[:2])
        if found is None or np.any(hidden_fractions(box[None], boxes) >= MAX_HIDDEN):
            continue
        (left, top), mask = found
        window = scene.image[top : top + mask.shape[0], left : left + mask.shape[1]]
        left = scene.image.shape[1] - left - mask.shape[1]
        boxes = np.concatenate([boxes, _overwrite(image, window[:, ::-1], mask[:, ::-1], (left, top))[None]])
        sources.append(index)
    added = Objects(
        boxes=boxes,
        class_ids=scene.objects.class_ids[sources],
        polygons=tuple(_mirrored(scene.objects.polygons[index], width) for index in sources),
    )
    return Scene(image=image, objects=joined(scene.objects, added)) if sources else scene


def paste_in(scene: Scene, crops: Sequence[Crop], *, rng: np.random.Generator) -> Scene:
    """Objects of other images in up to 20 places where they hide less than 30 % of the box of every other one.

    A place of random size gets a random crop, scaled to fit into it. A box is that of the pasted mask. Without
    anything pasted the scene comes back as it is.
    """
    if not crops:
        return scene
    slots = random_slots(scene.image.shape[:2], rng=rng)
    slots = slots[np.all(slots[:, 2:] - slots[:, :2] > MIN_SLOT_PX, axis=1)]
    slots = slots[np.all(hidden_fractions(slots, scene.objects.boxes) < MAX_HIDDEN, axis=1)]
    choices = rng.integers(len(crops), size=len(slots))
    image, boxes, class_ids = scene.image.copy(), np.zeros((0, 4), np.float32), []
    for slot, choice in zip(slots, choices, strict=True):
        if np.any(hidden_fractions(slot[None], boxes) >= MAX_HIDDEN):
            continue
        scaled = _scaled_into(crops[choice], slot)
        if scaled is not None:
            boxes = np.concatenate([boxes, _overwrite(image, *scaled, (int(slot[0]), int(slot[1])))[None]])
            class_ids.append(crops[choice].class_id)
    added = Objects(boxes=boxes, class_ids=np.array(class_ids, dtype=np.int64), polygons=(NO_POLYGON,) * len(class_ids))
    return Scene(image=image, objects=joined(scene.objects, added)) if class_ids else scene


def random_slots(image_hw: tuple[int, int], *, rng: np.random.Generator) -> FloatArray:
    """Places for objects as whole pixels, float32 [0..20, 4] xyxy: random sides and centres, cut at the image."""
    size = np.array(image_hw[::-1])
    largest = np.maximum(1, (size * np.array(SLOTS)[:, None]).astype(np.int64))
    sides = rng.integers(1, largest, endpoint=True)
    corners = rng.integers(0, size, size=sides.shape, endpoint=True) - sides // 2
    slots = np.concatenate([np.maximum(corners, 0), np.minimum(corners + sides, size)], axis=1)
    return slots[rng.random(len(slots)) >= SKIPPED].astype(np.float32)


def hidden_fractions(over: FloatArray, below: FloatArray) -> FloatArray:
    """How much of the area of each box `below` [M, 4] each box `over` [N, 4] covers, float32 [N, M]."""
    corners = np.minimum(over[:, None, 2:], below[None, :, 2:]) - np.maximum(over[:, None, :2], below[None, :, :2])
    areas = np.prod(below[:, 2:] - below[:, :2], axis=1)
    shared = np.prod(np.maximum(corners, 0), axis=2)
    fractions: FloatArray = shared / np.maximum(areas, np.finfo(np.float32).tiny)
    return fractions


def mask_of_polygon(polygon: FloatArray, image_hw: tuple[int, ...]) -> tuple[tuple[int, int], BoolArray] | None:
    """The pixels whose centres are inside an outline [K, 2] (even-odd rule), cut at the image; `None` without any.

    OpenCV fills the pixels that the outline touches too: masks and so boxes would be up to a pixel too large.

    Returns:
        x and y of the mask's corner, and the mask, bool [h, w], with a pixel in each outer row and column.
    """
    low = np.clip(np.floor(polygon.min(axis=0)), 0, image_hw[::-1]).astype(np.int64)
    width, height = np.clip(np.ceil(polygon.max(axis=0)), 0, image_hw[::-1]).astype(np.int64) - low
    start = polygon.astype(np.float64) - low - 0.5  # the centre of the first pixel is 0, 0
    end = np.roll(start, -1, axis=0)
    # An edge crosses the rows from ceil(upper y) to ceil(lower y) - 1; each crossing turns its row to the right of it.
    first, last = (np.clip(np.ceil(f(start[:, 1], end[:, 1])), 0, height).astype(int) for f in (np.minimum, np.maximum))
    counts = last - first
    edge = np.repeat(np.arange(len(start)), counts)
    rows = np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    step = (end[edge] - start[edge]).T
    columns = start[edge, 0] + (rows - start[edge, 1]) * step[0] / step[1]
    columns = np.clip(np.ceil(columns), 0, width).astype(np.int64)
    turns = np.zeros((height, width + 1), dtype=np.uint8)
    np.bitwise_xor.at(turns, (rows, columns), 1)
    mask = np.bitwise_xor.accumulate(turns[:, :width], axis=1).view(np.bool_)
    found = extent(mask)
    if found is None:
        return None
    x1, y1, x2, y2 = found
    return (int(low[0]) + x1, int(low[1]) + y1), mask[y1:y2, x1:x2]


def extent(mask: BoolArray) -> tuple[int, int, int, int] | None:
    """The box of a mask's pixels, x1, y1, x2, y2 with the far edges outside; `None` where it has none."""
    columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(columns) else None


def _overwrite(image: Image, pixels: Image, mask: BoolArray, corner_xy: tuple[int, int]) -> FloatArray:
    """Puts the masked pixels into `image`, and gives their box."""
    (left, top), (height, width), found = corner_xy, mask.shape, extent(mask)
    assert found is not None
    image[top : top + height, left : left + width][mask] = pixels[mask]
    return np.array(found, dtype=np.float32) + np.array([left, top, left, top], dtype=np.float32)


def _scaled_into(crop: Crop, slot: FloatArray) -> tuple[Image, BoolArray] | None:
    """The crop as large as fits into the slot; `None` where too little of it is left."""
    height, width = crop.mask.shape
    ratio = min(float(slot[2] - slot[0]) / width, float(slot[3] - slot[1]) / height)
    size = round(width * ratio), round(height * ratio)
    if min(size) <= MIN_SIDE_PX:
        return None
    mask: BoolArray = cv2.resize(crop.mask.astype(np.uint8) * 255, size) > 127
    if np.count_nonzero(mask) <= MIN_AREA_PX:
        return None
    return cv2.resize(crop.image, size), mask  # type: ignore[return-value]


def _mirrored(polygon: FloatArray, width: np.float32) -> FloatArray:
    return np.stack([width - polygon[:, 0], polygon[:, 1]], axis=1).astype(np.float32)
