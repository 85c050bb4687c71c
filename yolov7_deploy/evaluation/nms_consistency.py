"""Check whether a list of detections is what NMS finds in a decoded output, up to small differences of its input.

Two correct programs whose scores differ by 1e-7 keep different boxes where scores are nearly equal, and every such
choice decides about the boxes around it. Their lists can differ in most rows, so they are not compared with each other.
Each list is compared with the boxes that entered NMS. It is correct if greedy NMS gives exactly this list for some
scores and boxes within the slack:

* each detection is a candidate: its class, its box and its score are those of one of the anchors;
* detections do not overlap each other by more than the IoU threshold;
* each candidate that was not kept overlaps a detection whose score is not lower, or is too bad for the list.

The conditions are also sufficient: NMS keeps the list if its scores are raised, and all others lowered, by the slack.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from yolov7_deploy.image import FloatArray
from yolov7_deploy.metadata import NmsMetadata
from yolov7_deploy.options import TOPK_LIMIT, Thresholds
from yolov7_deploy.postprocess import MAX_CANDIDATES, RawDetections, iou_matrix, xywh_to_xyxy

SAME_OBJECT_IOU = 0.5
# Boxes of the list are compared with each other as the program computed them: only its arithmetic differs from ours.
IOU_ROUNDING = 1e-3
# If box coordinates may differ by any amount (INT8), a box may be removed by one that overlaps it this much less.
IOU_SLACK = 0.25
# Sigmoids multiply small scores by a factor: below 1 / 32, the slack of a score is proportional to it.
FULL_SLACK_FROM = 1 / 32
SCORE_ROUNDING = 1e-6  # of two float32 sigmoids
EMPTY_PX = 1e-6  # area in square pixels
CHUNK = 4096  # candidates that are compared with all detections at once

BoolArray = npt.NDArray[np.bool_]
IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slack:
    """Maximum differences between a decoded output and the boxes that entered NMS.

    Attributes:
        score: Maximum difference of a score.
        box_px: Maximum difference of a box coordinate in input pixels. If infinite, boxes are compared by IoU.
        box_share: Maximum difference of a box coordinate as a share of the longer side of the box, added to `box_px`.
        proportional: Scores below 1/32 differ less, in proportion to the score.
    """

    score: float
    box_px: float
    box_share: float = 0.0
    proportional: bool = True

    def of_scores(self, scores: FloatArray) -> FloatArray:
        """Return the maximum difference of each score."""
        factor = np.minimum(1, scores / np.float32(FULL_SLACK_FROM)) if self.proportional else np.ones_like(scores)
        return np.asarray(self.score * factor + SCORE_ROUNDING, dtype=np.float32)

    def of_boxes(self, boxes: FloatArray) -> FloatArray:
        """Return the maximum difference [N] of a coordinate of xyxy boxes [N, 4], in input pixels."""
        sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
        return np.asarray(self.box_px + self.box_share * sides, dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class NmsCheck:
    """Result of `check_nms`.

    Attributes:
        matched: Number of detections that are candidates.
        missing: Number of boxes that NMS must keep, but that are not in the list.
        extra: Number of detections that NMS cannot give.
        box_px: Largest difference of a coordinate of a matched box, in input pixels.
        score: Largest difference of a matched score.
    """

    matched: int
    missing: int
    extra: int
    box_px: float
    score: float


def class_scores(decoded: FloatArray) -> FloatArray:
    """Return the scores [A, C] of a decoded output [A, 5 + C]; of one class, the objectness."""
    objectness = decoded[:, 4:5]
    return objectness * decoded[:, 5:] if decoded.shape[1] > 6 else objectness


def candidate_limit(nms: NmsMetadata | None) -> int:
    """Return how many of the best boxes enter NMS: inside a file, or on the host for `None`."""
    return MAX_CANDIDATES if nms is None else nms.max_candidates or TOPK_LIMIT


def check_nms(
    found: RawDetections, decoded: FloatArray, thresholds: Thresholds, *, slack: Slack, max_candidates: int
) -> NmsCheck:
    """Check whether NMS finds these detections in a decoded output, up to a slack.

    Args:
        found: Detections of one image, best first.
        decoded: float32 [A, 5 + C] of this image: cx, cy, w, h, objectness, class probabilities.
        thresholds: Those of NMS; `classes` must be `None`.
        slack: Differences up to which the decoded output is known.
        max_candidates: Number of best-scoring candidates that enter NMS.
    """
    boxes, scores = xywh_to_xyxy(decoded[:, :4]), class_scores(decoded)
    best = scores.max(axis=1)
    # A class within the slack of the best one may be the best.
    labels = scores >= (np.float32(0) if thresholds.multi_label else (best - 2 * slack.of_scores(best))[:, None])
    kept, matched, box_px, score = _match(found, boxes, scores, labels, slack)
    certain = scores if thresholds.multi_label else best[:, None]
    low = _lowest_required(found, certain, thresholds, slack, max_candidates)
    missing = 0
    # Empty boxes need not be kept: where thresholds include equality, they remove each other.
    solid = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) > EMPTY_PX
    for anchors, classes in _required(labels & solid[:, None], certain, slack, low):
        candidates = RawDetections(boxes=boxes[anchors], scores=scores[anchors, classes], class_ids=classes)
        explained = kept[anchors, classes] | _may_be_removed(candidates, found, thresholds, slack)
        if thresholds.multi_label:
            missing += int((~explained).sum())
        else:  # one class of each anchor is a candidate; which one may be uncertain
            missing += len(np.unique(anchors)) - len(np.unique(anchors[explained]))
    unknown = ~matched
    if not np.isfinite(slack.box_px):  # the box of a low score may be anywhere
        unknown &= found.scores > low + slack.score
    return NmsCheck(
        matched=int(matched.sum()),
        missing=missing,
        extra=int((unknown | _impossible(found, thresholds, slack)).sum()),
        box_px=box_px,
        score=score,
    )


def _match(
    found: RawDetections, boxes: FloatArray, scores: FloatArray, labels: BoolArray, slack: Slack
) -> tuple[BoolArray, BoolArray, float, float]:
    """Find the candidate of each detection, each at most once.

    Returns:
        Which candidates [A, C] are in the list, which detections [N] are candidates, and the largest differences of
        their box coordinates and scores.
    """
    columns, free = np.ascontiguousarray(scores.T), np.ascontiguousarray(labels.T)
    kept, matched = np.zeros_like(labels), np.zeros(len(found.scores), dtype=np.bool_)
    box_px = score_difference = 0.0
    for row, (box, score, class_id) in enumerate(zip(*found, strict=True)):
        if not 0 <= class_id < len(columns):
            continue
        limit = slack.of_scores(score)
        differences = np.abs(columns[class_id] - score)
        near = np.flatnonzero(free[class_id] & (differences <= limit))
        distance, px = _box_distance(boxes[near], box, slack)
        cost = np.where(distance <= 1, distance + differences[near] / limit, np.inf)
        if not cost.min(initial=np.inf) < np.inf:
            continue
        index = cost.argmin()
        anchor = near[index]
        matched[row] = kept[anchor, class_id] = True
        free[class_id, anchor] = False
        box_px, score_difference = max(box_px, float(px[index])), max(score_difference, float(differences[anchor]))
    return kept, matched, box_px, score_difference


def _box_distance(boxes: FloatArray, box: FloatArray, slack: Slack) -> tuple[FloatArray, FloatArray]:
    """Return the distance of each box from `box` in units of the slack, and in pixels."""
    px = np.abs(boxes - box).max(axis=1, initial=0)
    if np.isfinite(slack.box_px):
        return px / slack.of_boxes(boxes), px
    return (1 - iou_matrix(boxes, box[None])[:, 0]) / np.float32(1 - SAME_OBJECT_IOU), px


def _impossible(found: RawDetections, thresholds: Thresholds, slack: Slack) -> BoolArray:
    """Return which detections are below `conf`, better than the one before, or overlap a better one too much."""
    wrong = found.scores + slack.of_scores(found.scores) < thresholds.conf
    wrong[1:] |= np.diff(found.scores) > 0
    overlap = np.triu(_exact_iou(found.boxes, found.boxes), k=1)
    if not thresholds.class_agnostic:
        overlap[found.class_ids[:, None] != found.class_ids[None]] = 0
    return np.asarray(wrong | (overlap > thresholds.iou + IOU_ROUNDING).any(axis=0))


def _exact_iou(a: FloatArray, b: FloatArray) -> npt.NDArray[np.float64]:
    return np.asarray(iou_matrix(a.astype(np.float64), b.astype(np.float64)))


def _lowest_required(
    found: RawDetections, scores: FloatArray, thresholds: Thresholds, slack: Slack, max_candidates: int
) -> float:
    """Return the score above which NMS must consider a candidate, before the slack of that candidate."""
    low = thresholds.conf
    if len(found.scores) >= thresholds.max_det:
        low = max(low, float(found.scores.min()))
    if scores.size > max_candidates:
        last = np.partition(scores.ravel(), -max_candidates)[-max_candidates]
        low = max(low, float(last + slack.of_scores(last)))
    return low


def _required(
    labels: BoolArray, certain: FloatArray, slack: Slack, low: float
) -> Iterator[tuple[IndexArray, IndexArray]]:
    """Yield anchors and classes of the candidates that NMS must consider, with all classes of an anchor together.

    Args:
        labels: Possible classes of each anchor [A, C].
        certain: Scores [A, C], or [A, 1] if one class of each anchor is a candidate.
        slack: Slack of the scores.
        low: NMS considers scores above this.
    """
    required = labels & (certain - slack.of_scores(certain) > low)
    rows = np.flatnonzero(required.any(axis=1))
    for part in np.split(rows, range(CHUNK, len(rows), CHUNK)):
        index, classes = np.nonzero(required[part])
        yield part[index], classes


def _may_be_removed(candidates: RawDetections, found: RawDetections, thresholds: Thresholds, slack: Slack) -> BoolArray:
    """Return which candidates a detection may have removed: its score may be higher, and its overlap large enough."""
    scores, class_ids = candidates.scores, candidates.class_ids
    may = found.scores[None] >= (scores - slack.of_scores(scores))[:, None]
    if not thresholds.class_agnostic:
        may &= class_ids[:, None] == found.class_ids[None]
    if np.isfinite(slack.box_px):
        overlap, least = _largest_iou(candidates.boxes, found.boxes, slack), thresholds.iou - IOU_ROUNDING
    else:
        overlap, least = _exact_iou(candidates.boxes, found.boxes), thresholds.iou - IOU_SLACK
    return np.asarray((may & (overlap > max(least, 0))).any(axis=1))


def _largest_iou(a: FloatArray, b: FloatArray, slack: Slack) -> npt.NDArray[np.float64]:
    """Return an upper bound [N, M] of the IoU of boxes `a`, which may differ by the slack, and boxes `b`."""
    px = slack.of_boxes(a).astype(np.float64)[:, None]
    a, b = a.astype(np.float64), b.astype(np.float64)
    grown = np.concatenate([a[:, :2] - px, a[:, 2:] + px], axis=1)
    shared = np.minimum(grown[:, None, 2:], b[None, :, 2:]) - np.maximum(grown[:, None, :2], b[None, :, :2])
    intersection = np.maximum(shared, 0).prod(-1)
    smallest = np.maximum(a[:, 2:] - a[:, :2] - 2 * px, 0).prod(-1)[:, None]
    union = np.maximum(smallest + (b[:, 2:] - b[:, :2]).prod(-1)[None] - intersection, intersection)
    return np.asarray(np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0))
