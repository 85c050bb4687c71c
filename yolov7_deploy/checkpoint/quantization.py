"""The INT8 quantization that weights were trained for: the scale of every activation, stored in the weights file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from yolov7_deploy._serialization import from_dict, short_repr
from yolov7_deploy.options import INT8_TARGETS

SCHEMA = 1
MAX_TENSORS = 8192  # with a Q/DQ pair; YOLOv7-E6E has 1144 for CPUs
# The integers of an activation, by target; see `Int8Options`.
INTEGER_LIMITS = {"tensorrt": (-128, 127), "cpu": (0, 255), "arm": (-128, 127)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRange:
    """The integers that represent the values of a tensor: value = scale * (integer - zero).

    Attributes:
        tensor: Name of the tensor in the ONNX graph of these weights, such as `model.0.act`.
        scale: The step, a float32 number.
        zero: The integer of 0.
    """

    tensor: str
    scale: float
    zero: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedQuantization:
    """The INT8 quantization that weights were trained for (quantization-aware training).

    Such weights are fused: BatchNorm is folded into the convolutions, because INT8 rounds the folded weights.

    Attributes:
        target: See `Int8Options`.
        reduce_range: Weights of 7 bits; see `Int8Options`.
        ranges: Range of every tensor that has a Q/DQ pair.
        amax: (tensor, largest magnitude) of every tensor that the calibration measured.
        method: Calibration method that chose the ranges from which training started.
        images: Number of calibration images.
        images_sha256: Digest of the calibration images, independent of their order.

    Raises:
        ValueError: A value is impossible; the message says which.
    """

    target: str
    reduce_range: bool
    ranges: tuple[TrainedRange, ...]
    amax: tuple[tuple[str, float], ...]
    method: str
    images: int
    images_sha256: str

    def __post_init__(self) -> None:
        if self.target not in INT8_TARGETS:
            raise ValueError(f"its target is {short_repr(self.target)}")
        if not 1 <= len(self.ranges) <= MAX_TENSORS or len(self.amax) > MAX_TENSORS:
            raise ValueError(f"it has {len(self.ranges)} activation ranges")
        if len({one.tensor for one in self.ranges}) < len(self.ranges):
            raise ValueError("it names a tensor twice")
        low, high = INTEGER_LIMITS[self.target]
        for one in self.ranges:
            if not 0 < one.scale < math.inf or not low <= one.zero <= high:
                raise ValueError(f"the scale of {one.tensor} is {one.scale:g}, and its zero {one.zero}")
        for tensor, value in self.amax:
            if not 0 <= value < math.inf:
                raise ValueError(f"the largest magnitude of {tensor} is {value:g}")

    def to_json(self) -> str:
        """Return one line of JSON; the same quantization gives the same bytes."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TrainedQuantization:
        """Return what `to_json` wrote.

        Raises:
            ValueError, RecursionError: The text is damaged, or of another schema.
        """
        raw: Any = json.loads(text)
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise ValueError("it is of another version")
        return from_dict(cls, raw)
