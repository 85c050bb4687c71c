"""TensorRT engines from image to detections: boxes, thresholds, batches, stages, and ownership of the results."""

import contextlib
import logging
from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper

from tests.fakes.fake_trt_runtime import VERSIONS
from tests.support.trt_kit import HW, INFO, NMS, assert_detected, environment, expected_boxes, infer, make_image, toy
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError, UsageError
from yolov7_deploy.image import fit_evaluation_letterbox, fit_letterbox
from yolov7_deploy.metadata import THRESHOLD_INPUTS
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.letterbox_kernel import FRAME
from yolov7_deploy.runtimes.staging import Staging

__all__ = ["environment"]

FIXED = replace(NMS, runtime_thresholds=False)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("batch", [1, None])
def test_every_tensorrt_detects_the_boxes_of_each_image(environment, version, batch):
    environment.use(version)
    runtime = environment.open(toy(batch))
    assert dict(runtime.runtime_info)["letterbox"] == "GPU kernel"
    for count in (1, 2, 3, 1, 1, 5, 4, 4, 4, 1):
        images = [make_image(seed) for seed in range(count)]
        for found, image in zip(infer(runtime, images).detections, images, strict=True):
            assert_detected(found, image)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", ["float", "float16", "uint8"])
def test_every_input_type_gives_the_same_boxes_with_either_letterbox(environment, kind, kernels):
    if not kernels:
        environment.without_kernels()
    runtime = environment.open(toy(None, kind=kind))
    assert (dict(runtime.runtime_info)["letterbox"] == "GPU kernel") == kernels == runtime.takes_gpu_arrays
    tolerance = 0.05 if kind == "float16" else 2e-3  # the canvas has 11 bits of mantissa
    for sizes in ([(48, 80)], [(48, 80)], [(300, 200), (10, 90)], [(300, 200), (10, 90)], [(64, 96)]):
        images = [make_image(seed, *size) for seed, size in enumerate(sizes)]
        for found, image in zip(infer(runtime, images).detections, images, strict=True):
            np.testing.assert_allclose(found.boxes, expected_boxes(image), atol=tolerance)


def test_a_letterbox_that_shrinks_by_area_is_applied_on_the_host(environment):
    runtime, image = environment.open(), make_image(3, 128, 192)
    box = fit_evaluation_letterbox((128, 192), HW, size=96)
    assert box.shrink_by_area
    thresholds = Thresholds(conf=0.25, multi_label=True)
    for _ in range(3):  # without a graph, captured, launched
        (found,) = runtime.infer([image], [box], thresholds).detections
        np.testing.assert_allclose(found.boxes, expected_boxes(image, box), atol=2e-3)
        assert_detected(infer(runtime, [make_image(4)]).detections[0], make_image(4))


def test_each_call_has_its_own_thresholds_classes_and_max_det(environment):
    runtime, image = environment.open(), make_image(1)
    for conf, rows in ((0.25, 3), (0.5, 2), (0.7, 1), (0.95, 0), (0.25, 3)):
        assert_detected(infer(runtime, [image], conf=conf).detections[0], image, rows=rows)
    assert_detected(infer(runtime, [image], max_det=2).detections[0], image, rows=2)
    (found,) = infer(runtime, [image], classes=(1, 2)).detections
    assert found.class_ids.tolist() == [1, 2]
    assert found.class_ids.dtype == np.int64
    # The label rules are inputs, too, which the toy graph ignores.
    assert_detected(infer(runtime, [image], multi_label=False, class_agnostic=True).detections[0], image)


def test_nms_after_the_engine_accepts_every_threshold(environment):
    graph = toy(None, decoded=True)
    runtime = environment.open(graph, metadata=replace(INFO, nms=None))
    images = [make_image(seed) for seed in range(3)]
    for found, image in zip(infer(runtime, images, iou=1.0, multi_label=False).detections, images, strict=True):
        assert found.class_ids.tolist() == [0, 1, 2]
        centre, size = expected_boxes(image)[:, :2], expected_boxes(image)[:, 2:]
        np.testing.assert_allclose(found.boxes[:, 2:] - found.boxes[:, :2], size, atol=4e-3)
        np.testing.assert_allclose((found.boxes[:, 2:] + found.boxes[:, :2]) / 2, centre, atol=4e-3)
    assert len(infer(runtime, images, class_agnostic=True, iou=0.01).detections[0].scores) < 3


@pytest.mark.parametrize(("batch", "batches"), [(3, (3, 3)), (None, (2, 3))])
def test_lists_are_split_into_batches_and_padded(environment, batch, batches):
    runtime = environment.open(toy(batch), batches=batches)
    assert runtime.max_batch_size == 3
    assert runtime.metadata.batch == batch
    for count in (7, 1, 3, 2, 1, 1):
        images = [make_image(seed) for seed in range(count)]
        outputs = infer(runtime, images)
        assert len(outputs.detections) == count
        for found, image in zip(outputs.detections, images, strict=True):
            assert_detected(found, image)


def test_a_batch_that_is_not_full_repeats_its_last_frame(environment):
    images = [make_image(seed) for seed in range(2)]
    with contextlib.closing(Staging(environment.cuda, 4)) as staging:
        boxes = [fit_letterbox(image.shape[:2], HW) for image in images]
        staging.layout(images, boxes, batch=4)
        table = staging.frames_address - staging.device.pointer
        frames = staging.host[table : table + 4 * FRAME.itemsize].view(FRAME)
        assert frames[0] != frames[1] == frames[2] == frames[3], "an old record would contain an invalid address"


