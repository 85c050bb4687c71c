"""`y7 val`: printed and written results, with a fake detector."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from yolov7_deploy.cli.val import val
from yolov7_deploy.detections import Detections
from yolov7_deploy.errors import UsageError
from yolov7_deploy.metadata import ModelMetadata


class FakeDetector:
    """A detector that finds one cat, always at the same position."""

    half = None
    metadata = ModelMetadata(variant="custom", class_names=("cat", "dog"), strides=(), anchors=(), precision="fp16")

    runtime = "onnxruntime"

    def __init__(self, weights, *, device, img, half, runtime):
        type(self).half = half
        self.input_hw = (img or 64, img or 64)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def infer(self, images, letterboxes, thresholds):
        found = Detections(
            boxes=np.array([[15, 10, 45, 30]], np.float32),
            scores=np.array([0.5], np.float32),
            class_ids=np.array([0]),
            class_names=self.metadata.class_names,
            image_hw=(40, 60),
        )
        return [found] * len(images)


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    cv2.imwrite(str(tmp_path / "images/3.png"), np.zeros((40, 60, 3), np.uint8))
    (tmp_path / "labels/3.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "data.yaml").write_text("val: images\nnames: [cat, dog]\n")
    (tmp_path / "m.onnx").touch()
    monkeypatch.chdir(tmp_path)
    module = ModuleType("yolov7_deploy.detector")
    module.Detector = FakeDetector
    monkeypatch.setitem(sys.modules, "yolov7_deploy.detector", module)
    app = typer.Typer()
    app.command()(val)
    common = ["--data", str(tmp_path / "data.yaml"), "--weights", str(tmp_path / "m.onnx")]
    return lambda *args: CliRunner().invoke(app, [*common, *args], catch_exceptions=False)


def test_val_prints_thresholds_and_protocol_with_the_metrics(run):
    result = run()
    assert result.exit_code == 0
    assert "(onnxruntime, fp16) on 1 images" in result.stdout
    assert "protocol: rect 64 (pad 0.5, batch 8" in result.stdout
    assert "conf 0.001, iou 0.65, max-det 300, multi-label NMS" in result.stdout
    assert "AP  IoU 0.50:0.95   1.0000" in result.stdout
    assert "val: 1/1, " in result.stderr


def test_val_prints_how_many_images_have_no_label_file_and_what_was_left_out(run, tmp_path):
    assert "note: 0 of 1 images have no label file\n" in run().stdout
    shutil.copy(tmp_path / "images/3.png", tmp_path / "images/4.png")
    (tmp_path / "images/a.heic").write_bytes(b"x")
    result = run()
    assert "note: 1 of 2 images have no label file; the first is " in result.stdout
    assert f"note: left out of {tmp_path}/images: 1 x .heic (a.heic)\n" in result.stdout


def test_val_accepts_the_official_spellings(run):
    spellings = ["--img-size", "96", "--batch-size", "2", "--conf-thres", "0.01", "--iou-thres", "0.5", "--per-class"]
    result = run(*spellings)
    assert "rect 96 (pad 0.5, batch 2" in result.stdout and "conf 0.01, iou 0.5" in result.stdout
    table = result.stdout.partition("class")[2].splitlines()[:3]
    assert [line.split() for line in table] == [
        ["images", "objects", "P", "R", "AP50", "AP"],
        ["all", "1", "1", *["1.0000"] * 4],
        ["cat", "1", "1", *["1.0000"] * 4],
    ]


def test_val_writes_charts_into_a_new_folder(run, tmp_path):
    names = {"confusion_matrix.png", "precision_recall.png", "val_examples.jpg"}
    for folder in ("runs/val/exp", "runs/val/exp2"):
        assert f"confusion matrix, curves and examples in {folder}\n" in run().stdout
        assert {path.name for path in Path(folder).iterdir()} == names
    assert f"examples in {tmp_path / 'here'}\n" in run("--save-dir", str(tmp_path / "here")).stdout
    assert {path.name for path in (tmp_path / "here").iterdir()} == names
    assert "confusion matrix" not in run("--nosave").stdout and not Path("runs/val/exp3").exists()
    assert "confusion matrix, curves" in run("--json", "-").stderr


def test_val_without_matplotlib_prints_how_to_get_charts(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "yolov7_deploy.evaluation.plots", raising=False)
    monkeypatch.delitem(sys.modules, "yolov7_deploy._charts", raising=False)
    result = run()
    assert result.exit_code == 0 and "AP  IoU 0.50:0.95   1.0000" in result.stdout
    assert "no charts: matplotlib is needed for charts.\npip install 'yolov7-deploy[bench]'" in result.stderr
    assert not Path("runs").exists()


@pytest.mark.parametrize("option,half", [([], None), (["--half"], True), (["--no-half"], False)])
def test_val_passes_half_to_the_detector(run, option, half):
    run(*option)
    assert FakeDetector.half is half


def test_val_writes_the_json_and_the_predictions(run, tmp_path):
    run("--json", str(tmp_path / "r.json"), "--predictions", str(tmp_path / "p.json"))
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["ap"], record["images"], record["runtime"]) == (1.0, 1, "onnxruntime")
    assert record["weights"].endswith("m.onnx")
    (prediction,) = json.loads((tmp_path / "p.json").read_text())
    assert prediction == {"image_id": 3, "category_id": 0, "bbox": [15.0, 10.0, 30.0, 20.0], "score": 0.5}


def test_predictions_and_json_in_one_file_are_refused(run, tmp_path):
    path = str(tmp_path / "r.json")
    with pytest.raises(UsageError, match="both write"):
        run("--json", path, "--predictions", path)


def test_stdout_contains_only_the_json(run):
    result = run("--json", "-")
    assert json.loads(result.stdout)["ap50"] == 1.0
    assert "protocol: " in result.stderr
