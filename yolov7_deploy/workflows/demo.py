"""Demonstration of the whole pipeline: export, verification, accuracy, speed and detections on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._console import table
from yolov7_deploy.benchmarking.benchmark import measure_speed, read_frames
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import UsageError
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.evaluation.synthetic_image import street_scene
from yolov7_deploy.hardware.machine import find_int8_target
from yolov7_deploy.hub import SHAPES_WEIGHTS, bundled_weights
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.options import BenchOptions, ExportOptions, Int8Options, QuantizeOptions, ValOptions
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.export import ExportReport, Int8Request, export_weights

Log = Callable[[str], None]

# The images have another seed than the training images.
SEED, CALIBRATION_IMAGES, EVALUATION_IMAGES, IMAGE_SIZE = 1, 100, 100, 320
DETECTED_IMAGE = 3  # index of the image with drawn detections
VERIFIED_IMAGES = 4
PRECISIONS = ("fp32", "fp16", "int8")
SPEED = BenchOptions(duration_s=1.5, warmup_s=1.5)
FP16_IS_SLOW = "FP16 is for GPUs: most CPUs compute it no faster than FP32, and converting to and from it takes time."
NO_DETECTIONS = "   This model did not detect the stop sign. Pass an image of your own:  --source photo.jpg"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """Results of `run_demo`: the checkpoint, the verified file, the annotated image and its detections."""

    weights: Path
    onnx: Path
    annotated: Path
    detections: Detections


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapesReport:
    """Results of `run_shapes_demo`.

    Attributes:
        weights: The checkpoint.
        files: ONNX file of each precision.
        aps: AP of the artifacts `torch`, `fp32`, `fp16` and `int8` on images that were not used in training.
        speeds: Images per second of each file, including pre- and postprocessing, at batch 1.
        annotated: The annotated image.
        detections: Its detections.
    """

    weights: Path
    files: Mapping[str, Path]
    aps: Mapping[str, float]
    speeds: Mapping[str, float]
    annotated: Path
    detections: Detections


# --- any checkpoint ---------------------------------------------------------------------------------------------------


def run_demo(*, save_dir: Path, log: Log, weights: Path, source: Path | None = None) -> DemoReport:
    """Export, verify and run a checkpoint, and explain each step.

    Args:
        save_dir: Output folder.
        log: Called with each line of text.
        weights: A checkpoint.
        source: An image; by default a synthetic street scene with a stop sign.

    Raises:
        Y7Error: A step failed.
    """
    _create_folder(save_dir)
    path = source if source is not None else _write_street_scene(save_dir)
    image = read_image(path)  # before any long step
    log(f"1  Checkpoint: {weights}")
    onnx = save_dir / f"{weights.stem}.onnx"
    log(f"2  Export to one ONNX file with NMS inside, verified against PyTorch: {onnx}")
    report = export_weights(weights, onnx, options=ExportOptions(), log=_step_log(log))
    _log_export(report, log)
    log(f"3  Detections in {path}")
    with Detector(onnx) as detector:
        detector.warmup()
        detections = detector(image)
        device = detector.device
    speed = detections.speed
    log(
        f"   on {device}: {speed.preprocess_ms:.1f} ms preprocess, {speed.inference_ms:.1f} ms inference, "
        f"{speed.postprocess_ms:.1f} ms postprocess"
    )
    annotated = save_dir / f"{path.stem}-detected.png"
    _log_detections(detections, image, annotated, log)
    if source is None and not len(detections):
        log(NO_DETECTIONS)
    log(
        _next_commands(
            {
                f"y7 detect --weights {onnx} --source FOLDER": "your images, videos, cameras",
                f"y7 val --weights {onnx} --data DATA.yaml": "AP on your dataset",
                f"y7 export --weights {weights} --help": "other sizes, batches, thresholds, precisions",
                "y7 doctor": "what this machine can run",
            }
        )
    )
    return DemoReport(weights=weights, onnx=onnx, annotated=annotated, detections=detections)


def _write_street_scene(save_dir: Path) -> Path:
    path = save_dir / "street.png"
    write_image(path, street_scene())
    return path


# --- the shapes network -----------------------------------------------------------------------------------------------


def run_shapes_demo(*, save_dir: Path, log: Log) -> ShapesReport:
    """Export the small network of this package in three precisions, verify, evaluate and run them; explain each step.

    Args:
        save_dir: Output folder.
        log: Called with each line of text.

    Raises:
        Y7Error: A step failed.
    """
    _create_folder(save_dir)
    weights = bundled_weights()
    log(f"1  Checkpoint: {weights}")
    log("   a yolov7-tiny that  y7 train  trained to detect six kinds of shapes")
    folder = save_dir / "shapes"
    data = write_shapes(folder, train=CALIBRATION_IMAGES, val=EVALUATION_IMAGES, size=IMAGE_SIZE, seed=SEED)
    log(f"   {CALIBRATION_IMAGES} images for calibration and {EVALUATION_IMAGES} for evaluation, generated in {folder}")
    log("2  Export to ONNX files with NMS inside, each verified against PyTorch stage by stage")
    files = {precision: _export(weights, precision, folder, save_dir, log) for precision in PRECISIONS}
    log(f"3  AP on the {EVALUATION_IMAGES} images, and speed of one image at a time, on this machine")
    dataset = open_dataset(data, split="val")
    path = dataset.path(DETECTED_IMAGE)
    aps = {"torch": _measure_ap(weights, dataset)} | {name: _measure_ap(file, dataset) for name, file in files.items()}
    speeds = {name: _measure_speed(file, path) for name, file in files.items()}
    log(_results_text(weights, files, aps, speeds))
    log(f"4  Detections of the INT8 file in {path}")
    image = read_image(path)
    with Detector(files["int8"]) as detector:
        detections = detector(image)
    annotated = save_dir / "shapes-detected.png"
    _log_detections(detections, image, annotated, log)
    log(
        _next_commands(
            {
                "y7 demo --weights yolov7": "this demo with the official weights (found locally, or downloaded)",
                f"y7 detect --weights {files['fp32']} --source {folder / 'images' / 'val'}": "detections in all images",
                f"y7 bench --weights {files['fp32']} --concurrency 1,2": "latency of every stage, and throughput",
                f"y7 train --data {data} --variant yolov7-tiny --img 416": "train a network like this one",
                "y7 doctor": "what this machine can run",
            }
        )
    )
    return ShapesReport(
        weights=weights, files=files, aps=aps, speeds=speeds, annotated=annotated, detections=detections
    )


def _export(weights: Path, precision: str, folder: Path, save_dir: Path, log: Log) -> Path:
    """Export one precision, and return the verified file."""
    path = save_dir / f"{SHAPES_WEIGHTS}-{precision}.onnx"
    log(f"   {precision.upper()}: {path}")
    training_images = folder / "images" / "train"
    int8 = None
    if precision == "int8":
        options = QuantizeOptions(int8=Int8Options(target=find_int8_target()), cache=save_dir / "calibration.npz")
        int8 = Int8Request(images=open_calibration(training_images), options=options)
    report = export_weights(
        weights,
        path,
        options=ExportOptions(),
        precision=precision,
        int8=int8,
        images=[] if int8 else [read_image(file) for file in sorted(training_images.iterdir())[:VERIFIED_IMAGES]],
        log=_step_log(log),
    )
    _log_export(report, log)
    return path


def _measure_ap(path: Path, dataset: Dataset) -> float:
    with Detector(path, device="cpu") as detector:
        return evaluate(detector, dataset, options=ValOptions(rect=False)).ap or 0.0


def _measure_speed(path: Path, image: Path) -> float:
    with Detector(path) as detector:
        return measure_speed(detector, read_frames(image), options=SPEED).rows[0].images_per_second


def _results_text(
    weights: Path, files: Mapping[str, Path], aps: Mapping[str, float], speeds: Mapping[str, float]
) -> str:
    rows = [["torch", f"{aps['torch']:.4f}", f"{weights.stat().st_size / 1e6:.1f}", None]]
    rows += [
        [name, f"{aps[name]:.4f}", f"{path.stat().st_size / 1e6:.1f}", f"{speeds[name]:.1f}"]
        for name, path in files.items()
    ]
    text = table(rows, ["artifact", "AP", "MB", "images/s"])
    return f"{text}\n{FP16_IS_SLOW}" if speeds["fp16"] < speeds["fp32"] else text


# --- both -------------------------------------------------------------------------------------------------------------


def _create_folder(save_dir: Path) -> None:
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{save_dir} cannot be created: {error.strerror or error}.", fix="Choose another folder:  --save-dir DIR"
        ) from error


def _step_log(log: Log) -> Callable[[str, float], None]:
    """Return a function that logs a finished step with its duration."""
    return lambda step, seconds: log(f"   {seconds:6.2f} s  {step}")


def _log_export(report: ExportReport, log: Log) -> None:
    """Log the largest difference from PyTorch at each stage, and the file size."""
    if report.parity is not None:
        for stage in report.parity.stages:
            differences = ", ".join(f"{name} {value:.2g}" for name, value in stage.differences.items())
            log(f"             largest differences of {stage.stage}: {differences}")
        if not report.parity.verified:
            log(f"             {report.parity.not_verified_reason}")
    log(f"             file size {report.bytes / 1e6:.1f} MB")


def _log_detections(detections: Detections, image: Image, annotated: Path, log: Log) -> None:
    log(f"   {detections.describe()}")
    detections.save(annotated, image)
    log(f"   drawn in {annotated}")


def _next_commands(commands: Mapping[str, str]) -> str:
    """Return a list of commands with their purpose."""
    width = max(map(len, commands))
    return "\n".join(["Next:", *(f"   {command:{width}}   {purpose}" for command, purpose in commands.items())])
