"""Quantization-aware training: the network that is trained, its checks, and its state as a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from yolov7_deploy._console import plural
from yolov7_deploy.checkpoint import Checkpoint
from yolov7_deploy.checkpoint.quantization import TrainedQuantization
from yolov7_deploy.errors import TrainingError, UsageError
from yolov7_deploy.image import Image
from yolov7_deploy.model.configs import find_variant
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.layer_table import Anchors
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions, Int8Options
from yolov7_deploy.precision.calibrate import Calibration, calibrate, network_digest
from yolov7_deploy.precision.calibration_cache import load_calibration
from yolov7_deploy.precision.calibration_images import CalibrationImages, open_calibration
from yolov7_deploy.precision.fake_quantize import FakeQuantizedYolov7, restore_fake_quantized, split_state
from yolov7_deploy.precision.qat import CalibratedNetwork, calibrated_network
from yolov7_deploy.precision.sensitivity import FLOOR_IMAGES, choose_silu_floor
from yolov7_deploy.precision.subgraph import Network
from yolov7_deploy.training.checkpoints import LAST, QatOptions, RunState, TrainRequest
from yolov7_deploy.training.distributed import DistributedContext
from yolov7_deploy.training.loggers import TrainCallback

CALIBRATION_SUFFIX = ".npz"


def initialize_qat(
    checkpoint: Checkpoint,
    request: TrainRequest,
    class_names: tuple[str, ...],
    *,
    distributed: DistributedContext,
    callback: TrainCallback,
) -> CalibratedNetwork:
    """Return the fused network of a checkpoint with calibrated ranges; the main process calibrates.

    Raises:
        UsageError: The checkpoint has other classes than the dataset, or the calibration file is of another model.
        LoadError, SourceError, DatasetError: Calibration file or images cannot be read.
        ExportError: A tensor is infinite or NaN on an image.
    """
    assert request.qat is not None, "the caller checks it"
    if checkpoint.class_names != class_names:
        raise UsageError(
            f"--qat keeps the classes of the weights, and those of {checkpoint.source} "
            f"({', '.join(checkpoint.class_names[:4])}, ...) are not those of the dataset "
            f"({', '.join(class_names[:4])}, ...).",
            fix="Train the weights on this dataset first:  y7 train --data D.yaml --weights W",
        )
    model = fuse(build_model(checkpoint))
    hw = (request.options.img, request.options.img)
    exported = export_onnx(model, checkpoint.metadata, ExportOptions(input_hw=hw, nms="none"))
    calibrated: tuple[Calibration, Int8Options] | None = None
    if distributed.is_main_process:
        calibrated = _calibrate(exported, request.qat, request.data, callback)
    calibrated = distributed.broadcast(calibrated)
    assert calibrated is not None, "the main process has calibrated"
    calibration, int8 = calibrated
    result = calibrated_network(model, exported, calibration, int8)
    callback.on_message(
        f"quantization-aware training for {int8.target}: {len(result.model.placement.convolutions)} INT8 convolutions, "
        f"{plural(len(result.model.placement.pairs), 'Q/DQ pair')} with {len(result.model.quantizers)} scales, from "
        f"ranges by {int8.method} on {plural(calibration.images, 'image')}"
    )
    return result


def _calibrate(
    exported: OnnxModel, options: QatOptions, data: str, callback: TrainCallback
) -> tuple[Calibration, Int8Options]:
    """Return the calibration, and the INT8 options with the best floor of SiLU."""
    path = Path(options.calib)
    if path.suffix == CALIBRATION_SUFFIX:
        calibration, images = _load(path, exported), open_calibration(data, limit=FLOOR_IMAGES)
    else:
        images = open_calibration(options.calib or data)
        with callback.progress("calibrate") as show:
            calibration = calibrate(exported, images, count=len(images), progress=show)
        for note in images.notes:
            callback.on_message(f"calibration: {note}")
    return calibration, choose_silu_floor(exported, calibration, _few(images), options.int8)


def _few(images: CalibrationImages) -> list[Image]:
    step = max(1, len(images) // FLOOR_IMAGES)
    return list(islice(images, 0, step * FLOOR_IMAGES, step))


def _load(path: Path, exported: OnnxModel) -> Calibration:
    """Return the calibration in a file of `y7 quantize`, which must be of this model."""
    calibration = load_calibration(path)
    network = network_digest(Network(exported))
    if calibration.network_sha256 != network:
        raise UsageError(
            f"{path} is a calibration of another model (SHA-256 of model {calibration.network_sha256[:12]} instead of "
            f"{network[:12]}).",
            fix="Name calibration images instead:  --calib FOLDER",
        )
    return calibration


def restore_qat(variant: str, anchors: Anchors, classes: int, quantization: TrainedQuantization) -> FakeQuantizedYolov7:
    """Return a network with random weights, into which the state of a run is loaded."""
    with torch.random.fork_rng(devices=[]):
        model = Yolov7(find_variant(variant), classes=classes, fused=True, anchors=anchors)
    return restore_fake_quantized(model, quantization)


def trained_checkpoint(
    model: nn.Module, state: RunState, ema: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], TrainedQuantization]:
    """Return the weights of the moving average, and the quantization with its learned scales.

    Args:
        model: The network that is trained.
        state: Progress of the run.
        ema: Its moving average.

    Raises:
        TrainingError: A scale is not positive.
    """
    assert isinstance(model, FakeQuantizedYolov7) and state.quantization is not None, "the run trains for INT8"
    weights, ranges = split_state(ema, model.placement)
    try:
        return weights, replace(state.quantization, ranges=ranges)
    except ValueError as error:
        raise TrainingError(
            f"An activation range collapsed in epoch {state.epoch + 1}: {error}. {LAST} is that of an earlier epoch.",
            fix="Try a lower learning rate:  --set lr0=0.0001",
        ) from error
