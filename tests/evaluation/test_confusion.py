"""Confusion matrices, compared with counting by hand."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from yolov7_deploy.datasets.samples import Dataset, Labels, Record
from yolov7_deploy.evaluation.confusion import IOU, ConfusionMatrix, confusion_matrix

SIDE = 100
NAMES = ("cat", "dog", "bird")


def dataset_of(*images):
    """Return a dataset; each image is a list of (class, x, y, side) or (class, x, y, side, "crowd")."""
    records = []
    for number, objects in enumerate(images):
        boxes = np.array([(x, y, x + side, y + side) for _, x, y, side, *_ in objects], np.float64).reshape(-1, 4)
        labels = Labels(
            boxes=boxes / SIDE,
            class_ids=np.array([item[0] for item in objects], np.int64),
            crowd=np.array([len(item) > 4 for item in objects], np.bool_),
            polygons=tuple(np.zeros((0, 2)) for _ in objects),
        )
        records.append(Record(path=Path(f"{number}.png"), image_id=number, image_hw=(SIDE, SIDE), labels=labels))
    return Dataset(records, source="drawn", class_names=NAMES, category_ids=(10, 20, 30))


def found(image_id, class_id, x, y, side, score=0.9):
    return {"image_id": image_id, "category_id": (class_id + 1) * 10, "bbox": [x, y, side, side], "score": score}


def matrix(dataset, *predictions):
    return confusion_matrix(dataset, range(len(dataset)), predictions).counts.tolist()


def test_found_confused_missed_and_extra_detections_are_counted():
    dataset = dataset_of([(0, 0, 0, 10), (1, 20, 0, 10), (2, 40, 0, 10)], [(0, 0, 0, 10)])
    counts = matrix(dataset, found(0, 0, 1, 0, 10), found(0, 0, 20, 1, 10), found(1, 2, 60, 60, 10))
    assert counts == [
        [1, 1, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [1, 0, 1, 0],
    ]


@pytest.mark.parametrize(("score", "counted"), [(0.25, False), (0.2501, True)])
def test_detections_at_or_below_the_default_confidence_do_not_count(score, counted):
    assert matrix(dataset_of([]), found(0, 0, 0, 0, 10, score))[0][3] == counted


def test_a_box_of_several_classes_counts_with_its_best_class():
    dataset = dataset_of([(0, 0, 0, 10)])
    counts = matrix(dataset, found(0, 1, 0, 0, 10, 0.4), found(0, 0, 0, 0, 10, 0.6), found(0, 2, 0, 0, 10, 0.5))
    assert np.sum(counts) == counts[0][0] == 1


def test_an_object_and_a_detection_are_matched_once_by_the_largest_overlap():
    dataset = dataset_of([(0, 0, 0, 20), (1, 4, 0, 20)])
    counts = matrix(dataset, found(0, 1, 4, 0, 20, 0.5), found(0, 0, 2, 0, 20, 0.9), found(0, 0, 0, 0, 20, 0.3))
    assert counts[0][0] == counts[1][1] == 1 and counts[0][3] == 1 and np.sum(counts) == 3


def test_crowds_are_neither_missed_nor_counted_as_extra():
    dataset = dataset_of([(0, 0, 0, 50, "crowd")])
    counts = matrix(dataset, found(0, 0, 5, 5, 10), found(0, 1, 30, 30, 20), found(0, 2, 80, 80, 10))
    assert np.sum(counts) == counts[2][3] == 1


def test_predictions_of_other_images_do_not_count():
    dataset = dataset_of([(0, 0, 0, 10)], [(1, 0, 0, 10)])
    assert confusion_matrix(dataset, [0], [found(1, 1, 0, 0, 10)]).counts.sum() == 1


def test_random_boxes_are_matched_as_by_trying_every_pair():
    rng = np.random.default_rng(1)
    for _ in range(20):
        objects = [(int(rng.integers(3)), *rng.integers(0, 60, 2).tolist(), 25) for _ in range(6)]
        detected = [
            found(0, int(rng.integers(3)), *rng.integers(0, 60, 2).tolist(), 25, 0.9 - i / 100) for i in range(6)
        ]
        pairs = []
        for (t, item), (p, row) in itertools.product(enumerate(objects), enumerate(detected)):
            w, h = (max(0, 25 - abs(a - b)) for a, b in zip(item[1:3], row["bbox"][:2], strict=True))
            pairs.append((w * h / (2 * 25**2 - w * h), t, p))
        expected = np.zeros((4, 4), int)
        free_t, free_p = set(range(6)), set(range(6))
        for iou, t, p in sorted(pairs, key=lambda pair: -pair[0]):
            if iou > IOU and t in free_t and p in free_p:
                expected[detected[p]["category_id"] // 10 - 1, objects[t][0]] += 1
                free_t.remove(t)
                free_p.remove(p)
        for t in free_t:
            expected[3, objects[t][0]] += 1
        for p in free_p:
            expected[detected[p]["category_id"] // 10 - 1, 3] += 1
        assert matrix(dataset_of(objects), *detected) == expected.tolist()


def test_the_summary_counts_and_names_the_most_frequent_confusions():
    counts = np.array([[6, 1, 0, 2], [2, 3, 0, 0], [0, 4, 0, 1], [1, 0, 5, 0]])
    assert ConfusionMatrix(counts=counts, class_names=NAMES).summary() == (
        "at conf 0.25: 9 of 22 objects found, 6 missed, 7 as another class; 3 detections without an object\n"
        "most confused: dog as bird: 4; cat as dog: 2; dog as cat: 1"
    )
    assert "most confused" not in ConfusionMatrix(counts=np.zeros((4, 4), int), class_names=NAMES).summary()


def test_fractions_of_classes_without_objects_are_nan():
    confusion = confusion_matrix(dataset_of([(0, 0, 0, 10)]), [0], [])
    assert confusion.normalized[3, 0] == 1 and np.isnan(confusion.normalized[:, 1]).all()
