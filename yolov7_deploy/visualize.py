"""Drawing of boxes and labels on an image, and writing of image files.

Line width and text size depend on the image size, colours on the class. A label is placed next to its box where it
covers no other label, if there is such a position.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._text import get_logger, printable_line
from yolov7_deploy.errors import ImageError
from yolov7_deploy.image import FloatArray, Image, as_bgr

logger = get_logger(__name__)

Colour = tuple[int, int, int]  # blue, green, red
Rect = tuple[int, int, int, int]  # x1, y1, x2, y2; the far edges are outside

DRAWS_UNICODE = hasattr(cv2, "FontFace")  # OpenCV 5 draws with TrueType fonts
FONT = cv2.FONT_HERSHEY_SIMPLEX
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))  # successive multiples stay far apart
LIGHTNESS = (0.72, 0.56, 0.82, 0.64)  # four of them: hues become similar again after 8, 13, 21, 34 and 55 classes
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
EVEN_CONTRAST_LUMINANCE = 0.179  # black and white text have equal contrast on it (WCAG 2 contrast formula)


@functools.cache
def class_colour(class_id: int) -> Colour:
    """Return the colour of a class: hues are a golden angle apart and cycle through four lightnesses."""
    hue = class_id * GOLDEN_ANGLE + 0.5
    lab = np.array([LIGHTNESS[class_id % len(LIGHTNESS)], CHROMA * math.cos(hue), CHROMA * math.sin(hue)])
    linear = np.clip(LMS_TO_RGB @ (OKLAB_TO_LMS @ lab) ** 3, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (round(float(value) * 255) for value in encoded)
    return blue, green, red


def text_colour(background: Colour) -> Colour:
    """Return black or white, whichever has more contrast with the background."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in background]
    luminance = sum(weight * value for weight, value in zip(LINEAR_BGR_WEIGHTS, linear, strict=True))
    return (0, 0, 0) if luminance > EVEN_CONTRAST_LUMINANCE else (255, 255, 255)


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawStyle:
    """Line and text sizes in pixels for one image size."""

    line: int
    text_scale: float
    text_weight: int
    padding: int


def draw_style(image_hw: tuple[int, int]) -> DrawStyle:
    """Return sizes that look the same on a thumbnail and on a 4K frame: both grow with the mean of height and width."""
    side = sum(image_hw) / 2
    line = max(1, round(side * 0.0035))
    text_scale = max(0.35, side * 0.0008)
    return DrawStyle(line=line, text_scale=text_scale, text_weight=max(1, round(text_scale * 1.6)), padding=1 + line)


def draw_boxes(image_bgr: Image, boxes_xyxy: FloatArray, *, labels: Sequence[str], class_ids: Sequence[int]) -> Image:
    """Return a copy of the image [H, W, 3] with boxes [N, 4] and their labels; earlier boxes are drawn on top.

    Empty labels and labels larger than the image are not drawn. Boxes are clipped to the image.
    """
    canvas: Image = as_bgr(image_bgr).copy()
    hw = (canvas.shape[0], canvas.shape[1])
    style = draw_style(hw)
    rects = _pixel_rects(boxes_xyxy, hw)
    for rect, class_id in reversed(list(zip(rects, class_ids, strict=True))):
        _draw_outline(canvas, rect, class_colour(class_id), line=style.line)
    placed: list[tuple[Rect, str, int]] = []
    for rect, label, class_id in zip(rects, map(drawable_text, labels), class_ids, strict=True):
        label_rect = _find_label_rect(label, rect, taken=[item[0] for item in placed], hw=hw, style=style)
        if label_rect is not None:
            placed.append((label_rect, label, class_id))
    for label_rect, label, class_id in reversed(placed):
        _draw_label(canvas, label_rect, label, class_colour(class_id), style=style)
    return canvas


def drawable_text(text: str) -> str:
    """Return a text that OpenCV can draw; it crashes for texts that are not valid Unicode.

    OpenCV 4 draws ASCII only: accents are removed, other characters become question marks, with one warning.
    """
    line = printable_line(text)
    if DRAWS_UNICODE or line.isascii():
        return line
    _warn_ascii_only(cv2.__version__)
    return "".join(map(_ascii_letter, line))


def _ascii_letter(letter: str) -> str:
    plain = "".join(part for part in unicodedata.normalize("NFKD", letter) if not unicodedata.combining(part))
    return plain if plain.isascii() else "?"


