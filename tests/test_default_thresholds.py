"""One default everywhere: a call without thresholds finds the same boxes with every file of the same weights."""

import logging

import numpy as np
import pytest
import torch

from tests.support.sample_images import assert_identical, assert_same
from tests.support.trt_kit import environment
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import UsageError
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.image import read_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions, Thresholds
from yolov7_deploy.tensorrt.onnx_rewrite import prepare_graph

__all__ = ["environment"]

HW = (256, 256)
FILES = {
    "plugin": {},
    "standard": {"nms": "standard"},
    "efficient": {"nms": "efficient"},
    "none": {"nms": "none"},
    "dynamic": {"batch": None},
    "batch of 3": {"batch": 3},
    "uint8": {"input_kind": "uint8"},
    "uint8 without NMS": {"input_kind": "uint8", "nms": "none", "batch": None},
}


@pytest.fixture(scope="module")
def fused():
    checkpoint = load_checkpoint(bundled_weights())
    return fuse(build_model(checkpoint)), checkpoint.metadata


@pytest.fixture(scope="module")
def export(fused, tmp_path_factory):
    """Return a function that exports the weights of this package, once per set of options."""
    folder, models = tmp_path_factory.mktemp("exports"), {}

    def get(**options):
        key = tuple(sorted(options.items()))
        if key not in models:
            model = export_onnx(*fused, ExportOptions(input_hw=HW, **options))
            models[key] = model, folder / f"{len(models)}.onnx"
            model.save(models[key][1])
        return models[key]

    return get


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    data = open_dataset(write_shapes(tmp_path_factory.mktemp("data"), train=1, val=6, size=256, seed=5))
    return [read_image(data.path(index)) for index in range(len(data))]


@pytest.fixture(scope="module")
def expected(images):
    """Detections of the checkpoint in PyTorch, with the default thresholds."""
    with Detector(bundled_weights(), img=HW, device="cpu") as detector:
        assert detector.thresholds == Thresholds(conf=0.25, iou=0.45, max_det=300)
        found = detector.batch(images)
    assert sum(map(len, found)) > 20
    return found


def assert_all_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", FILES)
def test_an_onnx_file_finds_the_boxes_of_the_checkpoint(export, images, expected, name):
    with Detector(export(**FILES[name])[1], device="cpu") as detector:
        assert detector.thresholds == Thresholds()
        assert_all_same(detector.batch(images), expected)


def test_a_pt_file_finds_the_boxes_of_the_checkpoint(images, expected, tmp_path):
    checkpoint = load_checkpoint(bundled_weights())
    torch.save({"model": checkpoint.tensors}, tmp_path / "weights.pt")
    with Detector(tmp_path / "weights.pt", img=HW, device="cpu") as detector:
        for ours, theirs in zip(detector.batch(images), expected, strict=True):
            assert_identical(ours, theirs)


@pytest.mark.parametrize("version", ["8.6.2", "11.1.0"])
@pytest.mark.parametrize("batch", [1, None])
def test_an_engine_finds_the_boxes_of_the_checkpoint(export, images, expected, environment, version, batch):
    environment.use(version)
    model, _ = export(batch=batch)
    engine = environment.engine(
        prepare_graph(model, use_plugin=False).proto, metadata=model.metadata, nms_by="operators", name="shapes.engine"
    )
    with Detector(engine) as detector:
        assert detector.thresholds == Thresholds()
        assert_all_same(detector.batch(images), expected)


@pytest.mark.parametrize("name", ["plugin", "standard", "none", "dynamic"])
@pytest.mark.parametrize("option", [{"multi_label": True}, {"class_agnostic": True}])
def test_multi_label_and_class_agnostic_nms_can_be_chosen_at_run_time(export, images, name, option):
    changed = {"conf": 0.01, "iou": 0.3, **option}
    with (
        Detector(bundled_weights(), img=HW, device="cpu", **changed) as torch_detector,
        Detector(export(**FILES[name])[1], device="cpu", **changed) as detector,
        Detector(export(**FILES[name])[1], device="cpu", conf=0.01, iou=0.3) as unchanged,
    ):
        expected = torch_detector.batch(images)
        assert_all_same(detector.batch(images), expected)
        assert sum(map(len, unchanged.batch(images))) != sum(map(len, expected))


def test_the_exported_defaults_are_those_of_the_file(export, images):
    with (
        Detector(export(multi_label=True, class_agnostic=True, max_det=7)[1], device="cpu") as detector,
        Detector(export()[1], device="cpu", multi_label=True, class_agnostic=True, max_det=7) as changed,
    ):
        assert detector.thresholds == changed.thresholds
        for image in images:
            assert_identical(detector(image), changed(image))


def test_efficient_nms_refuses_another_label_rule(export, images):
    refused = pytest.raises(UsageError, match="multi_label=False; multi_label=True was requested")
    with Detector(export(nms="efficient")[1], device="cpu", multi_label=True) as detector, refused:
        detector(images[0])


@pytest.mark.parametrize(("max_det", "advice"), [(300, "max-det 300"), (5000, "nms none")])
def test_more_detections_than_a_file_can_give_are_reported_once(export, images, caplog, max_det, advice):
    path = export(max_det=7)[1]
    with caplog.at_level(logging.WARNING), Detector(path, device="cpu", max_det=max_det) as detector:
        assert detector.thresholds.max_det == 7
        detector(images[0], max_det=500)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert f"at most 7 detections per image, not {max_det}." in messages[0]
    assert f"export it again with {advice}." in messages[0]


def test_fewer_detections_are_the_best_ones(export, images):
    with Detector(export()[1], device="cpu", conf=0.05) as detector:
        everything = detector(images[0])
        np.testing.assert_array_equal(detector(images[0], max_det=2).scores, everything.scores[:2])
