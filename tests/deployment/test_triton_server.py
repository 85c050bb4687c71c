"""`y7 triton` on a real server: Triton 2.51 of the wheel nvidia-pytriton, without a GPU.

The environment with the server is created with pip, unless `$Y7_TRITON` names one (see docs/triton.md).
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from triton_proof import prove, running_server

from yolov7_deploy import Detector, export
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.deployment.triton import write_triton_repository
from yolov7_deploy.deployment.triton_config import TritonOptions

ROOT = Path(__file__).parents[2]
VARIABLE = "Y7_TRITON"
PACKAGES = ("nvidia-pytriton==0.7.0", "numpy<2", f"{ROOT}[cpu]")
REQUESTS = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64", reason="nvidia-pytriton is for Linux on x86"
    ),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """A virtual environment with the server."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE]).resolve()
    folder = tmp_path_factory.mktemp("triton") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    command = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", *PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {PACKAGES[0]}; ${VARIABLE} may name an environment: {done.stderr[-300:]}")
    return folder


@pytest.fixture(autouse=True)
def _environment_without_the_repository(monkeypatch):
    """The server uses the installed package, not the one under test on the path."""
    if not os.environ.get(VARIABLE):
        monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "shapes.onnx"
    export("yolov7-tiny-shapes", path, img=320, batch=None, verify=False)
    return path


@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
def test_parallel_requests_equal_the_detector_and_run_in_batches(input_kind, environment, tmp_path):
    result = prove(environment, tmp_path, requests=REQUESTS, images=8, input_kind=input_kind)
    assert result["parsed_by_tritonclient"] == ["python", "onnxruntime", "tensorrt"]
    for name in ("python", "network"):
        figures = result[name]
        assert figures["answers_with_the_same_classes"] == REQUESTS, name
        assert figures["detections"] > REQUESTS
        assert figures["largest_box_difference_px"] < 0.01
        assert figures["largest_score_difference"] < 1e-4
        assert figures["metrics"]["nv_inference_request_success"] == REQUESTS
        assert figures["metrics"]["nv_inference_request_failure"] == 0
        assert figures["mean_batch"] > 1
        assert figures["warmups"] == ["batch of 1", "batch of 8"]


def test_the_written_client_prints_the_boxes_and_a_bad_image_is_an_error_for_its_request_only(
    environment, model, tmp_path
):
    write_triton_repository(model, tmp_path / "models", TritonOptions(backend="python", name="cars"))
    write_shapes(tmp_path / "shapes", train=1, val=1, size=320, seed=3)
    (image,) = (tmp_path / "shapes/images/val").glob("*")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with running_server(environment, tmp_path / "models", tmp_path / "server") as server:
        good, bad = (client(environment, tmp_path / "models", path, server) for path in (image, tmp_path / "bad.jpg"))
        assert client(environment, tmp_path / "models", image, server).stdout == good.stdout
    with Detector(model) as detector:
        expected = [f"{found.class_name!r} {found.score:.2f}" for found in detector(image)]
    assert [" ".join(line.split(" ")[:2]) for line in good.stdout.splitlines()] == expected
    assert expected
    assert bad.returncode == 1
    assert "image 0: " in bad.stderr


def client(environment, repository, image, server):
    command = [str(environment / "bin/python"), str(repository / "client.py"), str(image), server.http]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("backend", ["python", "onnxruntime"])
def test_the_written_client_is_typed(backend, model, environment, tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed: pip install mypy")
    write_triton_repository(model, tmp_path / "models", TritonOptions(backend=backend))
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "--allow-untyped-calls"]
    command += ["--python-executable", str(environment / "bin/python"), "--cache-dir", str(tmp_path / "cache")]
    command += [str(tmp_path / "models/client.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)  # not with the source files
    assert done.returncode == 0, done.stdout + done.stderr
