"""The demo goes the whole way without a network, and says so when its boxes mean nothing."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from yolov7_deploy import demo as module
from yolov7_deploy.cli.app import app
from yolov7_deploy.demo import run_demo, street, untrained_checkpoint
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError, UsageError
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import read_image
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.weights import WEIGHTS_DIR_VARIABLE, find_local_weights

SHARED = os.environ.get("Y7_SHARED", "")
# The sign in the drawn street: white rim of an octagon at (0.3 W, 0.36 H) with radius 0.15 H.
SIGN = (slice(101, 245), slice(120, 264))


def small(monkeypatch):
    """Exports at 128 pixels instead of the paper's size, for speed."""
    monkeypatch.setattr(
        module, "ExportOptions", lambda: ExportOptions(input_hw=(128, 128), max_det=50, max_candidates=200)
    )


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """A working directory and local places without any weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(WEIGHTS_DIR_VARIABLE, raising=False)
    return tmp_path


def test_the_street_is_the_same_every_time_and_has_a_red_sign():
    first = street()
    assert first.shape == (480, 640, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, street())
    blue, green, red = first[SIGN].reshape(-1, 3).mean(0)
    assert red > 1.5 * max(blue, green)


def test_the_untrained_network_has_the_same_numbers_every_time():
    first, again = untrained_checkpoint(), untrained_checkpoint()

    def digest(checkpoint):
        whole = hashlib.sha256()
        for name, tensor in checkpoint.tensors.items():
            whole.update(name.encode() + tensor.numpy().tobytes())
        return whole.hexdigest()

    assert digest(first) == digest(again)


def test_without_weights_the_demo_goes_the_whole_way_and_warns(nowhere, monkeypatch):
    small(monkeypatch)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exception is None
    assert "MEAN NOTHING" in result.stdout
    assert "verified against torch" in result.stdout
    assert "10 boxes that mean nothing" in result.stdout
    written = nowhere / "demo"
    assert sorted(path.name for path in written.iterdir()) == [
        "street-detected.png",
        "street.png",
        "untrained-yolov7-tiny.onnx",
        "untrained-yolov7-tiny.safetensors",
    ]
    assert OnnxModel.load(written / "untrained-yolov7-tiny.onnx").info.variant == "yolov7-tiny"
    assert read_image(written / "street-detected.png").shape == (480, 640, 3)
    assert not (nowhere / "cache").exists()


def test_weights_of_yours_are_taken_as_they_are(tmp_path, monkeypatch):
    small(monkeypatch)
    lines: list[str] = []
    weights = tmp_path / "mine.safetensors"
    module.save_checkpoint(untrained_checkpoint(), weights)
    report = run_demo(weights=weights, save_dir=tmp_path / "new" / "out", say=lines.append)
    assert report.trained
    assert "MEAN NOTHING" not in "\n".join(lines)
    assert report.onnx == tmp_path / "new" / "out" / "mine.onnx"
    assert len(report.detections) > 10
    assert json.loads(report.detections.to_json())["detections"]


def test_weights_on_this_machine_are_preferred(nowhere, monkeypatch):
    folder = nowhere / "weights"
    folder.mkdir()
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(folder))
    assert find_local_weights("yolov7") is None
    (folder / "yolov7_training.pt").write_bytes(b"weights")
    chosen = SimpleNamespace()
    monkeypatch.setattr(module, "run_demo", lambda **options: vars(chosen).update(options))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exception is None
    assert chosen.weights == folder / "yolov7_training.pt"


def test_a_picture_that_is_absent_is_our_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "export_weights", None)  # found out before any long work
    with pytest.raises(ImageError):
        run_demo(source=tmp_path / "absent.jpg", save_dir=tmp_path, say=lambda line: None)


def test_a_folder_that_cannot_be_made_is_our_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        run_demo(save_dir=tmp_path / "file" / "demo", say=lambda line: None)


@pytest.mark.skipif(not SHARED, reason="needs the official weights under Y7_SHARED")
def test_the_official_weights_recognise_the_sign_in_the_drawn_street():
    with Detector(Path(SHARED) / "weights" / "yolov7_training.pt", device="cpu") as detector:
        found = detector(street())
    assert found.names == ("stop sign",)
    np.testing.assert_allclose(found.boxes[0], [120, 101, 264, 245], atol=5)
