"""The reference NMS: NumPy without any optimization, against which every NMS of the package is tested.

It is the official semantics, step by step: all candidates are sorted, and each kept box is compared with all remaining
ones.
"""

import numpy as np

from yolov7_deploy.image import FloatArray, IntArray
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import MAX_CANDIDATES, RawDetections, xywh_to_xyxy


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
