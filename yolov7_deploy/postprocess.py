"""From network outputs to detections: thresholds, box arithmetic and the reference NMS, in NumPy.

The reference NMS is slow and easy to check. Every other NMS of this package (the ONNX function body, the CUDA kernels)
is tested against it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import FloatArray, IntArray
from yolov7_deploy.metadata import NmsMetadata
from yolov7_deploy.options import Thresholds

MAX_CANDIDATES = 30_000  # official limit of boxes that enter NMS


class RawDetections(NamedTuple):
    """Detections of one image in network-input pixels, best score first.

    Attributes:
        boxes: float32 [N, 4] xyxy.
        scores: float32 [N].
        class_ids: int64 [N].
    """

    boxes: FloatArray
    scores: FloatArray
    class_ids: IntArray


def xywh_to_xyxy(boxes: FloatArray) -> FloatArray:
    """Convert boxes [..., 4] from centre, width and height to corners."""
    half = boxes[..., 2:] * np.float32(0.5)
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)


def iou_matrix(a: FloatArray, b: FloatArray) -> FloatArray:
    """Return the IoU of xyxy boxes [N, 4] and [M, 4] as [N, M]; 0 where both boxes are empty."""
    intersection, union = _intersection_and_union(a[:, None], b[None])
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def _intersection_and_union(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    shared = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = np.maximum(shared, 0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - intersection
    return intersection, union


def greedy_nms(
    boxes: FloatArray, class_ids: IntArray, *, iou: float, max_det: int, class_agnostic: bool = False
) -> IntArray:
    """Return the indices of the boxes that NMS keeps, best first.

    A box is suppressed if a better kept box of its class overlaps it with intersection > iou * union. The comparison
    is strict, as in the official program. It has no division, so an empty box never suppresses another.

    Args:
        boxes: xyxy [N, 4], best score first.
        class_ids: [N].
        iou: IoU threshold.
        max_det: Stop after this many boxes.
        class_agnostic: Suppress across classes.
    """
    kept: list[int] = []
    remaining = np.arange(len(boxes))
    while len(remaining) and len(kept) < max_det:
        best, remaining = remaining[0], remaining[1:]
        kept.append(int(best))
        intersection, union = _intersection_and_union(boxes[best], boxes[remaining])
        suppressed = intersection > np.float32(iou) * union
        if not class_agnostic:
            suppressed &= class_ids[remaining] == class_ids[best]
        remaining = remaining[~suppressed]
    return np.array(kept, dtype=np.int64)


def postprocess(output: FloatArray, thresholds: Thresholds, *, max_candidates: int = MAX_CANDIDATES) -> RawDetections:
    """Return the detections in the decoded output of one image.

    The semantics are the official ones. A score is objectness * class probability (objectness alone with one class)
    and must exceed `conf` strictly. With `multi_label` every class of an anchor counts, otherwise only its best. Equal
    scores keep the order of anchors and classes.

    Args:
        output: float32 [A, 5 + C]: cx, cy, w, h, objectness, class probabilities.
        thresholds: Which detections to keep.
        max_candidates: Only this many of the best boxes enter NMS.
    """
    anchors = np.flatnonzero(output[:, 4] > thresholds.conf)
    scores = output[anchors, 4:5]
    if output.shape[1] > 6:
        scores = scores * output[anchors, 5:]
    return postprocess_scores(output[anchors, :4], scores, thresholds, max_candidates=max_candidates)


def postprocess_scores(
    boxes: FloatArray, scores: FloatArray, thresholds: Thresholds, *, max_candidates: int = MAX_CANDIDATES
) -> RawDetections:
    """Return the detections among boxes with one score for each class; see `postprocess`.

    Args:
        boxes: float32 [A, 4]: cx, cy, w, h.
        scores: float32 [A, C].
        thresholds: Which detections to keep.
        max_candidates: Only this many of the best boxes enter NMS.
    """
    if thresholds.multi_label:
        row, class_ids = np.nonzero(scores > thresholds.conf)
    else:
        best = scores.argmax(1)
        row = np.flatnonzero(scores[np.arange(len(scores)), best] > thresholds.conf)
        class_ids = best[row]
    if thresholds.classes is not None:
        selected = np.isin(class_ids, thresholds.classes)
        row, class_ids = row[selected], class_ids[selected]
    score = scores[row, class_ids]
    order = np.argsort(-score, kind="stable")[:max_candidates]
    row, class_ids, score = row[order], class_ids[order], score[order]
    corners = xywh_to_xyxy(boxes[row])
    kept = greedy_nms(
        corners, class_ids, iou=thresholds.iou, max_det=thresholds.max_det, class_agnostic=thresholds.class_agnostic
    )
    return RawDetections(boxes=corners[kept], scores=score[kept], class_ids=class_ids[kept].astype(np.int64))


# --- models with NMS inside -----------------------------------------------------------------------------------------


def check_nms_compatible(nms: NmsMetadata, thresholds: Thresholds) -> None:
    """Refuse thresholds that the NMS inside a model file cannot apply.

    Raises:
        UsageError: The message names the threshold and both values.
    """
    if nms.runtime_thresholds:
        return
    fixed: list[tuple[str, object, object]] = [
        ("multi_label", nms.multi_label, thresholds.multi_label),
        ("class_agnostic", nms.class_agnostic, thresholds.class_agnostic),
        ("iou", nms.iou, thresholds.iou),
    ]
    if thresholds.conf < nms.conf:
        fixed.append(("conf", nms.conf, thresholds.conf))
    for name, exported, requested in fixed:
        if exported != requested:
            raise UsageError(
                f"The NMS inside this file was exported with {name}={exported}; {name}={requested} was requested.",
                fix=f"Omit {name} to use the file's own value, or export again with it; --nms none leaves it open.",
            )


def filter_outputs(
    count: int, boxes: FloatArray, scores: FloatArray, classes: npt.NDArray[Any], thresholds: Thresholds
) -> RawDetections:
    """Apply a call's thresholds to the outputs of NMS inside a model; return copies.

    The model's own score threshold may be lower, and it does not know `classes`.

    Args:
        count: Rows that hold detections.
        boxes: float32 [K, 4] xyxy.
        scores: float32 [K], best first.
        classes: Integers [K].
        thresholds: Which detections to keep.
    """
    keep = np.flatnonzero(scores[:count] > thresholds.conf)
    if thresholds.classes is not None:
        keep = keep[np.isin(classes[keep], thresholds.classes)]
    keep = keep[: thresholds.max_det]
    return RawDetections(boxes=boxes[keep], scores=scores[keep], class_ids=classes[keep].astype(np.int64))
