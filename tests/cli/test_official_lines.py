"""The command lines of the official README run end to end as `y7 ...`, on a small generated dataset.

Only sizes, batch sizes, epochs, the device and paths are changed, as a user without a GPU and without COCO does.
The lines are those of the official repository at revision a207844b.
"""

from __future__ import annotations

import shlex
import shutil

import cv2
import onnx
import pytest
import torch
from typer.testing import CliRunner

from yolov7_deploy import load_checkpoint
from yolov7_deploy.cli.app import app
from yolov7_deploy.datasets.synthetic import write_shapes

pytestmark = pytest.mark.slow

SIZE = 64
TRAIN = (
    "train --workers 8 --device 0 --batch-size 32 --data data/coco.yaml --img 640 640 --cfg cfg/training/yolov7.yaml "
    "--weights '' --name yolov7 --hyp data/hyp.scratch.p5.yaml"
)
TRAIN_AUX = (
    "train_aux --workers 8 --device 0 --batch-size 16 --data data/coco.yaml --img 1280 1280 "
    "--cfg cfg/training/yolov7-w6.yaml --weights '' --name yolov7-w6 --hyp data/hyp.scratch.p6.yaml"
)
TRANSFER = (
    "train --workers 8 --device 0 --batch-size 32 --data data/custom.yaml --img 640 640 "
    "--cfg cfg/training/yolov7-custom.yaml --weights 'yolov7_training.pt' --name yolov7-custom "
    "--hyp data/hyp.scratch.custom.yaml"
)
TRANSFER_AUX = (
    "train_aux --workers 8 --device 0 --batch-size 16 --data data/custom.yaml --img 1280 1280 "
    "--cfg cfg/training/yolov7-w6-custom.yaml --weights 'yolov7-w6_training.pt' --name yolov7-w6-custom "
    "--hyp data/hyp.scratch.custom.yaml"
)
TEST = (
    "test --data data/coco.yaml --img 640 --batch 32 --conf 0.001 --iou 0.65 --device 0 --weights yolov7.pt "
    "--name yolov7_640_val"
)
DETECT_VIDEO = "detect --weights yolov7.pt --conf 0.25 --img-size 640 --source yourvideo.mp4"
DETECT_IMAGE = "detect --weights yolov7.pt --conf 0.25 --img-size 640 --source inference/images/horses.jpg"
EXPORT_END2END = (
    "export --weights yolov7-tiny.pt --grid --end2end --simplify --topk-all 100 --iou-thres 0.65 --conf-thres 0.35 "
    "--img-size 640 640 --max-wh 640"
)
EXPORT_TENSORRT = (
    "export --weights ./yolov7-tiny.pt --grid --end2end --simplify --topk-all 100 --iou-thres 0.65 --conf-thres 0.35 "
    "--img-size 640 640"
)
EXPORT_GRID = "export --weights yolov7.pt --grid --simplify --img-size 640 640"

CHANGES = {
    "--workers 8 --device 0 --batch-size 32": "--workers 0 --device cpu --batch-size 4 --epochs 1",
    "--workers 8 --device 0 --batch-size 16": "--workers 0 --device cpu --batch-size 2 --epochs 1",
    "--device 0": "--device cpu",
    "640": str(SIZE),
    "1280": str(2 * SIZE),
    "data/coco.yaml": "shapes/shapes.yaml",
    "data/custom.yaml": "shapes/shapes.yaml",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with the shapes dataset, an image and a video under the names of the README."""
    folder = tmp_path_factory.mktemp("official")
    data = write_shapes(folder / "shapes", train=8, val=4, size=96, seed=4)
    images = [cv2.imread(str(path)) for path in sorted((data.parent / "images" / "val").iterdir())]
    (folder / "inference" / "images").mkdir(parents=True)
    cv2.imwrite(str(folder / "inference" / "images" / "horses.jpg"), images[0])
    height, width = images[0].shape[:2]
    video = cv2.VideoWriter(str(folder / "yourvideo.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 5, (width, height))
    for image in images[:3]:
        video.write(cv2.resize(image, (width, height)))
    video.release()
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """Return a function that runs a line of the README, with the changes and others, and returns its output."""
    monkeypatch.chdir(folder)

    def run(line: str, **others: str) -> str:
        for old, new in {**CHANGES, **others}.items():
            line = line.replace(old, new)
        done = CliRunner().invoke(app, shlex.split(line))
        assert done.exit_code == 0, f"{line}\n{done.exception}\n{done.output}"
        return done.output

    return run


def save_as_official(weights, path):
    """Write weights as a `.pt` file with a plain state dict."""
    torch.save(load_checkpoint(weights).tensors, path)


def test_the_lines_of_yolov7(run, folder):
    run(TRAIN)
    best = folder / "runs" / "train" / "yolov7" / "best.safetensors"
    assert load_checkpoint(best).variant == "yolov7"
    save_as_official(best, folder / "yolov7_training.pt")
    output = run(TRANSFER)
    assert "yolov7_training.pt" in output
    weights = {"yolov7.pt": str(best)}
    assert "AP" in run(TEST, **weights)
    assert (folder / "runs" / "val" / "yolov7_64_val").is_dir()
    run(DETECT_IMAGE, **weights)
    run(DETECT_VIDEO, **weights)
    assert {path.name for path in (folder / "runs" / "detect").rglob("*.*")} >= {"horses.jpg", "yourvideo.mp4"}
    run(EXPORT_GRID, **weights)
    (output_of_file,) = onnx.load(folder / "best.onnx").graph.output
    assert output_of_file.name == "output"


def test_the_lines_of_yolov7_w6(run, folder):
    run(TRAIN_AUX)
    best = folder / "runs" / "train" / "yolov7-w6" / "best.safetensors"
    checkpoint = load_checkpoint(best)
    assert (checkpoint.variant, checkpoint.training) == ("yolov7-w6", True)
    save_as_official(best, folder / "yolov7-w6_training.pt")
    run(TRANSFER_AUX)
    assert (folder / "runs" / "train" / "yolov7-w6-custom" / "best.safetensors").is_file()


@pytest.mark.parametrize(
    "line,outputs",
    [
        (EXPORT_END2END, ["num_dets", "det_boxes", "det_scores", "det_classes"]),
        (EXPORT_TENSORRT, ["num_dets", "det_boxes", "det_scores", "det_classes"]),
    ],
)
def test_the_lines_of_yolov7_tiny(run, folder, line, outputs):
    from yolov7_deploy.hub import bundled_weights

    shutil.copy(bundled_weights(), folder / "tiny.safetensors")
    output = run(line, **{"./yolov7-tiny.pt": "tiny.safetensors", "yolov7-tiny.pt": "tiny.safetensors"})
    assert "verified" in output or "not run" in output
    model = onnx.load(folder / "tiny.onnx")
    assert [value.name for value in model.graph.output] == outputs
    assert "max-det 100" in output and "conf 0.35, iou 0.65" in output
