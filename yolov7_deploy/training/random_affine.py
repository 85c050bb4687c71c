"""The random change of scale, place and perspective: its matrix, and what it makes of labels and pixels.

Points are counted from the corner of the first pixel, whose centre is 0.5, 0.5: labels lie exactly on their pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from yolov7_deploy.datasets.samples import BoolArray, DoubleArray, IntArray
from yolov7_deploy.image import PAD_GREY, FloatArray, Image
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.objects import FlatObjects
from yolov7_deploy.training.sample import NO_POLYGON, Objects

# An object stays if this much of it is left; the numbers of the official program.
MIN_SIDE_PX = 2.0
MAX_ASPECT = 20.0
MIN_AREA_OF_BOX = 0.10
MIN_AREA_OF_POLYGON = 0.01

GREY = (PAD_GREY, PAD_GREY, PAD_GREY)
_HORIZON = 1e-6  # what is nearer to it or behind it has no place in the image


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Warp:
    """Where each point of a canvas comes to lie.

    Attributes:
        matrix: float64 [3, 3], of homogeneous columns (x, y, 1).
        scale: How much larger things become, by which their areas are judged.
        out_hw: Height and width of the result.
    """

    matrix: DoubleArray
    scale: float
    out_hw: tuple[int, int]

    @property
    def is_upright(self) -> bool:
        """It only scales and shifts."""
        rest = self.matrix[[0, 1, 2, 2], [1, 0, 0, 1]]
        return not rest.any() and self.matrix[2, 2] == 1

    def after(self, scale_xy: tuple[float, float], shift_xy: tuple[float, float]) -> Warp:
        """The warp of something that is first scaled and shifted onto the canvas."""
        first = np.array([[scale_xy[0], 0, shift_xy[0]], [0, scale_xy[1], shift_xy[1]], [0, 0, 1]])
        return Warp(matrix=self.matrix @ first, scale=self.scale, out_hw=self.out_hw)


def draw_warp(
    hyp: Hyperparameters, *, canvas_hw: tuple[int, int], out_hw: tuple[int, int], rng: np.random.Generator
) -> Warp:
    """T S R P C: the middle of the canvas to the origin, perspective, rotation with scale, shear, and to the output.

    The middle of the canvas comes to lie up to `translate` of the output away from its middle.
    """
    limits = np.array([hyp.perspective] * 2 + [hyp.degrees, 0] + [hyp.shear] * 2 + [hyp.translate] * 2)
    low, high = -limits, limits.copy()
    low[3], high[3] = 1 - hyp.scale, 1.1 + hyp.scale
    perspective_x, perspective_y, degrees, scale, shear_x, shear_y, move_x, move_y = rng.uniform(low, high).tolist()
    centre = np.array([[1, 0, -canvas_hw[1] / 2], [0, 1, -canvas_hw[0] / 2], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, 1, 0], [perspective_x, perspective_y, 1]])
    cos, sin = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    turn = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    tan_x, tan_y = math.tan(math.radians(shear_x)), math.tan(math.radians(shear_y))
    shear = np.array([[1, tan_x, 0], [tan_y, 1, 0], [0, 0, 1]])
    place = np.array([[1, 0, (0.5 + move_x) * out_hw[1]], [0, 1, (0.5 + move_y) * out_hw[0]], [0, 0, 1]])
    return Warp(matrix=place @ shear @ turn @ tilt @ centre, scale=scale, out_hw=out_hw)


def warp_pixels(image: Image, warp: Warp, *, out: Image | None = None, replicate: bool = False) -> Image:
    """The image where `warp` puts it, uint8 [*out_hw, 3], bilinear.

    Args:
        image: uint8 [H, W, 3].
        warp: From its points to those of the result.
        out: Where to write it, for example a window of a larger image.
        replicate: Continue the edges of the image instead of grey.
    """
    # OpenCV counts from pixel centres, and wants the way back.
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    whole = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    back = whole @ np.linalg.inv(warp.matrix) @ half
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    border = cv2.BORDER_REPLICATE if replicate else cv2.BORDER_CONSTANT
    size = warp.out_hw[::-1]
    if warp.matrix[2].tolist() == [0, 0, 1]:
        warped = cv2.warpAffine(image, back[:2], size, dst=out, flags=flags, borderMode=border, borderValue=GREY)
    else:
        warped = cv2.warpPerspective(image, back, size, dst=out, flags=flags, borderMode=border, borderValue=GREY)
    assert out is None or np.shares_memory(out, warped)
    return warped  # type: ignore[return-value]


def warp_objects(objects: FlatObjects, warp: Warp) -> Objects:
    """The objects of which enough is left, with boxes as tight as is known, and without outlines.

    The box of an object with an outline is that of the part of the outline's area that is in the result; of one
    without, that of its four corners. Each object takes the road of what is known about it, so that images with
    outlines and images without may be mixed.
    """
    outlined = objects.counts > 0
    boxes = np.zeros((len(objects), 4), dtype=np.float64)
    boxes[~outlined] = _warped_corners(objects.boxes[~outlined], warp)
    if outlined.any():
        counts = objects.counts[outlined]
        boxes[outlined] = _warped_outlines(objects.points, counts, warp)
    sides = boxes[:, 2:] - boxes[:, :2]
    before = np.prod(objects.boxes[:, 2:] - objects.boxes[:, :2], axis=1, dtype=np.float64) * warp.scale**2
    shortest, longest = sides.min(axis=1), sides.max(axis=1)
    threshold = np.where(outlined, MIN_AREA_OF_POLYGON, MIN_AREA_OF_BOX)
    keep = (shortest > MIN_SIDE_PX) & (longest < MAX_ASPECT * shortest) & (sides.prod(axis=1) > threshold * before)
    return Objects(
        boxes=boxes[keep].astype(np.float32),
        class_ids=objects.class_ids[keep],
        polygons=(NO_POLYGON,) * int(np.count_nonzero(keep)),
    )


def _warped_corners(boxes: FloatArray, warp: Warp) -> DoubleArray:
    """The box around the four warped corners of each, cut at the result; float64 [N, 4]."""
    corners, seen = _warped_points(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2), warp)
    corners = corners.reshape(-1, 4, 2)
    found = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    found[~seen.reshape(-1, 4).all(axis=1)] = 0
    return _cut(found, warp.out_hw)


def _warped_outlines(points: FloatArray, counts: IntArray, warp: Warp) -> DoubleArray:
    """The box around the visible part of each outline's area, zeros where there is none; float64 [N, 4]."""
    warped, seen = _warped_points(points, warp)
    starts = np.cumsum(counts) - counts
    low, high = np.minimum.reduceat(warped, starts), np.maximum.reduceat(warped, starts)
    limit = np.array(warp.out_hw[::-1])
    whole = np.concatenate([low, high], axis=1)
    hidden = (low >= limit).any(axis=1) | (high <= 0).any(axis=1) | ~np.logical_and.reduceat(seen, starts)
    whole[hidden] = 0
    crossing = ~hidden & ((low < 0) | (high > limit)).any(axis=1)
    if crossing.any():
        chosen = np.repeat(crossing, counts)
        whole[crossing] = visible_boxes(warped[chosen], counts[crossing], warp.out_hw)
    return whole


