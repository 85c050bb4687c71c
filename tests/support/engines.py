"""Exported models with random weights, the plugin library and TensorRT-RTX engines, for tests that build engines."""

import importlib.util
import os
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.support.deterministic import fill_model
from tests.support.plugin_kit import HEADERS_VARIABLE
from tests.support.sample_images import noise
from tests.support.small_models import metadata_of
from yolov7_deploy.errors import PluginError
from yolov7_deploy.metadata import THRESHOLD_INPUTS
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import EngineOptions, ExportOptions, Int8Options
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.tensorrt.builder import build_engine, find_tensorrt
from yolov7_deploy.tensorrt.engine import plan_version
from yolov7_deploy.tensorrt.plugin_build import build_plugin
from yolov7_deploy.tensorrt.plugin_library import PLUGIN_VARIABLE

IMAGE_SIZE = 128  # a multiple of every variant's stride, with more anchors than maximum detections
TARGET = "8.6"
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
NO_RTX = "needs tensorrt_rtx (pip install 'yolov7-deploy[tensorrt-rtx]')"
# A plan is larger than this share of its weights; a plan without weights would be much smaller.
WEIGHTS_SHARE = 0.9
OUTPUTS = {
    "num_dets": ("int32", (1, 1)),
    "det_boxes": ("float32", (1, 300, 4)),
    "det_scores": ("float32", (1, 300)),
    "det_classes": ("int32", (1, 300)),
    "overflow": ("int32", (1, 1)),
}
THRESHOLDS = dict.fromkeys(THRESHOLD_INPUTS, ("float32", (1,)))


@lru_cache(maxsize=1)
def _fused(variant):
    return fuse(fill_model(new_model(variant)))


@lru_cache(maxsize=2)
def exported(variant="yolov7-tiny", *, fp16=False, **options):
    """Return a cached model with random weights; callers must not modify it."""
    if fp16:
        return to_fp16(exported(variant, **options), (noise(IMAGE_SIZE, IMAGE_SIZE),))
    fused = _fused(variant)
    return export_onnx(fused, metadata_of(fused), ExportOptions(**{"input_hw": (IMAGE_SIZE, IMAGE_SIZE), **options}))


@lru_cache(maxsize=2)
def quantized(variant="yolov7-tiny", **options):
    """Return a cached INT8 model with random weights, calibrated with two images; callers must not modify it."""
    model = exported(variant, **options)
    images = [noise(IMAGE_SIZE, IMAGE_SIZE, seed) for seed in range(2)]
    return to_int8(model, calibrate(model, images, count=len(images)), Int8Options())


@lru_cache(maxsize=1)
def rtx():
    """Return the installed TensorRT-RTX, cached."""
    return find_tensorrt(EngineOptions(targets=(TARGET,)))


@lru_cache(maxsize=1)
def plugin_library(folder):
    """Return the path of the plugin library for TARGET and '', or `None` and the reason."""
    if os.environ.get(PLUGIN_VARIABLE):
        return os.environ[PLUGIN_VARIABLE], ""
    try:
        headers = Path(os.environ[HEADERS_VARIABLE]) if os.environ.get(HEADERS_VARIABLE) else None
        library = build_plugin(architectures=(TARGET.replace(".", ""),), tensorrt_include=headers, output=folder)
        return str(library.path), ""
    except PluginError as error:
        return None, str(error).replace("\n", " ")


def build(model, **options):
    """Build a TensorRT-RTX engine for TARGET, with NMS by operators."""
    return build_engine(model, EngineOptions(**{"targets": (TARGET,), "plugin": "off", **options}), installation=rtx())


def ports(tensors):
    """Return (dtype, shape) of tensors by name."""
    return {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}


def check(engine, model):
    """Assert the properties of every engine of `build` with NMS."""
    record = engine.record
    weights = sum(len(weight.raw_data) for weight in model.proto.graph.initializer)
    assert record.plan_bytes == len(engine.plan) > WEIGHTS_SHARE * weights
    assert plan_version(engine.plan)[0] == record.product == "tensorrt_rtx"
    assert ports(record.inputs) == {"images": ("float32", (1, 3, IMAGE_SIZE, IMAGE_SIZE)), **THRESHOLDS}
    assert ports(record.outputs) == OUTPUTS
    assert (record.targets, record.strongly_typed, record.runtime_thresholds) == ((TARGET,), True, True)
    assert record.metadata == model.metadata


def foreign(op="Relu", domain="", opset=17):
    """Return a model of another exporter: a convolution and a node named `last`."""
    weight = numpy_helper.from_array(np.zeros((8, 3, 1, 1), np.float32), "weight")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["inside"], name="first"),
        helper.make_node(op, ["inside"], ["output"], name="last", domain=domain),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [1, 8, 8, 8])],
        initializer=[weight],
    )
    sets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=sets, ir_version=8)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def left_behind():
    """Return the temporary folders of builds that still exist."""
    return sorted(Path(tempfile.gettempdir()).glob(".y7-engine.*"))
