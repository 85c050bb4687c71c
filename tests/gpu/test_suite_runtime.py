"""The suite's parts around Detector on a fake TensorRT and a fake GPU, so that no line runs first on a real one."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("psutil")

from tests.gpu import building, runtime, torch_speed
from tests.gpu.environment import Setting
from tests.support.trt_kit import make_image, setting, toy
from yolov7_deploy.benchmark.inputs import Frames

__all__ = ["setting"]


@pytest.fixture
def suite(setting, tmp_path, monkeypatch):
    """A part's Setting whose engines are those of `toy`."""
    made = Setting(folder=tmp_path, result=tmp_path / "result.json", emulated=True)
    monkeypatch.setattr(made.__class__, "open_cuda", lambda _: setting.cuda)
    (tmp_path / "yolov7.onnx").touch()

    def build(_, onnx, plugin, *, level, into, more):
        assert (plugin, level, into, more) == (None, "3", tmp_path / "engines", ())
        return setting.engine(toy(), name=f"engines/{onnx.stem}.engine")

    monkeypatch.setattr(building, "build", build)
    monkeypatch.setattr(runtime, "drawn_frames", lambda hw: Frames(images=(make_image(1),), words="one"))
    monkeypatch.setattr(runtime, "SECONDS", 0.0)
    monkeypatch.setattr(runtime, "WARM_UP_S", 0.0)
    return made


def test_an_engine_is_measured_with_graphs_without_and_from_the_gpu(suite):
    runtime.measure(suite)
    results = json.loads(suite.result.read_text())
    assert results["yolov7-tiny-nms.onnx"] == "was not brought"
    measured = results["yolov7.onnx"]
    assert [row["threads"] for row in measured["report"]["rows"]] == [1, 4]
    assert measured["detections"] == 3
    assert measured["same_without_graph"] and measured["same_from_gpu"]
    assert ["CUDA graph", "on"] in measured["report"]["settings"]
    assert results["frame on the GPU, ms"] > 0


def test_results_that_change_without_graphs_fail_the_part(suite, monkeypatch):
    monkeypatch.setattr(runtime, "alike", lambda one, other: False)
    with pytest.raises(AssertionError, match=r"failed: .*yolov7\.onnx"):
        runtime.measure(suite)
    assert json.loads(suite.result.read_text())["yolov7.onnx"] == {"failed": "results differ"}


def test_the_soak_reports_what_it_saw(suite):
    runtime.soak(suite)
    done = json.loads(suite.result.read_text())["soak"]
    assert (done["unequal_results"], done["threads"]) == (0, 8)


def test_the_papers_span_is_measured_for_a_model(suite, monkeypatch):
    monkeypatch.setattr(torch_speed, "SECONDS", 0.1)
    torch_speed.measure(suite)
    results = json.loads(suite.result.read_text())
    assert set(results) == {"yolov7-tiny 128x128 batch 1", "yolov7-tiny 96x128 batch 1"}
    assert all(one["engine_ms"] > 0 and one["engine_fps"] > 0 for one in results.values())
