"""What files with NMS inside give, and what may be asked of them: the same for every runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import UsageError
from yolov7_deploy.metadata import NmsMetadata
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.base import RawDetections

NMS_OUTPUTS = ("num_dets", "det_boxes", "det_scores", "det_classes")
UNKNOWN_CLASSES = 1000  # names made up for a foreign file with NMS inside, which does not say how many it has


def check_nms_compatible(nms: NmsMetadata, thresholds: Thresholds) -> None:
    """Refuses what the NMS inside the file cannot do, instead of doing something else.

    Raises:
        UsageError: It names the threshold and both values.
    """
    fixed: list[tuple[str, object, object]] = [
        ("multi_label", nms.multi_label, thresholds.multi_label),
        ("class_agnostic", nms.class_agnostic, thresholds.class_agnostic),
    ]
    if not nms.runtime_thresholds:
        fixed.append(("iou", nms.iou, thresholds.iou))
        if thresholds.conf < nms.conf:
            fixed.append(("conf", nms.conf, thresholds.conf))
    for name, have, want in fixed:
        if have != want:
            raise UsageError(
                f"The NMS inside this file was exported with {name}={have}; {name}={want} was asked for.",
                fix="Leave it out to take the file's own, or export again with it; --nms none keeps everything open.",
            )


def filter_outputs(
    count: int,
    boxes: npt.NDArray[np.float32],
    scores: npt.NDArray[np.float32],
    classes: npt.NDArray[Any],
    thresholds: Thresholds,
) -> RawDetections:
    """One image's rows that the caller wants, as copies.

    Args:
        count: Rows that are filled.
        boxes: [K, 4] xyxy.
        scores: [K], best first.
        classes: [K].
        thresholds: The file's own threshold may be lower, and only the caller knows the classes.
    """
    keep = np.flatnonzero(scores[:count] > thresholds.conf)
    if thresholds.classes is not None:
        keep = keep[np.isin(classes[keep], thresholds.classes)]
    keep = keep[: thresholds.max_det]
    return RawDetections(boxes=boxes[keep], scores=scores[keep], class_ids=classes[keep].astype(np.int64))
