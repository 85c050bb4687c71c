"""ONNX files that travel without their made-up weights, which are the same numbers on every machine."""

from __future__ import annotations

import math
import zlib

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

SMALLEST = 4096  # values; smaller tensors travel
MARK = "y7_made_up:"  # begins the doc string of a tensor whose values were left out
HALF_VARIANCE = 0.38  # of what SiLU passes on
CALM = 0.15  # of the head's weights: scores spread over 0 to 1 without sticking to the ends
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
_TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def made_up(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Convolution weights that keep the size of activations: SplitMix64 over the index, seeded by the name."""
    count = math.prod(shape)
    with np.errstate(over="ignore"):
        word = (np.uint64(zlib.crc32(name.encode())) + np.arange(1, count + 1, dtype=np.uint64)) * _GOLDEN_RATIO
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
    uniform = (word >> np.uint64(40)).astype(np.float32).reshape(shape) / np.float32(2**23) - np.float32(1)
    size = math.sqrt(3 / (HALF_VARIANCE * math.prod(shape[1:])))
    return uniform * np.float32(size * (CALM if shape[0] == 255 else 1))


def make_up(model: onnx.ModelProto) -> None:
    """Gives every large convolution weight its made-up values."""
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4 and math.prod(tensor.dims) >= SMALLEST and tensor.data_type == TensorProto.FLOAT:
            tensor.ClearField("float_data")
            tensor.raw_data = made_up(tensor.name, tuple(tensor.dims)).tobytes()


def stripped(model: onnx.ModelProto, names: set[str]) -> bytes:
    """The file without the values that `filled` makes again: of tensors that hold those of one of the names."""
    for tensor in model.graph.initializer:
        if tensor.data_type not in _TYPES or math.prod(tensor.dims) < SMALLEST or len(tensor.dims) != 4:
            continue
        # Passes over a graph make new names of old ones.
        for name in (name for name in names if name in tensor.name):
            values = made_up(name, tuple(tensor.dims)).astype(_TYPES[tensor.data_type])
            if values.tobytes() == tensor.raw_data:
                tensor.doc_string, tensor.raw_data = MARK + name, b""
                break
    return model.SerializeToString()


def filled(data: bytes) -> bytes:
    """The file with its values; a file that was never stripped comes back as it is."""
    model = onnx.load_model_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.doc_string.startswith(MARK):
            values = made_up(tensor.doc_string.removeprefix(MARK), tuple(tensor.dims))
            tensor.raw_data = values.astype(_TYPES[tensor.data_type]).tobytes()
            tensor.ClearField("doc_string")
    return model.SerializeToString()
