"""Accuracy and speed of one network on a CPU: FP32 and INT8, in ONNX Runtime and in OpenVINO.

Every row is a `Detector` call from an image in memory to Detections; the rows take turns, so that the noise of the
machine affects all of them. Two rows are plain scripts, as users write them around onnxruntime and openvino.

    python benchmarks/cpu_runtimes.py --weights yolov7 --calib IMAGES --data D.yaml
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import openvino
from int8_methods import head_maps
from int8_rounding import error_of
from recording import parser, record

from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import Y7Error
from yolov7_deploy.evaluation.accuracy import AccuracyReport, evaluate
from yolov7_deploy.evaluation.accuracy_drop import accuracy_drop
from yolov7_deploy.hardware.system import has_vnni
from yolov7_deploy.hub import find_weights
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions, Int8Options, ValOptions
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.precision.sensitivity import FLOOR_IMAGES, choose_silu_floor

FP32 = "fp32, onnxruntime"
# Name: file and runtime.
ROWS = {
    FP32: ("fp32", "onnxruntime"),
    "int8 for tensorrt, onnxruntime": ("int8-tensorrt", "onnxruntime"),
    "int8, onnxruntime": ("int8", "onnxruntime"),
    "int8 by mse, onnxruntime": ("int8-mse", "onnxruntime"),
    "int8 of 8 bits, onnxruntime": ("int8-8", "onnxruntime"),
    "fp32, openvino": ("fp32", "openvino"),
    "fp32, openvino-bf16": ("fp32", "openvino-bf16"),
    "fp16, openvino": ("fp16", "openvino"),
    "int8 for tensorrt, openvino": ("int8-tensorrt", "openvino"),
    "int8, openvino": ("int8", "openvino"),
    "int8 by mse, openvino": ("int8-mse", "openvino"),
    "int8, openvino-bf16": ("int8", "openvino-bf16"),
    "int8 of 8 bits, openvino": ("int8-8", "openvino"),
}
INT8_FILES = ("int8-tensorrt", "int8", "int8-mse", "int8-8")
CALLERS = 4
SIZE = 640


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--weights", default="yolov7")
    arguments.add_argument("--calib", required=True)
    arguments.add_argument("--data", required=True, type=Path)
    arguments.add_argument("--calls", type=int, default=20, help="timed calls of each row")
    arguments.add_argument("--head-images", type=int, default=32, help="number of images for the head error")
    arguments.add_argument("--no-accuracy", action="store_true", help="measure only speed")
    options = arguments.parse_args()
    data = open_dataset(options.data)
    with tempfile.TemporaryDirectory() as folder:
        files = write_files(options.weights, options.calib, Path(folder))
        rows, refused = open_rows(files)
        accuracy = {} if options.no_accuracy else measure_accuracy(rows, data)
        head_errors = {} if options.no_accuracy else measure_head_errors(files, data, options.head_images)
        images = [read_image(data.path(index)) for index in range(min(8, len(data)))]
        calls: dict[str, Callable[[Image], object]] = dict(rows)
        calls["plain script, onnxruntime"] = plain_onnxruntime(files["none"])
        calls["plain script, openvino"] = plain_openvino(files["none"])
        latency = measure_latency(calls, images, options.calls)
        throughput = {name: measure_throughput(rows[name], images) for name in ("int8, openvino", "fp32, openvino")}
        for detector in rows.values():
            detector.close()
    base = latency[FP32]
    record(
        f"cpu_runtimes_{Path(options.weights).stem}",
        options.machine,
        {
            "weights": Path(options.weights).name,
            "vnni": has_vnni(),
            "measured_on": len(data),
            "median_ms": {name: round(ms, 1) for name, ms in latency.items()},
            "ratio_to_fp32_onnxruntime": {name: round(ms / base, 3) for name, ms in latency.items()},
            "accuracy": accuracy,
            "head_error": head_errors,
            "limits": {"int8, openvino": 0.33, "int8, onnxruntime": 0.55, "fp32, openvino-bf16": 0.55},
            "throughput_4_callers_over_1": throughput,
            "refused": refused,
            "openvino": openvino.__version__,
        },
    )


def write_files(weights: str, calib: str, folder: Path) -> dict[str, Path]:
    """Export the weights as FP32 and as INT8 for every target."""
    checkpoint = load_checkpoint(find_weights(weights))
    fused = fuse(build_model(checkpoint))
    options = ExportOptions(input_hw=(SIZE, SIZE))
    model = export_onnx(fused, checkpoint.metadata, options)
    images = open_calibration(calib)
    calibration = calibrate(model, images, count=len(images))
    floor_images = list(open_calibration(calib, limit=FLOOR_IMAGES))
    cpu, cpu_mse = (
        choose_silu_floor(model, calibration, floor_images, Int8Options(target="cpu", method=method))
        for method in ("lp", "mse")
    )
    models = {
        "fp32": model,
        "none": export_onnx(fused, checkpoint.metadata, replace(options, nms="none")),
        "fp16": to_fp16(model, [next(iter(images))]),
        "int8-tensorrt": to_int8(model, calibration, Int8Options(target="tensorrt", fallback="fp32")),
        "int8": to_int8(model, calibration, cpu),
        "int8-mse": to_int8(model, calibration, cpu_mse),
        "int8-8": to_int8(model, calibration, replace(cpu, reduce_range=False)),
    }
    for name, entry in models.items():
        entry.save(folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in models}


def open_rows(files: dict[str, Path]) -> tuple[dict[str, Detector], dict[str, str]]:
    """Open every row; also return the reasons of the runtimes that refuse a file."""
    rows, refused = {}, {}
    for name, (file, runtime) in ROWS.items():
        try:
            rows[name] = Detector(files[file], device="cpu", runtime=runtime)
        except Y7Error as error:
            refused[name] = error.message.replace(str(files[file].parent), "")
            print(f"{name}: {refused[name]}", flush=True)
    return rows, refused


def measure_accuracy(rows: dict[str, Detector], data: Dataset) -> dict[str, dict[str, float]]:
    """Return AP of each row, and the points lost against FP32 with a 95 % confidence interval."""
    reports: dict[str, AccuracyReport] = {}
    result = {}
    for name, detector in rows.items():
        report = reports[name] = evaluate(detector, data, options=ValOptions(rect=False, batch=1))
        drop = accuracy_drop(data, range(len(data)), reports[FP32].predictions, report.predictions)
        result[name] = {
            "ap": round(report.ap or 0.0, 4),
            "points_lost": round(drop.points, 2),
            "low": round(drop.low or 0.0, 2),
            "high": round(drop.high or 0.0, 2),
        }
        print(f"{name:32} AP {report.ap:.4f}  points lost {drop.points:+.2f}", flush=True)
    return result


def measure_head_errors(files: dict[str, Path], data: Dataset, count: int) -> dict[str, float]:
    """Return the error of the head maps of each INT8 file, for the same operators in float32."""
    models = {name: OnnxModel.load(files[name]) for name in ("fp32", *INT8_FILES)}
    heads = list(head_maps(models["fp32"], data, count))
    return {name: round(error_of(models[name], models["fp32"], data, heads), 4) for name in INT8_FILES}


def measure_latency(calls: dict[str, Callable[[Image], object]], images: list[Image], count: int) -> dict[str, float]:
    """Return the median milliseconds of each call; the calls take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(images[0])
    for turn in range(count):
        for name, call in calls.items():
            started = time.perf_counter()
            call(images[turn % len(images)])
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_throughput(detector: Detector, images: list[Image]) -> float:
    """Return the images per second of several callers, divided by those of one; alternates both three times."""
    run_callers(detector, images, CALLERS, 3.0)  # compiles the network for throughput
    time.sleep(8.0)
    ratios = []
    for _ in range(3):
        one = run_callers(detector, images, 1, 8.0)
        ratios.append(run_callers(detector, images, CALLERS, 8.0) / one)
    return round(statistics.median(ratios), 3)


