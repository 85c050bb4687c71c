"""TensorRT engines from image to Found: boxes, thresholds, batches, spans, and whose memory the results are."""

import contextlib
import logging
from dataclasses import replace

import numpy as np
import pytest
from onnx import numpy_helper

from tests.fakes.fake_trt_runtime import VERSIONS
from tests.support.sample_images import IMAGES, SUPPRESSION, assert_same
from tests.support.small_models import HW as NETWORK_HW
from tests.support.small_models import exported_tiny
from tests.support.trt_kit import HW, INFO, NMS, assert_found, boxes_in, infer, make_image, setting, toy
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError, UsageError
from yolov7_deploy.image import fit_evaluation_letterbox, fit_letterbox
from yolov7_deploy.options import Thresholds
from yolov7_deploy.runtimes.letterbox_kernel import FRAME
from yolov7_deploy.runtimes.upload import Staging
from yolov7_deploy.tensorrt.onnx_rewrite import prepare_graph

__all__ = ["setting"]

FIXED = replace(NMS, runtime_thresholds=False)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("batch", [1, None])
def test_every_tensorrt_gives_the_boxes_of_each_image(setting, version, batch):
    setting.use(version)
    backend = setting.backend(toy(batch))
    assert dict(backend.runtime_info)["letterbox"] == "GPU kernel"
    for count in (1, 2, 3, 1, 1, 5, 4, 4, 4, 1):
        images = [make_image(seed) for seed in range(count)]
        for found, image in zip(infer(backend, images).found, images, strict=True):
            assert_found(found, image)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", ["float", "float16", "uint8"])
def test_every_type_of_input_gives_the_same_boxes_with_either_letterbox(setting, kind, kernels):
    if not kernels:
        setting.without_kernels()
    backend = setting.backend(toy(None, kind=kind))
    assert (dict(backend.runtime_info)["letterbox"] == "GPU kernel") == kernels == backend.takes_gpu_arrays
    tolerance = 0.05 if kind == "float16" else 2e-3  # of the canvas: 11 bits of mantissa
    for sizes in ([(48, 80)], [(48, 80)], [(300, 200), (10, 90)], [(300, 200), (10, 90)], [(64, 96)]):
        images = [make_image(seed, *size) for seed, size in enumerate(sizes)]
        for found, image in zip(infer(backend, images).found, images, strict=True):
            np.testing.assert_allclose(found.boxes, boxes_in(image), atol=tolerance)


def test_a_letterbox_by_area_is_made_on_the_host(setting):
    backend, image = setting.backend(), make_image(3, 128, 192)
    box = fit_evaluation_letterbox((128, 192), HW, size=96)
    assert box.shrink_by_area
    thresholds = Thresholds(conf=0.25, multi_label=True)
    for _ in range(3):  # plain, recorded, launched
        (found,) = backend.infer([image], [box], thresholds).found
        np.testing.assert_allclose(found.boxes, boxes_in(image, box), atol=2e-3)
        assert_found(infer(backend, [make_image(4)]).found[0], make_image(4))


def test_a_real_network_gives_the_boxes_of_its_onnx_file(setting):
    model = exported_tiny(nms="plugin", batch=None, **SUPPRESSION, multi_label=False)
    prepared = prepare_graph(model, own_plugin=False)
    onnx_file = setting.folder / "tiny.onnx"
    model.save(onnx_file)
    engine = setting.engine(prepared.proto, metadata=model.metadata, nms_by="operators", name="tiny.engine")
    with Detector(engine) as ours, Detector(onnx_file, device="cpu") as theirs:
        assert ours.input_hw == NETWORK_HW
        assert (ours.device, ours.max_batch_size, ours.class_names) == ("cuda:0", 4, theirs.class_names)
        for found, expected in zip(ours.batch(IMAGES), theirs.batch(IMAGES), strict=True):
            assert len(found) > 5
            assert_same(found, expected)
        assert_same(ours(IMAGES[0], conf=0.75), theirs(IMAGES[0], conf=0.75))
        assert len(ours(IMAGES[0], iou=0.05)) < len(ours(IMAGES[0]))


def test_thresholds_classes_and_max_det_are_those_of_the_call(setting):
    backend, image = setting.backend(), make_image(1)
    for conf, rows in ((0.25, 3), (0.5, 2), (0.7, 1), (0.95, 0), (0.25, 3)):
        assert_found(infer(backend, [image], conf=conf).found[0], image, rows=rows)
    assert_found(infer(backend, [image], max_det=2).found[0], image, rows=2)
    (found,) = infer(backend, [image], classes=(1, 2)).found
    assert found.class_ids.tolist() == [1, 2]
    assert found.class_ids.dtype == np.int64
    with pytest.raises(UsageError, match="class_agnostic=False"):
        infer(backend, [image], class_agnostic=True)


def test_suppression_after_the_engine_takes_every_threshold(setting):
    graph = toy(None, decoded=True)
    backend = setting.backend(graph, metadata=replace(INFO, nms=None))
    images = [make_image(seed) for seed in range(3)]
    for found, image in zip(infer(backend, images, iou=1.0, multi_label=False).found, images, strict=True):
        assert found.class_ids.tolist() == [0, 1, 2]
        centre, size = boxes_in(image)[:, :2], boxes_in(image)[:, 2:]
        np.testing.assert_allclose(found.boxes[:, 2:] - found.boxes[:, :2], size, atol=4e-3)
        np.testing.assert_allclose((found.boxes[:, 2:] + found.boxes[:, :2]) / 2, centre, atol=4e-3)
    assert len(infer(backend, images, class_agnostic=True, iou=0.01).found[0].scores) < 3