@functools.cache
def _warn_ascii_only(version: str) -> None:
    logger.warning(
        "OpenCV %s draws ASCII only: labels lose accents, and other letters become '?'. "
        "pip install -U 'opencv-python-headless>=5'",
        version,
    )


def _pixel_rects(boxes_xyxy: FloatArray, hw: tuple[int, int]) -> list[Rect]:
    limit = np.array([hw[1], hw[0], hw[1], hw[0]]) - 1
    whole = np.clip(np.nan_to_num(np.asarray(boxes_xyxy).reshape(-1, 4)), 0, limit).round().astype(int)
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in whole.tolist()]


def _draw_outline(canvas: Image, rect: Rect, colour: Colour, *, line: int) -> None:
    """Draw a box, with a thinner line if the full width would fill it."""
    x1, y1, x2, y2 = rect
    thickness = max(1, min(line, min(x2 - x1, y2 - y1) // 6))
    cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness)


def _label_size(label: str, style: DrawStyle) -> tuple[int, int, int]:
    """Return width and height including padding, and the height of the baseline above the lower edge."""
    (width, height), below = cv2.getTextSize(label, FONT, style.text_scale, style.text_weight)
    rise = below // 2 + style.padding
    return width + 2 * style.padding, height + rise + style.padding, rise


def _find_label_rect(
    label: str, rect: Rect, *, taken: list[Rect], hw: tuple[int, int], style: DrawStyle
) -> Rect | None:
    """Return where to draw a label, or `None` if it does not fit into the image.

    Candidates are: above the box, inside its top, below it, inside its bottom, each left then right. The first one
    that covers the fewest pixels of the labels in `taken` wins.
    """
    width, height, _ = _label_size(label, style)
    if not label or width > hw[1] or height > hw[0]:
        return None
    x1, y1, x2, y2 = rect
    half = style.line // 2
    candidates = []
    for top in (y1 - height - half, y1 - half, y2 + half + 1, y2 - height + half + 1):
        for left in (x1 - half, x2 - width + half + 1):
            if 0 <= top <= hw[0] - height:
                left = min(max(left, 0), hw[1] - width)
                candidates.append((left, top, left + width, top + height))
    if not candidates:
        top = min(max(y1, 0), hw[0] - height)
        left = min(max(x1, 0), hw[1] - width)
        candidates.append((left, top, left + width, top + height))
    others = np.array(taken, dtype=np.int64).reshape(-1, 4)
    return min(candidates, key=lambda label_rect: _covered_pixels(label_rect, others))


def _covered_pixels(label_rect: Rect, others: npt.NDArray[np.int64]) -> int:
    """Return how many pixels of the other rectangles this one covers."""
    wide = np.minimum(others[:, 2], label_rect[2]) - np.maximum(others[:, 0], label_rect[0])
    high = np.minimum(others[:, 3], label_rect[3]) - np.maximum(others[:, 1], label_rect[1])
    return int((np.maximum(wide, 0) * np.maximum(high, 0)).sum())


def _draw_label(canvas: Image, label_rect: Rect, label: str, colour: Colour, *, style: DrawStyle) -> None:
    x1, y1, x2, y2 = label_rect
    rise = _label_size(label, style)[2]
    cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), colour, cv2.FILLED)
    start = (x1 + style.padding, y2 - rise)
    cv2.putText(canvas, label, start, FONT, style.text_scale, text_colour(colour), style.text_weight, cv2.LINE_AA)


def write_image(path: str | Path, image_bgr: Image) -> None:
    """Write an image atomically; the suffix selects the format, and missing folders are created.

    Raises:
        ImageError: OpenCV cannot write this format, or the file cannot be written.
    """
    path = Path(path)
    suffix = path.suffix if path.suffix.isascii() else ""  # OpenCV crashes for texts that are not valid Unicode
    try:
        _, data = cv2.imencode(suffix, image_bgr)
    except cv2.error as error:
        raise ImageError(
            f"{path}: OpenCV cannot write {path.suffix or 'a file without suffix'}.",
            fix="Use a name that ends in .jpg or .png.",
        ) from error
    try:
        with atomic_write(path) as unfinished:
            unfinished.write_bytes(data.tobytes())
    except OSError as error:
        raise ImageError(
            f"{path} cannot be written: {error.strerror or error}.", fix="Choose another folder."
        ) from error


def jpeg_bytes(image_bgr: Image, *, quality: int) -> bytes:
    """Return an image as the bytes of a JPEG file; `quality` is 1 to 100."""
    _, data = cv2.imencode(".jpg", image_bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return data.tobytes()
