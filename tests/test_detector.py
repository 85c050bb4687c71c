"""Detector: images in, Detections out, with the same results on every runtime."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from tests.support.sample_images import (
    CONF,
    IMAGES,
    MAX_DET,
    assert_identical,
    assert_same,
)
from tests.support.small_models import HW, fused_tiny
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError, SourceError, UsageError
from yolov7_deploy.image import fit_letterbox, to_network_input
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import postprocess

# --- the same boxes on every runtime --------------------------------------------------------------------------------


def test_the_detector_equals_letterbox_network_nms_and_scaling_back(detector):
    for image in IMAGES:
        letterbox = fit_letterbox(image.shape[:2], HW)
        with torch.no_grad():
            decoded = fused_tiny().predict(torch.from_numpy(to_network_input([letterbox.apply(image)])))[0].numpy()
        boxes, scores, class_ids = postprocess(decoded, Thresholds(conf=CONF, max_det=MAX_DET))
        found = detector(image)
        assert len(found) > 5
        assert_same(found, replace(found, boxes=letterbox.undo(boxes), scores=scores, class_ids=class_ids))


@pytest.mark.parametrize("kind", ["none", "standard", "plugin"])
@pytest.mark.parametrize("batch", [1, 4, None])
def test_every_onnx_file_gives_the_boxes_of_pytorch(detectors, kind, batch):
    if kind == "standard" and batch is not None:
        pytest.skip("the body of plugin")
    ours = detectors(kind, batch=batch)
    assert ours.metadata.batch == batch
    for count in (1, 4, 5):
        for found, expected in zip(ours.batch(IMAGES[:count]), detectors("torch").batch(IMAGES[:count]), strict=True):
            assert len(found) > 5
            assert_same(found, expected)


def test_a_file_with_uint8_input_gives_the_boxes_of_pytorch(detectors):
    for found, expected in zip(
        detectors("plugin", input_kind="uint8", batch=None).batch(IMAGES),
        detectors("torch").batch(IMAGES),
        strict=True,
    ):
        assert_same(found, expected)


def test_boxes_are_sorted_clipped_and_typed(detectors):
    for kind in ("torch", "plugin"):
        for image, found in zip(IMAGES, detectors(kind).batch(IMAGES), strict=True):
            height, width = image.shape[:2]
            assert (found.boxes.dtype, found.scores.dtype, found.class_ids.dtype) == (np.float32, np.float32, np.int64)
            assert (np.diff(found.scores) <= 0).all() and (found.scores > np.float32(CONF)).all()
            assert found.boxes.min() >= 0
            assert (found.boxes <= [width, height, width, height]).all()
            assert found.image_hw == (height, width)
            assert found.class_names == tuple(f"thing {i}" for i in range(5))
            assert found.speed.inference_ms > 0


# --- ways to call it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_an_empty_list_gives_an_empty_list(detectors, kind):
    assert detectors(kind).batch([]) == []


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_an_image_without_detections_gives_empty_detections(detectors, kind):
    found = detectors(kind)(IMAGES[0], conf=1.0)
    assert len(found) == 0
    assert found.boxes.shape == (0, 4)


def test_paths_and_arrays_give_the_same(detector, tmp_path):
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), IMAGES[1])
    expected = detector(IMAGES[1])
    assert expected.path == ""
    for given in (path, str(path)):
        found = detector(given)
        assert found.path == str(path)
        assert_identical(found, expected)
    mixed = detector.batch([IMAGES[1], path])
    assert [one.path for one in mixed] == ["", str(path)]


def test_grey_and_bgra_images_are_accepted(detector):
    grey = IMAGES[0][:, :, 0]
    assert_identical(detector(grey), detector(np.repeat(grey[:, :, None], 3, 2)))
    assert_identical(detector(np.dstack([IMAGES[0], grey])), detector(IMAGES[0]))


def test_the_image_is_not_modified(detector):
    image = IMAGES[0].copy()
    detector(image)
    np.testing.assert_array_equal(image, IMAGES[0])


def test_a_float_array_and_a_missing_file_are_refused(detector, tmp_path):
    with pytest.raises(ImageError, match="float32"):
        detector(IMAGES[0].astype(np.float32))
    with pytest.raises(ImageError):
        detector(tmp_path / "absent.jpg")


@pytest.mark.parametrize("several", [list, tuple, iter, lambda images: (image for image in images)])
def test_a_call_with_several_images_gives_a_list(detector, several):
    found = detector(several(IMAGES[:2]), conf=0.7)
    assert isinstance(found, list) and len(found) == 2
    for ours, expected in zip(found, detector.batch(IMAGES[:2], conf=0.7), strict=True):
        assert_identical(ours, expected)


def test_results_of_a_list_longer_than_the_largest_batch_are_in_order(detector):
    images = [IMAGES[i % 5] for i in range(35)]
    found = detector.batch(images)
    assert len(found) == 35
    for i, one in enumerate(found):
        assert one.image_hw == images[i].shape[:2]
        assert_same(one, found[i % 5])


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_futures_hold_the_detections_of_their_images(detectors, kind):
    detector = detectors(kind)
    futures = [detector.submit(image, conf=0.7) for image in IMAGES]
    for future, image in zip(futures, IMAGES, strict=True):
        assert_same(future.result(timeout=60), detector(image, conf=0.7))


def test_a_future_holds_the_error(detector, tmp_path):
    future = detector.submit(tmp_path / "absent.jpg")
    assert isinstance(future.exception(timeout=60), ImageError)


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_eight_threads_get_equal_results(detectors, kind):
    detector = detectors(kind)
    expected = [detector(image) for image in IMAGES]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: detector(IMAGES[i % 5]), range(40)))
    for i, found in enumerate(results):
        assert_same(found, expected[i % 5])


def test_stream_yields_the_images_of_a_folder_in_order(detector, tmp_path):
    for i, image in enumerate(IMAGES[:3]):
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    seen = list(detector.stream(tmp_path, max_det=5))
    assert [frame.path for frame, _ in seen] == [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, (frame, found) in enumerate(seen):
        assert found.path == frame.path
        assert_identical(found, detector(IMAGES[i], max_det=5))


def test_stream_of_an_empty_folder_is_refused(detector, tmp_path):
    with pytest.raises(SourceError):
        next(detector.stream(tmp_path))


# --- thresholds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch", "none", "plugin"])
def test_thresholds_of_a_call_replace_those_of_the_detector(detectors, kind):
    detector = detectors(kind)
    kept = detector.thresholds
    everything = detector(IMAGES[0])
    above = detector(IMAGES[0], conf=0.75)
    assert 0 < len(above) < len(everything)
    assert_identical(above, everything.filter(conf=0.75))
    assert len(detector(IMAGES[0], iou=0.05)) < len(everything) < len(detector(IMAGES[0], iou=0.95))
    assert_identical(detector(IMAGES[0], max_det=3), everything[:3])
    assert detector.thresholds == kept
    assert_identical(detector(IMAGES[0]), everything)


@pytest.mark.parametrize("kind", ["torch", "plugin"])
def test_only_the_selected_classes_are_returned(detectors, kind):
    detector = detectors(kind)
    everything = detector(IMAGES[0])
    counts = np.bincount(everything.class_ids, minlength=5)
    wanted = int(counts.argmax())
    assert 0 < counts[wanted] < len(everything) < MAX_DET
    assert_identical(detector(IMAGES[0], classes=[wanted]), everything.filter(classes=wanted))


def test_a_threshold_below_that_of_the_export_detects_more(plugin, detector):
    assert_same(plugin(IMAGES[0], conf=0.5), detector(IMAGES[0], conf=0.5))
    assert len(plugin(IMAGES[0], conf=0.5)) > len(plugin(IMAGES[0]))


def test_omitted_thresholds_are_those_of_the_file(files):
    with Detector(files("plugin"), device="cpu") as detector:
        assert detector.thresholds == Thresholds(conf=CONF, iou=0.45, max_det=MAX_DET)
        assert detector.input_hw == HW
    with Detector(files("torch"), img=HW, device="cpu") as detector:
        assert detector.thresholds == Thresholds()


def test_the_default_size_is_that_of_the_paper(files):
    with Detector(files("torch"), device="cpu") as detector:
        assert detector.input_hw == (640, 640)


@pytest.mark.parametrize("kind", ["torch", "plugin"])
@pytest.mark.parametrize("class_id", [5, -1])
def test_an_unknown_class_id_is_refused(detectors, files, kind, class_id):
    with pytest.raises(UsageError, match=f"Class id {class_id} .* 5 classes") as caught:
        detectors(kind)(IMAGES[0], classes=[0, class_id])
    assert "0 to 4" in caught.value.fix
    with pytest.raises(UsageError, match="Class id"):
        Detector(files(kind), classes=[class_id], device="cpu")


@pytest.mark.parametrize("options", [{"conf": 1.5}, {"iou": -1}, {"max_det": 0}])
def test_thresholds_out_of_range_are_refused(detector, options):
    with pytest.raises(UsageError) as caught:
        detector(IMAGES[0], **options)
    assert next(iter(options)) in caught.value.message


def test_an_unknown_argument_is_refused_with_the_one_that_was_meant(detector, files):
    image = IMAGES[0]
    for call, name in (
        (lambda: Detector(files("plugin"), conf_thres=0.3), "Detector"),
        (lambda: detector(image, conf_thres=0.3), "Detector"),
        (lambda: detector.batch([image], confidence=0.3), "Detector.batch"),
        (lambda: detector.submit(image, confidences=0.3), "Detector.submit"),
    ):
        with pytest.raises(UsageError, match=f"^{name} does not have an argument conf") as raised:
            call()
        assert raised.value.fix.startswith("Did you mean conf? One of: ")


@pytest.mark.parametrize("option", [{"multi_label": True}, {"class_agnostic": True}])
def test_options_that_nms_inside_the_file_cannot_apply_are_refused(files, option):
    with Detector(files("efficient"), device="cpu", **option) as detector:
        with pytest.raises(UsageError, match=next(iter(option))) as caught:
            detector(IMAGES[0])
        assert caught.value.fix


def test_nms_outside_the_file_applies_multi_label(files, detectors):
    with Detector(files("none"), conf=CONF, max_det=MAX_DET, multi_label=True, device="cpu") as detector:
        assert len(detector(IMAGES[0])) > len(detectors("none")(IMAGES[0]))


def test_a_file_with_efficient_nms_accepts_higher_thresholds_and_refuses_lower_ones(files):
    with Detector(files("efficient", multi_label=True), device="cpu") as detector:
        everything = detector(IMAGES[0])
        assert_identical(detector(IMAGES[0], conf=0.75), everything.filter(conf=0.75))
        for option in ({"conf": 0.3}, {"iou": 0.6}, {"iou": 0.3}):
            with pytest.raises(UsageError, match=next(iter(option))):
                detector(IMAGES[0], **option)
