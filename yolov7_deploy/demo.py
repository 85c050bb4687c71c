"""The main job from end to end without a network: a checkpoint becomes a verified ONNX file that finds a stop sign."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from yolov7_deploy.checkpoint import Checkpoint, save_checkpoint
from yolov7_deploy.coco_names import COCO_NAMES
from yolov7_deploy.detections import Detections
from yolov7_deploy.detector import Detector
from yolov7_deploy.draw import write_picture
from yolov7_deploy.errors import UsageError
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.pipeline import export_weights

Say = Callable[[str], None]
FloatArray = npt.NDArray[np.float32]

UNTRAINED_VARIANT = "yolov7-tiny"
UNTRAINED_MAX_DET = 10  # boxes of a network of random numbers: enough to see that they are drawn
UNTRAINED_NOTE = (
    "   No trained weights were found, so this network is made of fixed random numbers. Every step and every\n"
    "   check is the real one, but the boxes MEAN NOTHING until you give trained weights:\n"
    "       y7 demo --weights yolov7.pt"
)
NOTHING_NOTE = "   Nothing found in the drawn street (it has a stop sign). With a picture of yours:  --source photo.jpg"

PICTURE_HW = (480, 640)
SKY, HORIZON_HAZE = (235, 200, 150), (175, 180, 190)  # blue, green, red
GRASS, ROAD, PAINT, STEEL, RED, WHITE = (
    (60, 120, 80),
    (95, 92, 90),
    (210, 215, 220),
    (150, 150, 150),
    (40, 30, 185),
    (240, 240, 240),
)
STOP = (
    "01110 11111 01110 11110",
    "10001 00100 10001 10001",
    "10000 00100 10001 10001",
    "01110 00100 10001 11110",
    "00001 00100 10001 10000",
    "10001 00100 10001 10000",
    "01110 00100 01110 10000",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """What the demo made: the checkpoint it started from, the verified file, the drawn picture and what is in it.

    `trained` is False where the weights were generated and the detections mean nothing.
    """

    weights: Path
    trained: bool
    onnx: Path
    drawn: Path
    detections: Detections


def run_demo(*, save_dir: Path, say: Say, weights: Path | None = None, source: Path | None = None) -> DemoReport:
    """Exports, verifies and runs a checkpoint, and explains each step as it goes. The network is not asked.

    Args:
        save_dir: Folder for everything it writes.
        say: Called with each line of the explanation.
        weights: A checkpoint; a small untrained network is generated where it is left out.
        source: A picture; a street with a stop sign is drawn where it is left out.

    Raises:
        Y7Error: Any error of the stations on the way; nothing is caught here.
    """
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{save_dir} cannot be made: {error.strerror or error}.", fix="Choose another folder:  --save-dir DIR"
        ) from error
    picture, drawn = _picture(source, save_dir)
    image = read_image(picture)
    trained = weights is not None
    if weights is None:
        weights = save_dir / f"untrained-{UNTRAINED_VARIANT}.safetensors"
        save_checkpoint(untrained_checkpoint(), weights)
    say(f"1  The checkpoint: {weights}")
    if not trained:
        say(UNTRAINED_NOTE)
    onnx = save_dir / f"{weights.stem}.onnx"
    _export(weights, onnx, say)
    say(f"3  Detections in {picture}")
    detections = _detect(onnx, image, drawn, trained=trained, say=say)
    if trained and source is None and not len(detections):
        say(NOTHING_NOTE)
    say(_next_commands(weights, onnx))
    return DemoReport(weights=weights, trained=trained, onnx=onnx, drawn=drawn, detections=detections)


def _export(weights: Path, onnx: Path, say: Say) -> None:
    say(f"2  One ONNX file with suppression inside: {onnx}")
    report = export_weights(
        weights, onnx, options=ExportOptions(), say=lambda what, seconds: say(f"   {seconds:6.2f} s  {what}")
    )
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


def _detect(onnx: Path, image: Image, drawn: Path, *, trained: bool, say: Say) -> Detections:
    with Detector(onnx) as detector:
        detector.warmup()
        found = detector(image, max_det=None if trained else UNTRAINED_MAX_DET)
        device = detector.device
    speed = found.speed
    say(
        f"   on {device}: {speed.preprocess_ms:.1f} ms preprocess, {speed.inference_ms:.1f} ms inference, "
        f"{speed.postprocess_ms:.1f} ms postprocess"
    )
    say(f"   {found.describe()}" if trained else f"   {len(found)} boxes that mean nothing")
    found.save(drawn, image)
    say(f"   drawn: {drawn}")
    return found


def _next_commands(weights: Path, onnx: Path) -> str:
    commands = {
        f"y7 detect --weights {onnx} --source FOLDER": "your pictures, videos, cameras",
        f"y7 val --weights {onnx} --data DATA.yaml": "its accuracy on your labels",
        f"y7 export --weights {weights} --help": "other sizes, batches, thresholds",
        "y7 doctor": "what this machine can run",
    }
    width = max(map(len, commands))
    return "\n".join(["Next:", *(f"   {command:{width}}   {why}" for command, why in commands.items())])


def untrained_checkpoint() -> Checkpoint:
    """YOLOv7-tiny with fixed random convolutions: the same numbers everywhere, and meaningless.

    Uniform weights within sqrt(6 / fan_in) keep the spread of the signal from layer to layer, so that the scores are
    neither all zero nor all one.
    """
    model = new_model(UNTRAINED_VARIANT)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        values = tensor.numpy()  # the tensor's own memory
        if values.ndim == 4:
            noise = np.random.default_rng(zlib.crc32(name.encode())).random(values.shape, dtype=np.float32)
            values[...] = (2 * noise - 1) * math.sqrt(6 / math.prod(values.shape[1:]))
        elif name.endswith(".bias"):
            values[...] = 0
    return Checkpoint(
        tensors=dict(tensors),
        variant=UNTRAINED_VARIANT,
        training=False,
        class_names=COCO_NAMES,
        anchors=model.anchors,
        source="untrained",
    )


def street() -> Image:
    """A drawn street with a stop sign, the same pixels everywhere; the official weights recognise it."""
    height, width = PICTURE_HW
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    picture = np.empty((height, width, 3), dtype=np.float32)
    picture[:] = SKY + (y / height)[..., None] * (np.array(HORIZON_HAZE, dtype=np.float32) - SKY)
    _draw_ground(picture, y, x)
    _draw_sign(picture, y, x, centre=(0.36 * height, 0.3 * width), radius=0.15 * height)
    grain = np.random.default_rng(3).normal(0, 6, (height, width, 1))
    return (picture + grain).clip(0, 255).astype(np.uint8)


def _draw_ground(picture: FloatArray, y: FloatArray, x: FloatArray) -> None:
    """Grass, and a road with a dashed line that runs to the horizon."""
    height, width = PICTURE_HW
    horizon = 0.62 * height
    near = (y - horizon) / (height - horizon)  # 0 at the horizon, 1 at the lower edge
    off_centre = np.abs(x - 0.62 * width) / width
    below = near > 0
    picture[below] = GRASS
    picture[below & (off_centre < 0.04 + 0.55 * near)] = ROAD
    picture[below & (off_centre < 0.003 + 0.015 * near) & ((12 * near).astype(int) % 2 == 0)] = PAINT


def _draw_sign(
    picture: FloatArray, y: FloatArray, x: FloatArray, *, centre: tuple[float, float], radius: float
) -> None:
    """A red octagon with a white rim and four letters, on a post."""
    dy, dx = np.abs(y - centre[0]), np.abs(x - centre[1])
    picture[(dx < 0.08 * radius) & (y > centre[0]) & (y < centre[0] + 3.8 * radius)] = STEEL
    for size, colour in ((radius, WHITE), (0.93 * radius, RED)):
        picture[(np.maximum(dx, dy) < size) & (dx + dy < size * math.sqrt(2))] = colour
    dots = np.array([[int(dot) for dot in row.replace(" ", "0")] for row in STOP])
    dot = int(1.5 * radius / dots.shape[1])
    letters = np.kron(dots, np.ones((round(1.3 * dot), dot))) > 0
    top, left = int(centre[0] - letters.shape[0] / 2), int(centre[1] - letters.shape[1] / 2)
    picture[top : top + letters.shape[0], left : left + letters.shape[1]][letters] = WHITE
