"""`y7 doctor` on building engines: with and without a GPU, TensorRT and TensorRT-RTX."""

from dataclasses import replace

import pytest

from tests.doctor.test_doctor import ORIN, PLAIN, WITH_T4, capability, everything, issue, library

WHAT = "build TensorRT engines"
NO_TENSORRT = {"tensorrt": library("tensorrt"), "tensorrt_rtx": library("tensorrt_rtx")}


def test_with_a_gpu_tensorrt_builds():
    found = capability(WHAT, everything(), WITH_T4)
    assert found.possible and found.reason == "tensorrt 1.0, onnx 1.0"


def test_without_a_gpu_tensorrt_rtx_builds():
    found = capability(WHAT, everything())
    assert found.possible and found.reason.startswith("tensorrt_rtx 1.0, onnx 1.0, for any GPU")


def test_without_a_gpu_tensorrt_alone_does_not_build():
    found = capability(WHAT, everything(tensorrt_rtx=library("tensorrt_rtx")))
    assert not found.possible
    assert "tensorrt 1.0 builds only where there is a GPU" in found.reason
    assert found.fix == "pip install 'yolov7-deploy[tensorrt-rtx]'"


@pytest.mark.parametrize(
    "machine,extra",
    [(PLAIN, "tensorrt-rtx"), (WITH_T4, "tensorrt")],
    ids=["no GPU", "GPU"],
)
def test_the_tensorrt_to_install_is_the_one_that_builds_here(machine, extra):
    found = capability(WHAT, everything(**NO_TENSORRT), machine)
    assert (found.possible, found.fix) == (False, f"pip install 'yolov7-deploy[{extra}]'")


def test_a_jetson_needs_tensorrt():
    assert (
        "tensorrt is not installed" in capability(WHAT, everything(**NO_TENSORRT), replace(PLAIN, jetson=ORIN)).reason
    )


def test_engines_cannot_be_built_without_onnx():
    found = capability(WHAT, everything(onnx=library("onnx")), WITH_T4)
    assert (found.possible, found.reason) == (False, "onnx is not installed")


def test_the_fix_for_a_xavier_names_its_jetpack_and_not_a_wheel():
    libraries = everything(tensorrt=library("tensorrt", "tensorrt 10.16.1"))
    xavier = replace(ORIN, model="NVIDIA Jetson AGX Xavier", compute_capability="7.2")
    (found,) = issue(libraries, replace(PLAIN, jetson=xavier), about="was the last that did")
    assert "JetPack 5" in found.fix and "10.4" not in found.fix
