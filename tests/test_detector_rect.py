"""Rectangular input: every runtime and file of dynamic input size gives the boxes of the official detection geometry.

The shared files have no results of the official detection program, only of its test program. The reference is therefore
written here from the official formulas: letterbox, PyTorch, the reference NMS, and scaling back.
"""

import os
import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.support import reference_nms
from tests.support.sample_images import (
    BOX_TOLERANCE,
    CONF,
    IMAGES,
    MAX_DET,
    SCORE_TOLERANCE,
    assert_identical,
    assert_same,
    noise,
)
from tests.support.slow_cases import some_fast
from tests.support.small_models import HW, fused_tiny
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import read_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.options import Thresholds

SIZE = 192
THRESHOLDS = Thresholds(conf=CONF, max_det=MAX_DET)
# Pixels of the image: float32 sums in another order. The official program rounds its boxes to whole pixels.
REAL_BOX_TOLERANCE = 0.02
needs_shared = pytest.mark.skipif(
    "Y7_SHARED" not in os.environ, reason="Y7_SHARED does not name the folder with weights and coco-mini"
)


def official_canvas(image, size, stride):
    """Return the canvas of the official detection program for one image."""
    ratio = min(size / image.shape[0], size / image.shape[1])
    resized = [max(1, round(side * ratio)) for side in image.shape[:2]]
    if list(image.shape[:2]) != resized:
        image = cv2.resize(image, resized[::-1], interpolation=cv2.INTER_LINEAR)
    half_h, half_w = ((size - side) % stride / 2 for side in resized)
    borders = [round(half + sign * 0.1) for half in (half_h, half_w) for sign in (-1, 1)]
    return cv2.copyMakeBorder(image, *borders, cv2.BORDER_CONSTANT, value=(114, 114, 114))


def official_boxes(boxes, canvas_hw, image_hw):
    """Scale boxes from canvas to image pixels as the official detection program does."""
    gain = min(canvas_hw[0] / image_hw[0], canvas_hw[1] / image_hw[1])
    pad_x, pad_y = (canvas_hw[1] - image_hw[1] * gain) / 2, (canvas_hw[0] - image_hw[0] * gain) / 2
    scaled = (boxes.astype(np.float64) - [pad_x, pad_y, pad_x, pad_y]) / gain
    return scaled.clip(0, [image_hw[1], image_hw[0], image_hw[1], image_hw[0]])


def official_detections(model, image, size, thresholds, *, stride=32):
    """Return boxes, scores and class ids of one image."""
    canvas = official_canvas(image, size, stride)
    network_input = torch.from_numpy(np.ascontiguousarray(canvas[:, :, ::-1].transpose(2, 0, 1))).float()[None] / 255
    with torch.no_grad():
        decoded = model.predict(network_input)[0].numpy()
    found = reference_nms.postprocess(decoded, thresholds)
    return official_boxes(found.boxes, canvas.shape[:2], image.shape[:2]), found.scores, found.class_ids


def rect_images():
    """Return images of several shapes, none of which fills the square."""
    return [*IMAGES, noise(97, 190, 5), noise(200, 60, 6), noise(61, 192, 7), noise(250, 250, 8)]


@pytest.fixture(scope="module")
def torch_rect(files):
    with Detector(files("torch"), device="cpu", img=SIZE, rect=True, conf=CONF, max_det=MAX_DET) as detector:
        yield detector


def test_rect_detections_are_those_of_the_official_geometry(torch_rect):
    canvases = set()
    for image in rect_images():
        found = torch_rect(image)
        boxes, scores, class_ids = official_detections(fused_tiny(), image, SIZE, THRESHOLDS)
        canvases.add(official_canvas(image, SIZE, 32).shape[:2])
        assert len(found) == len(scores)
        np.testing.assert_allclose(found.scores, scores, atol=SCORE_TOLERANCE)
        np.testing.assert_allclose(found.boxes, boxes, atol=BOX_TOLERANCE)
        np.testing.assert_array_equal(found.class_ids, class_ids)
    assert len(canvases) > 4


def test_rect_differs_from_the_square_unless_the_image_is_square(torch_rect, files):
    with Detector(files("torch"), device="cpu", img=SIZE, conf=CONF, max_det=MAX_DET) as square:
        assert not square.rect
        wide, even = noise(61, 192, 7), noise(250, 250, 8)
        assert_identical(torch_rect(even), square(even))
        assert len(torch_rect(wide)) != len(square(wide)) or not np.allclose(torch_rect(wide).boxes, square(wide).boxes)


def test_images_of_several_shapes_in_a_batch_give_what_each_gives_alone(torch_rect):
    images = rect_images()
    for found, image in zip(torch_rect.batch(images), images, strict=True):
        assert_same(found, torch_rect(image))
    assert torch_rect.batch([]) == []


def test_profile_measures_all_groups(torch_rect):
    images = rect_images()
    detections, timing = torch_rect.profile(images)
    assert [len(found) for found in detections] == [len(torch_rect(image)) for image in images]
    assert timing.engine_ms > 0 and timing.preprocess_ms > 0


def test_streams_and_futures_are_rectangular(torch_rect, tmp_path):
    image = noise(61, 192, 7)
    cv2.imwrite(str(tmp_path / "wide.png"), image)
    expected = torch_rect(image)
    assert_identical(torch_rect.submit(image).result(), expected)
    [(_, found)] = torch_rect.stream(tmp_path)
    assert_identical(found, expected)


