"""From an official YOLOv7 checkpoint to the fastest verified detector on your machine.

Seven stations, each a pure step between two named types:

     weights.pt ─▶ Checkpoint ─▶ Yolov7 ─▶ Yolov7 (fused) ─▶ OnnxModel ─▶ OnnxModel (fp16 | int8) ─▶ Engine ─▶ Detector
        load_checkpoint  build_model     fuse        export_onnx    to_fp16, to_int8 build_engine    ─▶ Detections

Names are imported when first touched, so `import yolov7_deploy` needs neither torch nor onnx.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from yolov7_deploy._version import __version__

if TYPE_CHECKING:
    from yolov7_deploy.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from yolov7_deploy.detections import Detections
    from yolov7_deploy.detector import Detector
    from yolov7_deploy.errors import Y7Error
    from yolov7_deploy.export.onnx_exporter import export_onnx
    from yolov7_deploy.export.onnx_model import OnnxModel
    from yolov7_deploy.metadata import ModelMetadata
    from yolov7_deploy.model.fusion import fuse
    from yolov7_deploy.model.yolov7 import Yolov7, build_model, new_model
    from yolov7_deploy.options import EngineOptions, ExportOptions, Int8Options, Thresholds
    from yolov7_deploy.precision.calibrate import calibrate
    from yolov7_deploy.precision.calibration_images import open_calibration
    from yolov7_deploy.precision.fp16 import to_fp16
    from yolov7_deploy.precision.int8 import to_int8
    from yolov7_deploy.tensorrt.builder import build_engine
    from yolov7_deploy.tensorrt.engine import Engine

_HOMES = {
    "Checkpoint": "checkpoint",
    "Detections": "detections",
    "Detector": "detector",
    "Engine": "tensorrt.engine",
    "EngineOptions": "options",
    "ExportOptions": "options",
    "Int8Options": "options",
    "ModelMetadata": "metadata",
    "OnnxModel": "export.onnx_model",
    "Thresholds": "options",
    "Y7Error": "errors",
    "Yolov7": "model.yolov7",
    "build_engine": "tensorrt.builder",
    "build_model": "model.yolov7",
    "calibrate": "precision.calibrate",
    "export_onnx": "export.onnx_exporter",
    "fuse": "model.fusion",
    "load_checkpoint": "checkpoint",
    "new_model": "model.yolov7",
    "open_calibration": "precision.calibration_images",
    "save_checkpoint": "checkpoint",
    "to_fp16": "precision.fp16",
    "to_int8": "precision.int8",
}

__all__ = [
    "Checkpoint",
    "Detections",
    "Detector",
    "Engine",
    "EngineOptions",
    "ExportOptions",
    "Int8Options",
    "ModelMetadata",
    "OnnxModel",
    "Thresholds",
    "Y7Error",
    "Yolov7",
    "__version__",
    "build_engine",
    "build_model",
    "calibrate",
    "export_onnx",
    "fuse",
    "load_checkpoint",
    "new_model",
    "open_calibration",
    "save_checkpoint",
    "to_fp16",
    "to_int8",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401 - one of the names above
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        from yolov7_deploy.errors import missing_library

        raise missing_library(error, f"for {name}") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
