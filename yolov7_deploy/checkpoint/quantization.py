"""The INT8 quantization that weights were trained for: the scale of every activation, stored in the weights file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from yolov7_deploy._serialization import MAX_REPR, from_dict, parse_json, short_repr
from yolov7_deploy.options import INT8_TARGETS

SCHEMA = 1
MAX_TENSORS = 8192  # with a Q/DQ pair; YOLOv7-E6E has 1144 for CPUs
# The integers of an activation, by target; see `Int8Options`.
INTEGER_LIMITS = {"tensorrt": (-128, 127), "cpu": (0, 255), "arm": (-128, 127)}
_ZERO_LIMITS = INTEGER_LIMITS | {"tensorrt": (0, 0)}  # TensorRT computes with symmetric ranges only
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


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
        if self.images < 1:
            raise ValueError(f"its calibration has {self.images} images")
        _check_counts(self.ranges, self.amax)
        _check_unique([one.tensor for one in self.ranges])
        _check_unique([tensor for tensor, _ in self.amax])
        for one in self.ranges:
            _check_range(one, self.target)
        for tensor, largest in self.amax:
            if not 0 <= largest <= _LARGEST:
                raise ValueError(f"the largest magnitude of {short_repr(tensor)} is {largest:g}")

    def to_json(self) -> str:
        """Return one line of JSON; the same quantization gives the same bytes."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> TrainedQuantization:
        """Return what `to_json` wrote.

        Raises:
            ValueError: The text is damaged, or of another schema.
        """
        raw = parse_json(text)
        if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
            raise ValueError("it is of another version")
        if isinstance(ranges := raw.get("ranges"), list) and isinstance(amax := raw.get("amax"), list):
            _check_counts(ranges, amax)  # before an object of each is made
        return from_dict(cls, raw)


def _check_counts(ranges: Sequence[object], amax: Sequence[object]) -> None:
    if not 1 <= len(ranges) <= MAX_TENSORS or len(amax) > MAX_TENSORS:
        raise ValueError(f"it has {len(ranges)} activation ranges, and {len(amax)} measured tensors")


def _check_unique(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError("it names a tensor twice")


def _check_range(one: TrainedRange, target: str) -> None:
    low, high = _ZERO_LIMITS[target]
    if not _SMALLEST <= one.scale <= _LARGEST or not low <= one.zero <= high:
        raise ValueError(f"the scale of {one.tensor[:MAX_REPR]} is {one.scale:g}, and its zero {one.zero}")
