"""Validation in the C ABI of NMS, its workspace size, and compilation of the kernels with nvcc."""

import re
import shutil
import subprocess

import numpy as np
import pytest

from tests.fakes.emulated_kernels import (
    BAD_ARGUMENT,
    FLOAT16,
    OK,
    SOURCES,
    UINT8,
    WORKSPACE_TOO_SMALL,
    NmsParams,
    compile_emulated,
)
from tests.support.nms_cases import CASES, Call, kernels_of
from yolov7_deploy.tensorrt.plugin_library import KERNELS_ABI


def test_a_call_needs_no_overflow_output():
    call = Call()
    call.structs.overflow = None
    assert call.status() == OK
    assert call.outputs["num_dets"].array.view(np.int32).tolist() == [0, 0]
    assert (call.outputs["overflow"].array.view(np.uint8) == 0xAB).all()


@pytest.mark.parametrize("name", ["params", "heads", "thresholds", "outputs", "workspace"])
def test_a_null_argument_is_rejected(name):
    call = Call()
    assert call.status(**{name: None}) == BAD_ARGUMENT
    assert call.is_untouched()


@pytest.mark.parametrize("name", ["conf", "iou", "multi_label", "class_agnostic"])
@pytest.mark.parametrize("change", [lambda address: None, lambda address: address + 2])
def test_a_null_or_misaligned_threshold_is_rejected(name, change):
    call = Call()
    setattr(call.thresholds, name, change(getattr(call.thresholds, name)))
    assert call.status() == BAD_ARGUMENT
    assert call.is_untouched()


@pytest.mark.parametrize("name", ["num_dets", "boxes", "scores", "classes"])
@pytest.mark.parametrize("change", [lambda address: None, lambda address: address + 2])
def test_a_null_or_misaligned_output_is_rejected(name, change):
    call = Call()
    setattr(call.structs, name, change(getattr(call.structs, name)))
    assert call.status() == BAD_ARGUMENT


def test_sizes_that_need_more_shared_memory_than_a_block_has_do_not_compile(tmp_path):
    with pytest.raises(AssertionError, match=r"Y7_NMS_STAGED .*shared memory"):
        compile_emulated("nms.cu", defines=["Y7_NMS_STAGED=6000"], folder=tmp_path)


WRONG = [
    *(("batch", value) for value in (0, -1, 1025)),
    *(("levels", value) for value in (0, -1, 9)),
    *((name, value) for name in ("classes", "max_det", "max_candidates") for value in (0, -1)),
    *(("type", value) for value in (-1, UINT8, 3)),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_parameter_out_of_range_is_rejected_and_has_no_workspace(name, value):
    call = Call()
    setattr(call.params, name, value)
    assert call.kernels.y7_nms_workspace(call.params) == 0
    assert call.status() == BAD_ARGUMENT
    assert call.is_untouched()


@pytest.mark.parametrize(("name", "value"), [("height", 0), ("width", -1), ("data", None), ("data", 2)])
def test_an_invalid_head_map_is_rejected(name, value):
    call = Call()
    setattr(call.heads[0], name, value)
    assert call.status() == BAD_ARGUMENT


def test_more_pairs_than_fit_into_32_bits_are_rejected():
    call = Call(classes=3)
    call.heads[0].height, call.heads[0].width = 21846, 21845  # 3 anchors per cell, 3 classes: 4.295e9
    assert 9 * 21846 * 21845 >= 2**32
    assert call.status() == BAD_ARGUMENT
    call.heads[0].height = call.heads[0].width = 2**31 - 1
    assert call.status() == BAD_ARGUMENT


def test_a_workspace_that_is_too_small_is_reported():
    call = Call()
    assert call.status(workspace_bytes=call.size - 1) == WORKSPACE_TOO_SMALL
    assert "smaller" in call.kernels.status_text(WORKSPACE_TOO_SMALL)
    assert call.is_untouched()


def test_the_workspace_is_256_kib_per_image():
    kernels = kernels_of("shipped")
    for batch in (1, 64, 1024):
        size = kernels.y7_nms_workspace(NmsParams(batch, 3, 80, 300, 30_000, FLOAT16))
        assert batch * 2**18 < size <= batch * 2**18 + 4096 + 256


def test_every_status_has_a_description():
    texts = [kernels_of("64 threads").status_text(status) for status in range(5)]
    assert all(texts) and len(set(texts[:3])) == 3
    assert kernels_of("64 threads").y7_kernels_abi() == KERNELS_ABI


# --- nvcc ---------------------------------------------------------------------------------------------------------


def nvcc():
    found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


def architectures():
    """Return all architectures of this nvcc if many cases are requested, else the oldest and the newest."""
    listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = sorted(set(re.findall(r"sm_\d+\b", listed)), key=lambda name: int(name[3:]))
    return known if CASES > 1000 else [known[0], known[-1]]


def test_nvcc_compiles_without_a_warning_and_spills_nothing(tmp_path):
    flags = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-Wall,-Wextra,-Werror", "-Werror", "all-warnings"]
    for name in architectures():
        command = [nvcc(), *flags, f"-arch={name}", "-Xptxas", "-v", "-c", str(SOURCES / "nms.cu")]
        result = subprocess.run([*command, "-o", str(tmp_path / "nms.o")], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", result.stderr)
        assert len(frames) == 4 and set(frames) == {("0", "0", "0")}, result.stderr
