"""The whole road with the trained network that comes along: FP32, FP16 and INT8 files whose AP is measured here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy._console import table
from yolov7_deploy.benchmark.benchmark import measure_speed
from yolov7_deploy.benchmark.inputs import read_frames
from yolov7_deploy.datasets import Dataset, open_dataset
from yolov7_deploy.datasets.synthetic import write_shapes
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import UsageError
from yolov7_deploy.evaluation.accuracy import evaluate
from yolov7_deploy.evaluation.synthetic_image import street
from yolov7_deploy.hub import SHAPES_WEIGHTS, shipped_weights
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.options import BenchOptions, ExportOptions, QuantizeOptions, ValOptions
from yolov7_deploy.precision.calibration_images import open_calibration
from yolov7_deploy.visualize import write_image
from yolov7_deploy.workflows.export import ExportReport, Int8Request, export_weights

Say = Callable[[str], None]

NOTHING_NOTE = "   Nothing found in the drawn street (it has a stop sign). With an image of yours:  --source photo.jpg"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """What the demo made: the checkpoint it started from, the verified file, the drawn image and what is in it."""

    weights: Path
    onnx: Path
    drawn: Path
    detections: Detections


def run_demo(*, save_dir: Path, say: Say, weights: Path, source: Path | None = None) -> DemoReport:
    """Exports, verifies and runs a checkpoint, and explains each step as it goes. The network is not asked.

    Args:
        save_dir: Folder for everything it writes.
        say: Called with each line of the explanation.
        weights: A checkpoint.
        source: An image; a street with a stop sign is drawn where it is left out.

    Raises:
        Y7Error: Any error of the stations on the way; nothing is caught here.
    """
    make_folder(save_dir)
    path, drawn = _image(source, save_dir)
    image = read_image(path)
    say(f"1  The checkpoint: {weights}")
    onnx = save_dir / f"{weights.stem}.onnx"
    say(f"2  One ONNX file with NMS inside: {onnx}")
    explain_export(
        export_weights(weights, onnx, options=ExportOptions(), say=lambda what, seconds: step(say, what, seconds)), say
    )
    say(f"3  Detections in {path}")
    detections = _detect_street(onnx, image, drawn, say=say)
    if source is None and not len(detections):
        say(NOTHING_NOTE)
    say(next_commands(weights, onnx))
    return DemoReport(weights=weights, onnx=onnx, drawn=drawn, detections=detections)


def make_folder(save_dir: Path) -> None:
    """The folder that everything is written to.

    Raises:
        UsageError: It cannot be made.
    """
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{save_dir} cannot be made: {error.strerror or error}.", fix="Choose another folder:  --save-dir DIR"
        ) from error


def step(say: Say, what: str, seconds: float) -> None:
    """A line for something that took time."""
    say(f"   {seconds:6.2f} s  {what}")


def explain_export(report: ExportReport, say: Say) -> None:
    """What was compared with the network it came from, and how large the file is."""
    if report.parity is not None:
        for stage in report.parity.stages:
            found = ", ".join(f"{name} {value:.2g}" for name, value in sorted(stage.differences.items()))
            say(f"   same {stage.stage}: largest difference {found}")
    say(f"   {report.bytes / 1e6:.1f} MB")


def _image(source: Path | None, save_dir: Path) -> tuple[Path, Path]:
    """The image to look at, and where the drawn one goes."""
    if source is not None:
        return source, save_dir / f"{source.stem}-detected.png"
    path = save_dir / "street.png"
    write_image(path, street())
    return path, save_dir / "street-detected.png"


def _detect_street(onnx: Path, image: Image, drawn: Path, *, say: Say) -> Detections:
    with Detector(onnx) as detector:
        detector.warmup()
        found = detector(image)
        device = detector.device
    speed = found.speed
    say(
        f"   on {device}: {speed.preprocess_ms:.1f} ms preprocess, {speed.inference_ms:.1f} ms inference, "
        f"{speed.postprocess_ms:.1f} ms postprocess"
    )
    say(f"   {found.describe()}")
    found.save(drawn, image)
    say(f"   drawn: {drawn}")
    return found


def next_commands(weights: Path, onnx: Path) -> str:
    """What to type next."""
    commands = {
        f"y7 detect --weights {onnx} --source FOLDER": "your images, videos, cameras",
        f"y7 val --weights {onnx} --data DATA.yaml": "its accuracy on your labels",
        f"y7 export --weights {weights} --help": "other sizes, batches, thresholds",
        "y7 doctor": "what this machine can run",
    }
    width = max(map(len, commands))
    return "\n".join(["Next:", *(f"   {command:{width}}   {why}" for command, why in commands.items())])


# Images of another seed than those it was trained on: none of them was ever seen.
SEED, CALIBRATION, JUDGES, IMAGE_SIDE = 1, 100, 100, 320
INPUT_HW = (416, 416)  # as it was trained
LOOKED_AT = 3  # the image that detections are drawn in
PRECISIONS = ("fp32", "fp16", "int8")
SPEED = BenchOptions(duration_s=1.5, warmup_s=1.5)
PLAIN = ValOptions(rect=False)
HALF_IS_SLOW = "fp16 is for GPUs: most processors compute it no faster than float32, and convert to and fro besides"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapesReport:
    """What the demo made and measured.

    Attributes:
        weights: The trained checkpoint.
        files: The ONNX file of each precision.
        aps: AP of each form on images it never saw: `torch`, `fp32`, `fp16`, `int8`.
        speeds: Images per second of each file, end to end, one at a time.
        drawn: The drawn image.
        detections: What is in it.
    """

    weights: Path
    files: Mapping[str, Path]
    aps: Mapping[str, float]
    speeds: Mapping[str, float]
    drawn: Path
    detections: Detections


def run_shapes_demo(*, save_dir: Path, say: Say) -> ShapesReport:
    """Exports the shipped network in three precisions, verifies, measures, detects; explains each step as it goes.

    Args:
        save_dir: Folder for everything it writes.
        say: Called with each line of the explanation.

    Raises:
        Y7Error: Any error of the stations on the way; nothing is caught here.
    """
    make_folder(save_dir)
    weights = shipped_weights()
    say(f"1  The checkpoint: {SHAPES_WEIGHTS}, trained by  y7 train  to find six kinds of shapes")
    say(f"   {weights}")
    folder = save_dir / "shapes"
    data = write_shapes(folder, train=CALIBRATION, val=JUDGES, size=IMAGE_SIDE, seed=SEED)
    say(f"   {CALIBRATION} generated images to calibrate on, {JUDGES} others to judge by, none seen in training")
    files = {precision: _exported(weights, precision, folder, save_dir, say) for precision in PRECISIONS}
    say(f"3  Accuracy and speed on this machine, by the shipped path ({JUDGES} images, then one at a time)")
    dataset = open_dataset(data, split="val")
    aps = {"torch": _ap(weights, dataset)} | {precision: _ap(path, dataset) for precision, path in files.items()}
    speeds = {precision: _speed(path, dataset.path(LOOKED_AT)) for precision, path in files.items()}
    say(_told(weights, files, aps, speeds))
    drawn = save_dir / "shapes-detected.png"
    detections = _detect(files["int8"], dataset.path(LOOKED_AT), drawn, say)
    say(_next(data, files))
    return ShapesReport(weights=weights, files=files, aps=aps, speeds=speeds, drawn=drawn, detections=detections)


def _exported(weights: Path, precision: str, folder: Path, save_dir: Path, say: Say) -> Path:
    """The verified file of one precision."""
    path = save_dir / f"{SHAPES_WEIGHTS}-{precision}.onnx"
    say(f"2  {precision.upper()}: {path}")
    int8 = None
    if precision == "int8":
        images = open_calibration(folder / "images" / "train")
        options = QuantizeOptions(cache=save_dir / "calibration.npz")
        int8 = Int8Request(images=images, options=options)
    report = export_weights(
        weights,
        path,
        options=ExportOptions(input_hw=INPUT_HW),
        precision=precision,
        int8=int8,
        images=[] if int8 else [read_image(file) for file in sorted((folder / "images" / "train").iterdir())[:4]],
        say=lambda what, seconds: step(say, what, seconds),
    )
    explain_export(report, say)
    return path


def _ap(path: Path, dataset: Dataset) -> float:
    with Detector(path, device="cpu", img=INPUT_HW) as detector:
        return evaluate(detector, dataset, options=PLAIN).ap or 0.0


def _speed(path: Path, image: Path) -> float:
    with Detector(path) as detector:
        return measure_speed(detector, read_frames(image), options=SPEED).rows[0].images_per_second


def _told(weights: Path, files: Mapping[str, Path], aps: Mapping[str, float], speeds: Mapping[str, float]) -> str:
    rows = [["torch", f"{aps['torch']:.4f}", f"{weights.stat().st_size / 1e6:.1f}", None]]
    rows += [
        [name, f"{aps[name]:.4f}", f"{path.stat().st_size / 1e6:.1f}", f"{speeds[name]:.1f}"]
        for name, path in files.items()
    ]
    words = table(rows, ["form", "AP", "MB", "images/s"])
    if speeds["fp16"] < speeds["fp32"]:
        words += f"\n{HALF_IS_SLOW}"
    return words


def _detect(onnx: Path, path: Path, drawn: Path, say: Say) -> Detections:
    image = read_image(path)
    with Detector(onnx) as detector:
        found = detector(image)
    say(f"4  Detections of the INT8 file in {path}")
    say(f"   {found.describe()}")
    found.save(drawn, image)
    say(f"   drawn: {drawn}")
    return found


def _next(data: Path, files: Mapping[str, Path]) -> str:
    commands = {
        "y7 demo --weights yolov7": "the same with the official weights (found here, or downloaded)",
        f"y7 detect --weights {files['fp32']} --source {data.parent / 'images' / 'val'}": "more of these images",
        f"y7 bench --weights {files['fp32']} --threads 1,2": "every span of a call",
        f"y7 train --data {data} --variant yolov7-tiny --img 416": "train a network of your own",
        "y7 doctor": "what this machine can run",
    }
    width = max(map(len, commands))
    return "\n".join(["Next:", *(f"   {command:{width}}   {why}" for command, why in commands.items())])
