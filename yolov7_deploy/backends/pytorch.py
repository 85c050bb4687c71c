"""Runs a checkpoint through the fused reference model; suppression is the reference one on the CPU."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from yolov7_deploy.backends.base import Found, Outputs, Spans, Stages
from yolov7_deploy.boxes import detections_of
from yolov7_deploy.checkpoint import load_checkpoint
from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.fusion import fuse
from yolov7_deploy.image import Image, Letterbox, to_network_input
from yolov7_deploy.info import ModelInfo
from yolov7_deploy.model.yolov7 import Yolov7, build_model
from yolov7_deploy.options import Thresholds


class PytorchBackend:
    """A fused float32 model on a device.

    Args:
        model: A fused model.
        info: Its passport.
        device: `auto` (a GPU where torch sees one), `cpu`, `cuda` or `cuda:N`.
    """

    largest_batch: int | None = None
    takes_gpu_arrays = False

    def __init__(self, model: Yolov7, info: ModelInfo, *, device: str = "cpu") -> None:
        self.info = info
        self._device = _torch_device(device)
        self._model = model.to(self._device)
        self.device = str(self._device)

    @classmethod
    def open(
        cls, path: Path, *, device: str, input_hw: tuple[int, int] | None, half: bool | None = None
    ) -> PytorchBackend:
        """See `open_backend`; any size that the stride divides is accepted."""
        checkpoint = load_checkpoint(path)
        info = checkpoint.info
        if input_hw is not None and any(side < 1 or side % info.stride for side in input_hw):
            up = [max(1, -(-side // info.stride)) * info.stride for side in input_hw]
            raise UsageError(
                f"An input of {input_hw[0]}x{input_hw[1]} is no multiple of this model's stride {info.stride}.",
                fix=f"--img {up[0]},{up[1]}",
            )
        return cls(fuse(build_model(checkpoint)), info, device=device)

    def infer(
        self,
        images: Sequence[Image],
        letterboxes: Sequence[Letterbox],
        thresholds: Thresholds,
        *,
        timed: bool = False,
    ) -> Outputs:
        """See `Backend.infer`."""
        started = time.perf_counter()
        canvases = [letterbox.apply(image) for image, letterbox in zip(images, letterboxes, strict=True)]
        tensor = torch.from_numpy(to_network_input(canvases)).to(self._device)
        prepared = time.perf_counter()
        with torch.inference_mode():
            decoded = self._model.predict(tensor).cpu().numpy()
        inferred = time.perf_counter()
        found = [_found(output, thresholds) for output in decoded]
        done = time.perf_counter()
        spans = Spans(
            preprocess_ms=(prepared - started) * 1e3,
            upload_ms=0.0,
            engine_ms=(inferred - prepared) * 1e3,
            download_ms=0.0,
            postprocess_ms=(done - inferred) * 1e3,
        )
        return Outputs(
            found=found,
            preprocess_ms=spans.preprocess_ms,
            inference_ms=spans.engine_ms,
            postprocess_ms=spans.postprocess_ms,
            spans=spans,
        )

    def stages(self, canvas: Image) -> Stages:
        """What the network makes of one canvas on the way to its detections."""
        with torch.inference_mode():
            features = self._model.features(torch.from_numpy(to_network_input([canvas])).to(self._device))
            maps = self._model.head.maps(features)
            decoded = self._model.head.decode([self._model.head.as_raw(x) for x in maps])
        return Stages(heads=[x[0].cpu().numpy() for x in maps], decoded=decoded[0].cpu().numpy())

    def close(self) -> None:
        """Nothing outlives the object."""


def _torch_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name.isdigit():
        name = f"cuda:{name}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DeviceError(
            f"torch {torch.__version__} has no device {name!r} here: {reason}", fix="--device cpu"
        ) from error
    return device


def _found(output: np.ndarray[tuple[int, ...], np.dtype[np.float32]], thresholds: Thresholds) -> Found:
    boxes, scores, class_ids = detections_of(output, thresholds)
    return Found(boxes=boxes, scores=scores, class_ids=class_ids)
