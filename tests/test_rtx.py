"""TensorRT-RTX parses and builds the exported file without a GPU, function body and all.

The wheel's parser opens `libtensorrt_rtx.so`, but the wheel only has `libtensorrt_rtx.so.1`: every build runs in a
process of its own whose library path holds a link of the right name.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnx.inliner
import pytest

pytest.importorskip("tensorrt_rtx", reason="needs tensorrt_rtx (pip install 'yolov7-deploy[tensorrt-rtx]')")

from deterministic import fill_model
from small_models import info_of

from yolov7_deploy.export.to_onnx import export_onnx
from yolov7_deploy.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.options import ExportOptions

BUILD_TIMEOUT_S = 300
# Tiny without its weights is far below this, so a plan of this size holds the whole network.
SMALLEST_TINY_PLAN = 20 * 2**20

# Parses argv[1], builds for the capability argv[2], prints one JSON document.
BUILD = """
import json, sys
import tensorrt_rtx as trt

builder = trt.Builder(logger := trt.Logger(trt.Logger.ERROR))
network = builder.create_network(0)
parser = trt.OnnxParser(network, logger)
parsed = parser.parse(open(sys.argv[1], "rb").read())
record = {"parsed": parsed, "errors": [parser.get_error(i).desc() for i in range(parser.num_errors)], "plan": 0}
if parsed:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, sys.argv[2]), 0)
    for tensor in inputs:
        if -1 in tensor.shape:
            profile = builder.create_optimization_profile()
            profile.set_shape(tensor.name, *((batch, *tensor.shape[1:]) for batch in (1, 2, 4)))
            config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    record |= {
        "plan": 0 if plan is None else plan.nbytes,
        "inputs": {tensor.name: [tensor.dtype.name, list(tensor.shape)] for tensor in inputs},
        "outputs": {tensor.name: [tensor.dtype.name, list(tensor.shape)] for tensor in outputs},
        "layers": sorted({network.get_layer(i).type.name for i in range(network.num_layers)}),
    }
print(json.dumps(record))
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Builds a plan of an ONNX file and gives the record of it."""
    (folder,) = importlib.util.find_spec("tensorrt_rtx_libs").submodule_search_locations
    links = tmp_path_factory.mktemp("libraries")
    (links / "libtensorrt_rtx.so").symlink_to(Path(folder) / "libtensorrt_rtx.so.1")
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{links}:{os.environ.get('LD_LIBRARY_PATH', '')}"}

    def run(path, capability="SM86"):
        done = subprocess.run(
            [sys.executable, "-c", BUILD, str(path), capability],
            env=environment,
            capture_output=True,
            text=True,
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"the builder died with {done.returncode}: {done.stdout}{done.stderr}"
        record = json.loads(done.stdout.splitlines()[-1])
        assert record["parsed"], record["errors"]
        assert record["plan"], done.stdout + done.stderr
        return record

    return run


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports a fused network of random weights to a file, each kind once."""
    networks, files = {}, {}

    def export(variant, side, **options):
        key = (variant, side, *sorted(options.items()))
        if key not in files:
            if variant not in networks:
                networks[variant] = fuse(fill_model(new_model(variant)))
            fused = networks[variant]
            files[key] = tmp_path_factory.mktemp("exported") / "model.onnx"
            model = export_onnx(fused, info_of(fused), ExportOptions(input_hw=(side, side), **options))
            model.save(files[key])
        return files[key]

    return export


@pytest.mark.parametrize("variant", ["yolov7-tiny", "yolov7"])
def test_the_file_as_exported_builds_with_its_function_body(build, exported, variant):
    record = build(exported(variant, 640))
    assert record["plan"] > SMALLEST_TINY_PLAN
    # The thresholds have defaults, which the parser takes as constants: they are no inputs of the engine.
    assert record["inputs"] == {"images": ["FLOAT", [1, 3, 640, 640]]}
    assert record["outputs"] == {
        "num_dets": ["INT32", [1, 1]],
        "det_boxes": ["FLOAT", [1, 100, 4]],
        "det_scores": ["FLOAT", [1, 100]],
        "det_classes": ["INT32", [1, 100]],
    }
    assert {"TOPK", "TRIP_LIMIT"} <= set(record["layers"])
    assert not [layer for layer in record["layers"] if "PLUGIN" in layer or layer == "NMS"]


@pytest.mark.parametrize("variant", ["yolov7-tiny", "yolov7"])
def test_the_file_builds_with_its_function_inlined(build, exported, tmp_path, variant):
    inlined = onnx.inliner.inline_local_functions(onnx.load(exported(variant, 640)))
    assert not inlined.functions
    path = tmp_path / "inlined.onnx"
    onnx.save(inlined, path)
    assert set(build(path)["outputs"]) == {"num_dets", "det_boxes", "det_scores", "det_classes"}


@pytest.mark.parametrize("capability", ["SM75", "SM80", "SM89", "SM120"])
def test_the_file_builds_for_every_architecture_since_turing(build, exported, capability):
    assert build(exported("yolov7-tiny", 320), capability)["plan"] > SMALLEST_TINY_PLAN


@pytest.mark.parametrize("nms", ["standard", "efficient", "none"])
def test_every_kind_of_end_builds(build, exported, nms):
    assert build(exported("yolov7-tiny", 320, nms=nms))["plan"] > SMALLEST_TINY_PLAN


@pytest.mark.parametrize("opset", [13, 21])
def test_the_first_and_the_last_opset_build(build, exported, opset):
    assert build(exported("yolov7-tiny", 320, opset=opset))["plan"] > SMALLEST_TINY_PLAN


def test_an_open_batch_builds_with_a_profile(build, exported):
    record = build(exported("yolov7-tiny", 320, batch=None))
    assert record["inputs"]["images"][1] == [-1, 3, 320, 320]
    assert record["outputs"]["det_boxes"][1] == [-1, 100, 4]


def test_uint8_input_builds(build, exported):
    record = build(exported("yolov7-tiny", 320, input_kind="uint8"))
    assert record["inputs"] == {"images": ["UINT8", [1, 320, 320, 3]]}
