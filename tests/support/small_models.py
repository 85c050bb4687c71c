"""Small networks with deterministic weights, exported and run, for tests of several packages."""

from functools import lru_cache

import numpy as np
import onnxruntime
import torch

from tests.support.deterministic import fill_model, make_image
from yolov7_deploy._ort_options import base_session_options
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import Yolov7, new_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions

HW = (128, 192)  # not square, so that swapped sides are noticed; 1512 anchors, more than enter NMS in the tests
KEPT_EXPORTS = 6  # with a session, each has 190 MB
HEAD_SCALE = 0.05  # factor of the head's weights: raw values of 2 instead of 40


def metadata_of(model: Yolov7) -> ModelMetadata:
    """Return the metadata of a model."""
    return ModelMetadata(
        variant=model.variant.name,
        class_names=tuple(f"thing {i}" for i in range(model.classes)),
        strides=model.head.strides,
        anchors=model.anchors,
        source="deterministic",
    )


def tiny(classes: int = 5) -> Yolov7:
    """Return yolov7-tiny with scores spread over 0 to 1; without the scaled head, nearly all would be 0 or 1."""
    model = fill_model(new_model("yolov7-tiny", classes=classes))
    with torch.no_grad():
        for convolution in model.head.m:
            convolution.weight *= HEAD_SCALE
    return model


@lru_cache
def fused_tiny(classes: int = 5) -> Yolov7:
    """Return `tiny`, fused; shared, do not modify it."""
    return fuse(tiny(classes))


@lru_cache(maxsize=KEPT_EXPORTS)
def exported_tiny(classes: int = 5, **options: object) -> OnnxModel:
    """Return yolov7-tiny as ONNX at HW; shared, do not modify it."""
    model = fused_tiny(classes)
    return export_onnx(model, metadata_of(model), ExportOptions(**{"input_hw": HW, **options}))


@lru_cache(maxsize=KEPT_EXPORTS)
def tiny_session(classes: int = 5, **options: object) -> onnxruntime.InferenceSession:
    """Return an ONNX Runtime session of `exported_tiny`."""
    return session(exported_tiny(classes, **options).proto)


def session(proto, *, optimize: bool = True) -> onnxruntime.InferenceSession:
    """Return a CPU session of ONNX Runtime, without its warnings about inputs that have a default."""
    options = base_session_options()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@lru_cache
def images(count: int = 1) -> np.ndarray:
    """Return network inputs [count, 3, H, W], all different."""
    return np.concatenate([make_image(*HW, salt=f"{i}").numpy() for i in range(count)])


@lru_cache
def decoded_by_torch(classes: int = 5, count: int = 1) -> np.ndarray:
    """Return the decoded output of torch for `images(count)`: [count, A, 5 + C]."""
    with torch.no_grad():
        return fused_tiny(classes).predict(torch.from_numpy(images(count))).numpy()
