"""YOLOv7: train, export, quantize, verify and deploy.

From an official checkpoint to a detector on ONNX Runtime or TensorRT. Every step is one function between two types:

    weights.pt ─▶ Checkpoint ─▶ Yolov7 ─▶ Yolov7 (fused) ─▶ OnnxModel ─▶ OnnxModel (FP16 | INT8) ─▶ Engine
      load_checkpoint  build_model   fuse          export_onnx     to_fp16, to_int8        build_engine

`Detector` runs any of these files: images in, `Detections` out. `export`, `train`, `validate`, `benchmark` and `report`
are the commands as functions.

Names are imported when they are first used, so `import yolov7_deploy` needs neither torch nor onnx.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from yolov7_deploy._version import __version__ as __version__

# Importing a new ONNX Runtime (1.32) starts telemetry: a thread, a device id and a database in the cache folder,
# and a file in the temporary folder. It reads this variable when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# The same names for type checkers; a test compares them with the table below.
if TYPE_CHECKING:
    from yolov7_deploy.checkpoint import Checkpoint as Checkpoint
    from yolov7_deploy.checkpoint import load_checkpoint as load_checkpoint
    from yolov7_deploy.checkpoint import save_checkpoint as save_checkpoint
    from yolov7_deploy.detections import Detections as Detections
    from yolov7_deploy.detector import Detector as Detector
    from yolov7_deploy.errors import Y7Error as Y7Error
    from yolov7_deploy.image import decode_image as decode_image
    from yolov7_deploy.metadata import ModelMetadata as ModelMetadata
    from yolov7_deploy.model.fusion import fuse as fuse
    from yolov7_deploy.model.yolov7 import Yolov7 as Yolov7
    from yolov7_deploy.model.yolov7 import build_model as build_model
    from yolov7_deploy.model.yolov7 import new_model as new_model
    from yolov7_deploy.onnx_export.onnx_exporter import export_onnx as export_onnx
    from yolov7_deploy.onnx_export.onnx_model import OnnxModel as OnnxModel
    from yolov7_deploy.options import EngineOptions as EngineOptions
    from yolov7_deploy.options import ExportOptions as ExportOptions
    from yolov7_deploy.options import Int8Options as Int8Options
    from yolov7_deploy.options import Thresholds as Thresholds
    from yolov7_deploy.precision.calibrate import calibrate as calibrate
    from yolov7_deploy.precision.calibration_images import open_calibration as open_calibration
    from yolov7_deploy.precision.fp16 import to_fp16 as to_fp16
    from yolov7_deploy.precision.int8 import to_int8 as to_int8
    from yolov7_deploy.streams import Streams as Streams
    from yolov7_deploy.tensorrt.builder import build_engine as build_engine
    from yolov7_deploy.tensorrt.engine import Engine as Engine
    from yolov7_deploy.workflows.functions import benchmark as benchmark
    from yolov7_deploy.workflows.functions import export as export
    from yolov7_deploy.workflows.functions import report as report
    from yolov7_deploy.workflows.functions import train as train
    from yolov7_deploy.workflows.functions import validate as validate

# Every public name and the module that defines it.
_MODULES = {
    "Checkpoint": "checkpoint",
    "Detections": "detections",
    "Detector": "detector",
    "Engine": "tensorrt.engine",
    "EngineOptions": "options",
    "ExportOptions": "options",
    "Int8Options": "options",
    "ModelMetadata": "metadata",
    "OnnxModel": "onnx_export.onnx_model",
    "Streams": "streams",
    "Thresholds": "options",
    "Y7Error": "errors",
    "Yolov7": "model.yolov7",
    "benchmark": "workflows.functions",
    "build_engine": "tensorrt.builder",
    "build_model": "model.yolov7",
    "calibrate": "precision.calibrate",
    "decode_image": "image",
    "export": "workflows.functions",
    "export_onnx": "onnx_export.onnx_exporter",
    "fuse": "model.fusion",
    "load_checkpoint": "checkpoint",
    "new_model": "model.yolov7",
    "open_calibration": "precision.calibration_images",
    "report": "workflows.functions",
    "save_checkpoint": "checkpoint",
    "to_fp16": "precision.fp16",
    "to_int8": "precision.int8",
    "train": "workflows.functions",
    "validate": "workflows.functions",
}

__all__ = sorted([*_MODULES, "__version__"])


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any of the public names
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        from yolov7_deploy.errors import missing_library

        raise missing_library(error, f"for {name}") from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return __all__
