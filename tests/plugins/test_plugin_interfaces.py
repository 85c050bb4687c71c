"""The plugin's methods, called as TensorRT calls them by a C++ driver that records the arguments of the kernels."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.plugin_kit import headers_or_skip, tensorrt86_or_skip
from yolov7_deploy.errors import PluginError
from yolov7_deploy.tensorrt.plugin_build import find_tools, plugin_sources

TIMEOUT_S = 300


@pytest.fixture(scope="session", params=["v3", "v2"])
def driven(request, tmp_path_factory):
    """Return the output of tests/plugins/plugin_driver.cpp for one plugin interface."""
    headers = headers_or_skip() if request.param == "v3" else tensorrt86_or_skip() / "include"
    try:
        tools = find_tools(tensorrt_include=headers)
    except PluginError as error:
        pytest.skip(error.message)
    cuda = subprocess.run([tools.nvcc, "--dryrun", "-E", "x.cu"], capture_output=True, text=True, check=False).stderr
    top = next(line.partition("TOP=")[2] for line in cuda.splitlines() if "TOP=" in line)
    folder, sources = tmp_path_factory.mktemp("driver"), plugin_sources()
    names = ("params", "nms_plugin", "logging", f"nms_plugin_{request.param}")
    files = [sources / "tensorrt" / f"{name}.cpp" for name in names]
    command = [tools.cxx, "-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined"]
    # Without vptr, which needs parts of TensorRT that are not linked.
    command += ["-fno-sanitize=vptr", "-fno-sanitize-recover"]
    command += [f"-I{sources / name}" for name in ("tensorrt", "kernels")]
    command += ["-isystem", headers, "-isystem", Path(top) / "include", "-o", folder / "driver"]
    done = subprocess.run(
        [*command, Path(__file__).with_name("plugin_driver.cpp"), *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run = subprocess.run([folder / "driver"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_tensorrt_can_choose_the_format_of_every_head_independently(driven):
    # float32 NCHW or NHWC, float16 NCHW or NHWC padded to 8 channels, for each of up to four heads.
    assert driven["combinations"] == {"1": 4, "3": 16, "4": 32, "8": 32}


def test_output_shapes_follow_the_batch(driven):
    assert driven["open"] == [[-1, 1], [-1, 300, 4], [-1, 300], [-1, 300], [-1, 1]]
    assert driven["fixed"] == [[3, 1], [3, 300, 4], [3, 300], [3, 300], [3, 1]]


def test_the_kernels_get_every_tensor_and_the_strides_of_its_format(driven):
    linear, mixed32, mixed16 = (driven[name] for name in ("linear", "mixed32", "mixed16"))
    assert [call["type"] for call in (linear, mixed32, mixed16)] == [0, 0, 1]
    # 255 channels and 8x12, 4x6 and 2x3 cells; the strides of batch, channel and cell.
    assert [head[:3] for head in linear["heads"]] == [[255 * 96, 96, 1], [255 * 24, 24, 1], [255 * 6, 6, 1]]
    assert [head[:3] for head in mixed32["heads"]] == [[255 * 96, 1, 255], [255 * 24, 24, 1], [255 * 6, 1, 255]]
    assert [head[:3] for head in mixed16["heads"]] == [[256 * 96, 1, 256], [255 * 24, 24, 1], [256 * 6, 1, 256]]
    for call in (linear, mixed32, mixed16):
        # Height, width, pixels per cell, height of the last anchor, address.
        assert [head[3:] for head in call["heads"]] == [
            [8, 12, 8, 28, 0x1000],
            [4, 6, 16, 146, 0x2000],
            [2, 3, 32, 401, 0x3000],
        ]
        assert call["pointers"] == [
            0x4000,
            0x5000,
            0x6000,
            0x7000,
            *(0x100000 * number for number in range(1, 6)),
            0x77,
        ]
        assert (call["batch"], call["bytes"]) == (2, 200 if call["type"] else 2000)


def test_the_workspace_is_that_of_the_batch_or_of_the_maximum(driven):
    assert driven["workspace"] == [3 * 100, 1024 * 1000]


def test_parameters_survive_serialization(driven):
    assert driven["round_trip"]


def test_profiles_are_validated_and_every_error_is_logged(driven):
    assert driven["profiles"] == [True, False, False]
    expected = [
        "the batch is up to 1025 images; the kernels support at most 1024.",
        "head map 2 has 3x3 cells; attribute strides says 32 pixels a cell, but head map 0 covers 64x64 pixels.",
        "enqueue: a kernel failed (batch 2, classes=7 max_det=300",
        "enqueue: head map 2 has 2x3 cells; attribute strides says 64 pixels a cell, but head map 0 covers 64x96",
        "the node has 5 inputs; attribute strides has 3 levels",
        "head map 0 has 255 channels; attribute classes is 7, which requires 36 (3 * (5 + classes)).",
        "iou_threshold has 2 values; it must have one.",
    ]
    assert len(driven["messages"]) == len(expected)
    for text, part in zip(driven["messages"], expected, strict=True):
        assert text.startswith("Y7NMS plugin, ")
        assert part in text
