"""Precision-recall curves at IoU 0.50, and the confidence threshold with the best F1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from yolov7_deploy.datasets.samples import BoolArray, DoubleArray

RECALL = np.linspace(0.0, 1.0, 101)  # COCO's recall points
ROUNDING = 1e-6  # in boxes: above the error of float64, below any fraction of a box
MAX_CANDIDATES = 10_000  # confidences that are tried; 80 classes have fewer


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatingPoint:
    """Precision, recall and F1 of a detector at a confidence threshold, as means over the classes.

    A class without boxes of this confidence counts 0. `f1` is the mean of the F1 of each class, not the F1 of the
    means.
    """

    confidence: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PrecisionRecall:
    """Precision-recall curves of all classes at IoU 0.50.

    Attributes:
        recall: float64 [101], 0 to 1.
        precision: float64 [C, 101], one row per class of the dataset: the highest precision at this recall or a higher
            one, 0 where the recall is not reached. NaN for a class without ground truth.
        best: Operating point with the highest mean F1; `None` without detections or without ground truth.
        at_best: Precision and recall of each class at that confidence, float64 [C, 2]; NaN for a class without ground
            truth, empty without `best`.
    """

    recall: DoubleArray
    precision: DoubleArray
    best: OperatingPoint | None
    at_best: DoubleArray = field(default_factory=lambda: np.zeros((0, 2)))

    def __post_init__(self) -> None:
        assert self.recall.ndim == 1 and self.precision.shape[1:] == self.recall.shape

    @property
    def measured(self) -> BoolArray:
        """Mask of the classes with ground truth, bool [C]."""
        return ~np.isnan(self.precision[:, 0])

    @property
    def ap50(self) -> DoubleArray:
        """AP at IoU 0.50 of each class as defined by COCO: the mean of the curve's points, float64 [C]."""
        mean: DoubleArray = self.precision.mean(axis=1)
        return mean

    @property
    def mean_precision(self) -> DoubleArray:
        """Mean curve of the classes with ground truth, float64 [101]; NaN if there is none."""
        if not self.measured.any():
            return np.full(self.recall.shape, np.nan)
        mean: DoubleArray = self.precision[self.measured].mean(axis=0)
        return mean


def precision_recall(
    precision: DoubleArray, scores: DoubleArray, *, found: Sequence[DoubleArray], instances: Sequence[int]
) -> PrecisionRecall:
    """Return the curves and the best operating point from the arrays of COCO's evaluation for one IoU threshold.

    Args:
        precision: float64 [C, 101], interpolated precision at COCO's recall points; -1 for a class without ground
            truth.
        scores: float64 [C, 101], confidence at which each recall is reached.
        found: Confidences of all detections of each class, in any order.
        instances: Number of ground truth boxes of each class.
    """
    curves = np.where(precision >= 0, precision, np.nan)
    classes = [
        _ClassCounts(boxes=boxes, recalls=RECALL[known], scores=score[known], found=np.sort(row))
        for known, score, row, boxes in zip(precision > 0, scores, found, instances, strict=True)
    ]
    best = _best_point(classes)
    if best is None:
        return PrecisionRecall(recall=RECALL, precision=curves, best=None)
    at_best = np.array([one.rates(np.array([best.confidence]))[:2, 0] for one in classes])
    return PrecisionRecall(recall=RECALL, precision=curves, best=best, at_best=at_best)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _ClassCounts:
    """Detections of one class.

    The interpolated precision of COCO cannot be used, because it includes detections of lower confidence: on 82 COCO
    images it gives F1 0.69 at confidence 0.07, while the actual values are 0.60 at 0.36. Therefore true positives are
    counted from the recall that a confidence reaches (exact for up to 100 boxes in a class, else rounded down by less
    than a hundredth of them), and positives from the detections (including those on a crowd, which COCO ignores).

    Attributes:
        boxes: Number of ground truth boxes.
        recalls, scores: The recall points that are reached, and the confidence of each, which decreases.
        found: Confidences of all detections, sorted.
    """

    boxes: int
    recalls: DoubleArray
    scores: DoubleArray
    found: DoubleArray

    def rates(self, confidences: DoubleArray) -> DoubleArray:
        """Return precision, recall and F1 at each of N confidences, float64 [3, N]; NaN without ground truth."""
        if not self.boxes:
            return np.full((3, len(confidences)), np.nan)
        counts = np.ceil(np.append(0.0, self.recalls) * self.boxes - ROUNDING) + 0.0  # not -0.0
        true_positives = counts[np.searchsorted(-self.scores, -confidences, side="right")]
        positives = len(self.found) - np.searchsorted(self.found, confidences)
        precision, recall = true_positives / np.maximum(positives, 1), true_positives / self.boxes
        return np.stack([precision, recall, 2 * true_positives / (positives + self.boxes)])


def _best_point(classes: Sequence[_ClassCounts]) -> OperatingPoint | None:
    """Return the operating point with the highest mean F1; of several, the one with the highest confidence."""
    candidates = np.unique(np.concatenate([np.zeros(0), *(one.scores for one in classes)]))[::-1]
    candidates = candidates[:: 1 + len(candidates) // MAX_CANDIDATES]
    sums = np.zeros((3, len(candidates)))
    measured = [one for one in classes if one.boxes]
    for one in measured:
        sums += one.rates(candidates)
    if not sums.any():
        return None
    at = int(sums[2].argmax())
    p, r, f1 = (sums[:, at] / len(measured)).tolist()
    return OperatingPoint(confidence=float(candidates[at]), precision=p, recall=r, f1=f1)
