"""The road over several stations: a checkpoint to a verified ONNX file."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from yolov7_deploy._atomic_file import partial_path
from yolov7_deploy._version import __version__
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.errors import ExportError, ParityError, UsageError
from yolov7_deploy.evaluation.parity import ParityReport, compare, comparison_thresholds, make_artifact
from yolov7_deploy.evaluation.synthetic_image import synthetic_image
from yolov7_deploy.export.onnx_exporter import export_onnx
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.image import Image
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.options import PRECISIONS, ExportOptions, QuantizeOptions
from yolov7_deploy.precision.calibration_images import CalibrationImages
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.runtimes.onnxruntime import OrtRuntime
from yolov7_deploy.runtimes.pytorch import PytorchRuntime
from yolov7_deploy.workflows.quantize import Quantized, Quantizer, Show, silent

logger = logging.getLogger(__name__)

Say = Callable[[str, float], None]

_CALIBRATED_SHOWN = 2  # images an INT8 file is verified on, where none are given


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What an export wrote and how it was checked.

    `parity` is `None` where verification was left out, `quantized` where the file is not INT8.
    """

    path: Path
    metadata: ModelMetadata
    bytes: int
    parity: ParityReport | None
    quantized: Quantized | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Request:
    """What INT8 needs beyond the weights: images to calibrate on, and others with labels if AP shall be known."""

    images: CalibrationImages
    options: QuantizeOptions
    data: Dataset | None = None
    show: Show = silent


def export_weights(
    weights: Path,
    output: Path,
    *,
    options: ExportOptions,
    precision: str = "fp32",
    int8: Int8Request | None = None,
    verify: bool = True,
    images: Sequence[Image] = (),
    say: Say | None = None,
) -> ExportReport:
    """Exports a checkpoint to ONNX and checks the file through ONNX Runtime against torch.

    The file gets its name only after the check: a failed or killed export leaves nothing, and an older file stays.

    Args:
        weights: A checkpoint.
        output: The `.onnx` file to write.
        options: See `ExportOptions`.
        precision: `fp32`, `fp16` or `int8`.
        int8: What `int8` needs.
        verify: Compare stage by stage.
        images: What to compare on, and what half precision is measured on. Where empty: a drawn image, and for INT8
            some of those it was calibrated on.
        say: Called with each finished step and its seconds.

    Raises:
        UsageError: The precision is unknown.
        LoadError: The checkpoint cannot be read.
        ExportError: The graph or file cannot be written.
        ParityError: The file is not the model; the message says at which stage they part.
    """
    if output.suffix != ".onnx":
        raise ExportError(f"{output} is not named like an ONNX file.", fix=f"--output {output.with_suffix('.onnx')}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown.", fix=f"One of: {', '.join(PRECISIONS)}")
    if (precision == "int8") != (int8 is not None):
        raise UsageError(
            f"precision {precision!r} with int8={int8}: INT8 needs images to calibrate on, and nothing else does.",
            fix="precision='int8', int8=Int8Request(images=open_calibration(FOLDER), options=QuantizeOptions())",
        )
    step = _Steps(say)
    checkpoint = load_checkpoint(weights)
    step.done(f"read {weights.name}: {checkpoint.variant}, {len(checkpoint.class_names)} classes")
    model = fuse(build_model(checkpoint))
    step.done("fused BatchNorm, RepConv and implicit knowledge")
    exported = export_onnx(model, replace(checkpoint.metadata, version=__version__), options)
    step.done(f"traced to ONNX opset {options.opset}, nms {options.nms}")
    exported, quantized, images = _lowered(exported, precision, int8, images, step)
    reference = PytorchRuntime(model, checkpoint.metadata) if verify else None
    size, parity = _written(exported, output, reference, images, step)
    return ExportReport(path=output, metadata=exported.metadata, bytes=size, parity=parity, quantized=quantized)


def _written(
    exported: OnnxModel, output: Path, reference: PytorchRuntime | None, images: Sequence[Image], step: _Steps
) -> tuple[int, ParityReport | None]:
    """Writes the file, and gives it its name if it is the reference's model; its size, and the check."""
    partial = partial_path(output)
    try:
        exported.save(partial)
        parity = None
        if reference is not None:
            parity = _verified(reference, partial, exported.metadata, images)
            step.done(f"verified against torch on {parity.images} image{'s' * (parity.images > 1)}")
        size = partial.stat().st_size
        partial.replace(output)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return size, parity


def _lowered(
    exported: OnnxModel, precision: str, int8: Int8Request | None, images: Sequence[Image], step: _Steps
) -> tuple[OnnxModel, Quantized | None, Sequence[Image]]:
    """The graph in its precision, how INT8 came about, and the images to verify it on."""
    quantized = None
    if int8 is not None:
        quantized = Quantizer(exported, int8.images, int8.options, data=int8.data, say=step.done, show=int8.show).run()
        images = images or list(islice(int8.images, _CALIBRATED_SHOWN))
    images = images or [synthetic_image(exported.metadata.default_hw)]
    if precision == "fp16":
        return _in_half(exported, images, step), None, images
    return (exported if quantized is None else quantized.model), quantized, images


def _in_half(exported: OnnxModel, images: Sequence[Image], step: _Steps) -> OnnxModel:
    half = to_fp16(exported, images)
    step.done("; ".join(half.metadata.notes[len(exported.metadata.notes) :]))
    return half


def _verified(reference: PytorchRuntime, path: Path, metadata: ModelMetadata, images: Sequence[Image]) -> ParityReport:
    input_hw = metadata.default_hw
    runtime = OrtRuntime.open(path, device="cpu", input_hw=None)
    parity = compare(
        make_artifact("torch", reference, None, input_hw=input_hw),
        make_artifact("ONNX Runtime", runtime, path, input_hw=input_hw),
        images,
        thresholds=comparison_thresholds(metadata),
    )
    if parity.first_failure is not None:
        lost = parity.first_failure
        raise ParityError(
            f"The exported file is not the model: at the stage {lost.stage!r} it differs by {lost.differences} "
            f"(allowed {lost.limits}). No file was written.",
            fix=_remedy(metadata.precision),
        )
    return parity


def _remedy(precision: str) -> str:
    if precision == "int8":
        return "Calibrate on more images like those to come, or keep layers float:  --data D.yaml --max-drop 0.3"
    if precision == "fp16":
        return "Try  --precision fp32, or images of your own:  --image FILE; --no-verify writes it all the same."
    return "Try  --no-simplify, another --opset, or another onnxruntime; --no-verify writes it all the same."


class _Steps:
    """Tells how long each step took."""

    def __init__(self, say: Say | None) -> None:
        self._say, self._started = say, time.perf_counter()

    def done(self, what: str) -> None:
        seconds = time.perf_counter() - self._started
        logger.info("%s (%.1f s)", what, seconds)
        if self._say:
            self._say(what, seconds)
        self._started = time.perf_counter()
