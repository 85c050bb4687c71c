"""Images on which the detections of two detectors differ most, and the objects that differ.

Detections of the two are matched down to the lowest confidence of the measurement, so an object with a score of 0.26 in
one and 0.24 in the other differs by 0.02, although it is above the threshold in one of them only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from yolov7_deploy.datasets.samples import CocoId
from yolov7_deploy.evaluation.confusion import best_of_each_box
from yolov7_deploy.evaluation.parity_stages import match_detections
from yolov7_deploy.postprocess import RawDetections, iou_matrix

Xyxy = tuple[float, float, float, float]
Row = Mapping[str, Any]  # a detection in COCO results format


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectedBox:
    """One detection of an image: its box in source pixels, its score, and whether it is shown (`best_of_each_box`)."""

    box: Xyxy
    score: float
    shown: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectDifference:
    """One object as two detectors see it; a side is `None` if it has no box of this class with an IoU of 0.5.

    Attributes:
        category_id: Class, as an id of the dataset.
        reference, other: The two detections.
        iou: Overlap of the two boxes, 0 without one of them.
    """

    category_id: CocoId
    reference: DetectedBox | None
    other: DetectedBox | None
    iou: float

    @property
    def value(self) -> float:
        """Size of the difference, 0 to 1: of the scores, or (1 - IoU) ** 2 if larger; the score if a side is `None`.

        The square keeps small objects from leading the list: a box of ten pixels loses a fifth of its IoU if it moves
        by one pixel.
        """
        if self.reference is None or self.other is None:
            return max(side.score for side in (self.reference, self.other) if side is not None)
        return max(abs(self.reference.score - self.other.score), (1 - self.iou) ** 2)

    @property
    def box_px(self) -> float | None:
        """Largest difference of a box coordinate in source pixels; `None` without one of the boxes."""
        if self.reference is None or self.other is None:
            return None
        return max(abs(a - b) for a, b in zip(self.reference.box, self.other.box, strict=True))


def image_differences(reference: Sequence[Row], other: Sequence[Row]) -> dict[CocoId, tuple[ObjectDifference, ...]]:
    """Return the objects of each image as two detectors see them, the largest difference first.

    An object is listed if one of the two shows it: with a score above 0.25, as the best class of its box.

    Args:
        reference, other: Detections in COCO results format, with low scores, too.
    """
    shown = [
        {id(row) for rows in best_of_each_box(predictions).values() for row in rows}
        for predictions in (reference, other)
    ]
    by_image = [_by_image(predictions) for predictions in (reference, other)]
    return {
        image_id: _compare_image(*((rows.get(image_id, []), ids) for rows, ids in zip(by_image, shown, strict=True)))
        for image_id in dict.fromkeys([*by_image[0], *by_image[1]])
    }


def _by_image(predictions: Sequence[Row]) -> dict[CocoId, list[Row]]:
    rows: dict[CocoId, list[Row]] = defaultdict(list)
    for row in sorted(predictions, key=lambda row: -row["score"]):
        rows[row["image_id"]].append(row)
    return rows


def _compare_image(*sides: tuple[Sequence[Row], set[int]]) -> tuple[ObjectDifference, ...]:
    """Return the differences between two sides; each has its rows and the identities of those that are shown."""
    (theirs, their_ids), (ours, our_ids) = sides
    categories = list(dict.fromkeys(row["category_id"] for row in (*theirs, *ours)))
    a, b = _detections(theirs, categories), _detections(ours, categories)
    pairs, overlaps = match_detections(a, b), iou_matrix(a.boxes, b.boxes)
    missing, extra = (np.setdiff1d(np.arange(len(s)), pairs[:, k]).tolist() for k, s in enumerate((theirs, ours)))
    rows: list[tuple[Row | None, Row | None, float]] = [
        *((theirs[i], ours[j], float(overlaps[i, j])) for i, j in pairs.tolist()),
        *((theirs[i], None, 0.0) for i in missing),
        *((None, ours[j], 0.0) for j in extra),
    ]
    differences = [
        ObjectDifference(
            category_id=(one or other or {})["category_id"],
            reference=_box(one, their_ids),
            other=_box(other, our_ids),
            iou=iou,
        )
        for one, other, iou in rows
    ]
    listed = [d for d in differences if any(box is not None and box.shown for box in (d.reference, d.other))]
    return tuple(sorted(listed, key=lambda difference: -difference.value))


def _detections(rows: Sequence[Row], categories: Sequence[CocoId]) -> RawDetections:
    return RawDetections(
        boxes=np.array([_xyxy(row) for row in rows], dtype=np.float32).reshape(-1, 4),
        scores=np.array([row["score"] for row in rows], dtype=np.float32),
        class_ids=np.array([categories.index(row["category_id"]) for row in rows], dtype=np.int64),
    )


def _box(row: Row | None, shown: set[int]) -> DetectedBox | None:
    if row is None:
        return None
    return DetectedBox(box=_xyxy(row), score=float(row["score"]), shown=id(row) in shown)


def _xyxy(row: Row) -> Xyxy:
    x, y, width, height = row["bbox"]
    return x, y, x + width, y + height