def test_a_copy_in_another_process_is_rectangular(torch_rect):
    with pickle.loads(pickle.dumps(torch_rect)) as copy:
        assert copy.rect
        assert_identical(copy(IMAGES[1]), torch_rect(IMAGES[1]))
    assert "rect up to 192x192" in repr(torch_rect)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", some_fast(["plugin", "standard", "none", "efficient"], every=2))
def test_onnx_files_of_open_size_give_the_boxes_of_pytorch(files, torch_rect, kind, runtime):
    pytest.importorskip(runtime)
    options = {"input_kind": "uint8"} if kind == "none" else {}
    path = files(kind, batch=None, dynamic_size=True, **options)
    with Detector(path, device="cpu", runtime=runtime, img=SIZE, rect=True, conf=CONF, max_det=MAX_DET) as detector:
        assert detector.metadata.input_hw is None
        images = rect_images()
        for found, image in zip(detector.batch(images), images, strict=True):
            assert_same(found, torch_rect(image))
            assert_same(detector(image), torch_rect(image))


def test_openvino_compiles_the_sizes_that_are_used_often_and_keeps_a_few(files, torch_rect, monkeypatch):
    module = pytest.importorskip("yolov7_deploy.runtimes.openvino")
    monkeypatch.setattr(module, "SIZE_CALLS", 2)
    monkeypatch.setattr(module, "MAX_SIZES", 2)
    path = files("plugin", batch=None, dynamic_size=True)
    images = [noise(height, SIZE, height) for height in (30, 60, 90)]
    with Detector(path, device="cpu", runtime="openvino", img=SIZE, rect=True, conf=CONF, max_det=MAX_DET) as detector:
        networks = detector._runtime._session.get()
        for number, image in enumerate(images):
            expected = torch_rect(image)
            for compiled in (0, 1, 1):
                assert_same(detector(image), expected)
                assert len(networks.sizes) == min(number + compiled, 2)
        assert [dict(shapes)["images"][1:3] for shapes in networks.sizes] == [(64, SIZE), (96, SIZE)]
        assert_same(detector(images[0]), torch_rect(images[0]))


def test_openvino_compiles_a_size_from_the_file_that_was_opened_or_not_at_all(files, monkeypatch, tmp_path, caplog):
    module = pytest.importorskip("yolov7_deploy.runtimes.openvino")
    monkeypatch.setattr(module, "SIZE_CALLS", 2)
    shutil.copy(files("none", batch=None, dynamic_size=True), tmp_path / "m.onnx")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Detector("m.onnx", device="cpu", runtime="openvino", img=SIZE, rect=True, conf=CONF) as detector:
        networks = detector._runtime._session.get()
        monkeypatch.chdir(tmp_path / "elsewhere")
        for _ in range(2):
            detector(noise(30, SIZE, 1))
        assert len(networks.sizes) == 1
        (tmp_path / "m.onnx").write_bytes(b"another file")
        for _ in range(2):
            assert_same(detector(noise(60, SIZE, 1)), detector(noise(60, SIZE, 1)))
        assert len(networks.sizes) == 1
    assert "has changed or was removed since it was opened" in caplog.text


def test_openvino_compiles_a_file_of_fixed_size_once(files, monkeypatch):
    module = pytest.importorskip("yolov7_deploy.runtimes.openvino")
    monkeypatch.setattr(module, "SIZE_CALLS", 1)
    with Detector(files("plugin", batch=None), device="cpu", runtime="openvino") as detector:
        detector(IMAGES[0])
        assert not detector._runtime._session.get().sizes


def test_a_file_of_open_size_has_the_default_size_of_its_export(files):
    path = files("plugin", batch=None, dynamic_size=True)
    with Detector(path, device="cpu", runtime="onnxruntime") as detector, Detector(files("torch"), img=HW) as square:
        assert detector.input_hw == HW
        for image in rect_images():
            assert_same(detector(image, conf=CONF), square(image, conf=CONF))
    with pytest.raises(UsageError, match="100x192 is not a multiple of this model's stride 32") as error:
        Detector(path, device="cpu", img=(100, 192))
    assert error.value.fix == "--img 128x192"


def test_files_of_a_fixed_size_are_refused_with_the_export_to_type(files):
    with pytest.raises(UsageError, match="fixed input of 128x192") as error:
        Detector(files("plugin"), device="cpu", rect=True)
    assert "--dynamic" in error.value.fix
    with pytest.raises(UsageError, match="rect must be True or False"):
        Detector(files("torch"), rect="yes")


@needs_shared
def test_real_weights_find_what_the_official_detection_geometry_gives():
    """Every detection of nine COCO images at the official thresholds; `benchmarks/rect.py` compares all 82."""
    shared = Path(os.environ["Y7_SHARED"])
    weights = shared / "weights" / "yolov7_training.pt"
    paths = sorted((shared / "coco-mini" / "images" / "val2017").glob("*.jpg"))[::10]
    model = fuse(build_model(load_checkpoint(weights)))
    with Detector(weights, device="cpu", rect=True) as detector:
        for path in paths:
            image = read_image(path)
            boxes, scores, class_ids = official_detections(model, image, 640, Thresholds())
            found = detector(image)
            np.testing.assert_array_equal(found.class_ids, class_ids)
            np.testing.assert_allclose(found.scores, scores, atol=SCORE_TOLERANCE)
            np.testing.assert_allclose(found.boxes, boxes, atol=REAL_BOX_TOLERANCE)
