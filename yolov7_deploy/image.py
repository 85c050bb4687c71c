"""Reading pictures, and the letterbox there and back.

Pictures are uint8 BGR arrays [H, W, 3] everywhere, as OpenCV has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import ImageError

Image = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

PAD_GREY = 114  # the official letterbox colour
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def read_image(path: str | Path) -> Image:
    """A picture file as uint8 BGR [H, W, 3]; grey, RGBA and 16-bit files are converted.

    Raises:
        ImageError: The file is absent, empty, or not a picture OpenCV can decode.
    """
    path = Path(path)
    try:
        data = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise ImageError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
    if data.size == 0:
        raise ImageError(f"{path} is empty (0 bytes).", fix="Copy or download the picture again.")
    image = cv2.imdecode(data, cv2.IMREAD_COLOR)
    if image is None:
        raise ImageError(
            f"{path} is not a picture OpenCV can decode ({data.size} bytes).",
            fix=f"Convert it to one of: {' '.join(IMAGE_SUFFIXES)}",
        )
    return image.astype(np.uint8, copy=False)


def as_bgr(image: object) -> Image:
    """Any array that people pass as a picture, as contiguous uint8 BGR [H, W, 3]; no copy where it already is one.

    Grey [H, W] or [H, W, 1] is repeated, the alpha of BGRA [H, W, 4] is dropped, uint16 is scaled by 1/257.

    Raises:
        ImageError: A shape or type that has no one meaning (floats could be 0..1 or 0..255).
    """
    array = image if isinstance(image, np.ndarray) else _as_array(image)
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(
            f"A picture must be an array [H, W, 3] (BGR), [H, W] or [H, W, 4]; this one is {shape}.",
            fix="For a batch call detector.batch([image, ...]); for channels first use image.transpose(1, 2, 0).",
        )
    if array.dtype == np.uint16:
        array = (array // 257).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(
            f"A picture must be uint8 or uint16; this one is {array.dtype}.",
            fix="For floats 0..1 use (image * 255).round().astype('uint8').",
        )
    array = np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]
    return np.ascontiguousarray(array)


def _as_array(image: object) -> npt.NDArray[Any]:
    """Anything NumPy takes for an array, such as a PIL picture; not a list, which is rather several pictures."""
    if not hasattr(image, "__array__") and not hasattr(image, "__array_interface__"):
        raise ImageError(
            f"A picture must be an array [H, W, 3] (BGR); this one is a {type(image).__name__}.",
            fix="For several pictures call detector.batch([image, ...]); for a file give its path.",
        )
    return np.asarray(image)


@dataclass(frozen=True, kw_only=True, slots=True)
class Letterbox:
    """How one picture is placed on a network-sized canvas, and how boxes come back.

    Attributes:
        source_hw: Height and width of the picture.
        resized_hw: Height and width it is scaled to.
        canvas_hw: Height and width of the network input.
        top, left: Pixels of grey above and to the left.
        gain: Canvas pixels per source pixel, to take boxes back.
        offset_xy: Canvas position of the picture's corner, to take boxes back; unrounded, as the official one.
        shrink_by_area: Scale with pixel-area averaging (the official evaluation loader) instead of bilinear.
    """

    source_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    canvas_hw: tuple[int, int]
    top: int
    left: int
    gain: float
    offset_xy: tuple[float, float]
    shrink_by_area: bool = False

    def apply(self, image_bgr: Image) -> Image:
        """The canvas uint8 BGR [canvas_h, canvas_w, 3] with the picture on it; always a new array."""
        height, width = self.resized_hw
        if (height, width) != self.source_hw:
            method = cv2.INTER_AREA if self.shrink_by_area else cv2.INTER_LINEAR
            image_bgr = cv2.resize(image_bgr, (width, height), interpolation=method)  # type: ignore[assignment]
        canvas = np.full((*self.canvas_hw, 3), PAD_GREY, dtype=np.uint8)
        canvas[self.top : self.top + height, self.left : self.left + width] = image_bgr
        return canvas

    def undo(self, boxes_xyxy: FloatArray) -> FloatArray:
        """Boxes [N, 4] from canvas pixels to source pixels, clipped to the picture; a new array."""
        offset = np.array(self.offset_xy * 2, dtype=np.float32)
        height, width = self.source_hw
        boxes = (boxes_xyxy - offset) / np.float32(self.gain)
        limit = np.array([width, height, width, height], dtype=np.float32)
        clipped: FloatArray = np.clip(boxes, 0, limit, dtype=np.float32)
        return clipped


def fit_letterbox(source_hw: tuple[int, int], canvas_hw: tuple[int, int]) -> Letterbox:
    """The official inference letterbox: scale to fit (also up), centre, grey 114.

    Sides are round(side * r), the odd pixel of padding goes below and to the right. Boxes come back by r and the
    unrounded half padding, as official boxes do.
    """
    height, width = source_hw
    ratio = min(canvas_hw[0] / height, canvas_hw[1] / width)
    resized_hw = (max(1, round(height * ratio)), max(1, round(width * ratio)))
    return _centred(source_hw, resized_hw, canvas_hw, gain=ratio, shrink_by_area=False)


def fit_evaluation_letterbox(source_hw: tuple[int, int], canvas_hw: tuple[int, int], *, size: int) -> Letterbox:
    """The official evaluation loader's placement (`--rect`): longer side to `size`, then centred without scaling.

    Sides are truncated, shrinking averages by area, and boxes come back by the height ratio and the unrounded half
    padding on both axes, as the published AP was computed (spec of the official test program).
    """
    height, width = source_hw
    ratio = size / max(height, width)
    resized_hw = source_hw if ratio == 1 else (max(1, int(height * ratio)), max(1, int(width * ratio)))
    return _centred(source_hw, resized_hw, canvas_hw, gain=resized_hw[0] / height, shrink_by_area=ratio < 1)


def _centred(
    source_hw: tuple[int, int],
    resized_hw: tuple[int, int],
    canvas_hw: tuple[int, int],
    *,
    gain: float,
    shrink_by_area: bool,
) -> Letterbox:
    half_h, half_w = (canvas_hw[0] - resized_hw[0]) / 2, (canvas_hw[1] - resized_hw[1]) / 2
    return Letterbox(
        source_hw=source_hw,
        resized_hw=resized_hw,
        canvas_hw=canvas_hw,
        top=round(half_h - 0.1),
        left=round(half_w - 0.1),
        gain=gain,
        offset_xy=(half_w, half_h),
        shrink_by_area=shrink_by_area,
    )


def to_network_input(canvases: Sequence[Image]) -> FloatArray:
    """Canvases uint8 BGR [H, W, 3] of one size as float32 [B, 3, H, W], RGB, 0..1."""
    height, width = canvases[0].shape[:2]
    tensor = np.empty((len(canvases), 3, height, width), dtype=np.float32)
    for planes, canvas in zip(tensor, canvases, strict=True):
        for plane, channel in zip(planes, (2, 1, 0), strict=True):
            np.divide(canvas[:, :, channel], np.float32(255), out=plane)
    return tensor
