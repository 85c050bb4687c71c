"""Accuracy of INT8 for each calibration method: AP compared with float32, and the error of the head maps.

python benchmarks/int8_methods.py --weights yolov7 --calib IMAGES --data D.yaml
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from recording import parser, record

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.evaluation.accuracy import AccuracyReport, evaluate
from yolov7_deploy.evaluation.accuracy_drop import accuracy_drop
from yolov7_deploy.hub import find_weights
from yolov7_deploy.image import read_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import INT8_METHODS, ExportOptions, Int8Options, ValOptions
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.sensitivity import head_error
from yolov7_deploy.precision.subgraph import Network

MAX_DET = 300
VARIANTS = [(method, Int8Options(method=method)) for method in INT8_METHODS]
VARIANTS.append(("mse, without bias correction", Int8Options(correct_bias=False)))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", default="yolov7")
    arguments.add_argument("--calib", required=True)
    arguments.add_argument("--data", required=True, type=Path)
    arguments.add_argument("--head-images", type=int, default=32, help="number of images for the head error")
    options = arguments.parse_args()
    checkpoint = load_checkpoint(find_weights(options.weights))
    model = export_onnx(fuse(build_model(checkpoint)), checkpoint.metadata, ExportOptions(max_det=MAX_DET))
    images, data = open_calibration(options.calib), open_dataset(options.data)
    calibration = calibrate(model, images, count=len(images))
    reference = accuracy(model, data)
    rows: dict[str, object] = {"float32": {"ap": reference.ap, "ap50": reference.ap50}}
    heads = list(head_maps(model, data, options.head_images))
    for name, chosen in VARIANTS:
        quantized = to_int8(model, calibration, chosen)
        report = accuracy(quantized, data)
        drop = accuracy_drop(data, range(len(data)), reference.predictions, report.predictions)
        errors = [
            head_error(theirs, ours, model.metadata.heads, model.metadata)
            for theirs, ours in zip(heads, head_maps(quantized, data, options.head_images), strict=True)
        ]
        rows[name] = {
            "ap": report.ap,
            "ap50": report.ap50,
            "drop": asdict(drop),
            "head_error": float(np.sqrt(np.mean(np.square(errors)))),
        }
        print(f"{name:28} AP {report.ap:.4f}  points lost {drop.points:+.2f}", flush=True)
    assert quantized.metadata.int8 is not None
    record(
        "int8_methods",
        options.machine,
        {
            "weights": Path(options.weights).name,
            "calibrated_on": calibration.images,
            "measured_on": len(data),
            "int8_share_of_macs": quantized.metadata.int8.share,
            "points_limit_mse": 0.3,
            "methods": rows,
        },
    )


def accuracy(model: OnnxModel, data: Dataset) -> AccuracyReport:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model.save(path)
        with Detector(path, device="cpu") as detector:
            return evaluate(detector, data, options=ValOptions(rect=False, batch=1))


def head_maps(model: OnnxModel, data: Dataset, count: int) -> Iterator[dict[str, np.ndarray]]:
    network = Network(model)
    runner = NetworkRunner(model.proto, network.nodes, model.metadata.heads)
    for index in range(min(count, len(data))):
        yield runner.run(network_input(read_image(data.path(index)), model.metadata))


if __name__ == "__main__":
    main()
