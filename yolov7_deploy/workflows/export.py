"""Export pipeline: from a checkpoint to a verified ONNX file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy._text import get_logger
from yolov7_deploy._version import __version__
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.checkpoint.loader import load_quantization
from yolov7_deploy.checkpoint.quantization import TrainedQuantization
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.errors import ExportError, ParityError, UsageError, Y7Error
from yolov7_deploy.evaluation.parity import (
    Artifact,
    ParityReport,
    StageMemory,
    compare,
    comparison_thresholds,
    make_artifact,
)
from yolov7_deploy.evaluation.synthetic_image import synthetic_image
from yolov7_deploy.hardware.system import free_host_memory
from yolov7_deploy.image import Image
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import PRECISIONS, EngineOptions, ExportOptions, QuantizeOptions
from yolov7_deploy.precision.calibration_images import CalibrationImages
from yolov7_deploy.precision.fake_quantize import load_fake_quantized
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.qat import to_trained_int8
from yolov7_deploy.runtimes.base import installed_runtimes, open_runtime
from yolov7_deploy.runtimes.pytorch import PytorchRuntime
from yolov7_deploy.tensorrt.builder import BuildCallbacks, EngineReport, build_file, find_tensorrt
from yolov7_deploy.workflows.quantize import Quantized, Quantizer, Show, silent

logger = get_logger(__name__)

Log = Callable[[str, float], None]

# Free memory for opening a file in ONNX Runtime and OpenVINO at the same time, in sizes of the file; `yolov7` took 16.
_OPENING_MEMORY = 24
_VERIFIED_CALIBRATION_IMAGES = 2  # images an INT8 file is verified on by default


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """Result of an export.

    Attributes:
        path: The ONNX file.
        metadata: Its metadata.
        bytes: Its size.
        parity: Result of the verification; `None` if it was skipped. Without any detection to compare, it is not
            `verified`.
        quantized: Result of the quantization; `None` unless the file is INT8.
        engine: The TensorRT engine that was built from the file, and its record; `None` without one.
    """

    path: Path
    metadata: ModelMetadata
    bytes: int
    parity: ParityReport | None
    quantized: Quantized | None = field(default=None, repr=False)
    engine: EngineReport | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Request:
    """Inputs of an INT8 export besides the weights.

    Attributes:
        images: Calibration images.
        options: Options of the quantization.
        data: Labelled images on which to measure AP; `None` measures none.
        show: Opens a progress display for a step.
    """

    images: CalibrationImages
    options: QuantizeOptions
    data: Dataset | None = None
    show: Show = silent


def default_output(weights: str, path: Path, precision: str) -> Path:
    """Return `NAME.onnx` or `NAME-PRECISION.onnx` in the working directory.

    Args:
        weights: The weights as they were requested; an official name is the file's name.
        path: The file of the weights.
        precision: `fp32`, `fp16` or `int8`.
    """
    stem = path.stem if Path(weights).suffix else weights
    return Path(f"{stem}.onnx" if precision == "fp32" else f"{stem}-{precision}.onnx")


def engine_builder(options: EngineOptions, callbacks: BuildCallbacks | None = None) -> Callable[[Path], EngineReport]:
    """Return a function that builds `NAME.engine` from `NAME.onnx`; TensorRT is found now, before the long work.

    Raises:
        MissingLibraryError: TensorRT is not installed.
        EngineError: It cannot build on this machine.
    """
    installation = find_tensorrt(options)
    return lambda path: build_file(
        path, path.with_suffix(".engine"), options=options, installation=installation, callbacks=callbacks
    )


def export_weights(
    weights: Path,
    output: Path,
    *,
    options: ExportOptions,
    precision: str = "fp32",
    int8: Int8Request | None = None,
    verify: bool = True,
    images: Sequence[Image] = (),
    log: Log | None = None,
) -> ExportReport:
    """Export a checkpoint to ONNX and verify the file in every installed runtime against PyTorch.

    The file gets its name only after the verification: a failed or killed export leaves nothing, and an existing file
    stays.

    Args:
        weights: A checkpoint.
        output: The `.onnx` file to write.
        options: Options of the graph.
        precision: `fp32`, `fp16` or `int8`.
        int8: Inputs of the quantization, required by and only for `int8`, except for weights that were trained for
            INT8: these have everything.
        verify: Compare the file with PyTorch stage by stage.
        images: Images for the verification and the range check of FP16. By default a synthetic image, and for INT8
            some of the calibration images.
        log: Called with each finished step and its duration in seconds.

    Raises:
        UsageError: The precision is unknown, or `int8` does not fit it.
        LoadError: The checkpoint cannot be read.
        ExportError: The graph or file cannot be written.
        ParityError: The file differs from the model; the message names the first stage that does.
    """
    if output.suffix != ".onnx":
        raise ExportError(f"{output} does not end in .onnx.", fix=f"--output {output.with_suffix('.onnx')}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r} is unknown.", fix=f"One of: {', '.join(PRECISIONS)}")
    trained = load_quantization(weights)
    if trained is not None:
        _check_trained(weights, precision, int8)
    elif (precision == "int8") != (int8 is not None):
        raise UsageError(
            f"precision {precision!r} with int8={int8}: INT8 requires calibration images, other precisions take none.",
            fix="precision='int8', int8=Int8Request(images=open_calibration(FOLDER), options=QuantizeOptions())",
        )
    steps = _StepTimer(log)
    checkpoint = load_checkpoint(weights)
    steps.done(f"read {weights.name}: {checkpoint.variant}, {len(checkpoint.class_names)} classes")
    model = build_model(checkpoint)
    if trained is None:
        model = fuse(model)
        steps.done("fused BatchNorm, RepConv and implicit knowledge")
    options = limit_detections(options, checkpoint.metadata)
    exported = export_onnx(model, replace(checkpoint.metadata, version=__version__), options)
    steps.done(f"traced to ONNX opset {options.opset}, nms {options.nms}")
    if trained is None:
        exported, quantized, images = _convert(exported, precision, int8, images, steps)
    else:
        exported, quantized = _convert_trained(exported, trained, steps), None
        images = images or [synthetic_image(exported.metadata.default_hw)]
        model = load_fake_quantized(checkpoint)
    reference = PytorchRuntime(model, checkpoint.metadata) if verify else None
    size, parity = _write(exported, output, reference, images, steps)
    return ExportReport(path=output, metadata=exported.metadata, bytes=size, parity=parity, quantized=quantized)


def trained_for_int8(
    weights: Path,
    *,
    calib: object = None,
    data: object = None,
    max_drop: object = None,
    method: object = None,
    rounding: str = "nearest",
    int8_target: str = "auto",
    reduce_range: bool | None = None,
    for_engine: bool = False,
) -> TrainedQuantization | None:
    """Return the INT8 quantization that weights were trained for, which an export uses; `None` for other weights.

    Args:
        weights: A weights file; it need not exist.
        calib, data, max_drop, method, rounding: What calibration takes; such weights need none of them.
        int8_target, reduce_range: As requested; see `choose_int8_options`.
        for_engine: A TensorRT engine will be built from the file.

    Raises:
        UsageError: The request contradicts the quantization.
        LoadError: The file is damaged.
    """
    trained = load_quantization(weights)
    if trained is None:
        return None
    given = {"--calib": calib, "--data": data, "--max-drop": max_drop, "--method": method}
    given[f"--rounding {rounding}"] = None if rounding == "nearest" else rounding
    for option, value in given.items():
        if value is not None:
            learned = "weights" if option.startswith("--rounding") else "activation ranges"
            raise UsageError(
                f"{option} has no effect: {weights.name} was trained for INT8, and its {learned} are learned.",
                fix=f"Leave it out. y7 val measures AP:  y7 val --weights {weights} --data D.yaml",
            )
    target = "tensorrt" if int8_target == "auto" and for_engine else int8_target
    differs = target not in ("auto", trained.target)
    if differs or reduce_range not in (None, trained.reduce_range):
        wrong = f"--int8-target {target}" if differs else "--reduce-range" if reduce_range else "--full-range"
        bits = "7" if trained.reduce_range else "8"
        raise UsageError(
            f"{weights.name} was trained for --int8-target {trained.target}, with weights of {bits} bits, not {wrong}.",
            fix=f"Leave it out, or train again:  y7 train --qat --weights WEIGHTS --data D.yaml {wrong}",
        )
    return trained


def _check_trained(weights: Path, precision: str, int8: Int8Request | None) -> None:
    if precision != "int8":
        raise UsageError(
            f"{weights.name} was trained for INT8; as {precision} it would not give the same detections.",
            fix=f"y7 export --int8 --weights {weights}   or export the weights it was trained from",
        )
    if int8 is not None:
        trained_for_int8(weights, calib=int8)


def _convert_trained(exported: OnnxModel, trained: TrainedQuantization, steps: _StepTimer) -> OnnxModel:
    model = to_trained_int8(exported, trained)
    for note in model.metadata.notes[len(exported.metadata.notes) :]:
        steps.done(note)
    return model


def limit_detections(options: ExportOptions, metadata: ModelMetadata) -> ExportOptions:
    """Return options whose `max_det` is at most the number of anchors: small inputs have fewer than the default."""
    height, width = options.input_hw or metadata.default_hw
    levels = zip(metadata.strides, metadata.anchors, strict=True)
    anchors = sum(len(level) * (height // stride) * (width // stride) for stride, level in levels)
    return replace(options, max_det=min(options.max_det, max(anchors, 1)))


def _write(
    exported: OnnxModel, output: Path, reference: PytorchRuntime | None, images: Sequence[Image], steps: _StepTimer
) -> tuple[int, ParityReport | None]:
    """Write the file and rename it after the verification; return its size and the verification's result."""
    try:
        with atomic_write(output) as unfinished:
            exported.save(unfinished)
            parity = None
            if reference is not None:
                parity = _verify(reference, unfinished, exported.metadata, images, steps)
            size = unfinished.stat().st_size
    except OSError as error:
        raise ExportError(
            f"{output} cannot be written: {error.strerror or error}.", fix="Choose another path:  --output F"
        ) from error
    return size, parity


