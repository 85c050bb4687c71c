"""ONNX Runtime: the device that is reported is the one that runs, and thresholds with and without a default."""

import logging
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from tests.support.sample_images import noise
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError, LoadError, MissingLibraryError, UsageError
from yolov7_deploy.metadata import THRESHOLD_INPUTS
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.runtimes.base import installed_runtimes, open_runtime


@pytest.fixture
def without_cuda_libraries(monkeypatch):
    """An ONNX Runtime with a CUDA provider that does not load, so that sessions silently use the CPU."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has a CUDA provider")
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_an_unusable_gpu_is_not_reported(files, without_cuda_libraries, caplog, capfd):
    with caplog.at_level(logging.WARNING), Detector(files("plugin"), runtime="onnxruntime") as detector:
        assert detector.device == "cpu"
        detector(noise(128, 192))
    (message,) = (record.getMessage() for record in caplog.records)
    assert "runs on the CPU" in message and "pip install 'onnxruntime-gpu[cuda,cudnn]'" in message
    assert "Failed" not in "".join(capfd.readouterr())


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", 0])
def test_an_unusable_gpu_that_was_asked_for_is_refused(files, without_cuda_libraries, device):
    with pytest.raises(DeviceError, match="its CUDA libraries") as caught:
        Detector(files("plugin"), runtime="onnxruntime", device=device)
    assert caught.value.fix.startswith("pip install 'onnxruntime-gpu[cuda,cudnn]'")


@pytest.mark.parametrize("kind", ["ImportError", "OSError"])
def test_a_library_that_does_not_load_is_reported_with_the_cause(files, tmp_path, monkeypatch, kind):
    (tmp_path / "openvino.py").write_text(f"raise {kind}('libtbb.so.12: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("openvino", "yolov7_deploy.runtimes.openvino"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingLibraryError, match=r"openvino is needed to run .*does not load: libtbb\.so") as caught:
        open_runtime(files("plugin"), device="cpu", input_hw=None, runtime="openvino")
    assert "y7 doctor" in caught.value.fix


def test_a_file_that_is_slow_here_is_explained_once(files, tmp_path, caplog):
    model = OnnxModel.load(files("none"))
    OnnxModel.of(model.proto, replace(model.metadata, precision="fp16")).save(tmp_path / "half.onnx")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            Detector(tmp_path / "half.onnx", runtime="onnxruntime").close()
    (message,) = (record.getMessage() for record in caplog.records)
    assert "half.onnx is FP16, which ONNX Runtime computes slower" in message and "--runtime openvino" in message


def test_an_onnx_file_for_tensorrt_is_refused_with_the_command_that_builds_an_engine(files):
    with pytest.raises(UsageError, match="not with tensorrt") as caught:
        open_runtime(files("plugin"), device="cpu", input_hw=None, runtime="tensorrt")
    assert caught.value.fix.endswith("y7 export --weights WEIGHTS.pt --engine")


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("without_default", [("multi_label",), ("conf_threshold", "iou_threshold"), THRESHOLD_INPUTS])
def test_thresholds_without_a_default_get_a_value_in_every_run(files, tmp_path, runtime, without_default):
    if runtime not in installed_runtimes(files("plugin"), "cpu"):
        pytest.skip(f"{runtime} is not installed")
    model = onnx.load(files("plugin"))
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in without_default]
    assert len(model.graph.initializer) - len(kept) == len(without_default)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, tmp_path / "m.onnx")
    with (
        Detector(files("plugin"), device="cpu", runtime=runtime, conf=0.01) as before,
        Detector(tmp_path / "m.onnx", device="cpu", runtime=runtime, conf=0.01) as now,
    ):
        image = noise(128, 192)
        expected, found = before(image), now(image)
    assert len(expected) > 0
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_file_with_some_of_the_thresholds_is_refused_when_it_is_opened(files, tmp_path, runtime):
    if runtime not in installed_runtimes(files("plugin"), "cpu"):
        pytest.skip(f"{runtime} is not installed")
    model = onnx.load(files("none"))
    value = onnx.helper.make_tensor_value_info("iou_threshold", onnx.TensorProto.FLOAT, [1])
    model.graph.input.append(value)
    if runtime == "openvino":  # where defaults become inputs
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0.5], np.float32), "iou_threshold"))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(LoadError, match=r"of the thresholds for NMS, it has iou_threshold only"):
        Detector(tmp_path / "m.onnx", device="cpu", runtime=runtime)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("nms", ["plugin", "none"])
def test_the_next_image_does_not_change_the_detections_of_the_last(files, runtime, nms):
    """A thread's calls share the memory of the network input."""
    if runtime not in installed_runtimes(files(nms), "cpu"):
        pytest.skip(f"{runtime} is not installed")
    images = [noise(128, 192, seed=seed) for seed in (1, 2)]
    with Detector(files(nms), device="cpu", runtime=runtime, conf=0.01) as detector:
        alone = [detector.batch([image])[0] for image in images]
        before = [found.boxes.copy() for found in alone]
        together = detector.batch(images)
        again = [detector(image) for image in reversed(images)][::-1]
    assert len(alone[0]) > 0 and not np.array_equal(alone[0].boxes, alone[1].boxes)
    for one, kept, both, later in zip(alone, before, together, again, strict=True):
        np.testing.assert_array_equal(one.boxes, kept)
        np.testing.assert_array_equal(one.boxes, later.boxes)
        np.testing.assert_allclose(one.boxes, both.boxes, atol=1e-3)
