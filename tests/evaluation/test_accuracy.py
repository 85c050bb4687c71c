"""Average precision: the protocols, the COCO metrics, and the contents of a report."""

import json
import os
import re
import threading
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.detections import Detections, Speed
from yolov7_deploy.errors import DatasetError, UsageError
from yolov7_deploy.evaluation.accuracy import METRICS, compute_coco_metrics, evaluate
from yolov7_deploy.evaluation.protocol import effective_thresholds, rect_batches
from yolov7_deploy.image import fit_evaluation_letterbox
from yolov7_deploy.metadata import ModelMetadata, NmsMetadata
from yolov7_deploy.options import Thresholds, ValOptions

OFFICIAL_DIGITS = 5e-5  # the official figures are printed with four decimals
NAMES = ("cat", "dog")
needs_shared = pytest.mark.skipif(
    "Y7_SHARED" not in os.environ, reason="Y7_SHARED does not name the folder with coco-mini"
)


def model_metadata(**changes):
    values = {"variant": "custom", "class_names": NAMES, "strides": (), "anchors": (), "source": "a.pt"}
    return ModelMetadata(**(values | changes))


class PlannedDetector:
    """A fake detector that returns planned boxes for each image, identified by the value of its first pixel."""

    def __init__(self, planned, *, metadata=None, input_hw=(64, 64)):
        self.planned = planned
        self.metadata = metadata or model_metadata()
        self.input_hw = input_hw
        self.calls = []

    def infer(self, images, letterboxes, thresholds):
        self.calls.append((len(images), {box.canvas_hw for box in letterboxes}, thresholds))
        return [self.detections(image) for image in images]

    def detections(self, image):
        boxes, scores, class_ids = self.planned.get(int(image[0, 0, 0]), ([], [], []))
        return Detections(
            boxes=np.array(boxes, np.float32).reshape(-1, 4),
            scores=np.array(scores, np.float32),
            class_ids=np.array(class_ids, np.int64),
            class_names=self.metadata.class_names,
            image_hw=image.shape[:2],
            speed=Speed(preprocess_ms=1.0, inference_ms=2.0, postprocess_ms=3.0),
        )


