"""Evaluation protocols: batches and canvas sizes of the published rect protocol and of the letterbox of one size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import Letterbox, fit_evaluation_letterbox, fit_letterbox
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import Thresholds, ValOptions
from yolov7_deploy.runtimes.base import split_batches

if TYPE_CHECKING:
    from yolov7_deploy.detector import Detector

RECT_PAD = 0.5  # strides added to each side of a rect canvas by the official evaluation
RECT_MIN_STRIDE = 32
FitLetterbox = Callable[[tuple[int, int], tuple[int, int]], Letterbox]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageBatch:
    """Indices of dataset samples that run as one batch, and the height and width of their canvas."""

    indices: tuple[int, ...]
    canvas_hw: tuple[int, int]


def plan_batches(
    detector: Detector, sizes: Mapping[int, tuple[int, int]], *, rect: bool, batch: int
) -> tuple[list[ImageBatch], FitLetterbox, str]:
    """Return the batches to run, the letterbox function of (image_hw, canvas_hw), and a description of the protocol.

    Args:
        detector: Its input size is used.
        sizes: Height and width of every image by its index, in order of path.
        rect: Use the rect protocol instead of a letterbox of one size.
        batch: Images per batch.
    """
    if not rect:
        height, width = detector.input_hw
        batches = _split(list(sizes), batch, lambda _: (height, width))
        return batches, fit_letterbox, f"letterbox {height}x{width}"
    size, stride = max(detector.input_hw), max(detector.metadata.stride, RECT_MIN_STRIDE)
    batches = rect_batches(sizes, size=size, stride=stride, batch=batch)
    tallest, widest = (max((b.canvas_hw[axis] for b in batches), default=0) for axis in (0, 1))
    description = f"rect {size} (pad {RECT_PAD}, batch {batch}, canvases up to {tallest}x{widest})"
    return batches, lambda hw, canvas_hw: fit_evaluation_letterbox(hw, canvas_hw, size=size), description


def rect_batches(sizes: Mapping[int, tuple[int, int]], *, size: int, stride: int, batch: int) -> list[ImageBatch]:
    """Return the rectangular batches of the official evaluation: images sorted by height / width, `batch` at a time.

    With a = height / width of the images in a batch, its canvas is (max a, 1) if all a < 1, (1, 1 / min a) if all
    a > 1, else (1, 1); each side times `size`, plus half a stride, rounded up to a multiple of the stride.
    """

    def canvas_hw(indices: Sequence[int]) -> tuple[int, int]:
        aspects = [sizes[i][0] / sizes[i][1] for i in indices]
        shape = (1.0, 1.0)
        if max(aspects) < 1:
            shape = (max(aspects), 1.0)
        elif min(aspects) > 1:
            shape = (1.0, 1 / min(aspects))
        height, width = (math.ceil(side * size / stride + RECT_PAD) * stride for side in shape)
        return height, width

    indices = list(sizes)
    # NumPy's default sort, not a stable one: only it puts images of equal shape into the same batches as the official
    # program, and the batch determines the canvas.
    order = np.array([sizes[i][0] / sizes[i][1] for i in indices]).argsort()
    return _split([indices[i] for i in order], batch, canvas_hw)


def _split(
    indices: Sequence[int], batch: int, canvas_hw: Callable[[Sequence[int]], tuple[int, int]]
) -> list[ImageBatch]:
    parts = [tuple(part) for part in split_batches(indices, batch)]
    return [ImageBatch(indices=part, canvas_hw=canvas_hw(part)) for part in parts]


def effective_thresholds(requested: Thresholds, metadata: ModelMetadata) -> tuple[Thresholds, tuple[str, ...]]:
    """Return the thresholds that a file with its own NMS applies, and a note if they are not the requested ones."""
    nms = metadata.nms
    if nms is None:
        return requested, ()
    effective = replace(requested, max_det=min(requested.max_det, nms.max_det))
    if not nms.runtime_thresholds:
        effective = replace(
            effective,
            conf=max(requested.conf, nms.conf),
            iou=nms.iou,
            multi_label=nms.multi_label,
            class_agnostic=nms.class_agnostic,
        )
    if effective == requested:
        return requested, ()
    note = (
        f"the NMS inside the file applies conf {effective.conf:g}, iou {effective.iou:g}, max_det {effective.max_det}, "
        f"multi_label {effective.multi_label}: AP is not comparable with the published one"
    )
    return effective, (note,)


def uses_rect(metadata: ModelMetadata, options: ValOptions) -> bool:
    """Return whether to use rect batches: as requested, by default if the model takes any input size.

    Raises:
        UsageError: rect is requested for a model with a fixed input size.
    """
    if metadata.input_hw is None:
        return options.rect is not False
    if options.rect:
        height, width = metadata.input_hw
        raise UsageError(
            f"--rect needs a model that takes any input size; this one takes {height}x{width} only.",
            fix="Leave --rect out, measure the weights from which it was exported, or export them with  --dynamic",
        )
    return False