def _convert(
    exported: OnnxModel, precision: str, int8: Int8Request | None, images: Sequence[Image], steps: _StepTimer
) -> tuple[OnnxModel, Quantized | None, Sequence[Image]]:
    """Return the graph in its precision, the result of the quantization, and the images to verify on."""
    quantized = None
    if int8 is not None:
        quantized = Quantizer(exported, int8.images, int8.options, data=int8.data, log=steps.done, show=int8.show).run()
        images = images or list(islice(int8.images, _VERIFIED_CALIBRATION_IMAGES))
    images = images or [synthetic_image(exported.metadata.default_hw)]
    if precision == "fp16":
        return _convert_to_fp16(exported, images, steps), None, images
    return (exported if quantized is None else quantized.model), quantized, images


def _convert_to_fp16(exported: OnnxModel, images: Sequence[Image], steps: _StepTimer) -> OnnxModel:
    model = to_fp16(exported, images)
    steps.done("; ".join(model.metadata.notes[len(exported.metadata.notes) :]))
    return model


def _verify(
    reference: PytorchRuntime, path: Path, metadata: ModelMetadata, images: Sequence[Image], steps: _StepTimer
) -> ParityReport:
    """Compare the file with the model in every installed runtime; return the report of the first.

    A file that takes any size is also compared at another size than its default. All runtimes open the file at the
    same time, each in a thread, if there is memory for it: they need longer for it than for the comparison.
    """
    reports = []
    expected = make_artifact("torch", reference, None, input_hw=metadata.default_hw)
    expected = replace(expected, probe=StageMemory(reference))
    names = installed_runtimes(path, "cpu")
    with contextlib.ExitStack() as opened, ThreadPoolExecutor(len(names)) as pool:
        each = pool.map if _has_memory_for_several(path) else map
        for artifact in each(partial(_open_artifact, path, metadata.default_hw, opened), names):
            if isinstance(artifact, str):
                steps.done(artifact)
                continue
            for input_hw in _verified_sizes(metadata):
                parity = compare(
                    replace(expected, input_hw=input_hw),
                    replace(artifact, input_hw=input_hw),
                    images,
                    thresholds=comparison_thresholds(metadata),
                )
                _check_parity(artifact.name, parity, metadata)
                size = "" if metadata.input_hw else f" at {input_hw[0]}x{input_hw[1]}"
                steps.done(_verification_text(artifact.name, parity, size))
                reports.append(parity)
    return reports[0]


