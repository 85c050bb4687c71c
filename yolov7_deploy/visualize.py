"""Drawing boxes and labels on an image, and writing the image.

Sizes follow the image, colours follow the class, and a label goes where it hides no other label if such a place
is next to its box.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy.errors import ImageError
from yolov7_deploy.image import FloatArray, Image, as_bgr

Colour = tuple[int, int, int]  # blue, green, red
Rect = tuple[int, int, int, int]  # x1, y1, x2, y2; the far edges are outside

FONT = cv2.FONT_HERSHEY_SIMPLEX
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))  # successive multiples never come close to one another
LIGHTNESS = (0.72, 0.56, 0.82, 0.64)  # four: hues come close again after 8, 13, 21, 34 and 55 classes
CHROMA = 0.17
# OKLab to linear sRGB (B. Ottosson, "A perceptual color space for image processing", 2020)
OKLAB_TO_LMS = np.array(
    [[1.0, 0.3963377774, 0.2158037573], [1.0, -0.1055613458, -0.0638541728], [1.0, -0.0894841775, -1.2914855480]]
)
LMS_TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)
LINEAR_BGR_WEIGHTS = (0.0722, 0.7152, 0.2126)  # relative luminance, ITU-R BT.709
EVEN_CONTRAST_LUMINANCE = 0.179  # black and white text contrast equally with this (WCAG 2 contrast formula)


@functools.cache
def class_colour(class_id: int) -> Colour:
    """The colour of a class, the same everywhere: hues a golden angle apart, four lightnesses in turn."""
    hue = class_id * GOLDEN_ANGLE + 0.5
    lab = np.array([LIGHTNESS[class_id % len(LIGHTNESS)], CHROMA * math.cos(hue), CHROMA * math.sin(hue)])
    linear = np.clip(LMS_TO_RGB @ (OKLAB_TO_LMS @ lab) ** 3, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (round(float(value) * 255) for value in encoded)
    return blue, green, red


def text_colour(background: Colour) -> Colour:
    """Black or white, whichever contrasts more with the background."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = sum(weight * value for weight, value in zip(LINEAR_BGR_WEIGHTS, linear, strict=True))
    return (0, 0, 0) if luminance > EVEN_CONTRAST_LUMINANCE else (255, 255, 255)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pen:
    """Sizes in pixels for one image."""

    line: int
    text_scale: float
    text_weight: int
    padding: int


def fit_pen(image_hw: tuple[int, int]) -> Pen:
    """Lines and text that look the same on a thumbnail and on a 4K frame: both grow with the mean side."""
    side = sum(image_hw) / 2
    line = max(1, round(side * 0.0035))
    text_scale = max(0.35, side * 0.0008)
    return Pen(line=line, text_scale=text_scale, text_weight=max(1, round(text_scale * 1.6)), padding=1 + line)


def draw_boxes(image_bgr: Image, boxes_xyxy: FloatArray, *, labels: Sequence[str], class_ids: Sequence[int]) -> Image:
    """A copy of the image [H, W, 3] with boxes [N, 4] and one label each; earlier ones lie on top.

    An empty label draws none, and so does one that is larger than the image. Boxes outside are clipped.
    """
    canvas: Image = as_bgr(image_bgr).copy()
    hw = (canvas.shape[0], canvas.shape[1])
    pen = fit_pen(hw)
    rects = _pixel_rects(boxes_xyxy, hw)
    for rect, class_id in reversed(list(zip(rects, class_ids, strict=True))):
        _draw_outline(canvas, rect, class_colour(class_id), line=pen.line)
    placed: list[tuple[Rect, str, int]] = []
    for rect, label, class_id in zip(rects, labels, class_ids, strict=True):
        spot = _place_label(label, rect, taken=[item[0] for item in placed], hw=hw, pen=pen)
        if spot is not None:
            placed.append((spot, label, class_id))
    for spot, label, class_id in reversed(placed):
        _draw_label(canvas, spot, label, class_colour(class_id), pen=pen)
    return canvas


