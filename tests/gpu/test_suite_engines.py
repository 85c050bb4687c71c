"""Parts of the GPU suite that use TensorRT, with fakes of TensorRT and CUDA, so that every line is tested."""

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

pytest.importorskip("torch")

from tests.gpu import comparison, nms, weights
from tests.gpu.environment import Environment
from tests.gpu.prepare_files import copy_site, nms_network, write_synthetic_network
from tests.support.trt_kit import TrtEnvironment
from yolov7_deploy.evaluation.synthetic_image import street_scene

TENSORRT_PARTS = ("against_efficient_nms", "engines", "tensorrt_run")


@pytest.fixture
def env(tmp_path, monkeypatch):
    """An emulated environment in which the fake TensorRT can be imported during the test."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "fakes" / "onnx_as_tensorrt"))
    for name in ("tensorrt", *(f"tests.gpu.{part}" for part in TENSORRT_PARTS)):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield Environment(folder=tmp_path, result=tmp_path / "result.json", emulated=True)
    for name in ("tensorrt", *(f"tests.gpu.{part}" for part in TENSORRT_PARTS)):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_comparison_with_efficient_nms_records_ratios(env, monkeypatch):
    from tests.gpu import against_efficient_nms as against_efficient

    monkeypatch.setattr(against_efficient, "KINDS", ((np.float16, 1),))
    monkeypatch.setattr(against_efficient, "COUNTS", (20,))
    monkeypatch.setattr(against_efficient, "ROUNDS", 2)
    for end in against_efficient.NMS_CHOICES:
        path = env.folder / nms.END_FILE.format(kind=end, type="float16", batch=1)
        path.write_bytes(nms_network(end, np.float16, 1).SerializeToString())
    against_efficient.measure(env)
    results = json.loads(env.result.read_text())
    assert results["registry"] == {"EfficientNMS_TRT": True, "Y7NMS": True}
    (row,) = results["rows"]
    assert {"efficient", "plugin", "kernels", "plugin_times_faster", "kernels_times_faster"} <= set(row)
    assert row["detections"]["kernels"] > 5


@pytest.mark.slow
def test_an_engine_is_built_run_and_compared_with_its_reference(env, monkeypatch):
    """ONNX Runtime runs the FP16 file in place of the engine, so the differences are those of FP16."""
    from tests.gpu import engines

    write_synthetic_network(env.folder, "yolov7-tiny", 320, street_scene())
    file = env.folder / "yolov7-tiny.onnx"
    assert file.stat().st_size < 2**20, "the weights are removed"

    def build(_, onnx, plugin, *, level, into):
        assert (plugin, level, into) == (None, "2", env.folder)
        engine = onnx.with_suffix(".engine")
        engine.write_bytes(weights.with_weights(onnx.read_bytes()))
        return engine

    monkeypatch.setattr(engines, "build", build)
    monkeypatch.setattr(engines, "layers", lambda engine: {"of": engine.name})  # this engine is an ONNX file
    engines.check(env)
    results = json.loads(env.result.read_text())
    assert results["yolov7-tiny"]["same"] is True
    assert results["yolov7-tiny"]["rows"] == 2000
    assert results["yolov7-tiny layers"] == {"of": "yolov7-tiny.engine"}
    assert results["yolov7"] == "yolov7.onnx is missing"
    reference = dict(np.load(env.folder / "yolov7-tiny.npz"))
    np.savez(env.folder / "yolov7-tiny.npz", **{**reference, "output": reference["output"][::-1]})
    with pytest.raises(AssertionError, match=r"failed: .*yolov7-tiny"):
        engines.check(env)


def test_a_failed_build_is_recorded_with_its_output(env, tmp_path):
    from tests.gpu import engines

    pytest.importorskip("tensorrt_rtx", reason="needs a TensorRT that y7 build can refuse with")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Nonsense", ["x"], ["y"])], "g", [value], [])
    (tmp_path / "yolov7-tiny.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    np.savez(tmp_path / "yolov7-tiny.npz", canvas=np.zeros((8, 8, 3), np.uint8))
    env.result = tmp_path / "elsewhere" / "result.json"
    env.result.parent.mkdir()
    with pytest.raises(AssertionError, match="yolov7-tiny"):
        engines.check(env)
    results = json.loads(env.result.read_text())
    assert results["yolov7-tiny build"]["exit"] == 1
    assert "Error" in results["yolov7-tiny build"]["output"] or "no metadata" in results["yolov7-tiny build"]["output"]


def test_the_layers_of_an_engine_and_the_reformats_around_its_plugin_are_counted(env, tmp_path, monkeypatch):
    from tests.gpu import engines

    machine = TrtEnvironment(tmp_path, monkeypatch)
    plugin = {"Name": "nms", "LayerType": "PluginV3", "PluginType": "Y7NMS"}
    plugin["Inputs"] = [{"Name": "a linear", "Format/Datatype": "Row major linear FP16 format"}]
    reformat = {"Name": "copy", "LayerType": "Reformat", "Inputs": [{"Name": "a"}], "Outputs": [{"Name": "a linear"}]}
    engine = machine.engine(inspector=json.dumps({"Layers": [reformat, plugin], "Bindings": []}))
    counts = {"layers": 2, "reformats": 1, "reformats_around_plugins": 1, "plugin_inputs": ["LINEAR"]}
    assert engines.layers(engine) == counts
    assert engines.layers(machine.engine(recorded=False, name="other.engine")) == {"layers": "unknown"}


def test_pytest_is_copied(tmp_path):
    copy_site(tmp_path)
    assert (tmp_path / "site" / "pytest" / "__init__.py").exists()


def test_the_iou_of_boxes_is_correct():
    box = np.array([0, 0, 10, 10], np.float32)
    others = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], np.float32)
    np.testing.assert_allclose(comparison.iou(box, others), [1, 1 / 3, 0], rtol=1e-6)