@pytest.fixture
def folder(tmp_path):
    """Three images of 40x60, grey values 0, 50 and 100, with a cat, a dog and a cat."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    for number, label in enumerate(["0 0.5 0.5 0.5 0.5", "1 0.5 0.5 0.5 0.5", "0 0.25 0.25 0.2 0.3"]):
        assert cv2.imwrite(str(tmp_path / f"images/{number}.png"), np.full((40, 60, 3), 50 * number, np.uint8))
        (tmp_path / f"labels/{number}.txt").write_text(label)
    (tmp_path / "data.yaml").write_text(f"val: images\nnames: {list(NAMES)}\n")
    return tmp_path


def perfect(dataset):
    return {50 * i: (s.boxes, np.full(len(s.boxes), 0.9), s.class_ids) for i, s in enumerate(dataset)}


def evaluated(folder, planned=None, *, options=None, **detector):
    dataset = open_dataset(folder / "data.yaml")
    detector = PlannedDetector(perfect(dataset) if planned is None else planned, **detector)
    return evaluate(detector, dataset, options=options or ValOptions()), detector


def test_perfect_detections_have_average_precision_one(folder):
    report, _ = evaluated(folder)
    assert report.ap == pytest.approx(1) and report.ar100 == pytest.approx(1)
    assert report.ap_large is None, "there is no ground truth of this size"
    assert [(c.name, c.images, c.instances) for c in report.classes] == [("cat", 2, 2), ("dog", 1, 1)]


@pytest.mark.parametrize("first", [10**16, 2**53, 2**63 - 1, 10**40])
def test_file_names_of_many_digits_are_ids_of_different_images(folder, first):
    for number in range(3):
        for name in (f"images/{number}.png", f"labels/{number}.txt"):
            path = folder / name
            path.rename(path.with_stem(str(first + number)))
    planned = perfect(open_dataset(folder / "data.yaml"))
    report, _ = evaluated(folder, planned)
    assert report.ap == pytest.approx(1) and report.images == 3
    assert [row["image_id"] for row in report.predictions] == [first, first + 1, first + 2]
    summary, _, _ = compute_coco_metrics(open_dataset(folder / "data.yaml"), [0, 1, 2], report.predictions)
    assert summary["ap"] == report.ap


def test_the_metric_does_not_depend_on_the_values_of_the_ids(folder):
    boxes, score = [[15, 10, 45, 30], [0, 0, 20, 20]], np.array([0.5, 0.5])  # a right and a wrong box with one score
    planned = {0: (boxes, score, [0, 0]), 50: (boxes, score, [1, 0]), 100: (boxes, score, [0, 1])}
    numbered, _ = evaluated(folder, planned)
    for name in ("images/0.png", "labels/0.txt"):
        (folder / name).rename((folder / name).with_stem("a"))
    (folder / "images/1.png").rename(folder / "images/b.png")
    (folder / "labels/1.txt").rename(folder / "labels/b.txt")
    (folder / "images/2.png").rename(folder / "images/c.png")
    (folder / "labels/2.txt").rename(folder / "labels/c.txt")
    named, _ = evaluated(folder, planned)
    assert [getattr(named, name) for name in METRICS] == [getattr(numbered, name) for name in METRICS]


def test_images_without_label_file_and_files_left_out_are_noted(folder):
    assert evaluated(folder)[0].notes == ("0 of 3 images have no label file",)
    (folder / "labels/1.txt").unlink()
    (folder / "images/._1.png").write_bytes(b"x")
    left_out, missing = evaluated(folder)[0].notes
    assert left_out == f"left out of {folder}/images: 1 x hidden (._1.png)"
    assert missing.startswith("1 of 3 images have no label file")


def test_no_detections_have_average_precision_zero(folder):
    report, _ = evaluated(folder, {})
    assert report.ap == 0 and report.predictions == []


def test_a_class_found_as_another_counts_for_neither(folder):
    boxes = open_dataset(folder / "data.yaml")[1].boxes
    report, _ = evaluated(folder, {50: (boxes, [0.9], [0])})
    assert report.ap == 0 and report.classes[1].ap == 0


def test_half_of_a_class_found_is_half_its_average_precision(folder):
    # one of two cats, found without false positives: precision 1 up to recall 0.5, that is 51 of 101 recall points
    planned = {0: perfect(open_dataset(folder / "data.yaml"))[0]}
    report, _ = evaluated(folder, planned)
    assert report.classes[0].ap == pytest.approx(51 / 101) and report.ap == pytest.approx(51 / 202)


def test_the_official_thresholds_reach_the_detector(folder):
    _, detector = evaluated(folder)
    assert detector.calls[0][2] == Thresholds(conf=0.001, iou=0.65, max_det=300, multi_label=True)


def test_models_of_any_input_size_are_evaluated_with_rect_batches(folder):
    report, detector = evaluated(folder)
    # 40/60 of 64 is 42.7 pixels: with half a stride 1.83 strides high and 2.5 wide
    assert detector.calls == [(3, {(64, 96)}, ValOptions().thresholds)]
    assert report.protocol == "rect 64 (pad 0.5, batch 8, canvases up to 64x96)"


def test_without_rect_every_image_is_letterboxed_to_one_size(folder):
    report, detector = evaluated(folder, options=ValOptions(rect=False, batch=2))
    assert [call[:2] for call in detector.calls] == [(2, {(64, 64)}), (1, {(64, 64)})]
    assert report.protocol == "letterbox 64x64"


def test_models_of_a_fixed_input_size_are_evaluated_with_a_letterbox_of_that_size(folder):
    report, _ = evaluated(folder, metadata=model_metadata(input_hw=(32, 64)), input_hw=(32, 64))
    assert report.protocol == "letterbox 32x64"


def test_rect_of_a_fixed_input_size_is_a_usage_error(folder):
    with pytest.raises(UsageError, match="takes 32x64 only") as caught:
        evaluated(folder, metadata=model_metadata(input_hw=(32, 64)), options=ValOptions(rect=True))
    assert "--rect" in caught.value.fix


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.sampled_from([(640, 32), (1280, 64), (320, 32)]),
)
def test_rect_canvases_contain_every_image_of_their_batch(sizes, batch, size_stride):
    size, stride = size_stride
    batches = rect_batches(dict(enumerate(sizes)), size=size, stride=stride, batch=batch)
    assert sorted(i for one in batches for i in one.indices) == list(range(len(sizes)))
    assert all(len(one.indices) == batch for one in batches[:-1])
    for one in batches:
        assert all(side % stride == 0 and side <= size + stride for side in one.canvas_hw)
        for i in one.indices:
            box = fit_evaluation_letterbox(sizes[i], one.canvas_hw, size=size)
            assert box.top >= 0 and box.top + box.resized_hw[0] <= box.canvas_hw[0]
            assert box.left >= 0 and box.left + box.resized_hw[1] <= box.canvas_hw[1]


@pytest.mark.parametrize(
    ("sizes", "canvas_hw"),
    [
        ([(480, 640)], (512, 672)),  # landscape: rows from the highest image, columns from the size
        ([(640, 480)], (672, 512)),
        ([(427, 640), (480, 640)], (512, 672)),
        ([(480, 640), (640, 480)], (672, 672)),
        ([(640, 640)], (672, 672)),
        ([(640, 427), (640, 480)], (672, 512)),
    ],
)
def test_rect_canvases_are_the_official_ones(sizes, canvas_hw):
    (only,) = rect_batches(dict(enumerate(sizes)), size=640, stride=32, batch=8)
    assert only.canvas_hw == canvas_hw


def test_unreadable_images_are_skipped_with_their_ground_truth(folder):
    (folder / "images/0.png").write_bytes(b"not an image")
    data = (folder / "images/2.png").read_bytes()
    (folder / "images/2.png").write_bytes(data[:60])  # the header is complete, the pixels are not
    report, _ = evaluated(folder, {50: perfect(open_dataset(folder / "data.yaml")[1:2])[0]})
    assert report.images == 1 and report.ap == pytest.approx(1)
    assert [Path(item.path).name for item in report.skipped] == ["0.png", "2.png"]
    assert all("not an image" in item.reason for item in report.skipped)


def test_a_dataset_without_readable_images_is_an_error(folder):
    for image in (folder / "images").iterdir():
        image.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"None of the 3 images could be used.*0 bytes"):
        evaluated(folder, {})


def test_a_dataset_without_boxes_is_an_error_that_names_the_expected_label_file(folder):
    for label in (folder / "labels").iterdir():
        label.unlink()
    with pytest.raises(DatasetError, match="has no box in 3 images") as caught:
        evaluated(folder, {})
    assert str(folder / "labels" / "0.txt") in caught.value.message


def test_images_of_another_size_than_annotated_are_skipped(folder):
    images = [{"id": i, "file_name": f"{i}.png", "width": 60, "height": 40 + i} for i in range(2)]
    boxes = [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 20, 20]} for i in range(2)]
    document = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "instances.json").write_text(json.dumps(document))
    report = evaluate(PlannedDetector({}), open_dataset(folder / "instances.json"), options=ValOptions())
    assert report.images == 1
    assert report.skipped[0].reason == "is 40x60, but the annotations are of 41x60 (height x width)"


def test_classes_are_matched_by_name(folder):
    dataset = open_dataset(folder / "data.yaml")
    swapped = {key: (boxes, scores, 2 - ids) for key, (boxes, scores, ids) in perfect(dataset).items()}
    report, _ = evaluated(folder, swapped, metadata=model_metadata(class_names=("cow", "Dog", "cat")))
    assert report.ap == pytest.approx(1)


def test_classes_missing_in_the_dataset_are_not_false_positives(folder):
    planned = perfect(open_dataset(folder / "data.yaml"))
    planned[0] = ([*planned[0][0], [0, 0, 5, 5]], [0.9, 0.95], [0, 2])
    report, _ = evaluated(folder, planned, metadata=model_metadata(class_names=("cat", "dog", "cow")))
    assert report.ap == pytest.approx(1) and len(report.predictions) == 3


def test_classes_of_models_without_names_are_matched_by_position(folder):
    report, _ = evaluated(folder, metadata=model_metadata(class_names=("class_0", "class_1")))
    assert report.ap == pytest.approx(1)


def test_classes_missing_in_the_model_are_an_error(folder):
    wanted = "boxes of 'dog', which the model does not know; its 3 classes: 'cat', 'Cow', 'pig'.$"
    with pytest.raises(DatasetError) as caught:
        evaluated(folder, metadata=model_metadata(class_names=("cat", "Cow", "pig")))
    assert re.search(wanted, caught.value.message)


def test_the_report_is_one_json_document_without_predictions(folder):
    report, _ = evaluated(folder)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    contract = "ap ap50 ap75 ap_small ap_medium ap_large ar100 images weights runtime precision thresholds protocol"
    assert {*contract.split(), "speed_ms", "classes", "skipped", "ar1", "ar10"} <= set(document)
    assert "predictions" not in document
    assert document["speed_ms"] == {"preprocess": 1.0, "inference": 2.0, "postprocess": 3.0}
    assert document["thresholds"]["conf"] == 0.001


def test_predictions_are_rounded_as_the_official_program_does(folder):
    report, _ = evaluated(folder, {0: ([[1.00049, 2, 11.12345, 12]], [0.1234567], [1])})
    assert report.predictions == [{"image_id": 0, "category_id": 1, "bbox": [1.0, 2.0, 10.123, 10.0], "score": 0.12346}]


def test_progress_ends_with_every_image(folder):
    seen = []
    dataset = open_dataset(folder / "data.yaml")
    evaluate(PlannedDetector({}), dataset, options=ValOptions(batch=2), progress=lambda *args: seen.append(args))
    assert seen == [(2, 3), (3, 3)]


def test_reading_overlaps_with_inference(folder, monkeypatch):
    from yolov7_deploy.evaluation import accuracy

    read, running, overlapped = accuracy.read_image, threading.Event(), []

    def slow_read(path):
        overlapped.append(running.wait(timeout=5) if path.name != "0.png" else False)
        return read(path)

    class Busy(PlannedDetector):
        def infer(self, images, letterboxes, thresholds):
            running.set()
            return super().infer(images, letterboxes, thresholds)

    monkeypatch.setattr(accuracy, "read_image", slow_read)
    evaluate(Busy({}), open_dataset(folder / "data.yaml", limit=2), options=ValOptions(batch=1))
    assert overlapped == [False, True], "the second image is read while the first is in the network"


def test_an_interrupt_stops_the_readers(folder):
    class Interrupted(PlannedDetector):
        def infer(self, images, letterboxes, thresholds):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted({}), open_dataset(folder / "data.yaml"), options=ValOptions(batch=1))
    deadline = time.monotonic() + 5
    while any(t.name.startswith("y7-read") for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(t.name.startswith("y7-read") for t in threading.enumerate())


def test_a_file_with_fixed_nms_thresholds_reports_them():
    nms = NmsMetadata(
        kind="efficient",
        conf=0.25,
        iou=0.45,
        max_det=100,
        max_candidates=1024,
        multi_label=True,
        class_agnostic=False,
        runtime_thresholds=False,
    )
    effective, notes = effective_thresholds(ValOptions().thresholds, model_metadata(nms=nms))
    assert (effective.conf, effective.iou, effective.max_det) == (0.25, 0.45, 100)
    assert "not comparable" in notes[0]
    assert effective_thresholds(ValOptions().thresholds, model_metadata()) == (ValOptions().thresholds, ())


@needs_shared
@pytest.mark.parametrize("data", ["coco-mini.yaml", "annotations/instances_val2017.json"])
@pytest.mark.parametrize(
    ("predictions", "key"),
    [
        ("official_rect_predictions.json", "official_rect672"),
        ("official_square640_predictions.json", "official_model_square640"),
    ],
)
def test_the_official_detections_have_the_official_twelve_metrics(data, predictions, key):
    root = Path(os.environ["Y7_SHARED"]) / "coco-mini"
    dataset = open_dataset(root / data)
    official = json.loads((root / "official_ap.json").read_text())[key]
    summary, classes, _ = compute_coco_metrics(
        dataset, range(len(dataset)), json.loads((root / predictions).read_text())
    )
    np.testing.assert_allclose(list(summary.values()), list(official.values()), atol=OFFICIAL_DIGITS)
    measured = [c.ap for c in classes if c.ap is not None]
    assert np.mean(measured) == pytest.approx(summary["ap"])


@needs_shared
def test_the_metrics_equal_those_of_pycocotools(capsys):
    pycocotools = pytest.importorskip("pycocotools.coco", reason="the reference metric is not installed")
    from pycocotools.cocoeval import COCOeval

    root = Path(os.environ["Y7_SHARED"]) / "coco-mini"
    dataset = open_dataset(root / "coco-mini.yaml")
    predictions = json.loads((root / "official_rect_predictions.json").read_text())
    truth = pycocotools.COCO(str(root / "annotations/instances_val2017.json"))
    reference = COCOeval(truth, truth.loadRes(json.loads(json.dumps(predictions))), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    capsys.readouterr()
    summary, _, _ = compute_coco_metrics(dataset, range(len(dataset)), predictions)
    np.testing.assert_allclose(list(summary.values()), reference.stats, atol=1e-12)
    assert capsys.readouterr() == ("", ""), "the metric prints nothing"


@needs_shared
def test_the_official_detections_replayed_by_a_detector_have_the_official_ap():
    root = Path(os.environ["Y7_SHARED"]) / "coco-mini"
    dataset = open_dataset(root / "coco-mini.yaml")
    class_of = {category: i for i, category in enumerate(dataset.category_ids)}
    found = {}
    for row in json.loads((root / "official_rect_predictions.json").read_text()):
        found.setdefault(row["image_id"], []).append((row["bbox"], row["score"], class_of[row["category_id"]]))

    class Replay(PlannedDetector):
        def infer(self, images, letterboxes, thresholds):
            self.canvases.update(box.canvas_hw for box in letterboxes)
            results = [planned[image.tobytes()] for image in images]
            return [self.detections(i, *r) for i, r in zip(images, results, strict=True)]

        def detections(self, image, boxes, scores, class_ids):
            self.planned = {int(image[0, 0, 0]): (boxes, scores, class_ids)}
            return super().detections(image)

    planned = {}
    for sample in dataset:
        boxes, scores, class_ids = zip(*found[sample.image_id], strict=True)
        boxes = np.array(boxes)
        boxes[:, 2:] += boxes[:, :2]
        planned[cv2.imread(str(sample.path)).tobytes()] = (boxes, scores, class_ids)
    detector = Replay({}, metadata=model_metadata(class_names=dataset.class_names), input_hw=(640, 640))
    detector.canvases = Counter()
    report = evaluate(detector, dataset, options=ValOptions())
    assert report.ap == pytest.approx(0.5315, abs=OFFICIAL_DIGITS) and report.images == 82
    assert max(max(canvas) for canvas in detector.canvases) == 672
