"""Readiness of this process to serve: a runtime opens a model, as a serving process does when it starts.

Container health checks run this every half minute, so it downloads nothing and runs no image.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import LoadError
from yolov7_deploy.hub import bundled_onnx, find_weights

READY_VARIABLE = "Y7_READY_WEIGHTS"  # environment variable with the model of a container


@dataclass(frozen=True, kw_only=True, slots=True)
class Readiness:
    """A model that was opened, and what it runs with.

    Attributes:
        weights: Path of the model.
        runtime: Name of the runtime, `onnxruntime`.
        device: `cpu`, `cuda:N`, `intel:gpu` or `intel:npu`.
        seconds: Time to import the runtime and to open the model.
    """

    weights: str
    runtime: str
    device: str
    seconds: float


def check_ready(weights: str | None = None, *, device: str = "auto") -> Readiness:
    """Open a model and close it again.

    Args:
        weights: Path or official name; default: `$Y7_READY_WEIGHTS`, else the demo network of this package.
        device: Device on which it must open; `auto` is the one that a `Detector` chooses.

    Raises:
        Y7Error: The model is missing or damaged, its runtime is not installed, or the device is not available.
    """
    started = time.perf_counter()
    chosen = weights or os.environ.get(READY_VARIABLE)
    try:
        path = find_weights(chosen, offline=True) if chosen else bundled_onnx()
    except LoadError as error:
        raise _with_source(error, weights) from error
    with Detector(path, device=device) as detector:
        seconds = time.perf_counter() - started
        return Readiness(weights=str(path), runtime=detector.runtime, device=detector.device, seconds=seconds)


def _with_source(error: LoadError, weights: str | None) -> LoadError:
    """Return the error of a missing model; it names the environment variable if the model came from there."""
    if weights:
        return error
    return LoadError(f"${READY_VARIABLE}: {error.message}", fix=error.fix)
