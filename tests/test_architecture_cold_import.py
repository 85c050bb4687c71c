"""The package works without optional libraries, names the extra to install otherwise, and starts fast.

Each test runs in a separate process in which the listed libraries cannot be imported.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.support.deterministic import fill_model
from tests.support.sample_images import noise
from yolov7_deploy.cli.app import COMMANDS
from yolov7_deploy.detector import Detector
from yolov7_deploy.hub import bundled_weights
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.visualize import write_image

HEAVY = (
    "cuda",
    "cv2",
    "faster_coco_eval",
    "jinja2",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "pyarrow",
    "pycocotools",
    "pycuda",
    "ray",
    "safetensors",
    "starlette",
    "tensorboard",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
    "yaml",
)
# Not installed on production machines.
NOT_IN_PRODUCTION = tuple(name for name in HEAVY if name not in {"cv2", "onnxruntime"})
COMMAND_NAMES = [name for command, aliases in COMMANDS for name in (command.__name__, *aliases)]

BLOCK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
COMMAND = """
import runpy
sys.argv = {arguments!r}
runpy.run_module("yolov7_deploy", run_name="__main__")
"""

# Seconds of wall time, including the start of the interpreter; the best of several runs, because a busy machine
# only makes it longer.
IMPORT_LIMIT_S = 0.15
HELP_LIMIT_S = 0.4
MAX_RUNS = 25

# The package is importable from any folder, installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}

SIDE = 64
MODEL = "path of the small ONNX file"
IMAGE = np.random.default_rng(7).integers(0, 256, (48, 80, 3), dtype=np.uint8)


def python(code: str, *, without: tuple[str, ...], cwd=None) -> subprocess.CompletedProcess[str]:
    script = BLOCK.format(names=set(without)) + code
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT, check=False
    )


def y7(*arguments: str, without: tuple[str, ...], cwd=None) -> subprocess.CompletedProcess[str]:
    return python(COMMAND.format(arguments=["y7", *arguments]), without=without, cwd=cwd)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A small ONNX file with NMS inside."""
    model = fuse(fill_model(new_model("yolov7-tiny", classes=2)))
    info = ModelMetadata(
        variant="yolov7-tiny", class_names=("first", "second"), strides=(8, 16, 32), anchors=model.anchors
    )
    options = ExportOptions(input_hw=(SIDE, SIDE), conf=0.01, max_det=20, max_candidates=100)
    path = tmp_path_factory.mktemp("cold") / "tiny.onnx"
    export_onnx(model, info, options).save(path)
    return path


def test_the_package_can_be_imported_without_any_library():
    code = "import yolov7_deploy\nassert 'Detector' in dir(yolov7_deploy)\nyolov7_deploy.Thresholds()\n"
    done = python(code, without=(*HEAVY, "numpy", "rich", "typer"))
    assert done.returncode == 0, done.stderr


def test_help_works_without_any_library():
    done = y7("--help", without=(*HEAVY, "numpy"))
    assert done.returncode == 0, done.stderr
    assert all(command.__name__ in done.stdout for command, _ in COMMANDS)


