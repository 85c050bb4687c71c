"""Errors name arguments and functions to Python callers; the command line prints options and commands."""

from __future__ import annotations

import inspect

import pytest
from typer.testing import CliRunner

import yolov7_deploy
from yolov7_deploy import Detector, Thresholds, Y7Error
from yolov7_deploy._python_spelling import _FUNCTIONS, in_python
from yolov7_deploy.cli.app import app
from yolov7_deploy.errors import UsageError
from yolov7_deploy.options import EngineOptions

# What the command line prints, and what Python shows.
TEXTS = [
    ("For example: --conf 0.25", "For example: conf=0.25"),
    ("--img 384x640 and --img 384,640", "img=(384, 640) and img=(384, 640)"),
    ("Pass it:  --img HEIGHT,WIDTH", "Pass it:  img=(HEIGHT, WIDTH)"),
    ("--nms foo is unknown.", 'nms="foo" is unknown.'),
    ("--device v100: it is not here", 'device="v100": it is not here'),
    ("Add  --calib FOLDER  with 100 images", 'Add  calib="FOLDER"  with 100 images'),
    ("--rect and --multi-scale contradict each other.", "rect=True and multi_scale=True contradict each other."),
    ("Leave --runtime out, or use  --runtime openvino", 'Leave runtime out, or use  runtime="openvino"'),
    ("the image, which --source replaces.", "the image, which source replaces."),
    ("Use a smaller --batch or --img.", "Use a smaller batch or img."),
    ("For any size use --dynamic-batch", "For any size use batch=None"),
    ("Try  --no-simplify, or --fp16", 'Try  simplify=False, or precision="fp16"'),
    ("Lower it (--set lr0=0.001)", 'Lower it (hyp={"lr0": 0.001})'),
    ("--min-batch 1 --opt-batch 4 --max-batch 8", "min_batch=1, opt_batch=4, max_batch=8"),
    ("The file has conf=0.3; conf=0.4 was requested", "The file has conf=0.3; conf=0.4 was requested"),
    ("For example: --img 640 or --img 384x640", "For example: img=640 or img=(384, 640)"),
    ("--cache -1 must be at least 0.", "cache_gib=-1 must be at least 0."),
    ("--target sm86,sm89", 'targets=["sm86", "sm89"]'),
    ("--workspace 4", "workspace_gib=4"),
    ("y7 export --weights yolov7.pt --batch 8 --engine", 'export("yolov7.pt", batch=8, engine=True)'),
    ("Export it:  y7 export --dynamic-batch", 'Export it:  export("WEIGHTS.pt", batch=None)'),
    ("y7 train --data d.yaml --weights last.pt", 'train("d.yaml", weights="last.pt")'),
    ("y7 train --resume --save-dir runs/train/exp", 'train(resume=True, save_dir="runs/train/exp")'),
    ("y7 val --weights a.pt --data d.yaml", 'validate("a.pt", "d.yaml")'),
    ("y7 detect --weights a.pt --source b.jpg", 'Detector("a.pt")("b.jpg")'),
    ("y7 build --weights a.onnx", 'build_engine(OnnxModel.load("a.onnx")).save("a.engine")'),
    (
        "y7 build --weights a.onnx --plugin off",
        'build_engine(OnnxModel.load("a.onnx"), EngineOptions(plugin="off")).save("a.engine")',
    ),
    # These have no function, or options that no function has.
    ("y7 doctor shows it; y7 plugin", "y7 doctor shows it; y7 plugin"),
    ("y7 bench --estimate v100   (an estimate)", "y7 bench --estimate v100   (an estimate)"),
    (
        "pip install --force-reinstall torch   or   --device cpu",
        'pip install --force-reinstall torch   or   device="cpu"',
    ),
    ("docker run --gpus all (Jetson: --runtime nvidia)", "docker run --gpus all (Jetson: --runtime nvidia)"),
    ("torchrun --nproc-per-node 2 -m yolov7_deploy train", "torchrun --nproc-per-node 2 -m yolov7_deploy train"),
    ("runs/my--batch 3/best.pt does not exist", "runs/my--batch 3/best.pt does not exist"),
]


@pytest.mark.parametrize("shell,python", TEXTS)
def test_a_message_in_python(shell, python):
    assert in_python(shell) == python


def test_an_error_keeps_the_words_of_the_command_line_beside_its_text():
    error = UsageError("--batch 0 must be at least 1.", fix="For any size use --dynamic-batch")
    assert str(error) == "batch=0 must be at least 1.\nFor any size use batch=None"
    assert (error.message, error.fix) == ("--batch 0 must be at least 1.", "For any size use --dynamic-batch")


def test_python_reads_arguments_and_the_shell_reads_options(tmp_path):
    with pytest.raises(UsageError) as raised:
        Detector("yolov7-tiny-shapes", conf=5)
    assert str(raised.value).endswith("For example: conf=0.25")
    done = CliRunner().invoke(app, ["detect", "--weights", "yolov7-tiny-shapes", "--source", ".", "--conf", "5"])
    assert isinstance(done.exception, Y7Error)
    assert done.exception.fix == "For example: --conf 0.25"


@pytest.mark.parametrize("command,options", _FUNCTIONS.items())
def test_every_option_of_a_call_is_an_argument(command, options):
    """A message never names an argument that the function does not have."""
    functions = {"val": "validate", "bench": "benchmark", "detect": "Detector"}
    if command == "build":
        known = set(inspect.signature(EngineOptions).parameters) | {"weights", "output"}
    else:
        known = set(inspect.signature(getattr(yolov7_deploy, functions.get(command, command))).parameters)
    if command == "train":
        from yolov7_deploy.workflows.functions import TrainKeywords

        known |= set(TrainKeywords.__annotations__)
    if command == "detect":
        known.add("source")
    names = {in_python(f"--{option}").partition("=")[0] for option in options}
    assert names <= known


def test_thresholds_speak_python():
    with pytest.raises(UsageError, match=r"^max_det must be at least 1, not 0.\nFor example: max_det=100$"):
        Thresholds(max_det=0)
