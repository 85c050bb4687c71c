"""Random affine and perspective transforms: the matrix, and its application to labels and pixels.

The origin of coordinates is the corner of the first pixel, whose centre is (0.5, 0.5), so that labels match pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from yolov7_deploy.datasets.samples import BoolArray, DoubleArray, IntArray
from yolov7_deploy.image import PAD_GREY, FloatArray, Image
from yolov7_deploy.training.hyperparameters import Hyperparameters
from yolov7_deploy.training.sample import NO_POLYGON, FlatObjects, Objects

# An object is kept if this much of it remains; values of the official program.
MIN_SIDE_PX = 2.0
MAX_ASPECT = 20.0
MIN_BOX_AREA = 0.10  # fraction of the scaled area before the warp
MIN_POLYGON_AREA = 0.01  # the same for an object with an outline

GREY = (PAD_GREY, PAD_GREY, PAD_GREY)
_HORIZON = 1e-6  # points with a smaller homogeneous coordinate cannot be projected


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Warp:
    """A transform of the points of a canvas.

    Attributes:
        matrix: float64 [3, 3], for homogeneous columns (x, y, 1).
        scale: The scale factor; areas are compared after multiplication by its square.
        out_hw: Height and width of the result.
    """

    matrix: DoubleArray
    scale: float
    out_hw: tuple[int, int]

    @property
    def is_axis_aligned(self) -> bool:
        """True if the warp only scales and shifts."""
        off_diagonal = self.matrix[[0, 1, 2, 2], [1, 0, 0, 1]]
        return not off_diagonal.any() and self.matrix[2, 2] == 1

    def after(self, scale_xy: tuple[float, float], shift_xy: tuple[float, float]) -> Warp:
        """Return this warp after a scale and a shift onto the canvas, as one warp."""
        first = np.array([[scale_xy[0], 0, shift_xy[0]], [0, scale_xy[1], shift_xy[1]], [0, 0, 1]])
        return Warp(matrix=self.matrix @ first, scale=self.scale, out_hw=self.out_hw)


def random_warp(
    hyp: Hyperparameters, *, canvas_hw: tuple[int, int], out_hw: tuple[int, int], rng: np.random.Generator
) -> Warp:
    """Return the random warp T S R P C: canvas centre to origin, perspective, rotation and scale, shear, translation.

    The centre of the canvas is moved to the centre of the output, plus or minus up to `translate` of the output size.
    """
    limits = np.array([hyp.perspective] * 2 + [hyp.degrees, 0] + [hyp.shear] * 2 + [hyp.translate] * 2)
    low, high = -limits, limits.copy()
    low[3], high[3] = 1 - hyp.scale, 1.1 + hyp.scale
    perspective_x, perspective_y, degrees, scale, shear_x, shear_y, move_x, move_y = rng.uniform(low, high).tolist()
    centre = np.array([[1, 0, -canvas_hw[1] / 2], [0, 1, -canvas_hw[0] / 2], [0, 0, 1]])
    perspective = np.array([[1, 0, 0], [0, 1, 0], [perspective_x, perspective_y, 1]])
    cos, sin = scale * math.cos(math.radians(degrees)), scale * math.sin(math.radians(degrees))
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    tan_x, tan_y = math.tan(math.radians(shear_x)), math.tan(math.radians(shear_y))
    shear = np.array([[1, tan_x, 0], [tan_y, 1, 0], [0, 0, 1]])
    translation = np.array([[1, 0, (0.5 + move_x) * out_hw[1]], [0, 1, (0.5 + move_y) * out_hw[0]], [0, 0, 1]])
    return Warp(matrix=translation @ shear @ rotation @ perspective @ centre, scale=scale, out_hw=out_hw)


def warp_pixels(image: Image, warp: Warp, *, out: Image | None = None, replicate: bool = False) -> Image:
    """Return the warped image, uint8 [*out_hw, 3], with bilinear interpolation.

    Args:
        image: uint8 [H, W, 3].
        warp: Maps points of the image to points of the result.
        out: Output array, for example a window of a larger image.
        replicate: Fill outside of the image with its edge pixels instead of grey.
    """
    # In OpenCV, (0, 0) is the centre of the first pixel, and the matrix maps the result to the image.
    from_opencv = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    to_opencv = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])
    inverse = to_opencv @ np.linalg.inv(warp.matrix) @ from_opencv
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    border = cv2.BORDER_REPLICATE if replicate else cv2.BORDER_CONSTANT
    size = warp.out_hw[::-1]
    if warp.matrix[2].tolist() == [0, 0, 1]:
        warped = cv2.warpAffine(image, inverse[:2], size, dst=out, flags=flags, borderMode=border, borderValue=GREY)
    else:
        warped = cv2.warpPerspective(image, inverse, size, dst=out, flags=flags, borderMode=border, borderValue=GREY)
    assert out is None or np.shares_memory(out, warped)
    return warped  # type: ignore[return-value]


def warp_objects(objects: FlatObjects, warp: Warp) -> Objects:
    """Return the warped objects that remain large enough, without outlines.

    The new box of an object with an outline encloses the visible part of the outline's area; the box of an object
    without one encloses its four warped corners. The choice is made per object, so that images with and without
    outlines can be mixed.
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
    threshold = np.where(outlined, MIN_POLYGON_AREA, MIN_BOX_AREA)
    keep = (shortest > MIN_SIDE_PX) & (longest < MAX_ASPECT * shortest) & (sides.prod(axis=1) > threshold * before)
    return Objects(
        boxes=boxes[keep].astype(np.float32),
        class_ids=objects.class_ids[keep],
        polygons=(NO_POLYGON,) * int(np.count_nonzero(keep)),
    )


