"""Box arithmetic and the reference NMS in NumPy, slow and obviously right.

Every other NMS in this package (the ONNX function body, the CUDA kernels) is tested against this file.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from yolov7_deploy.options import Thresholds

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

MAX_CANDIDATES = 30_000  # official limit of boxes that enter NMS


def xywh_to_xyxy(boxes: FloatArray) -> FloatArray:
    """Centre, width and height [..., 4] to corners [..., 4]."""
    half = boxes[..., 2:] * np.float32(0.5)
    return np.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)


def iou_matrix(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over union of xyxy boxes [N, 4] and [M, 4] as [N, M]; 0 where both boxes are empty."""
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
    """Indices of the boxes that survive, best first.

    A box falls if a better surviving one of its class overlaps it with intersection > iou * union (strictly, as the
    official one; without the division an empty box never suppresses).

    Args:
        boxes: xyxy [N, 4], best score first.
        class_ids: [N].
        iou: Threshold.
        max_det: Stops after this many survivors.
        class_agnostic: Classes suppress each other.
    """
    kept: list[int] = []
    waiting = np.arange(len(boxes))
    while len(waiting) and len(kept) < max_det:
        best, waiting = waiting[0], waiting[1:]
        kept.append(int(best))
        intersection, union = _intersection_and_union(boxes[best], boxes[waiting])
        falls = intersection > np.float32(iou) * union
        if not class_agnostic:
            falls &= class_ids[waiting] == class_ids[best]
        waiting = waiting[~falls]
    return np.array(kept, dtype=np.int64)


def postprocess(
    output: FloatArray, thresholds: Thresholds, *, max_candidates: int = MAX_CANDIDATES
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Boxes, scores and class ids of one image from a decoded head output, best first.

    The official semantics: a score is objectness * class probability (objectness alone with one class), kept if it
    exceeds `conf` strictly; of `multi_label` every class of an anchor counts, otherwise its best; equal scores keep the
    order of anchors and classes.

    Args:
        output: [A, 5 + C]: cx, cy, w, h, objectness, class probabilities.
        thresholds: What to keep.
        max_candidates: The best this many enter suppression.

    Returns:
        float32 [N, 4] xyxy in the output's pixels, float32 [N], int64 [N].
    """
    alive = np.flatnonzero(output[:, 4] > thresholds.conf)
    scores = output[alive, 4:5]
    if output.shape[1] > 6:
        scores = scores * output[alive, 5:]
    if thresholds.multi_label:
        row, class_ids = np.nonzero(scores > thresholds.conf)
    else:
        best = scores.argmax(1)
        row = np.flatnonzero(scores[np.arange(len(scores)), best] > thresholds.conf)
        class_ids = best[row]
    if thresholds.classes is not None:
        wanted = np.isin(class_ids, thresholds.classes)
        row, class_ids = row[wanted], class_ids[wanted]
    score = scores[row, class_ids]
    order = np.argsort(-score, kind="stable")[:max_candidates]
    row, class_ids, score = row[order], class_ids[order], score[order]
    boxes = xywh_to_xyxy(output[alive[row], :4])
    kept = greedy_nms(
        boxes, class_ids, iou=thresholds.iou, max_det=thresholds.max_det, class_agnostic=thresholds.class_agnostic
    )
    return boxes[kept], score[kept], class_ids[kept].astype(np.int64)
