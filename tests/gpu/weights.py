"""Removes weights from ONNX files that can be restored: synthetic ones, and those that another file contains too."""

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

from yolov7_deploy.precision.int8 import quantize_weight

MIN_VALUES = 4096  # smaller tensors are always stored
SYNTHETIC_MARK = "y7_synthetic:"  # prefix of the doc string of a tensor whose synthetic values were removed
SHARED_MARK = "y7_same_as:"  # the same for values of FILE#TENSOR, where FILE is in the same folder
SILU_VARIANCE = 0.38  # part of the variance that SiLU keeps
HEAD_SCALE = 0.15  # factor of the head's weights, with which scores spread over 0 to 1
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
_TYPES: dict[int, npt.DTypeLike] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT8: np.int8,
}


def synthetic_weights(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return convolution weights that preserve the variance of activations: SplitMix64 of the index, seeded by name."""
    count = math.prod(shape)
    with np.errstate(over="ignore"):
        word = (np.uint64(zlib.crc32(name.encode())) + np.arange(1, count + 1, dtype=np.uint64)) * _GOLDEN_RATIO
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
    uniform = (word >> np.uint64(40)).astype(np.float32).reshape(shape) / np.float32(2**23) - np.float32(1)
    size = math.sqrt(3 / (SILU_VARIANCE * math.prod(shape[1:])))
    return uniform * np.float32(size * (HEAD_SCALE if shape[0] == 255 else 1))


def set_synthetic_weights(model: onnx.ModelProto) -> None:
    """Set every large convolution weight of a model to its synthetic values."""
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4 and math.prod(tensor.dims) >= MIN_VALUES and tensor.data_type == TensorProto.FLOAT:
            tensor.ClearField("float_data")
            tensor.raw_data = synthetic_weights(tensor.name, tuple(tensor.dims)).tobytes()


def without_weights(model: onnx.ModelProto, names: set[str]) -> bytes:
    """Serialize a model without the values that `with_weights` restores: synthetic values of one of the names."""
    for tensor in model.graph.initializer:
        if tensor.data_type not in _TYPES or math.prod(tensor.dims) < MIN_VALUES or len(tensor.dims) != 4:
            continue
        # Graph transformations append to the original names.
        for name in (name for name in names if name in tensor.name):
            if _stored(name, tensor) == tensor.raw_data:
                tensor.doc_string, tensor.raw_data = SYNTHETIC_MARK + name, b""
                break
    return model.SerializeToString()


def without_shared_weights(data: bytes, known: dict[str, str], *, file: str) -> bytes:
    """Return a file without the large values that another file in its folder contains.

    Args:
        data: Content of the file; values that were removed before stay removed.
        known: FILE#TENSOR by digest of all previous files; this file is added.
        file: Name of the file.
    """
    model = onnx.load_model_from_string(data)
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) < MIN_VALUES:
            continue
        digest = hashlib.sha256(tensor.raw_data).hexdigest()
        first = known.setdefault(digest, f"{file}#{tensor.name}")
        if first.partition("#")[0] != file:
            tensor.doc_string, tensor.raw_data = SHARED_MARK + first, b""
    return model.SerializeToString()


def with_weights(data: bytes, folder: Path | None = None) -> bytes:
    """Return a file with all its values; a complete file is returned unchanged.

    Args:
        data: Content of the file.
        folder: Folder of the files that contain its shared values.
    """
    model = onnx.load_model_from_string(data)
    others: dict[str, dict[str, bytes]] = {}
    for tensor in model.graph.initializer:
        if tensor.doc_string.startswith(SYNTHETIC_MARK):
            tensor.raw_data = _stored(tensor.doc_string.removeprefix(SYNTHETIC_MARK), tensor)
        elif tensor.doc_string.startswith(SHARED_MARK):
            file, _, name = tensor.doc_string.removeprefix(SHARED_MARK).partition("#")
            assert folder is not None, f"{tensor.name} is in {file}, and no folder was given"
            if file not in others:
                other = onnx.load(folder / file)
                others[file] = {shared.name: shared.raw_data for shared in other.graph.initializer}
            tensor.raw_data = others[file][name]
        else:
            continue
        tensor.ClearField("doc_string")
    return model.SerializeToString()


def _stored(name: str, tensor: onnx.TensorProto) -> bytes:
    """Return the synthetic values of a name in the shape and type of a tensor, as raw data."""
    values: npt.NDArray[Any] = synthetic_weights(name, tuple(tensor.dims))
    if tensor.data_type == TensorProto.INT8:
        values = quantize_weight(values).values
    stored: bytes = values.astype(_TYPES[tensor.data_type]).tobytes()
    return stored
