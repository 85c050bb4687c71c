"""What counts as the same: the outputs of a half engine beside those of the float32 file."""

from __future__ import annotations

import numpy as np

from tests.gpu.environment import Array

# Of float32 against half: boxes of confident detections, and raw outputs of networks with made-up weights.
IOU_SAME, SCORE_SAME, MATCHED_SHARE = 0.9, 0.05, 0.95
RAW_SHARE, RAW_TOLERANCE = 0.99, 0.02


def compare_raw(found: Array, wanted: Array) -> dict[str, object]:
    """Rows [N, 5 + C] of decoded output: boxes in parts of their size, probabilities as they are."""
    assert np.isfinite(found).all(), "the engine's output is not finite"
    scale = np.ones_like(wanted)
    scale[:, :4] = np.maximum(np.tile(wanted[:, 2:4], 2), 1)
    difference = np.abs(found - wanted) / scale
    share = float((difference.max(1) < RAW_TOLERANCE).mean())
    return {
        "rows": len(wanted),
        "share_close": share,
        "median": float(np.median(difference)),
        "same": share >= RAW_SHARE,
    }


def compare_detections(found: dict[str, Array], wanted: dict[str, Array]) -> dict[str, object]:
    """How many detections of the reference the engine has too: same class, nearly the same box and score."""
    count, wanted_count = int(found["num_dets"][0]), int(wanted["num_dets"][0])
    matched = 0
    for box, score, class_id in zip(
        wanted["det_boxes"][:wanted_count],
        wanted["det_scores"][:wanted_count],
        wanted["det_classes"][:wanted_count],
        strict=True,
    ):
        near = iou(box, found["det_boxes"][:count]) > IOU_SAME
        near &= (found["det_classes"][:count] == class_id) & (abs(found["det_scores"][:count] - score) < SCORE_SAME)
        matched += bool(near.any())
    share = matched / max(wanted_count, 1)
    same = wanted_count > 0 and share >= MATCHED_SHARE
    return {"detections": count, "reference": wanted_count, "matched": matched, "same": same}


def iou(box: Array, others: Array) -> Array:
    """Of one xyxy box [4] with others [N, 4]."""
    shared = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    inter = np.maximum(shared, 0).prod(1)
    area = (others[:, 2:] - others[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - inter
    result: Array = inter / np.maximum(area, 1e-9)
    return result