def _warped_points(points: FloatArray, warp: Warp) -> tuple[DoubleArray, BoolArray]:
    """Points [P, 2] where they come to lie, float64, and whether they have a place at all."""
    if warp.is_upright:
        return points * warp.matrix[[0, 1], [0, 1]] + warp.matrix[:2, 2], np.ones(len(points), dtype=np.bool_)
    found = points @ warp.matrix[:, :2].T + warp.matrix[:, 2]
    seen = found[:, 2] > _HORIZON
    return found[:, :2] / np.where(seen, found[:, 2], 1)[:, None], seen


def _cut(boxes: DoubleArray, hw: tuple[int, int]) -> DoubleArray:
    cut: DoubleArray = np.clip(boxes, 0, np.array([hw[1], hw[0], hw[1], hw[0]]))
    return cut


def visible_boxes(points: DoubleArray, counts: IntArray, hw: tuple[int, int]) -> DoubleArray:
    """The box around the common area of each polygon and the image, zeros where there is none; float64 [N, 4].

    The corners of that area are ends of edges cut at the image's border, and corners of the image inside the
    polygon (even-odd rule). The official program keeps those of 1000 points along the outline that are in the
    image: it loses an object that fills the image, and the side of one that reaches over a corner.

    Args:
        points: float64 [P, 2], the polygons one behind the other.
        counts: int64 [N], how many points each has; at least 1.
        hw: Height and width of the image.
    """
    starts = np.cumsum(counts) - counts
    following = np.arange(1, len(points) + 1)
    following[starts + counts - 1] = starts
    after = points[following]
    step = after - points
    limit = np.array(hw[::-1], dtype=np.float64)
    enter, leave = _inside(points, step, limit)
    edges = enter <= leave
    parts = np.where(edges[:, None], np.stack([enter, leave], axis=1), 0)
    ends = np.clip(points[:, None] + parts[:, :, None] * step[:, None], 0, limit)  # [P, 2, 2]
    low = np.minimum.reduceat(np.where(edges[:, None], ends.min(axis=1), np.inf), starts)
    high = np.maximum.reduceat(np.where(edges[:, None], ends.max(axis=1), -np.inf), starts)
    corners = np.array([[0, 0], [limit[0], 0], [0, limit[1]], limit])
    for corner in corners:
        covered = _covers(corner, points, after, starts)[:, None]
        low = np.where(covered, np.minimum(low, corner), low)
        high = np.where(covered, np.maximum(high, corner), high)
    boxes = np.concatenate([low, high], axis=1)
    boxes[~np.isfinite(low[:, 0])] = 0
    return boxes


def _inside(start: DoubleArray, step: DoubleArray, limit: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
    """From and up to which part of their length, 0..1, segments are in the rectangle (Liang and Barsky); [P] each."""
    moving = step != 0
    safe = np.where(moving, step, 1)
    near, far = -start / safe, (limit - start) / safe
    between = (start >= 0) & (start <= limit)
    first = np.where(moving, np.minimum(near, far), np.where(between, 0.0, np.inf))
    last = np.where(moving, np.maximum(near, far), np.where(between, 1.0, -np.inf))
    return np.maximum(first.max(axis=1), 0), np.minimum(last.min(axis=1), 1)


def _covers(corner: DoubleArray, start: DoubleArray, end: DoubleArray, starts: IntArray) -> BoolArray:
    """Whether each polygon contains a point: a ray to the right crosses its edges an odd number of times."""
    crossing = (start[:, 1] > corner[1]) != (end[:, 1] > corner[1])
    rise = np.where(crossing, end[:, 1] - start[:, 1], 1)
    at = start[:, 0] + (corner[1] - start[:, 1]) / rise * (end[:, 0] - start[:, 0])
    covers: BoolArray = np.logical_xor.reduceat(crossing & (at > corner[0]), starts)
    return covers
