"""Comparison of two artifacts of one model on one image: head maps, decoding, NMS and detections.

Every stage is compared on the same input, so a stage does not fail because of a difference before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from yolov7_deploy.evaluation.nms_consistency import (
    SAME_OBJECT_IOU,
    NmsCheck,
    Slack,
    candidate_limit,
    check_nms,
    class_scores,
)
from yolov7_deploy.image import FloatArray
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import Thresholds, file_thresholds
from yolov7_deploy.postprocess import RawDetections, iou_matrix, xywh_to_xyxy
from yolov7_deploy.runtimes.base import IntermediateOutputs

STAGES = ("head", "decode", "nms", "detections")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """Maximum differences between two artifacts.

    Attributes:
        head: Maximum difference of a raw head map, in standard deviations of that map; infinite if not checked.
        head_rms: Root mean square difference of a raw head map, in the same unit.
        box_px, score: Maximum difference of a box coordinate in input pixels and of a score, where head maps are not
            available or not checked. An infinite `box_px` compares boxes by IoU.
        swaps: Number of detections per image that may be missing in one artifact: rounding decides which of two boxes
            NMS keeps if their IoU is close to `iou` or their scores are nearly equal.
    """

    head: float
    head_rms: float
    box_px: float
    score: float
    swaps: int = 0


# Float32 runtimes sum in different orders: about 1e-5 standard deviations of a map, which a 900-pixel anchor turns
# into hundredths of a pixel. The limits are ten times that.
TOLERANCES = {
    "fp32": Tolerance(head=1e-3, head_rms=1e-3, box_px=0.25, score=1e-3),
    # FP16 has 11 significant bits. Measured with the official yolov7 on COCO images: raw maps within 0.035 standard
    # deviations (24 images; the eight variants with random weights: 0.03), decoded boxes within 2.9 pixels (the widest
    # ones) and scores within 0.0043 (82 images); at conf 0.25 no detection swapped, at 0.01 at most two per image. The
    # limits are three times that, and a little more for scores, which depend most on the weights. The root mean square
    # is 0.0016 (5 images), and 0.0013 with random weights; a layer without its bias is off by ten times that, one with
    # overflow or underflow by tenths of a standard deviation and more.
    "fp16": Tolerance(head=0.1, head_rms=0.01, box_px=9, score=0.02, swaps=3),
    # bfloat16 has 8 significant bits. Measured with the official yolov7 on 12 COCO images: raw maps within 0.31
    # standard deviations, 0.010 in the root mean square, scores of matched detections within 0.009, their boxes within
    # 2.3 pixels, none missing. The limits are three to five times that.
    "bf16": Tolerance(head=1, head_rms=0.04, box_px=12, score=0.04, swaps=3),
    # INT8 has 8 bits and clips, so single cells may differ by any amount: only means over a map and detections are
    # checked. Measured with the official yolov7 on 24 COCO images: means within 0.10 standard deviations of a map,
    # scores of matched detections within 0.18, no detection with a score above conf + 0.3 missing. Whether that is
    # good enough, AP shows (`y7 verify --data`).
    "int8": Tolerance(head=math.inf, head_rms=0.3, box_px=math.inf, score=0.3, swaps=2),
}
# Decoding and NMS are float32 in files of every precision, and compute the same as NumPy up to rounding. Measured:
# scores within 2e-7, boxes within 1e-6 of their side. From head maps in FP16, ONNX Runtime may take the unrounded
# values: scores within 1e-4, boxes within 2e-4 of their side. The limits are several times that.
EXACT = Slack(score=1e-5, box_px=0.01, box_share=2e-5)
EXACT_FP16 = Slack(score=5e-4, box_px=0.01, box_share=2e-3)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """Differences at one stage on one image, or the largest ones over several images.

    Attributes:
        stage: One of `STAGES`.
        differences: Largest difference of each compared quantity.
        limits: Maximum allowed difference of each quantity that is checked.
        note: A remark, such as the number of matched detections.
        compared: Number of detections of either artifact that were compared; 0 for the other stages.
    """

    stage: str
    differences: dict[str, float]
    limits: dict[str, float]
    note: str = ""
    compared: int = 0

    @property
    def ok(self) -> bool:
        """True if no difference exceeds its limit; NaN exceeds every limit."""
        return all(self.differences[name] <= limit for name, limit in self.limits.items())

    def with_sides_swapped(self) -> StageResult:
        """Return the result with missing and extra detections exchanged, for exchanged artifacts."""
        missing, extra = self.differences["missing"], self.differences["extra"]
        return replace(self, differences={**self.differences, "missing": extra, "extra": missing})


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkRun:
    """Intermediate outputs of an artifact for one image.

    Attributes:
        metadata: Metadata of the artifact.
        heads: Raw head maps; empty if the artifact does not expose them.
        decoded: Decoded output, computed in NumPy if only NMS inside the file decodes; `None` if nothing is exposed.
        detections: See `IntermediateOutputs`.
    """

    metadata: ModelMetadata
    heads: list[FloatArray]
    decoded: FloatArray | None
    detections: RawDetections | None

    @classmethod
    def of(cls, outputs: IntermediateOutputs, metadata: ModelMetadata) -> NetworkRun:
        """Return the outputs of one run of a file with this metadata."""
        decoded = outputs.decoded
        if decoded is None and outputs.heads:
            decoded = decode_heads(outputs.heads, metadata)
        return cls(metadata=metadata, heads=outputs.heads, decoded=decoded, detections=outputs.detections)

    @property
    def best_class_only(self) -> bool:
        """True if `decoded` has the score of the best class of each box only, and 0 for the others."""
        nms = self.metadata.nms
        return nms is not None and nms.kind == "efficient" and not nms.multi_label


def lower_precision(a: ModelMetadata, b: ModelMetadata) -> str:
    """Return the lower one of two precisions, which has the larger tolerance."""
    return max(a.precision, b.precision, key=list(TOLERANCES).index)


def decode_heads(heads: Sequence[FloatArray], metadata: ModelMetadata) -> FloatArray:
    """Return the decoded output float32 [A, 5 + C] of raw head maps [3 * (5 + C), H, W], fine to coarse.

    With y the sigmoid of a raw value, centre = (2 y - 0.5 + cell) * stride and size = (2 y)^2 * anchor.
    """
    levels = []
    for raw, stride, anchors in zip(heads, metadata.strides, metadata.anchors, strict=True):
        height, width = raw.shape[1:]
        with np.errstate(over="ignore"):
            y = 1 / (1 + np.exp(-raw.astype(np.float64).reshape(len(anchors), -1, height, width)))
        y[:, 0] = (2 * y[:, 0] - 0.5 + np.arange(width)) * stride
        y[:, 1] = (2 * y[:, 1] - 0.5 + np.arange(height)[:, None]) * stride
        y[:, 2:4] = (2 * y[:, 2:4]) ** 2 * np.array(anchors)[:, :, None, None]
        levels.append(y.transpose(0, 2, 3, 1).reshape(-1, y.shape[1]))
    return np.concatenate(levels).astype(np.float32)


# --- stages -----------------------------------------------------------------------------------------------------------


def compare_heads(reference: Sequence[FloatArray], against: Sequence[FloatArray], tolerance: Tolerance) -> StageResult:
    """Compare raw head maps in units of their standard deviation."""
    # np.max returns NaN if any value is NaN; Python's max would depend on the order.
    pairs = list(zip(reference, against, strict=True))
    spread = np.max([np.abs(a - b).max() / max(a.std(), 1e-6) for a, b in pairs])
    rms = np.max([np.sqrt(np.square(a - b).mean()) / max(a.std(), 1e-6) for a, b in pairs])
    return StageResult(
        stage="head",
        differences={"raw / std": float(spread), "rms / std": float(rms)},
        limits=_finite({"raw / std": tolerance.head, "rms / std": tolerance.head_rms}),
        note=f"{len(reference)} levels",
    )


def compare_decoding(reference: NetworkRun, against: NetworkRun) -> StageResult:
    """Compare the decoding of both artifacts with that in NumPy, each on its own head maps.

    Anchors and strides are those in the metadata of `against`. If NMS inside that file decodes, `compare_nms` checks
    its boxes.
    """
    slack = _rounding(lower_precision(reference.metadata, against.metadata))
    box_share = score = 0.0
    for run in (reference, against):
        assert run.decoded is not None, "head maps can be decoded"
        expected = decode_heads(run.heads, against.metadata)
        box_px, score_difference = _differences(expected, run.decoded, best_class_only=run.best_class_only)
        share = np.maximum(box_px - slack.box_px, 0) / np.maximum(expected[:, 2:4].max(axis=1), 1)
        box_share, score = np.maximum(box_share, share.max()), np.maximum(score, score_difference)
    return StageResult(
        stage="decode",
        differences={"box / side": float(box_share), "score": float(score)},
        limits={"box / side": slack.box_share, "score": slack.score},
        note=f"{len(expected)} boxes",
    )


def compare_nms(run: NetworkRun) -> StageResult:
    """Compare NMS inside a file with the reference NMS on the same boxes; on all of them if `conf` is an input."""
    nms = run.metadata.nms
    assert nms is not None, "the file has NMS inside"
    assert run.decoded is not None, "the input of NMS is known"
    assert run.detections is not None, "NMS has run"
    thresholds = file_thresholds(nms)
    if nms.runtime_thresholds:
        thresholds = replace(thresholds, conf=0.0)
    slack, limit = _rounding(run.metadata.precision), candidate_limit(nms)
    check = check_nms(run.detections, run.decoded, thresholds, slack=slack, max_candidates=limit)
    return _nms_result("nms", check, len(run.detections.scores), swaps=0)


def compare_with_boxes(
    found: RawDetections,
    run: NetworkRun,
    thresholds: Thresholds,
    *,
    tolerance: Tolerance,
    slack: Slack,
    max_candidates: int,
) -> StageResult:
    """Compare the detections of one artifact with the boxes of the other one before NMS.

    Args:
        found: Detections of one artifact.
        run: Outputs of the other one for the same image.
        thresholds: Those of NMS.
        tolerance: Its `swaps` are the limit of missing and extra detections.
        slack: How far the boxes of the two may differ before NMS.
        max_candidates: Number of boxes that enter the NMS of the first one.
    """
    assert run.decoded is not None, "the boxes are known"
    check = check_nms(found, run.decoded, thresholds, slack=slack, max_candidates=max_candidates)
    return _nms_result("detections", check, len(found.scores), swaps=tolerance.swaps)


def compare_lists(
    reference: RawDetections, against: RawDetections, thresholds: Thresholds, tolerance: Tolerance
) -> StageResult:
    """Compare two lists of detections with each other, if neither artifact exposes its boxes before NMS."""
    pairs = match_detections(reference, against)
    missing, extra = (
        found.scores[np.setdiff1d(np.arange(len(found.scores)), pairs[:, side])]
        for side, found in enumerate((reference, against))
    )
    # A detection whose score is close to conf, or to the last score of max_det, may be in one artifact only.
    full = [float(found.scores[-1]) for found in (reference, against) if len(found.scores) >= thresholds.max_det]
    min_score = max([thresholds.conf, *full]) + tolerance.score
    boxes = np.abs(reference.boxes[pairs[:, 0]] - against.boxes[pairs[:, 1]]).max(axis=1, initial=0)
    scores = np.abs(reference.scores[pairs[:, 0]] - against.scores[pairs[:, 1]])
    swapped = (boxes > tolerance.box_px) | (scores > tolerance.score)
    if swapped.sum() <= tolerance.swaps:
        boxes, scores = boxes[~swapped], scores[~swapped]
    check = NmsCheck(
        matched=len(pairs),
        missing=int((missing > min_score).sum()),
        extra=int((extra > min_score).sum()),
        box_px=float(boxes.max(initial=0)),
        score=float(scores.max(initial=0)),
    )
    result = _nms_result("detections", check, len(reference.scores), swaps=tolerance.swaps)
    return replace(result, limits=_finite({"box px": tolerance.box_px, "score": tolerance.score, **result.limits}))


def _finite(limits: dict[str, float]) -> dict[str, float]:
    """Return the limits without infinite ones: these quantities are reported but not checked."""
    return {name: limit for name, limit in limits.items() if limit < math.inf}


def measured_slack(reference: NetworkRun, against: NetworkRun, tolerance: Tolerance) -> Slack:
    """Return how far the boxes of two artifacts may differ before NMS.

    That is twice what was measured on this image and rounding; the limits of the earlier stages restrict it. If head
    maps are not available, not finite, or only compared in the mean, it is the tolerance.
    """
    default = Slack(score=tolerance.score, box_px=tolerance.box_px)
    if tolerance.head == math.inf or reference.decoded is None or against.decoded is None:
        return default
    best_class_only = reference.best_class_only or against.best_class_only
    box_px, score = _differences(reference.decoded, against.decoded, best_class_only=best_class_only)
    largest_px = float(box_px.max())
    if not (math.isfinite(largest_px) and math.isfinite(score)):
        return default
    rounding = _rounding(lower_precision(reference.metadata, against.metadata))
    return Slack(
        score=2 * score + rounding.score,
        box_px=2 * largest_px + rounding.box_px,
        box_share=rounding.box_share,
        proportional=False,
    )


def _differences(reference: FloatArray, against: FloatArray, *, best_class_only: bool) -> tuple[FloatArray, float]:
    """Return the largest difference of a coordinate of each box [A], and of all scores.

    Args:
        reference, against: Decoded outputs [A, 5 + C].
        best_class_only: Compare the best score of each box only, and that of its class in the other output.
    """
    boxes = np.abs(xywh_to_xyxy(reference[:, :4]) - xywh_to_xyxy(against[:, :4])).max(axis=1)
    theirs, ours = class_scores(reference), class_scores(against)
    if best_class_only:
        rows, label = np.arange(len(ours)), ours.argmax(axis=1)
        best = ours[rows, label]
        theirs, ours = np.stack([theirs.max(axis=1), theirs[rows, label]]), np.stack([best, best])
    return boxes, float(np.abs(theirs - ours).max())


def _rounding(precision: str) -> Slack:
    return EXACT if precision == "fp32" else EXACT_FP16


def _nms_result(stage: str, check: NmsCheck, detections: int, *, swaps: int) -> StageResult:
    """Return the result of a stage; a detection whose box or score differs too much is an extra one."""
    return StageResult(
        stage=stage,
        differences={"box px": check.box_px, "score": check.score, "missing": check.missing, "extra": check.extra},
        limits={"missing": swaps, "extra": swaps},
        note=f"{check.matched} of {detections} matched",
        compared=check.matched + check.missing + check.extra if stage == "detections" else 0,
    )


def match_detections(a: RawDetections, b: RawDetections) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """Return index pairs [M, 2] of detections of the same class with an IoU of at least `SAME_OBJECT_IOU`.

    Matching is greedy in descending order of IoU; ties in order of score.
    """
    overlap = iou_matrix(a.boxes, b.boxes)
    overlap[a.class_ids[:, None] != b.class_ids[None]] = 0
    rows, columns = np.nonzero(overlap >= SAME_OBJECT_IOU)
    pairs: list[tuple[int, int]] = []
    used_a: set[int] = set()
    used_b: set[int] = set()
    for k in np.argsort(-overlap[rows, columns], kind="stable"):
        i, j = int(rows[k]), int(columns[k])
        if i not in used_a and j not in used_b:
            pairs.append((i, j))
            used_a.add(i)
            used_b.add(j)
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def merge_worst(old: StageResult | None, new: StageResult) -> StageResult:
    """Return the larger differences of two images at one stage."""
    if old is None:
        return new
    merged = {name: float(np.maximum(old.differences[name], value)) for name, value in new.differences.items()}
    note = _sum_counts(old.note, new.note) if new.stage in ("nms", "detections") else new.note
    return replace(new, differences=merged, note=note, compared=old.compared + new.compared)


def _sum_counts(old: str, new: str) -> str:
    """Return `8 of 9 matched` for `3 of 4 matched` and `5 of 5 matched`."""
    (a, _, b, *rest), (c, _, d, *_) = old.split(), new.split()
    return " ".join([str(int(a) + int(c)), "of", str(int(b) + int(d)), *rest])