@pytest.mark.parametrize("command", COMMAND_NAMES)
def test_the_help_of_every_command_works_without_any_library(command):
    done = y7(command, "--help", without=(*HEAVY, "numpy"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Usage: y7 {command}") or f"y7 {command}" in done.stdout.splitlines()[1]


@pytest.mark.parametrize(
    "library,name,extra",
    [
        ("onnxruntime", "model.onnx", "cpu"),
        ("torch", "model.pt", "export"),
        ("safetensors", "model.safetensors", "export"),
    ],
)
def test_a_detector_names_the_library_and_the_extra_it_needs(tmp_path, library, name, extra):
    (tmp_path / name).write_bytes(b"anything")
    code = f"""
from yolov7_deploy import Detector
from yolov7_deploy.errors import MissingLibraryError
try:
    Detector({name!r})
except MissingLibraryError as error:
    print(error)
"""
    done = python(code, without=(library, "openvino"), cwd=tmp_path)
    assert done.stdout == f"{library} is needed to run {name}.\npip install 'yolov7-deploy[{extra}]'\n", done.stderr


@pytest.mark.parametrize(
    "library,name",
    [
        ("torch", "load_checkpoint"),
        ("safetensors", "save_checkpoint"),
        ("torch", "new_model"),
        ("torch", "build_model"),
        ("torch", "fuse"),
        ("torch", "export_onnx"),
        ("onnx", "export_onnx"),
        ("onnxsim", "export_onnx"),
        ("onnx", "OnnxModel"),
    ],
)
def test_a_public_name_names_the_library_and_the_extra_it_needs(library, name):
    code = f"""
import yolov7_deploy
from yolov7_deploy.errors import MissingLibraryError
try:
    yolov7_deploy.{name}
except MissingLibraryError as error:
    print(error)
"""
    done = python(code, without=(library,))
    assert done.stdout == f"{library} is needed for {name}.\npip install 'yolov7-deploy[export]'\n", done.stderr


@pytest.mark.parametrize(
    "library,extra,arguments",
    [
        ("torch", "export", ["demo"]),
        ("onnxruntime", "cpu", ["demo"]),
        ("torch", "export", ["export", "--weights", "model.pt"]),
        ("onnx", "export", ["export", "--weights", "model.pt"]),
        ("onnxruntime", "cpu", ["export", "--weights", "model.pt"]),
        ("faster_coco_eval", "val", ["val", "--data", "data.yaml"]),
        ("yaml", "val", ["val", "--data", "data.yaml"]),
        ("onnx", "export", ["verify", "--weights", MODEL, "--against", MODEL]),
        ("torch", "export", ["info", "yolov7"]),
        ("torch", "export", ["info", "model.pt"]),
        ("matplotlib", "bench", ["bench", "--paper", "--weights", "model.pt"]),
        ("pyarrow", "ray", ["score", "--input", "images.parquet", "--output", "results", "--weights", MODEL]),
        ("ray", "ray", ["score", "--input", "image.png", "--output", "results", "--weights", MODEL, "--workers", "2"]),
        ("jinja2", "report", ["report", "--weights", MODEL, "--against", MODEL, "--data", "data.yaml"]),
        ("faster_coco_eval", "val", ["report", "--weights", MODEL, "--against", MODEL, "--data", "data.yaml"]),
        ("torch", "export", ["train", "--data", "data.yaml"]),
        ("matplotlib", "bench", ["train", "--data", "data.yaml"]),
        ("faster_coco_eval", "val", ["train", "--data", "data.yaml"]),
    ],
)
def test_a_command_names_the_library_and_the_extra_it_needs(library, extra, arguments, tmp_path, model_file):
    for name in ("model.pt", "image.png", "images.parquet"):
        (tmp_path / name).write_bytes(b"anything")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [shape]\n")
    arguments = [str(model_file) if argument == MODEL else argument for argument in arguments]
    done = y7(*arguments, without=(library,), cwd=tmp_path)
    assert "Traceback" not in done.stderr
    message, fix = done.stderr.splitlines()
    assert done.returncode == 1
    assert message.startswith(f"MissingLibraryError: {library} is needed")
    assert extra in fix.removeprefix("pip install 'yolov7-deploy[").removesuffix("]'").split(",")


@pytest.mark.slow
def test_export_quantize_and_verify_need_no_library_of_training_or_validation(tmp_path):
    weights = bundled_weights()
    without = ("faster_coco_eval", "matplotlib", "pycocotools", "yaml")
    (tmp_path / "images").mkdir()
    write_image(tmp_path / "images" / "0.png", noise(64, 64))
    done = y7("export", "--weights", str(weights), "--img", "64", "-o", "m.onnx", without=without, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = y7("quantize", "--weights", "m.onnx", "--calib", "images", without=without, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = y7("verify", "--weights", str(weights), "--against", "m.onnx", without=without, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_doctor_works_without_any_optional_library():
    done = y7("doctor", without=HEAVY)
    assert done.returncode == 0, done.stderr
    assert "pip install" in done.stdout


def test_onnx_files_run_without_torch_and_without_onnx(model_file):
    code = f"""
import json
import numpy as np
from yolov7_deploy import Detector
image = np.array({IMAGE.tolist()}, dtype=np.uint8)
with Detector({str(model_file)!r}, device="cpu") as detector:
    found = detector(image)
print(json.dumps([found.boxes.tolist(), found.class_ids.tolist()]))
"""
    done = python(code, without=NOT_IN_PRODUCTION)
    assert done.returncode == 0, done.stderr
    with Detector(model_file, device="cpu") as detector:
        found = detector(IMAGE)
    assert len(found) > 0
    assert json.loads(done.stdout) == [found.boxes.tolist(), found.class_ids.tolist()]


def test_a_detector_does_not_import_the_command_line_libraries(model_file):
    code = f"""
from yolov7_deploy import Detector
Detector({str(model_file)!r}, device="cpu").close()
print(sorted({{"rich", "typer"}} & set(sys.modules)))
"""
    assert python(code, without=()).stdout == "[]\n"


def best_time_s(*arguments: str, limit_s: float) -> float:
    """Return the shortest time of up to MAX_RUNS runs; stop at the first one under the limit."""
    best = math.inf
    for _ in range(MAX_RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], capture_output=True, env=ENVIRONMENT, check=True)
        best = min(best, time.perf_counter() - start)
        if best < limit_s:
            break
    return best


def test_the_package_is_imported_fast():
    assert best_time_s("-c", "import yolov7_deploy", limit_s=IMPORT_LIMIT_S) < IMPORT_LIMIT_S


def test_help_is_fast():
    assert best_time_s("-m", "yolov7_deploy", "--help", limit_s=HELP_LIMIT_S) < HELP_LIMIT_S


def test_a_build_without_any_tensorrt_names_the_extra_first(model_file):
    done = y7("build", "--weights", str(model_file), without=("tensorrt", "tensorrt_rtx"))
    assert done.returncode == 1, done.stderr
    assert "is needed" in done.stderr and "pip install 'yolov7-deploy[tensorrt-rtx]'" in done.stderr
    assert not model_file.with_suffix(".engine").exists()
