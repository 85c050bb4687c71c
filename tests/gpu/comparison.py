"""Comparison of the outputs of an FP16 engine with those of the float32 file."""

from __future__ import annotations

import numpy as np

from tests.gpu.environment import Array

# Tolerances of FP16 against float32, for confident detections and for raw outputs of networks with synthetic weights.
IOU_SAME, SCORE_SAME, MATCHED_SHARE = 0.9, 0.05, 0.95
RAW_SHARE, RAW_TOLERANCE = 0.99, 0.02


def compare_raw(found: Array, expected: Array) -> dict[str, object]:
    """Compare rows [N, 5 + C] of decoded output: boxes relative to their size, probabilities absolutely."""
    assert np.isfinite(found).all(), "the engine's output is not finite"
    scale = np.ones_like(expected)
    scale[:, :4] = np.maximum(np.tile(expected[:, 2:4], 2), 1)
    difference = np.abs(found - expected) / scale
    share = float((difference.max(1) < RAW_TOLERANCE).mean())
    return {
        "rows": len(expected),
        "share_close": share,
        "median": float(np.median(difference)),
        "same": share >= RAW_SHARE,
    }


def compare_detections(found: dict[str, Array], expected: dict[str, Array]) -> dict[str, object]:
    """Count the reference detections that the engine finds too: same class, nearly the same box and score."""
    count, expected_count = int(found["num_dets"][0]), int(expected["num_dets"][0])
    matched = 0
    for box, score, class_id in zip(
        expected["det_boxes"][:expected_count],
        expected["det_scores"][:expected_count],
        expected["det_classes"][:expected_count],
        strict=True,
    ):
        near = iou(box, found["det_boxes"][:count]) > IOU_SAME
        near &= (found["det_classes"][:count] == class_id) & (abs(found["det_scores"][:count] - score) < SCORE_SAME)
        matched += bool(near.any())
    share = matched / max(expected_count, 1)
    same = expected_count > 0 and share >= MATCHED_SHARE
    return {"detections": count, "reference": expected_count, "matched": matched, "same": same}


def iou(box: Array, others: Array) -> Array:
    """Return the IoU [N] of one xyxy box [4] with others [N, 4]."""
    shared = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    inter = np.maximum(shared, 0).prod(1)
    area = (others[:, 2:] - others[:, :2]).prod(1) + (box[2:] - box[:2]).prod() - inter
    result: Array = inter / np.maximum(area, 1e-9)
    return result
