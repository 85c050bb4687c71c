"""Precision-recall curves, and the confidence with the best F1, compared with counting."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.samples import Dataset, Labels, Record
from yolov7_deploy.detections import Detections, Speed
from yolov7_deploy.evaluation.accuracy import compute_coco_metrics, evaluate
from yolov7_deploy.evaluation.precision_recall import MAX_CANDIDATES, PrecisionRecall, _ClassCounts, precision_recall
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import ValOptions

SIDE = 400  # width and height of an image, in pixels
CELL = 20  # objects are on a grid, so that a detection matches one box or none
ROUNDED_DOWN = 0.01  # of recall, for classes with more than 100 boxes
SAME = 1e-9


def make_image(image_id, boxes_xyxy, class_ids, *, crowd=()):
    boxes = np.array(boxes_xyxy, np.float64).reshape(-1, 4)
    labels = Labels(
        boxes=boxes / SIDE,
        class_ids=np.array(class_ids, np.int64),
        crowd=np.isin(np.arange(len(boxes)), crowd),
        polygons=tuple(np.zeros((0, 2)) for _ in boxes),
    )
    return Record(path=Path(f"{image_id}.png"), image_id=image_id, image_hw=(SIDE, SIDE), labels=labels)


def drawn(seed, *, images=12, objects=20, classes=4):
    """Return a dataset, predictions, and these as (class, score, is correct); a box has at most one detection."""
    rng = np.random.default_rng(seed)
    records, predictions, results = [], [], []
    for image_id in range(1, images + 1):
        cells = rng.permutation((SIDE // CELL) ** 2)[: 2 * objects]
        corners = np.stack([cells % (SIDE // CELL), cells // (SIDE // CELL)], axis=1) * CELL
        boxes = np.concatenate([corners, corners + CELL - 4], axis=1).astype(np.float64)
        class_ids = rng.integers(0, classes - 1, len(boxes))  # the last class has no box
        records.append(make_image(image_id, boxes[:objects], class_ids[:objects]))
        for index in np.flatnonzero(rng.random(len(boxes)) < 0.7):
            correct = bool(index < objects)
            score = round(float(rng.beta(4, 2) if correct else rng.beta(2, 4)), 3)
            x1, y1, *_ = boxes[index]
            row = {"image_id": image_id, "bbox": [x1, y1, CELL - 4, CELL - 4], "score": score}
            predictions.append(row | {"category_id": int(class_ids[index]) + 1})
            results.append((int(class_ids[index]), score, correct))
    names, ids = tuple(f"class {i}" for i in range(classes)), tuple(range(1, classes + 1))
    return Dataset(records, source="drawn", class_names=names, category_ids=ids), predictions, results


def counted_best(results, instances):
    """Return the best F1 and its (highest) confidence, precision and recall, by counting at every confidence."""
    best = (-1.0, 0.0, 0.0, 0.0)
    for confidence in sorted({score for _, score, _ in results}, reverse=True):
        rows = []
        for class_id, boxes in enumerate(instances):
            if boxes:
                kept = [correct for c, score, correct in results if c == class_id and score >= confidence]
                rows.append((2 * sum(kept) / (len(kept) + boxes), sum(kept) / max(len(kept), 1), sum(kept) / boxes))
        f1, p, r = np.mean(rows, axis=0)
        if f1 > best[0] + SAME:
            best = (f1, confidence, p, r)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_best_confidence_is_the_one_from_counting(seed):
    dataset, predictions, results = drawn(seed)
    instances = dataset.box_counts().tolist()
    assert max(instances) <= 100 and instances[-1] == 0
    best = compute_coco_metrics(dataset, range(len(dataset)), predictions)[2].best
    assert best is not None
    found = (best.f1, best.confidence, best.precision, best.recall)
    np.testing.assert_allclose(found, counted_best(results, instances), atol=SAME)


def test_with_many_boxes_in_a_class_the_error_is_below_a_hundredth():
    dataset, predictions, results = drawn(9, images=60, classes=2)
    instances = dataset.box_counts().tolist()
    assert instances == [1200, 0]
    best = compute_coco_metrics(dataset, range(len(dataset)), predictions)[2].best
    f1, _, p, r = counted_best(results, instances)
    assert best is not None
    assert f1 - ROUNDED_DOWN <= best.f1 <= f1 + SAME
    np.testing.assert_allclose((best.precision, best.recall), (p, r), atol=3 * ROUNDED_DOWN)


def test_the_area_under_the_curves_is_the_average_precision():
    dataset, predictions, _ = drawn(1)
    summary, classes, curves = compute_coco_metrics(dataset, range(len(dataset)), predictions)
    assert curves.measured.tolist() == [row.ap50 is not None for row in classes] == [True, True, True, False]
    for area, row in zip(curves.ap50.tolist(), classes, strict=True):
        assert (area == pytest.approx(row.ap50)) if row.ap50 is not None else np.isnan(area)
    assert curves.mean_precision.mean() == pytest.approx(summary["ap50"])
    assert (np.diff(curves.precision[curves.measured]) <= 0).all() and curves.recall.tolist()[:2] == [0, 0.01]


def test_the_curves_are_in_class_order_for_any_category_ids():
    dataset, predictions, _ = drawn(2, classes=3)
    other = Dataset(dataset._records, source="drawn", class_names=dataset.class_names, category_ids=(9, 4, 7))
    renamed = [row | {"category_id": (9, 4, 7)[row["category_id"] - 1]} for row in predictions]
    ours = compute_coco_metrics(dataset, range(len(dataset)), predictions)[2]
    theirs = compute_coco_metrics(other, range(len(other)), renamed)[2]
    np.testing.assert_array_equal(ours.precision, theirs.precision)
    assert ours.best == theirs.best


def test_a_crowd_is_not_ground_truth():
    box = (10, 10, 60, 60)
    dataset = Dataset(
        [make_image(1, [box, (100, 100, 300, 300)], [0, 0], crowd=[1])],
        source="drawn",
        class_names=("sheep",),
        category_ids=(1,),
    )
    found = [{"image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.5}]
    best = compute_coco_metrics(dataset, [0], found)[2].best
    assert best is not None and (best.confidence, best.precision, best.recall, best.f1) == (0.5, 1, 1, 1)


@pytest.mark.parametrize("found", [[], [(0.9, (200, 200, 20, 20))]])
def test_a_detector_without_true_positives_has_no_best_confidence(found):
    dataset = Dataset(
        [make_image(1, [(10, 10, 60, 60)], [0])], source="drawn", class_names=("cat", "dog"), category_ids=(1, 2)
    )
    rows = [{"image_id": 1, "category_id": 1, "bbox": list(box), "score": score} for score, box in found]
    curves = compute_coco_metrics(dataset, [0], rows)[2]
    assert curves.best is None and curves.mean_precision.max() == 0 and curves.measured.tolist() == [True, False]


def test_images_without_ground_truth_have_no_curve():
    dataset = Dataset([make_image(1, [], [])], source="drawn", class_names=("cat",), category_ids=(1,))
    curves = compute_coco_metrics(
        dataset, [0], [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}]
    )[2]
    assert curves.best is None and not curves.measured.any() and np.isnan(curves.mean_precision).all()


def test_skipping_confidences_hardly_changes_the_best_f1():
    rng = np.random.default_rng(3)
    classes = 3 * MAX_CANDIDATES // 101
    scores = -np.sort(-rng.random((classes, 101)))
    curves = precision_recall(np.ones((classes, 101)), scores, found=list(scores), instances=[101] * classes)
    assert curves.best is not None and curves.best.f1 == pytest.approx(1, abs=ROUNDED_DOWN)


def test_curves_and_recall_must_have_the_same_length():
    with pytest.raises(AssertionError):
        PrecisionRecall(recall=np.linspace(0, 1, 101), precision=np.zeros((2, 100)), best=None)


def test_a_report_has_curves_but_its_json_does_not(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    assert cv2.imwrite(str(tmp_path / "images/0.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "labels/0.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "data.yaml").write_text("val: images\nnames: [cat]\n")

    class Found:
        metadata = ModelMetadata(variant="custom", class_names=("cat",), strides=(), anchors=(), source="a.pt")
        input_hw = (64, 64)

        def infer(self, images, letterboxes, thresholds):
            return [
                Detections(
                    boxes=np.array([[15, 10, 45, 30]], np.float32),
                    scores=np.array([0.75], np.float32),
                    class_ids=np.array([0]),
                    class_names=("cat",),
                    image_hw=(40, 60),
                    speed=Speed(preprocess_ms=1.0, inference_ms=1.0, postprocess_ms=1.0),
                )
            ]

    report = evaluate(Found(), open_dataset(tmp_path / "data.yaml"), options=ValOptions())
    assert report.curves is not None and report.curves.best is not None
    assert (report.curves.best.confidence, report.curves.best.f1) == (0.75, 1)
    assert "curves" not in report.to_dict() and "curves" not in repr(report)


def test_a_class_without_detections_has_a_precision_of_zero_without_a_sign():
    none = np.empty(0)
    rates = _ClassCounts(boxes=2, recalls=none, scores=none, found=none).rates(np.array([0.5]))
    assert not rates.any() and not np.signbit(rates).any()