def _warped_corners(boxes: FloatArray, warp: Warp) -> DoubleArray:
    """Return the box around the four warped corners of each box, clipped to the result; float64 [N, 4]."""
    corners, is_valid = _warped_points(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2), warp)
    corners = corners.reshape(-1, 4, 2)
    warped = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    warped[~is_valid.reshape(-1, 4).all(axis=1)] = 0
    height, width = warp.out_hw
    clipped: DoubleArray = np.clip(warped, 0, np.array([width, height, width, height]))
    return clipped


def _warped_outlines(points: FloatArray, counts: IntArray, warp: Warp) -> DoubleArray:
    """Return the box around the visible part of each outline's area, zeros if there is none; float64 [N, 4]."""
    warped, is_valid = _warped_points(points, warp)
    starts = np.cumsum(counts) - counts
    low, high = np.minimum.reduceat(warped, starts), np.maximum.reduceat(warped, starts)
    limit = np.array(warp.out_hw[::-1])
    boxes = np.concatenate([low, high], axis=1)
    hidden = (low >= limit).any(axis=1) | (high <= 0).any(axis=1) | ~np.logical_and.reduceat(is_valid, starts)
    boxes[hidden] = 0
    crossing = ~hidden & ((low < 0) | (high > limit)).any(axis=1)
    if crossing.any():
        chosen = np.repeat(crossing, counts)
        boxes[crossing] = visible_boxes(warped[chosen], counts[crossing], warp.out_hw)
    return boxes


def _warped_points(points: FloatArray, warp: Warp) -> tuple[DoubleArray, BoolArray]:
    """Return warped points [P, 2], float64, and whether each can be projected, bool [P]."""
    if warp.is_axis_aligned:
        return points * warp.matrix[[0, 1], [0, 1]] + warp.matrix[:2, 2], np.ones(len(points), dtype=np.bool_)
    homogeneous = points @ warp.matrix[:, :2].T + warp.matrix[:, 2]
    is_valid = homogeneous[:, 2] > _HORIZON
    return homogeneous[:, :2] / np.where(is_valid, homogeneous[:, 2], 1)[:, None], is_valid


def visible_boxes(points: DoubleArray, counts: IntArray, hw: tuple[int, int]) -> DoubleArray:
    """Return the box around the intersection of each polygon with the image, zeros if it is empty; float64 [N, 4].

    The corners of the intersection are end points of edges clipped to the image, and corners of the image inside the
    polygon (even-odd rule). The official program uses those of 1000 points on the outline that are in the image, and so
    drops an object that fills the image, and part of the box of an object that covers a corner of the image.

    Args:
        points: float64 [P, 2], the concatenated polygons.
        counts: int64 [N], number of points of each polygon; at least 1.
        hw: Height and width of the image.
    """
    starts = np.cumsum(counts) - counts
    following = np.arange(1, len(points) + 1)
    following[starts + counts - 1] = starts
    after = points[following]
    step = after - points
    limit = np.array(hw[::-1], dtype=np.float64)
    enter, leave = _clip_segments(points, step, limit)
    is_inside = enter <= leave
    parts = np.where(is_inside[:, None], np.stack([enter, leave], axis=1), 0)
    ends = np.clip(points[:, None] + parts[:, :, None] * step[:, None], 0, limit)  # [P, 2, 2]
    low = np.minimum.reduceat(np.where(is_inside[:, None], ends.min(axis=1), np.inf), starts)
    high = np.maximum.reduceat(np.where(is_inside[:, None], ends.max(axis=1), -np.inf), starts)
    corners = np.array([[0, 0], [limit[0], 0], [0, limit[1]], limit])
    for corner in corners:
        covered = _contains(corner, points, after, starts)[:, None]
        low = np.where(covered, np.minimum(low, corner), low)
        high = np.where(covered, np.maximum(high, corner), high)
    boxes = np.concatenate([low, high], axis=1)
    boxes[~np.isfinite(low[:, 0])] = 0
    return boxes


def _clip_segments(start: DoubleArray, step: DoubleArray, limit: DoubleArray) -> tuple[DoubleArray, DoubleArray]:
    """Return where segments enter and leave the rectangle, as fractions of their length (Liang-Barsky); [P] each."""
    moving = step != 0
    safe = np.where(moving, step, 1)
    near, far = -start / safe, (limit - start) / safe
    between = (start >= 0) & (start <= limit)
    first = np.where(moving, np.minimum(near, far), np.where(between, 0.0, np.inf))
    last = np.where(moving, np.maximum(near, far), np.where(between, 1.0, -np.inf))
    return np.maximum(first.max(axis=1), 0), np.minimum(last.min(axis=1), 1)


def _contains(point: DoubleArray, start: DoubleArray, end: DoubleArray, starts: IntArray) -> BoolArray:
    """Return whether each polygon contains a point: a ray to the right crosses its edges an odd number of times."""
    crossing = (start[:, 1] > point[1]) != (end[:, 1] > point[1])
    rise = np.where(crossing, end[:, 1] - start[:, 1], 1)
    crossing_x = start[:, 0] + (point[1] - start[:, 1]) / rise * (end[:, 0] - start[:, 0])
    contains: BoolArray = np.logical_xor.reduceat(crossing & (crossing_x > point[0]), starts)
    return contains
