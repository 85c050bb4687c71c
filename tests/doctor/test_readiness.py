"""`y7 doctor --ready`: exit code 0 if a model opens, else 1 with a message; it downloads nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from yolov7_deploy import hub
from yolov7_deploy._serialization import sha256_hex
from yolov7_deploy.cli.app import app
from yolov7_deploy.detector import Detector
from yolov7_deploy.doctor.readiness import READY_VARIABLE, check_ready
from yolov7_deploy.errors import DeviceError, LoadError, UsageError
from yolov7_deploy.hub import bundled_onnx, bundled_weights, find_weights

ROOT = Path(__file__).parents[2]
READY = [sys.executable, "-m", "yolov7_deploy", "doctor", "--ready"]
LIMIT_CPU_S = 6.0  # of the whole process; 1.4 s when this was written


def ready(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: text for name, text in os.environ.items() if name != READY_VARIABLE}
    environment = {**inherited, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run([*READY, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.fixture(autouse=True)
def _no_variable(monkeypatch):
    monkeypatch.delenv(READY_VARIABLE, raising=False)


@pytest.fixture
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(hub, "_download", refuse)


def test_the_included_onnx_file_is_an_export_of_the_included_weights():
    with Detector(bundled_onnx(), device="cpu") as detector:
        assert detector.metadata.source_sha256 == sha256_hex(bundled_weights().read_bytes())
        assert detector.metadata.precision == "fp16" and detector.metadata.nms is not None
    assert find_weights("yolov7-tiny-shapes.onnx") == bundled_onnx()


def test_a_process_that_opens_a_model_is_ready_and_cheap(tmp_path):
    before = os.times()
    done = ready(cwd=tmp_path)
    after = os.times()
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("ready: ")
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    assert cpu_s < LIMIT_CPU_S


def test_a_model_that_does_not_exist_is_exit_code_1_and_names_where_it_came_from(tmp_path):
    done = ready(cwd=tmp_path, **{READY_VARIABLE: "absent.onnx"})
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert "$Y7_READY_WEIGHTS: absent.onnx does not exist." in done.stderr


def test_a_damaged_model_is_not_ready(tmp_path):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(bundled_onnx().read_bytes()[:100_000])
    with pytest.raises(LoadError, match=r"damaged\.onnx"):
        check_ready(str(path))


def test_the_given_model_comes_before_the_variable(tmp_path, monkeypatch):
    path = tmp_path / "given.onnx"
    path.write_bytes(bundled_onnx().read_bytes())
    monkeypatch.setenv(READY_VARIABLE, "absent.onnx")
    found = check_ready(str(path), device="cpu")
    assert (found.weights, found.device) == (str(path), "cpu") and found.seconds > 0


def test_a_device_that_is_not_there_is_not_ready():
    with pytest.raises(DeviceError, match="CUDA"):
        check_ready(device="cuda:7")


@pytest.mark.usefixtures("_no_network")
def test_an_official_name_is_looked_for_in_local_folders_and_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError) as caught:
        check_ready("yolov7")
    assert "was not found in any of these locations" in caught.value.message
    assert "release" not in caught.value.message and "copy the weights" in caught.value.fix


def test_options_of_the_check_need_the_check():
    result = CliRunner().invoke(app, ["doctor", "--weights", "best.onnx"])
    assert isinstance(result.exception, UsageError) and "--ready" in result.exception.fix


def test_json_on_standard_output_is_the_only_output_there():
    result = CliRunner().invoke(app, ["doctor", "--ready", "--device", "cpu", "--json", "-"])
    record = json.loads(result.stdout)
    assert set(record) == {"device", "runtime", "seconds", "weights"} and result.stderr.startswith("ready: ")