@pytest.mark.parametrize(("batch", "batches"), [(3, (3, 3)), (None, (2, 3))])
def test_lists_are_run_in_parts_and_filled_up(setting, batch, batches):
    backend = setting.backend(toy(batch), batches=batches)
    assert backend.max_batch_size == 3
    assert backend.metadata.batch == batch
    for count in (7, 1, 3, 2, 1, 1):
        images = [make_image(seed) for seed in range(count)]
        outputs = infer(backend, images)
        assert len(outputs.found) == count
        for found, image in zip(outputs.found, images, strict=True):
            assert_found(found, image)


def test_places_of_a_batch_that_no_image_fills_repeat_the_last_one(setting):
    images = [make_image(seed) for seed in range(2)]
    with contextlib.closing(Staging(setting.cuda, 4)) as staging:
        boxes = [fit_letterbox(image.shape[:2], HW) for image in images]
        staging.place(images, boxes, batch=4)
        table = staging.addresses[2] - staging.device.pointer
        frames = staging.host[table : table + 4 * FRAME.itemsize].view(FRAME)
        assert frames[0] != frames[1] == frames[2] == frames[3], "an old one would point anywhere"


def test_no_images_give_nothing(setting):
    backend = setting.backend()
    assert infer(backend, []).found == []
    with Detector(setting.engine()) as detector:
        assert detector.batch([]) == []
        assert detector.infer([], [], detector.thresholds) == []
        assert detector.profile([])[0] == []


def test_results_are_copies_that_outlive_everything(setting):
    backend, image = setting.backend(), make_image(5)
    first = infer(backend, [image]).found[0]
    for seed in range(3):
        infer(backend, [make_image(seed)])
    backend.close()
    assert_found(first, image)
    for array in (first.boxes, first.scores, first.class_ids):
        array += 1  # the caller's own
        assert setting.cuda.gpu_of(array.ctypes.data) is None
        assert setting.cuda.runtime.pointer_device(array.ctypes.data)[1] == 0, "not page-locked either"


def test_a_full_list_of_candidates_is_told_once(setting, caplog):
    backend = setting.backend(toy(overflow=1))
    for _ in range(3):
        infer(backend, [make_image(0)])
    warnings = [record.message for record in caplog.records if "more boxes passed" in record.message]
    assert len(warnings) == 1
    assert "(100)" in warnings[0] and "--max-candidates" in warnings[0]


@pytest.mark.parametrize("kernels", [True, False])
def test_every_span_is_measured_by_itself(setting, kernels):
    if not kernels:
        setting.without_kernels()
    backend = setting.backend(toy(None))
    images = [make_image(seed) for seed in range(6)]  # two parts
    for _ in range(3):
        outputs = infer(backend, images, timed=True)
        spans = outputs.spans
        assert min(spans.preprocess_ms, spans.upload_ms, spans.engine_ms, spans.download_ms) > 0
        assert spans.postprocess_ms == pytest.approx(outputs.postprocess_ms)
        assert spans.engine_ms < outputs.inference_ms
        assert_found(outputs.found[5], images[5])
    assert infer(backend, images).spans is None


def test_a_detector_times_an_engine(setting):
    with Detector(setting.engine()) as detector:
        detections, spans = detector.profile([make_image(0)])
        assert len(detections) == 1 and spans.engine_ms > 0
        assert dict(detector.runtime_info)["transfers"] == "included"


def test_every_way_to_write_a_image_down_is_taken(setting):
    image = make_image(2, 40, 60)
    frozen = image.copy()
    frozen.flags.writeable = False
    wide = np.zeros((40, 90, 3), np.uint8)
    wide[:, 20:80] = image
    grey = np.ascontiguousarray(image[:, :, 0])
    with Detector(setting.engine()) as detector:
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


def test_a_file_that_is_replaced_or_gone_is_still_the_engine_that_was_opened(setting):
    path = setting.engine()
    with Detector(path) as detector:
        before = detector(make_image(1))
        path.write_bytes(b"another file")
        np.testing.assert_array_equal(detector(make_image(1)).boxes, before.boxes)
        path.unlink()
        np.testing.assert_array_equal(detector(make_image(1)).boxes, before.boxes)


def test_thresholds_that_are_part_of_the_engine_cannot_be_changed(setting):
    graph = toy()
    del graph.graph.input[1:]
    for name, value in (("conf_threshold", NMS.conf), ("iou_threshold", NMS.iou)):
        graph.graph.initializer.append(numpy_helper.from_array(np.array([value], np.float32), name))
    backend = setting.backend(graph)
    assert backend.metadata.nms == FIXED
    assert_found(infer(backend, [make_image(1)], conf=0.5).found[0], make_image(1), rows=2)
    for wish in ({"conf": 0.1}, {"iou": 0.6}):
        with pytest.raises(UsageError, match=next(iter(wish))):
            infer(backend, [make_image(1)], **wish)


def test_a_canvas_of_another_size_is_refused_by_name(setting):
    backend = setting.backend()
    with pytest.raises(UsageError, match="takes inputs of 64x96, not 96x96"):
        infer(backend, [make_image(0)], hw=(96, 96))
    assert_found(infer(backend, [make_image(0)]).found[0], make_image(0))


def test_opening_says_what_runs_where(setting, caplog):
    caplog.set_level(logging.INFO)
    backend = setting.backend()
    (line,) = [record.message for record in caplog.records if "Imaginary GPU 0" in record.message]
    assert "letterbox GPU kernel" in line and "CUDA graph on" in line
    assert dict(backend.runtime_info)["runtime"] == "TensorRT 10.3.0"
