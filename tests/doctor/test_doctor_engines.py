"""What the doctor says about building engines."""

from dataclasses import replace

import pytest

from tests.doctor.test_doctor import ORIN, PLAIN, WITH_T4, ability, everything, library, trap

WHAT = "build TensorRT engines"
NO_TENSORRT = {"tensorrt": library("tensorrt"), "tensorrt_rtx": library("tensorrt_rtx")}


def test_with_a_gpu_tensorrt_builds():
    found = ability(WHAT, everything(), WITH_T4)
    assert found.possible and found.reason == "tensorrt 1.0, onnx 1.0"


def test_without_a_gpu_tensorrt_rtx_builds():
    found = ability(WHAT, everything())
    assert found.possible and found.reason.startswith("tensorrt_rtx 1.0, onnx 1.0, for any GPU")


def test_without_a_gpu_tensorrt_alone_does_not_build():
    found = ability(WHAT, everything(tensorrt_rtx=library("tensorrt_rtx")))
    assert not found.possible
    assert "tensorrt 1.0 builds only where there is a GPU" in found.reason
    assert found.fix == "pip install 'yolov7-deploy[tensorrt-rtx]'"


@pytest.mark.parametrize(
    "machine,extra",
    [(PLAIN, "tensorrt-rtx"), (WITH_T4, "tensorrt")],
    ids=["no GPU", "GPU"],
)
def test_the_tensorrt_to_install_is_the_one_that_builds_here(machine, extra):
    found = ability(WHAT, everything(**NO_TENSORRT), machine)
    assert (found.possible, found.fix) == (False, f"pip install 'yolov7-deploy[{extra}]'")


def test_a_board_without_tensorrt_wants_tensorrt():
    assert "tensorrt is not installed" in ability(WHAT, everything(**NO_TENSORRT), replace(PLAIN, jetson=ORIN)).reason


def test_a_graph_cannot_be_prepared_without_onnx():
    found = ability(WHAT, everything(onnx=library("onnx")), WITH_T4)
    assert (found.possible, found.reason) == (False, "onnx is not installed")


def test_a_xavier_is_sent_to_the_tensorrt_of_its_jetpack_and_not_to_a_wheel():
    libraries = everything(tensorrt=library("tensorrt", "tensorrt 10.16.1"))
    xavier = replace(ORIN, model="NVIDIA Jetson AGX Xavier", compute_capability="7.2")
    (found,) = trap(libraries, replace(PLAIN, jetson=xavier), about="was the last that did")
    assert "JetPack 5" in found.fix and "10.4" not in found.fix
