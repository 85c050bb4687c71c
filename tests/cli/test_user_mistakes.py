"""Mistakes that users make in commands: each message says what is wrong and what to type, and typing that succeeds."""

from __future__ import annotations

import shlex
import shutil
from dataclasses import dataclass

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from yolov7_deploy import export
from yolov7_deploy.cli.app import app
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.errors import Y7Error
from yolov7_deploy.hub import bundled_weights

SIZE = 64


@dataclass(frozen=True)
class Mistake:
    """A command line with a mistake.

    Attributes:
        typed: What the user types after `y7`.
        says: Words of the message.
        fix: Words of the line that says what to type.
        then: The command with the fix, which succeeds; empty if it needs something that is not on every machine.
    """

    typed: str
    says: str
    fix: str
    then: str = ""


DETECT = "detect --weights best.onnx --source street.png --nosave"
TRAIN = "train --data shapes/shapes.yaml --weights best.safetensors --epochs 1 --img 64 --batch 4 --workers 0"
EXPORT = "export --weights best.safetensors --img 64 -o new.onnx --no-verify"
VAL = "val --weights best.onnx --data shapes/shapes.yaml --nosave"

MISTAKES = [
    # weights
    Mistake(
        "detect --weights bst.onnx --source street.png", "bst.onnx does not exist", "Did you mean best.onnx?", DETECT
    ),
    Mistake("detect --weights best.onxx --source street.png", "does not exist", "Did you mean best.onnx?", DETECT),
    Mistake(
        "detect --weights BEST.onnx --source street.png", "BEST.onnx does not exist", "Did you mean best.onnx?", DETECT
    ),
    Mistake(
        "val --weights runs/train/exp/weights/best.pt --data shapes/shapes.yaml",
        "runs/train/exp/weights/best.pt does not exist",
        "Did you mean runs/train/exp/best.safetensors?",
        "val --weights runs/train/exp/best.safetensors --data shapes/shapes.yaml --nosave --img 64",
    ),
    Mistake(
        "detect --weights yolov7-tinny --source street.png",
        "neither a file nor an official",
        "Did you mean yolov7-tiny?",
    ),
    Mistake(
        "export --weights runs/train/exp",
        "runs/train/exp is a folder",
        "--weights runs/train/exp/best.safetensors",
        "export --weights runs/train/exp/best.safetensors --img 64 -o new.onnx --no-verify",
    ),
    Mistake("detect --weights shapes --source street.png", "has no weights file", "--weights yolov7"),
    Mistake("detect --weights street.png --source street.png", "street.png is an image", "--source street.png", DETECT),
    Mistake("export --weights street.png", "street.png is an image, not a model file", "--weights yolov7", EXPORT),
    Mistake(
        "val --weights shapes/shapes.yaml --data shapes/shapes.yaml",
        "is the description of a dataset",
        "--data shapes/shapes.yaml",
        VAL,
    ),
    Mistake(
        "train --data shapes/shapes.yaml --weights best.onnx", "is an ONNX graph", "--weights best.safetensors", TRAIN
    ),
    Mistake("export --weights best.onnx", "is an ONNX graph", "--weights best.safetensors", EXPORT),
    Mistake("info best.engine", "best.engine does not exist", "y7 build --weights best.onnx"),
    Mistake("verify --weights best.safetensors --against bst.onnx", "does not exist", "Did you mean best.onnx?"),
    Mistake(
        "quantize --weights best.safetensors --calib images",
        "best.safetensors is not an .onnx file",
        "y7 export --weights best.safetensors --int8 --calib FOLDER",
        "export --weights best.safetensors --int8 --calib images --img 64 -o int8.onnx --no-verify",
    ),
    Mistake("build --weights best.safetensors", "is a checkpoint", "y7 export --weights best.safetensors --engine"),
    # sources
    Mistake(
        "detect --weights best.onnx --source stret.png", "stret.png does not exist", "Did you mean street.png?", DETECT
    ),
    Mistake("detect --weights best.onnx --source imges", "imges does not exist", "Did you mean images?"),
    Mistake("detect --weights best.onnx --source best.onnx", "is a model file", "--weights best.onnx", DETECT),
    Mistake("detect --weights best.onnx --source shapes/shapes.yaml", "describes a dataset", "--source FOLDER", DETECT),
    Mistake(
        "detect --weights best.onnx --source shapes",
        "has no image and no video in it",
        "--source 'shapes/**/*'",
        "detect --weights best.onnx --source 'shapes/**/*' --nosave",
    ),
    Mistake(
        "detect --weights best.onnx --source http://127.0.0.1:9/a.jpg", "cannot be downloaded", "Check the address"
    ),
    Mistake("detect --weights best.onnx --source street.png --save-dir best.onnx", "is a file", "--save-dir results"),
    Mistake(f"{DETECT} --json street.png", "is not JSON", "such as result.json", f"{DETECT} --json result.json"),
    # datasets
    Mistake(
        "val --weights best.onnx --data shapes/shape.yaml", "does not exist", "Did you mean shapes/shapes.yaml?", VAL
    ),
    Mistake("val --weights best.onnx --data shapes", "shapes is a folder", "--data shapes/shapes.yaml", VAL),
    Mistake("train --data best.safetensors", "is a model file, not a dataset", "--weights best.safetensors", TRAIN),
    Mistake("train --variant yolov7-tiny", "needs --data", "y7 shapes --output shapes"),
    Mistake(f"{VAL} --split valid", "has no split 'valid' (it has", "--split val", f"{VAL} --split val"),
    Mistake("val --weights best.onnx --data other.yaml", "boxes of 'cat', 'dog'", "rename"),
    # sizes and numbers
    Mistake(f"{DETECT} --img 128", "fixed input of 64x64, not 128x128", "export --weights best.safetensors --img 128"),
    Mistake(f"{DETECT} --img 64x", "--img 64x is not a size", "--img 640", f"{DETECT} --img 64"),
    Mistake(
        "export --weights best.safetensors --img 100 -o new.onnx",
        "--img 100 is not a multiple of this model's stride 32",
        "--img 128",
        "export --weights best.safetensors --img 128 -o new.onnx --no-verify",
    ),
    Mistake(f"{TRAIN} --img 100", "--img 100 is not a multiple of yolov7-tiny's stride 32", "--img 128"),
    Mistake(f"{TRAIN} --img 64x96", "training images are square", "--img 96"),
    Mistake(f"{DETECT} --conf 25", "conf must be between 0 and 1, not 25", "--conf 0.25", f"{DETECT} --conf 0.25"),
    Mistake(f"{TRAIN} --epochs 0", "--epochs 0 must be at least 1", "--epochs 2"),
    Mistake(
        "bench --weights best.onnx --batch 8",
        "takes at most 1 at once",
        "y7 export --weights best.safetensors --batch 8",
    ),
    Mistake("bench --weights best.onnx --frame 640", "--frame 640 is not an image size", "--frame 1080x1920"),
    # options
    Mistake(f"{TRAIN} --variant yolov7-tinny", "yolov7-tinny is unknown", "Did you mean yolov7-tiny?"),
    Mistake(
        f"{TRAIN} --hyp custm.yaml",
        "neither a preset nor a file",
        "Did you mean custom.yaml?",
        f"{TRAIN} --hyp custom.yaml",
    ),
    Mistake(f"{TRAIN} --set momentun=0.9", "'momentun' is not a hyperparameter", "Did you mean momentum?"),
    Mistake(f"{DETECT} --classes circel", "no class 'circel'", "circle", f"{DETECT} --classes circle"),
    Mistake(f"{EXPORT} --nms fast", "--nms fast is unknown", "plugin, standard", f"{EXPORT} --nms standard"),
    Mistake(
        f"{EXPORT} --precision float16",
        "--precision float16 is unknown",
        "--precision fp16",
        f"{EXPORT} --precision fp16",
    ),
    Mistake(
        f"{EXPORT} --int8", "INT8 requires calibration images", "--calib FOLDER", f"{EXPORT} --int8 --calib images"
    ),
    Mistake(
        f"{EXPORT} --calib images", "--calib has no effect without --int8", "--int8", f"{EXPORT} --calib images --int8"
    ),
    Mistake("export --weights best.safetensors -o out.engine", "does not end in .onnx", "--output out.onnx"),
    Mistake(f"{EXPORT} --dynamic-batch --batch 8", "contradict each other", "Leave one", f"{EXPORT} --dynamic-batch"),
    Mistake(f"{DETECT} --half", "best.onnx is fp32", "y7 export --weights best.safetensors --precision fp16"),
    Mistake("train --resume", "no training run in runs/train to resume", "--save-dir DIR"),
    # what this machine does not have
    Mistake(f"{DETECT} --device cuda:7", "CUDA", "--device cpu", f"{DETECT} --device cpu"),
    Mistake(f"{TRAIN} --device 7", "GPU 7 is needed", "--device cpu"),
    Mistake("bench --weights best.onnx --device jetson", "is not a Jetson", "y7 bench --estimate orin-nx"),
    # habits of other programs
    Mistake(
        "detect --weights best.onnx --source images/000001.png images/000002.png --nosave",
        "--source takes one value, not 2 files; a shell replaces a pattern without quotes",
        "--source 'images/00000*.png'",
        "detect --weights best.onnx --source 'images/00000*.png' --nosave",
    ),
    Mistake("detect best.onnx street.png", "best.onnx is given without an option", f"y7 {DETECT[:-9]}", DETECT),
    Mistake("predict model=best.onnx source=street.png", "given without an option", f"y7 {DETECT[:-9]}", DETECT),
    Mistake("detct --weights best.onnx --source street.png", "No such command", "Did you mean 'detect'?", DETECT),
    Mistake("detect --weight best.onnx --source street.png", "No such option: --weight", "--weights", DETECT),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with weights, an exported file, images, a dataset, and a finished training run."""
    folder = tmp_path_factory.mktemp("mistakes")
    data = write_shapes(folder / "shapes", train=8, val=4, size=96, seed=5)
    shutil.copy(bundled_weights(), folder / "best.safetensors")
    (folder / "runs" / "train" / "exp").mkdir(parents=True)
    shutil.copy(bundled_weights(), folder / "runs" / "train" / "exp" / "best.safetensors")
    export(folder / "best.safetensors", folder / "best.onnx", img=SIZE, verify=False)
    shutil.copytree(data.parent / "images" / "train", folder / "images")
    cv2.imwrite(str(folder / "street.png"), np.full((90, 120, 3), 90, dtype=np.uint8))
    (folder / "custom.yaml").write_text("lr0: 0.001\n")
    (folder / "other.yaml").write_text(
        "path: shapes\ntrain: images/train\nval: images/val\nnames: [cat, dog, a, b, c, d]\n"
    )
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("Y7_WEIGHTS_DIR", str(folder))


def run(line: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code, and its message and fix, or its output."""
    done = CliRunner().invoke(app, shlex.split(line))
    if isinstance(done.exception, Y7Error):
        return 1, f"{done.exception.message}\n{done.exception.fix}"
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.typed)
def test_the_message_says_what_is_wrong_and_what_to_type(mistake):
    code, text = run(mistake.typed)
    assert code in (1, 2)
    assert mistake.says in text
    assert mistake.fix in text


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.then], ids=lambda mistake: mistake.typed)
def test_the_fix_is_right(mistake, folder, tmp_path):
    line = mistake.then + (f" --save-dir {tmp_path / 'run'}" if mistake.then.startswith("train") else "")
    code, text = run(line)
    assert code == 0, text


def test_there_are_at_least_forty_mistakes():
    assert len(MISTAKES) >= 40
