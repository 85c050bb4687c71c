"""Precision against recall at IoU 0.50, and the confidence that balances them best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yolov7_deploy.datasets.samples import BoolArray, DoubleArray

RECALL = np.linspace(0.0, 1.0, 101)  # COCO's recall points
ROUNDING = 1e-6  # of a box: more than float64 loses, less than any fraction of a box
MOST_CANDIDATES = 10_000  # confidences that are tried; 80 classes have no more


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatingPoint:
    """What a detector does when it answers with the boxes of at least this confidence, as means over the classes.

    A class whose boxes all have less counts 0. `f1` is the mean of the classes' F1, not the F1 of the means.
    """

    confidence: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PrecisionRecall:
    """The curves of all classes at IoU 0.50.

    Attributes:
        recall: float64 [101], 0 to 1.
        precision: float64 [C, 101], per class of the dataset: the best precision at this recall or a higher one, 0
            where the recall is not reached. NaN for a class without boxes.
        best: Where the mean F1 is highest; `None` where nothing was found, or nothing was to be found.
    """

    recall: DoubleArray
    precision: DoubleArray
    best: OperatingPoint | None

    def __post_init__(self) -> None:
        assert self.recall.ndim == 1 and self.precision.shape[1:] == self.recall.shape

    @property
    def measured(self) -> BoolArray:
        """Which classes have boxes, bool [C]."""
        return ~np.isnan(self.precision[:, 0])

    @property
    def ap50(self) -> DoubleArray:
        """The area under each curve as COCO has it: the mean of its points, float64 [C]."""
        mean: DoubleArray = self.precision.mean(axis=1)
        return mean

    @property
    def mean_precision(self) -> DoubleArray:
        """The mean of the curves of the classes with boxes, float64 [101]; NaN where there is none."""
        if not self.measured.any():
            return np.full(self.recall.shape, np.nan)
        mean: DoubleArray = self.precision[self.measured].mean(axis=0)
        return mean


def precision_recall(
    precision: DoubleArray, scores: DoubleArray, *, found: Sequence[DoubleArray], instances: Sequence[int]
) -> PrecisionRecall:
    """The curves and their best point from what COCO's evaluation gives for one IoU.

    Args:
        precision: float64 [C, 101], interpolated precision at COCO's recall points; -1 for a class without boxes.
        scores: float64 [C, 101], the confidence at which each recall is reached.
        found: Per class the confidence of every detection, in any order.
        instances: Per class the boxes to find.
    """
    curves = np.where(precision >= 0, precision, np.nan)
    best = _best_point(precision > 0, scores, [np.sort(row) for row in found], instances)
    return PrecisionRecall(recall=RECALL, precision=curves, best=best)


def _best_point(
    reached: BoolArray, scores: DoubleArray, found: Sequence[DoubleArray], instances: Sequence[int]
) -> OperatingPoint | None:
    """The confidence with the highest mean F1; the highest such confidence where several have it.

    The interpolated precision would not do, because it counts what only comes at lower confidence: on 82 images of
    COCO it says F1 0.69 at confidence 0.07, where the truth is 0.60 at 0.36. So hits are counted from the recall that
    a confidence reaches (exactly up to 100 boxes in a class, else rounded down by less than a hundredth of them), and
    alarms from the detections (those on a crowd, too, which COCO ignores).
    """
    candidates = np.unique(scores[reached])[::-1]
    candidates = candidates[:: 1 + len(candidates) // MOST_CANDIDATES]
    sums = np.zeros((3, len(candidates)))
    for known, score, confidences, boxes in zip(reached, scores, found, instances, strict=True):
        if boxes:
            hits = np.ceil(np.append(0.0, RECALL[known]) * boxes - ROUNDING)
            # Confidence falls along a curve: so many of its points lie at a candidate's confidence or above.
            hits = hits[np.searchsorted(-score[known], -candidates, side="right")]
            alarms = len(confidences) - np.searchsorted(confidences, candidates)
            sums += np.stack([hits / np.maximum(alarms, 1), hits / boxes, 2 * hits / (alarms + boxes)])
    if not sums.any():
        return None
    at = int(sums[2].argmax())
    p, r, f1 = (sums[:, at] / np.count_nonzero(instances)).tolist()
    return OperatingPoint(confidence=float(candidates[at]), precision=p, recall=r, f1=f1)