def run_callers(detector: Detector, images: list[Image], callers: int, seconds: float) -> float:
    counts = [0] * callers
    end = time.perf_counter() + seconds

    def call(number: int) -> None:
        while time.perf_counter() < end:
            detector(images[counts[number] % len(images)])
            counts[number] += 1

    started = time.perf_counter()
    threads = [threading.Thread(target=call, args=(number,)) for number in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - started)


# --- plain scripts ----------------------------------------------------------------------------------------------------


def plain_onnxruntime(path: Path) -> Callable[[Image], object]:
    """Return a script around onnxruntime with its default settings."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: postprocess(session.run(None, {name: preprocess(image)})[0][0])


def plain_openvino(path: Path) -> Callable[[Image], object]:
    """Return a script around openvino with its default settings."""
    compiled = openvino.Core().compile_model(str(path), "CPU")
    return lambda image: postprocess(compiled(preprocess(image))[0][0])


def preprocess(image: Image, size: int = SIZE) -> np.ndarray:
    scale = size / max(image.shape[:2])
    resized = cv2.resize(image, (round(image.shape[1] * scale), round(image.shape[0] * scale)))
    canvas = np.full((size, size, 3), 114, np.uint8)
    canvas[: resized.shape[0], : resized.shape[1]] = resized
    return np.ascontiguousarray(canvas[:, :, ::-1].transpose(2, 0, 1)[None], dtype=np.float32) / 255


def postprocess(rows: np.ndarray, conf: float = 0.25, iou: float = 0.45) -> list[tuple[int, float, list[float]]]:
    rows = rows[rows[:, 4] > conf]
    scores = rows[:, 5:] * rows[:, 4:5]
    classes, best = scores.argmax(1), scores.max(1)
    boxes = np.concatenate([rows[:, :2] - rows[:, 2:4] / 2, rows[:, 2:4]], axis=1)
    offsets = boxes + classes[:, None] * 7680.0 * np.array([1, 1, 0, 0])
    kept = cv2.dnn.NMSBoxes(offsets.tolist(), best.tolist(), conf, iou)
    return [(int(classes[i]), float(best[i]), boxes[i].tolist()) for i in np.array(kept).reshape(-1)]


if __name__ == "__main__":
    main()
