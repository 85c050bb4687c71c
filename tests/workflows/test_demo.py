"""The demo runs the whole pipeline offline, with included weights that detect objects in new images."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.cli.app import app
from yolov7_deploy.datasets import open_dataset
from yolov7_deploy.datasets.synthetic import CLASS_NAMES, generate_image, write_shapes
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError, UsageError
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.evaluation.synthetic_image import street_scene
from yolov7_deploy.hub import SHAPES_WEIGHTS, WEIGHTS_DIR_VARIABLE, bundled_weights, find_weights
from yolov7_deploy.image import read_image
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import BenchOptions, ValOptions
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows import demo as module
from yolov7_deploy.workflows.demo import run_demo, run_shapes_demo

SHARED = os.environ.get("Y7_SHARED", "")
# The sign in the street scene: white rim of an octagon at (0.3 W, 0.36 H) with radius 0.15 H.
SIGN = (slice(101, 245), slice(120, 264))


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working directory, cache and environment without any weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(WEIGHTS_DIR_VARIABLE, raising=False)
    return tmp_path


def test_the_street_scene_is_deterministic_and_has_a_red_sign():
    first = street_scene()
    assert first.shape == (480, 640, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, street_scene())
    blue, green, red = first[SIGN].reshape(-1, 3).mean(0)
    assert red > 1.5 * max(blue, green)


def test_the_included_weights_are_small_and_have_metadata():
    path = bundled_weights()
    assert path.stat().st_size <= 13_000_000
    checkpoint = load_checkpoint(path)
    assert (checkpoint.variant, checkpoint.class_names) == ("yolov7-tiny", CLASS_NAMES)
    assert checkpoint.training_size == 416
    assert find_weights(SHAPES_WEIGHTS) == path


def test_the_included_weights_detect_shapes_in_new_images(tmp_path):
    data = write_shapes(tmp_path / "shapes", train=1, val=40, size=320, seed=7)
    with Detector(bundled_weights(), device="cpu") as detector:
        report = evaluate(detector, open_dataset(data), options=ValOptions(rect=False))
    assert report.ap >= 0.8


@pytest.mark.slow
def test_without_weights_the_demo_runs_the_whole_pipeline(nowhere, monkeypatch):
    monkeypatch.setattr(module, "CALIBRATION_IMAGES", 8)
    monkeypatch.setattr(module, "EVALUATION_IMAGES", 8)
    monkeypatch.setattr(module, "SPEED", BenchOptions(duration_s=0.05, warmup_s=0.05))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exception is None, result.output
    assert result.stdout.count("against torch on") >= 3
    rows = [line.split() for line in result.stdout.splitlines()]
    aps = {row[0]: float(row[1]) for row in rows if len(row) == 4 and row[0] in ("torch", "fp32", "fp16", "int8")}
    assert aps["torch"] > 0.8
    assert aps["fp32"] == pytest.approx(aps["torch"], abs=0.001)
    assert aps["fp16"] == pytest.approx(aps["torch"], abs=0.01)
    assert aps["int8"] == pytest.approx(aps["torch"], abs=0.05)
    written = nowhere / "demo"
    for precision in ("fp32", "fp16", "int8"):
        metadata = OnnxModel.load(written / f"{SHAPES_WEIGHTS}-{precision}.onnx").metadata
        assert (metadata.precision, metadata.class_names) == (precision, CLASS_NAMES)
    assert read_image(written / "shapes-detected.png").shape == (320, 320, 3)
    cached = [path.name for path in nowhere.glob("cache/yolov7_deploy/*")]
    assert set(cached) <= {"openvino"}  # nothing is downloaded


@pytest.mark.parametrize("fp16_speed", [17.0, 60.0])
def test_fp16_that_is_slower_than_fp32_is_explained(tmp_path, fp16_speed):
    files = {name: tmp_path / f"{name}.onnx" for name in ("fp32", "fp16")}
    for path in files.values():
        path.write_bytes(b"")
    speeds = {"fp32": 32.0, "fp16": fp16_speed}
    text = module._results_text(bundled_weights(), files, {"torch": 0.84, "fp32": 0.84, "fp16": 0.84}, speeds)
    assert (module.FP16_IS_SLOW in text) == (fp16_speed < 32.0)


def test_an_image_for_the_shapes_network_is_a_usage_error():
    result = CliRunner().invoke(app, ["demo", "--source", "street.jpg"])
    assert isinstance(result.exception, UsageError)
    assert "--weights yolov7" in str(result.exception)


def test_the_demo_runs_with_other_weights(tmp_path):
    lines: list[str] = []
    weights = tmp_path / "mine.safetensors"
    weights.write_bytes(bundled_weights().read_bytes())
    image, _ = generate_image(4, split="val", size=320, seed=0)
    write_image(tmp_path / "shapes.png", image)
    folder = tmp_path / "new" / "out"
    report = run_demo(weights=weights, source=tmp_path / "shapes.png", save_dir=folder, log=lines.append)
    assert report.onnx == folder / "mine.onnx"
    assert OnnxModel.load(report.onnx).metadata.input_hw == (416, 416)
    assert json.loads(report.detections.to_json())["detections"]
    assert read_image(folder / "shapes-detected.png").shape == image.shape


def test_a_missing_image_is_an_image_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "export_weights", None)  # it is not reached
    with pytest.raises(ImageError):
        run_demo(weights=bundled_weights(), source=tmp_path / "absent.jpg", save_dir=tmp_path, log=lambda line: None)


def test_a_folder_that_cannot_be_created_is_a_usage_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be created"):
        run_shapes_demo(save_dir=tmp_path / "file" / "demo", log=lambda line: None)


@pytest.mark.skipif(not SHARED, reason="needs the official weights under Y7_SHARED")
def test_the_official_weights_detect_the_sign_in_the_street_scene():
    with Detector(Path(SHARED) / "weights" / "yolov7_training.pt", device="cpu") as detector:
        found = detector(street_scene())
    assert found.names == ("stop sign",)
    np.testing.assert_allclose(found.boxes[0], [120, 101, 264, 245], atol=5)