def _has_memory_for_several(path: Path) -> bool:
    free = free_host_memory()
    return free is None or free.size > _OPENING_MEMORY * path.stat().st_size


def _open_artifact(path: Path, input_hw: tuple[int, int], opened: contextlib.ExitStack, name: str) -> Artifact | str:
    """Open a file and its intermediate outputs in a runtime, which `opened` closes; return why if one cannot run it.

    Raises:
        LoadError: ONNX Runtime cannot.
    """
    try:
        runtime = open_runtime(path, device="cpu", input_hw=None, runtime=name)
    except Y7Error as error:
        if name == "onnxruntime":
            raise
        return f"not run in {name}: {error.message}"
    opened.callback(runtime.close)
    return make_artifact(name, runtime, path, input_hw=input_hw)


def _verified_sizes(metadata: ModelMetadata) -> list[tuple[int, int]]:
    height, width = metadata.default_hw
    if metadata.input_hw is not None:
        return [(height, width)]
    lower = max(1, height * 3 // 4 // metadata.stride) * metadata.stride
    return [(height, width), (lower, width)]


def _check_parity(runtime: str, parity: ParityReport, metadata: ModelMetadata) -> None:
    failure = parity.first_failure
    if failure is not None:
        raise ParityError(
            f"The exported file differs from the model in {runtime}: at stage {failure.stage!r} by "
            f"{failure.differences} (allowed {failure.limits}). No file was written.",
            fix=_fix(metadata.precision),
        )


def _verification_text(runtime: str, parity: ParityReport, size: str) -> str:
    images = f"{parity.images} image{'s' * (parity.images > 1)}"
    return f"verified in {runtime} against torch on {images}{size}" if parity.verified else parity.not_verified_reason


def _fix(precision: str) -> str:
    if precision == "int8":
        return "Calibrate on more representative images, or exclude layers from INT8:  --data D.yaml --max-drop 0.3"
    if precision == "fp16":
        return "Try  --precision fp32, or one of your images:  --image FILE; --no-verify writes the file anyway."
    return "Try  --no-simplify, another --opset, or another onnxruntime; --no-verify writes the file anyway."


class _StepTimer:
    """Logs each finished step with its duration."""

    def __init__(self, log: Log | None) -> None:
        self._log, self._started = log, time.perf_counter()

    def done(self, step: str) -> None:
        seconds = time.perf_counter() - self._started
        logger.info("%s (%.1f s)", step, seconds)
        if self._log:
            self._log(step, seconds)
        self._started = time.perf_counter()
