"""The code of README.md, docs/ and examples/ runs, page by page and in order, in a folder with the files it names.

The official weights are replaced by the included ones at a small size, streams by videos, and trainings and
measurements are short. Lines that need a GPU, a server, a container or an installation are listed with the reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import pytest
import torch

from tests.support.code_blocks import all_blocks
from yolov7_deploy import export, load_checkpoint, save_checkpoint
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.hub import bundled_weights

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    *(f"{folder}/{path.name}" for folder in ("docs", "examples") for path in sorted((ROOT / folder).glob("*.md"))),
]
SIZE = 96
# Options that make a command short; of an option that is given twice the last one counts.
SHORT = {
    "y7 train": f"--epochs 1 --img {SIZE} --batch 4 --nominal-batch 4 --workers 0 --device cpu --no-tensorboard",
    "y7 bench": "--duration 0.3 --warmup 0.1",
    "y7 optimize": "--duration 2 --limit 4 --calib-limit 4",
    "y7 shapes": f"--train 8 --val 4 --img {SIZE}",
}
REPLACED = {
    "rtsp://gate.local/1": "a.mp4",
    "rtsp://yard.local/1": "b.mp4",
    " --source 0": "",
    "--source cameras.txt": "--source a.mp4 --source b.mp4",
    "--workers 16 --address auto": "--workers 2",
    "--workers 4": "--workers 2",
    "concurrency=(1, 4)": "concurrency=(1, 4), duration_s=0.2, warmup_s=0.1",
    "--against best.onnx best-fp16.onnx": "--max-drop 100 --against best.onnx best-fp16.onnx",  # four images
    "--against best-int8.onnx": "--max-drop 100 --against best-int8.onnx",
    "--against helmets-int8.onnx": "--max-drop 100 --against helmets-int8.onnx",  # four images, one epoch
    "--against helmets.onnx helmets-int8.onnx": "--max-drop 100 --against helmets.onnx helmets-int8.onnx",
    "epochs=100": f'epochs=1, img={SIZE}, batch=4, workers=0, device="cpu"',
}
# Lines that are not run: a pattern, and the reason.
NOT_RUN = {
    r"^(pip|sudo|apt-get|git clone|python3 -m venv)\b|\bpip install\b|\bserver\b.*pytriton": "an installation",
    r"^(docker|make -C|sh app/run|SINK|tritonserver|trtexec|cmake|serve run|curl|/usr/src)\b": "other software",
    r"^python3? (docker/|benchmarks/|models/client|fastapi_service)": "a script with a test of its own",
    r"^y7 (triton|deepstream) --weights \S+\.engine": "needs TensorRT: servers do not run engines of TensorRT-RTX",
    r"^y7 plugin\b": "compiles CUDA for minutes; tests/test_installation.py runs it",
    r"^y7 demo\b": "tests/workflows/test_demo.py runs it",
    r"\.engine\b.*(--source|--device)|--device (v100|jetson)": "needs an NVIDIA GPU",
    r"^y7 (train|train_aux|test|detect|export) .*(--cfg|data/coco|inference/images|--grid)": "test_official_lines.py",
}
NEEDS_RTX = re.compile(r"^y7 (build|deepstream|triton)\b.*(engine|fixed-thresholds|fp16\.onnx)|--engine\b|build_engine")

pytestmark = pytest.mark.slow


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the files that pages name: weights, exported files, images, videos, a dataset, a list."""
    folder = tmp_path_factory.mktemp("prepared")
    checkpoint = replace(load_checkpoint(bundled_weights()), training_size=SIZE)
    for name in ("yolov7", "yolov7-tiny", "best"):
        save_checkpoint(checkpoint, folder / f"{name}.safetensors")
    for name in ("yolov7", "best"):
        torch.save({"model": checkpoint.tensors}, folder / f"{name}.pt")
    files = {"yolov7": "fp32", "best": "fp32", "shapes": "fp32"}
    files |= {"yolov7-fp16": "fp16", "best-fp16": "fp16", "shapes-fp16": "fp16", "best-int8": "int8"}
    data = write_shapes(folder / "shapes-data", train=8, val=4, size=SIZE, seed=2)
    text = re.sub("^path:.*$", "path: shapes-data", data.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for name in ("data.yaml", "coco-mini.yaml"):
        (folder / name).write_text(text, encoding="utf-8")
    images = sorted((data.parent / "images" / "train").iterdir())
    for name in ("images", "images/train"):
        shutil.copytree(data.parent / "images" / "train", folder / name, dirs_exist_ok=True)
    for name, precision in files.items():
        calib = folder / "images" if precision == "int8" else None
        path = folder / f"{name}.onnx"
        export(folder / "best.safetensors", path, precision=precision, calib=calib, batch=None, verify=False)
    cv2.imwrite(str(folder / "street.jpg"), cv2.imread(str(images[0])))
    (folder / "list.txt").write_text("".join(f"images/train/{path.name}\n" for path in images), encoding="utf-8")
    for name in ("a.mp4", "b.mp4"):
        write_video(folder / name, images)
    return folder


def write_video(path: Path, images: list[Path]) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (SIZE, SIZE))
    for image in images:
        writer.write(cv2.imread(str(image)))
    writer.release()


@pytest.fixture(scope="module")
def environment(prepared, tmp_path_factory):
    """Environment variables: `y7` and `python` are this interpreter and this checkout, official weights are small."""
    programs = tmp_path_factory.mktemp("programs")
    for name, arguments in {"y7": "-m yolov7_deploy ", "python": "", "python3": ""}.items():
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n', encoding="utf-8")
        script.chmod(0o755)
    own = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "Y7_WEIGHTS_DIR": str(prepared),
        "OMP_NUM_THREADS": "2",
    }
    return {**os.environ, **own}


def commands(block: str) -> list[str]:
    """Return the commands of a shell block, one per line, without comments."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines) if line]


def runnable(command: str) -> bool:
    """Return whether a command can run here."""
    if any(re.search(pattern, command) for pattern in NOT_RUN):
        return False
    return has("ray") or not re.search(r"^y7 score .*--workers", command)


def prepared_text(text: str) -> str:
    """Return code with the replacements of this test."""
    for old, new in REPLACED.items():
        text = text.replace(old, new)
    return text


def shortened(command: str) -> str:
    """Return a command that ends soon."""
    added = [options for start, options in SHORT.items() if command.startswith(start)]
    return " ".join([prepared_text(command), *added])


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, prepared, environment, tmp_path):
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    ran = 0
    for language, code in all_blocks(ROOT / page):
        if NEEDS_RTX.search(code) and not has("tensorrt_rtx"):
            continue
        if language in ("sh", "bash"):
            lines = [shortened(command) for command in commands(code) if runnable(command)]
            ran += run(["bash", "-euo", "pipefail", "-c", "\n".join(lines)], tmp_path, environment) if lines else 0
        elif language == "python":
            ran += run([sys.executable, "-c", prepared_text(code)], tmp_path, environment)
        elif language == "json":
            json.loads(code)
        elif language == "yaml":
            pytest.importorskip("yaml").safe_load(code)
    if not ran:
        pytest.skip("the page has no code that runs here")


def run(command: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Run a block and return 1; fail with its output if its exit code is not 0."""
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return 1


def test_every_pattern_of_lines_that_are_not_run_matches_a_line():
    lines = [line for page in PAGES for language, code in all_blocks(ROOT / page) for line in commands(code)]
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, line) for line in lines)] == []
    text = "\n".join(code for page in PAGES for _, code in all_blocks(ROOT / page))
    assert [old for old in REPLACED if old not in text] == []
