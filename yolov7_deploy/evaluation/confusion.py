"""Confusion matrix: which classes a detector takes for which, what it misses, and what it finds in the background."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import BoolArray, DoubleArray, IntArray

CONF = 0.25  # of `Thresholds`: the matrix shows what a Detector returns by default
IOU = 0.45  # of a detection with its object, as in the official program
MAX_CONFUSIONS = 5  # pairs that the summary lists

BACKGROUND = "background"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ConfusionMatrix:
    """Detections against objects, each matched at most once, regardless of class.

    Attributes:
        counts: int64 [C + 1, C + 1], predicted class x true class. The last row counts missed objects, the last column
            detections without an object.
        class_names: One per class.
    """

    counts: IntArray
    class_names: tuple[str, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of rows and columns."""
        return (*self.class_names, BACKGROUND)

    @property
    def normalized(self) -> DoubleArray:
        """Fractions of the objects of each true class, float64 [C + 1, C + 1]; NaN for classes without objects.

        The last column has the fractions of all detections without an object.
        """
        totals = self.counts.sum(axis=0, keepdims=True)
        with np.errstate(invalid="ignore"):
            shares: DoubleArray = self.counts / totals
        return shares

    def summary(self) -> str:
        """Return found, missed and wrong detections, and the most frequent confusions, as text."""
        between = self.counts[:-1, :-1]
        found, confused = int(np.trace(between)), int(between.sum() - np.trace(between))
        missed, extra = int(self.counts[-1].sum()), int(self.counts[:, -1].sum())
        total = found + confused + missed
        text = f"at conf {CONF:g}: {found} of {total} objects found, {missed} missed, {confused} as another class; "
        text += f"{extra} detections without an object"
        pairs = [(int(between[p, t]), t, p) for p, t in zip(*np.nonzero(between), strict=True) if p != t]
        worst = sorted(pairs, key=lambda pair: (-pair[0], pair[1:]))[:MAX_CONFUSIONS]
        lines = [f"{self.class_names[t]} as {self.class_names[p]}: {count}" for count, t, p in worst]
        return "\n".join([text, *([f"most confused: {'; '.join(lines)}"] if lines else [])])


def confusion_matrix(
    dataset: Dataset, indices: Sequence[int], predictions: Sequence[Mapping[str, Any]]
) -> ConfusionMatrix:
    """Return the confusion matrix of detections with a score above `CONF`.

    Of detections with the same box, the best class counts, as without multi-label NMS. Detections on a crowd region do
    not count.

    Args:
        dataset: Dataset with the ground truth.
        indices: Samples to evaluate.
        predictions: Detections of these samples in COCO results format.
    """
    class_of = {category: class_id for class_id, category in enumerate(dataset.category_ids)}
    by_image = best_of_each_box(predictions)
    classes = len(dataset.class_names)
    counts = np.zeros((classes + 1, classes + 1), dtype=np.int64)
    for index in indices:
        sample, rows = dataset[index], by_image.get(dataset.image_id(index), ())
        boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        predicted = np.array([class_of[row["category_id"]] for row in rows], dtype=np.int64)
        objects = sample.boxes[~sample.crowd].astype(np.float64)
        true = sample.class_ids[~sample.crowd]
        pairs = _match(objects, boxes)
        for t, p in pairs:
            counts[predicted[p], true[t]] += 1
        missed = np.setdiff1d(np.arange(len(true)), [t for t, _ in pairs])
        extra = np.setdiff1d(np.arange(len(boxes)), [p for _, p in pairs]).astype(np.int64)
        extra = extra[~_on_crowd(boxes[extra], sample.boxes[sample.crowd].astype(np.float64))]
        counts[classes] += np.bincount(true[missed.astype(np.int64)], minlength=classes + 1)
        counts[:, classes] += np.bincount(predicted[extra], minlength=classes + 1)
    return ConfusionMatrix(counts=counts, class_names=dataset.class_names)


def best_of_each_box(predictions: Sequence[Mapping[str, Any]]) -> dict[int | str, list[Mapping[str, Any]]]:
    """Return the detections with a score above `CONF` by image id, the best class of each box, best first."""
    best: dict[int | str, dict[tuple[float, ...], Mapping[str, Any]]] = defaultdict(dict)
    for row in sorted(predictions, key=lambda row: -row["score"]):
        if row["score"] <= CONF:
            break
        best[row["image_id"]].setdefault(tuple(row["bbox"]), row)
    return {image_id: list(rows.values()) for image_id, rows in best.items()}


def _match(objects: DoubleArray, boxes: DoubleArray) -> list[tuple[int, int]]:
    """Return pairs (object, box) with an IoU above `IOU`, largest IoU first, each object and box at most once."""
    ious = _intersections(objects, boxes) / np.maximum(_union(objects, boxes), np.finfo(np.float64).tiny)
    candidates = np.argwhere(ious > IOU)
    order = np.argsort(-ious[candidates[:, 0], candidates[:, 1]], kind="stable")
    pairs: list[tuple[int, int]] = []
    used_objects, used_boxes = set[int](), set[int]()
    for t, p in candidates[order].tolist():
        if t not in used_objects and p not in used_boxes:
            used_objects.add(t)
            used_boxes.add(p)
            pairs.append((t, p))
    return pairs


def _on_crowd(boxes: DoubleArray, crowds: DoubleArray) -> BoolArray:
    """Return whether a crowd region covers more than `IOU` of the area of each box, bool [N]."""
    shares = _intersections(boxes, crowds) / np.maximum(_areas(boxes)[:, None], np.finfo(np.float64).tiny)
    return np.asarray((shares > IOU).any(axis=1))


def _intersections(a: DoubleArray, b: DoubleArray) -> DoubleArray:
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    return np.asarray(np.maximum(high - low, 0).prod(axis=2))


def _union(a: DoubleArray, b: DoubleArray) -> DoubleArray:
    return np.asarray(_areas(a)[:, None] + _areas(b)[None, :] - _intersections(a, b))


def _areas(boxes: DoubleArray) -> DoubleArray:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
