"""Options of `y7 triton` and `y7 deepstream`, which define the defaults. Imports nothing heavy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from yolov7_deploy.errors import UsageError

BACKENDS = ("auto", "onnxruntime", "tensorrt", "python")
DEVICES = ("auto", "cpu", "gpu")
# NVIDIA's image for servers: "nvcr.io/nvidia/tritonserver:<xx.yy>-py3" in github.com/triton-inference-server/server,
# whose docs/introduction/compatibility.md lists release 26.07 with ONNX Runtime 1.27.
CONTAINER = "nvcr.io/nvidia/tritonserver:26.07-py3"
DEFAULT_MAX_BATCH = 8
# A model's name is the name of a folder, and part of URLs.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
MAX_STREAMS = 1024  # NVDSINFER_MAX_BATCH_SIZE of DeepStream


@dataclass(frozen=True, kw_only=True, slots=True)
class TritonOptions:
    """Options of a Triton model repository.

    Attributes:
        backend: What runs the network in Triton: `onnxruntime`, `tensorrt`, or `python` (this package, which takes
            encoded images and returns boxes in their pixels). `auto` is `tensorrt` for engines, `onnxruntime` for ONNX
            files and `python` for checkpoints.
        name: Name of the model; empty for the name of the file.
        max_batch: Maximum batch size; `None` is that of the file, at most `DEFAULT_MAX_BATCH`.
        preferred: Batch sizes that Triton waits for; empty for half of the maximum and the maximum.
        queue_delay_ms: How long a request may wait until a batch is full.
        instances: How many instances of the model run at the same time, on each GPU.
        device: `cpu`, `gpu`, or `auto`: a GPU if the server has one.
        container: Docker image of the server, for the command that starts it.
    """

    backend: str = "auto"
    name: str = ""
    max_batch: int | None = None
    preferred: tuple[int, ...] = ()
    queue_delay_ms: float = 2.0
    instances: int = 1
    device: str = "auto"
    container: str = CONTAINER

    def __post_init__(self) -> None:
        for name, value, known in (("backend", self.backend, BACKENDS), ("device", self.device, DEVICES)):
            if value not in known:
                raise UsageError(f"--{name} {value} is unknown.", fix=f"One of: {', '.join(known)}")
        if self.name and not NAME.fullmatch(self.name):
            raise UsageError(
                f"--name {self.name} is not a name for a model: letters, digits, '_', '-' and '.', at most 100.",
                fix="For example: --name yolov7",
            )
        for name, number in (("max-batch", self.max_batch), ("instances", self.instances)):
            if number is not None and number < 1:
                raise UsageError(f"--{name} {number} must be at least 1.", fix=f"For example: --{name} 4")
        if not 0 <= self.queue_delay_ms < math.inf:
            raise UsageError(
                f"--queue-delay {self.queue_delay_ms:g} is not a time in milliseconds.",
                fix="For example: --queue-delay 2",
            )
        if any(size < 1 for size in self.preferred):
            raise UsageError(
                f"--preferred-batch {','.join(map(str, self.preferred))} must be at least 1.",
                fix="For example: --preferred-batch 4,8",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepStreamOptions:
    """Options of a DeepStream application.

    Attributes:
        streams: Maximum number of streams, which is also the batch size.
        conf: Show detections with a score of at least this; `None` is the threshold of the file.
    """

    streams: int = 1
    conf: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.streams <= MAX_STREAMS:
            raise UsageError(
                f"--streams {self.streams} is not between 1 and {MAX_STREAMS}.", fix="For example: --streams 4"
            )
        if self.conf is not None and not 0 <= self.conf <= 1:
            raise UsageError(f"conf must be between 0 and 1, not {self.conf}.", fix="For example: --conf 0.25")