def _pixel_rects(boxes_xyxy: FloatArray, hw: tuple[int, int]) -> list[Rect]:
    limit = np.array([hw[1], hw[0], hw[1], hw[0]]) - 1
    whole = np.clip(np.nan_to_num(np.asarray(boxes_xyxy).reshape(-1, 4)), 0, limit).round().astype(int)
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in whole.tolist()]


def _draw_outline(canvas: Image, rect: Rect, colour: Colour, *, line: int) -> None:
    """Thinner on boxes that the full line would fill."""
    x1, y1, x2, y2 = rect
    thickness = max(1, min(line, min(x2 - x1, y2 - y1) // 6))
    cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness)


def _label_size(label: str, pen: Pen) -> tuple[int, int, int]:
    """Width and height with padding, and the height of the baseline above the lower edge."""
    (width, height), below = cv2.getTextSize(label, FONT, pen.text_scale, pen.text_weight)
    rise = below // 2 + pen.padding
    return width + 2 * pen.padding, height + rise + pen.padding, rise


def _place_label(label: str, rect: Rect, *, taken: list[Rect], hw: tuple[int, int], pen: Pen) -> Rect | None:
    """The first free place of: above the box, inside its top, below it, inside its bottom, each left then right."""
    width, height, _ = _label_size(label, pen)
    if not label or width > hw[1] or height > hw[0]:
        return None
    x1, y1, x2, y2 = rect
    half = pen.line // 2
    spots = []
    for top in (y1 - height - half, y1 - half, y2 + half + 1, y2 - height + half + 1):
        for left in (x1 - half, x2 - width + half + 1):
            if 0 <= top <= hw[0] - height:
                left = min(max(left, 0), hw[1] - width)
                spots.append((left, top, left + width, top + height))
    if not spots:
        top = min(max(y1, 0), hw[0] - height)
        left = min(max(x1, 0), hw[1] - width)
        spots.append((left, top, left + width, top + height))
    others = np.array(taken, dtype=np.int64).reshape(-1, 4)
    return min(spots, key=lambda spot: _hidden(spot, others))


def _hidden(spot: Rect, others: npt.NDArray[np.int64]) -> int:
    """How many pixels of the other rectangles this one covers."""
    wide = np.minimum(others[:, 2], spot[2]) - np.maximum(others[:, 0], spot[0])
    high = np.minimum(others[:, 3], spot[3]) - np.maximum(others[:, 1], spot[1])
    return int((np.maximum(wide, 0) * np.maximum(high, 0)).sum())


def _draw_label(canvas: Image, spot: Rect, label: str, colour: Colour, *, pen: Pen) -> None:
    x1, y1, x2, y2 = spot
    rise = _label_size(label, pen)[2]
    cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), colour, cv2.FILLED)
    start = (x1 + pen.padding, y2 - rise)
    cv2.putText(canvas, label, start, FONT, pen.text_scale, text_colour(colour), pen.text_weight, cv2.LINE_AA)


def write_image(path: str | Path, image_bgr: Image) -> None:
    """Writes the image under a temporary name and renames it; folders are made, the suffix chooses the format.

    Raises:
        ImageError: OpenCV has no writer for the suffix, or the file cannot be written.
    """
    path = Path(path)
    try:
        _, data = cv2.imencode(path.suffix, image_bgr)
    except cv2.error as error:
        raise ImageError(
            f"{path}: OpenCV cannot write {path.suffix or 'a file without suffix'}.",
            fix="Use a name that ends in .jpg or .png.",
        ) from error
    try:
        with whole_file(path) as unfinished:
            unfinished.write_bytes(data.tobytes())
    except OSError as error:
        raise ImageError(
            f"{path} cannot be written: {error.strerror or error}.", fix="Choose another place."
        ) from error