def test_an_empty_list_gives_an_empty_list(environment):
    runtime = environment.open()
    assert infer(runtime, []).detections == []
    with Detector(environment.engine()) as detector:
        assert detector.batch([]) == []
        assert detector.infer([], [], detector.thresholds) == []
        assert detector.profile([])[0] == []


def test_results_are_copies_that_outlive_everything(environment):
    runtime, image = environment.open(), make_image(5)
    first = infer(runtime, [image]).detections[0]
    for seed in range(3):
        infer(runtime, [make_image(seed)])
    runtime.close()
    assert_detected(first, image)
    for array in (first.boxes, first.scores, first.class_ids):
        array += 1  # writable
        assert environment.cuda.gpu_of(array.ctypes.data) is None
        assert environment.cuda.binding.pointer_device(array.ctypes.data)[1] == 0, "nor page-locked"


def test_an_overflow_of_nms_candidates_is_logged_once(environment, caplog):
    runtime = environment.open(toy(overflow=1))
    for _ in range(3):
        infer(runtime, [make_image(0)])
    warnings = [record.message for record in caplog.records if "more boxes passed" in record.message]
    assert len(warnings) == 1
    assert "(100)" in warnings[0] and "--max-candidates" in warnings[0]


@pytest.mark.parametrize("kernels", [True, False])
def test_every_stage_is_measured_separately(environment, kernels):
    if not kernels:
        environment.without_kernels()
    runtime = environment.open(toy(None))
    images = [make_image(seed) for seed in range(6)]  # two batches
    for _ in range(3):
        outputs = infer(runtime, images, timed=True)
        timing = outputs.timing
        assert min(timing.preprocess_ms, timing.upload_ms, timing.engine_ms, timing.download_ms) > 0
        assert timing.postprocess_ms == pytest.approx(outputs.postprocess_ms)
        assert timing.engine_ms < outputs.inference_ms
        assert_detected(outputs.detections[5], images[5])
    assert infer(runtime, images).timing is None


def test_a_detector_profiles_an_engine(environment):
    with Detector(environment.engine()) as detector:
        detections, timing = detector.profile([make_image(0)])
        assert len(detections) == 1 and timing.engine_ms > 0
        assert dict(detector.runtime_info)["transfers"] == "included"


def test_every_array_layout_of_an_image_is_accepted(environment):
    image = make_image(2, 40, 60)
    frozen = image.copy()
    frozen.flags.writeable = False
    wide = np.zeros((40, 90, 3), np.uint8)
    wide[:, 20:80] = image
    grey = np.ascontiguousarray(image[:, :, 0])
    with Detector(environment.engine()) as detector:
        expected = detector(image)
        same = (
            frozen,
            wide[:, 20:80],
            np.asfortranarray(image),
            np.dstack([image, grey]),
            image.astype(np.uint16) * 257,
        )
        for given in same:
            np.testing.assert_array_equal(detector(given).boxes, expected.boxes)
        for given in (grey, grey[:, :, None]):
            np.testing.assert_array_equal(detector(given).boxes, detector(np.repeat(grey[:, :, None], 3, 2)).boxes)
        for given in (image[:0], image.astype(np.float32), image[None]):
            with pytest.raises(ImageError):
                detector(given)


def test_an_opened_engine_does_not_depend_on_its_file(environment):
    path = environment.engine()
    with Detector(path) as detector:
        before = detector(make_image(1))
        path.write_bytes(b"another file")
        np.testing.assert_array_equal(detector(make_image(1)).boxes, before.boxes)
        path.unlink()
        np.testing.assert_array_equal(detector(make_image(1)).boxes, before.boxes)


def test_thresholds_that_are_fixed_in_the_engine_cannot_be_changed(environment):
    graph = toy()
    del graph.graph.input[1:]
    for name, value in zip(THRESHOLD_INPUTS, (NMS.conf, NMS.iou, 1.0, 0.0), strict=True):
        graph.graph.initializer.append(numpy_helper.from_array(np.array([value], np.float32), name))
    runtime = environment.open(graph)
    assert runtime.metadata.nms == FIXED
    assert_detected(infer(runtime, [make_image(1)], conf=0.5).detections[0], make_image(1), rows=2)
    for change in ({"conf": 0.1}, {"iou": 0.6}, {"multi_label": False}, {"class_agnostic": True}):
        with pytest.raises(UsageError, match=next(iter(change))):
            infer(runtime, [make_image(1)], **change)


def test_a_canvas_of_another_size_is_refused(environment):
    runtime = environment.open()
    with pytest.raises(UsageError, match="takes inputs of 64x96, not 96x96"):
        infer(runtime, [make_image(0)], hw=(96, 96))
    assert_detected(infer(runtime, [make_image(0)]).detections[0], make_image(0))


def test_opening_logs_what_runs_where(environment, caplog):
    caplog.set_level(logging.INFO)
    runtime = environment.open()
    (line,) = [record.message for record in caplog.records if "Imaginary GPU 0" in record.message]
    assert "letterbox GPU kernel" in line and "CUDA graph on" in line
    assert dict(runtime.runtime_info)["runtime"] == f"TensorRT {environment.trt.__version__}"
