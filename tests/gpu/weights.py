"""ONNX files that travel without weights that are there already: made-up ones, and those of a file beside them."""

from __future__ import annotations

import hashlib
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from yolov7_deploy.precision.weight_quantization import round_weight

SMALLEST = 4096  # values; smaller tensors travel
MARK = "y7_made_up:"  # begins the doc string of a tensor whose values were left out
SAME = "y7_same_as:"  # the same, and they are those of FILE#TENSOR, a file in the same folder
HALF_VARIANCE = 0.38  # of what SiLU passes on
CALM = 0.15  # of the head's weights: scores spread over 0 to 1 without sticking to the ends
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
_TYPES: dict[int, npt.DTypeLike] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT8: np.int8,
}


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
            if _stored(name, tensor) == tensor.raw_data:
                tensor.doc_string, tensor.raw_data = MARK + name, b""
                break
    return model.SerializeToString()


def unshared(data: bytes, known: dict[str, str], *, file: str) -> bytes:
    """A file without the large values that a file beside it has.

    Args:
        data: The file; values that were left out before stay so.
        known: FILE#TENSOR by digest, of the files so far; those of this one are added.
        file: Its name.
    """
    model = onnx.load_model_from_string(data)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < SMALLEST:
            continue
        digest = hashlib.sha256(tensor.raw_data).hexdigest()
        place = known.setdefault(digest, f"{file}#{tensor.name}")
        if place.partition("#")[0] != file:
            tensor.doc_string, tensor.raw_data = SAME + place, b""
    return model.SerializeToString()


def filled(data: bytes, folder: Path | None = None) -> bytes:
    """The file with its values; a file that has them all comes back as it is.

    Args:
        data: The file.
        folder: Where the files lie that it shares values with.
    """
    model = onnx.load_model_from_string(data)
    beside: dict[str, dict[str, bytes]] = {}
    for tensor in model.graph.initializer:
        if tensor.doc_string.startswith(MARK):
            tensor.raw_data = _stored(tensor.doc_string.removeprefix(MARK), tensor)
        elif tensor.doc_string.startswith(SAME):
            file, _, name = tensor.doc_string.removeprefix(SAME).partition("#")
            assert folder is not None, f"{tensor.name} is in {file}, and nobody says where that is"
            if file not in beside:
                other = onnx.load(folder / file)
                beside[file] = {shared.name: shared.raw_data for shared in other.graph.initializer}
            tensor.raw_data = beside[file][name]
        else:
            continue
        tensor.ClearField("doc_string")
    return model.SerializeToString()


def _stored(name: str, tensor: onnx.TensorProto) -> bytes:
    """The made-up values of a name as a tensor of this shape and type holds them."""
    values: npt.NDArray[Any] = made_up(name, tuple(tensor.dims))
    if tensor.data_type == TensorProto.INT8:
        values = round_weight(values).values
    stored: bytes = values.astype(_TYPES[tensor.data_type]).tobytes()
    return stored
