"""Parts of the GPU suite that use Detector, with a fake TensorRT and a fake GPU, so that every line is tested."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("psutil")

from tests.gpu import engine_build, runtime, torch_speed
from tests.gpu.environment import Environment
from tests.support.trt_kit import environment, make_image, toy
from yolov7_deploy.benchmarking.benchmark import Frames

__all__ = ["environment"]

pytestmark = pytest.mark.slow


@pytest.fixture
def suite(environment, tmp_path, monkeypatch):
    """The environment of a part whose engines are those of `toy`."""
    env = Environment(folder=tmp_path, result=tmp_path / "result.json", emulated=True)
    monkeypatch.setattr(env.__class__, "open_cuda", lambda _: environment.cuda)
    (tmp_path / "yolov7.onnx").touch()

    def build(_, onnx, plugin, *, level, into, more):
        assert (plugin, level, into, more) == (None, "3", tmp_path / "engines", ())
        return environment.engine(toy(), name=f"engines/{onnx.stem}.engine")

    monkeypatch.setattr(engine_build, "build", build)
    monkeypatch.setattr(runtime, "synthetic_frames", lambda hw: Frames(images=(make_image(1),), description="one"))
    monkeypatch.setattr(runtime, "SECONDS", 0.0)
    monkeypatch.setattr(runtime, "WARM_UP_S", 0.0)
    return env


def test_an_engine_is_measured_with_graphs_without_graphs_and_with_gpu_frames(suite):
    runtime.measure(suite)
    results = json.loads(suite.result.read_text())
    assert results["yolov7-tiny-nms.onnx"] == "is missing"
    measured = results["yolov7.onnx"]
    assert [row["concurrency"] for row in measured["report"]["rows"]] == [1, 4]
    assert measured["detections"] == 3
    assert measured["same_without_graph"] and measured["same_from_gpu"]
    assert ["CUDA graph", "on"] in measured["report"]["settings"]
    assert results["frame on the GPU, ms"] > 0


def test_different_results_without_graphs_fail_the_part(suite, monkeypatch):
    monkeypatch.setattr(runtime, "identical_detections", lambda one, other: False)
    with pytest.raises(AssertionError, match=r"failed: .*yolov7\.onnx"):
        runtime.measure(suite)
    assert json.loads(suite.result.read_text())["yolov7.onnx"] == {"failed": "results differ"}


def test_the_soak_test_records_its_result(suite):
    runtime.soak(suite)
    done = json.loads(suite.result.read_text())["soak"]
    assert (done["unequal_results"], done["threads"]) == (0, 8)


def test_the_measurement_of_the_paper_runs_for_a_model(suite, monkeypatch):
    monkeypatch.setattr(torch_speed, "SECONDS", 0.1)
    torch_speed.measure(suite)
    results = json.loads(suite.result.read_text())
    assert set(results) == {"yolov7-tiny 128x128 batch 1", "yolov7-tiny 96x128 batch 1"}
    assert all(one["engine_ms"] > 0 and one["engine_fps"] > 0 for one in results.values())
