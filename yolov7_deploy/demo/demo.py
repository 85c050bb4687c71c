"""A checkpoint becomes a verified ONNX file that finds something in a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from yolov7_deploy.demo.street import street
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.draw import write_picture
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.pipeline import ExportReport, export_weights

Say = Callable[[str], None]

NOTHING_NOTE = "   Nothing found in the drawn street (it has a stop sign). With a picture of yours:  --source photo.jpg"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """What the demo made: the checkpoint it started from, the verified file, the drawn picture and what is in it."""

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
        source: A picture; a street with a stop sign is drawn where it is left out.

    Raises:
        Y7Error: Any error of the stations on the way; nothing is caught here.
    """
    make_folder(save_dir)
    picture, drawn = _picture(source, save_dir)
    image = read_image(picture)
    say(f"1  The checkpoint: {weights}")
    onnx = save_dir / f"{weights.stem}.onnx"
    say(f"2  One ONNX file with suppression inside: {onnx}")
    explain_export(
        export_weights(weights, onnx, options=ExportOptions(), say=lambda what, seconds: step(say, what, seconds)), say
    )
    say(f"3  Detections in {picture}")
    detections = _detect(onnx, image, drawn, say=say)
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


def _picture(source: Path | None, save_dir: Path) -> tuple[Path, Path]:
    """The picture to look at, and where the drawn one goes."""
    if source is not None:
        return source, save_dir / f"{source.stem}-detected.png"
    path = save_dir / "street.png"
    write_picture(path, street())
    return path, save_dir / "street-detected.png"


def _detect(onnx: Path, image: Image, drawn: Path, *, say: Say) -> Detections:
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
        f"y7 detect --weights {onnx} --source FOLDER": "your pictures, videos, cameras",
        f"y7 val --weights {onnx} --data DATA.yaml": "its accuracy on your labels",
        f"y7 export --weights {weights} --help": "other sizes, batches, thresholds",
        "y7 doctor": "what this machine can run",
    }
    width = max(map(len, commands))
    return "\n".join(["Next:", *(f"   {command:{width}}   {why}" for command, why in commands.items())])
