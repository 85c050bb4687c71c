"""ONNX Runtime's devices: the device that is reported is the one that runs."""

import logging

import onnxruntime
import pytest

from tests.support.sample_images import noise
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import DeviceError


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
