"""How images are placed for a measurement: the published rect protocol and the plain letterbox."""

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

if TYPE_CHECKING:
    from yolov7_deploy.detector import Detector

RECT_PAD = 0.5  # strides added to each side of a rect canvas by the official evaluation
RECT_MIN_STRIDE = 32
Fit = Callable[[tuple[int, int], tuple[int, int]], Letterbox]


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Samples of a dataset that run together on canvases of one size."""

    indices: tuple[int, ...]
    canvas_hw: tuple[int, int]


def plan(
    detector: Detector, sized: Mapping[int, tuple[int, int]], *, rect: bool, batch: int
) -> tuple[list[Group], Fit, str]:
    """The groups to run, how an image is placed on its group's canvas, and that in words."""
    if not rect:
        height, width = detector.input_hw
        groups = _consecutive(list(sized), batch, lambda _: (height, width))
        return groups, fit_letterbox, f"letterbox {width}x{height}"
    size, stride = max(detector.input_hw), max(detector.metadata.stride, RECT_MIN_STRIDE)
    groups = rect_groups(sized, size=size, stride=stride, batch=batch)
    tallest, widest = (max((g.canvas_hw[axis] for g in groups), default=0) for axis in (0, 1))
    words = f"rect {size} (pad {RECT_PAD}, batch {batch}, canvases up to {widest}x{tallest})"
    return groups, lambda hw, canvas_hw: fit_evaluation_letterbox(hw, canvas_hw, size=size), words


def rect_groups(sized: Mapping[int, tuple[int, int]], *, size: int, stride: int, batch: int) -> list[Group]:
    """The official rectangular batches: images in order of path, sorted by height / width, `batch` at a time.

    With a = height / width of a group's images its canvas is (max a, 1) if all a < 1, (1, 1 / min a) if all a > 1,
    else (1, 1), each side times `size`, plus half a stride, rounded up to whole strides.
    """

    def canvas_hw(indices: Sequence[int]) -> tuple[int, int]:
        aspects = [sized[i][0] / sized[i][1] for i in indices]
        shape = (1.0, 1.0)
        if max(aspects) < 1:
            shape = (max(aspects), 1.0)
        elif min(aspects) > 1:
            shape = (1.0, 1 / min(aspects))
        height, width = (math.ceil(side * size / stride + RECT_PAD) * stride for side in shape)
        return height, width

    indices = list(sized)
    # NumPy's default sort, not a stable one: it puts images of equal shape into the same batches as the official
    # program, and a batch decides the canvas of its images.
    order = np.array([sized[i][0] / sized[i][1] for i in indices]).argsort()
    return _consecutive([indices[i] for i in order], batch, canvas_hw)


def _consecutive(
    indices: Sequence[int], batch: int, canvas_hw: Callable[[Sequence[int]], tuple[int, int]]
) -> list[Group]:
    parts = [tuple(indices[start : start + batch]) for start in range(0, len(indices), batch)]
    return [Group(indices=part, canvas_hw=canvas_hw(part)) for part in parts]


def thresholds_in_force(asked: Thresholds, metadata: ModelMetadata) -> tuple[Thresholds, tuple[str, ...]]:
    """What a file with its own NMS really applies, and a note where that is not what was asked for."""
    nms = metadata.nms
    if nms is None:
        return asked, ()
    real = replace(
        asked,
        conf=asked.conf if nms.runtime_thresholds else max(asked.conf, nms.conf),
        iou=asked.iou if nms.runtime_thresholds else nms.iou,
        max_det=min(asked.max_det, nms.max_det),
        multi_label=nms.multi_label,
        class_agnostic=nms.class_agnostic,
    )
    if real == asked:
        return asked, ()
    note = (
        f"the NMS inside the file holds conf {real.conf:g}, iou {real.iou:g}, max_det {real.max_det}, "
        f"multi_label {real.multi_label}: AP is not comparable with the published one"
    )
    return real, (note,)


def is_rect(metadata: ModelMetadata, options: ValOptions) -> bool:
    """Whether to measure with rect batches: what was asked for, else what the model can do.

    Raises:
        UsageError: rect is asked of a model with a fixed input size.
    """
    if metadata.input_hw is None:
        return options.rect is not False
    if options.rect:
        height, width = metadata.input_hw
        raise UsageError(
            f"--rect needs a model that takes any input size; this one takes {width}x{height} only.",
            fix="Leave --rect out for a plain letterbox, or measure the weights it was exported from.",
        )
    return False
