"""Contents of an ONNX file, ours or a third-party one, read without onnx and without ONNX Runtime.

Production machines have no onnx, and ONNX Runtime does not show nodes. ONNX is protobuf, whose wire format is a list
of nested (field number, value) pairs; the numbers below are those of onnx.proto, which never change. Only counting
INT8 operations needs onnx.
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov7_deploy import _protobuf as pb
from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, open_file, read_bytes
from yolov7_deploy.errors import LoadError
from yolov7_deploy.metadata import METADATA_KEY, ModelMetadata

if TYPE_CHECKING:
    from yolov7_deploy.precision.int8_summary import Int8Summary

# Message: field of onnx.proto.
_MODEL_IR, _MODEL_PRODUCER, _MODEL_PRODUCER_VERSION, _MODEL_GRAPH = 1, 2, 3, 7
_MODEL_OPSETS, _MODEL_METADATA, _MODEL_FUNCTIONS = 8, 14, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 4, 5
_ATTRIBUTE_TENSOR = 5
_TENSOR_DIMS, _TENSOR_NAME = 1, 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR, _TENSOR_TYPE_ELEMENT, _TENSOR_TYPE_SHAPE, _SHAPE_DIM, _DIM_VALUE, _DIM_NAME = 1, 1, 2, 1, 1, 2
_FUNCTION_NAME, _FUNCTION_NODE = 1, 7
_KEY, _VALUE = 1, 2  # of entries in the metadata and in the list of operator sets

_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 8: "string", 9: "bool",
    10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16", 17: "float8e4m3fn", 19: "float8e5m2",
    21: "uint4", 22: "int4", 23: "float4e2m1",
}  # fmt: skip

# Since IR version 4 initializers need not be listed as inputs: a listed one is an input with a default value.
_IR_WITH_DEFAULTS = 4
_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_PASS_THROUGH = {"Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Transpose"}


# Operator: the rule by which the tensor before it has a Q/DQ pair.
_QDQ_RULES = {
    "Conv": "before convolutions",
    "Resize": "before upsampling, which then moves bytes",
    "Add": "before residual additions",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """An input or output: its element type, and for each dimension a size, a name, or `?`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    has_default: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxFile:
    """Contents of an ONNX file.

    Attributes:
        path: Path as passed.
        size_bytes: Size of this file, without external data.
        metadata: The metadata; `None` in a third-party file.
        ir_version: Version of the ONNX container.
        opsets: Version of each operator set; the empty name is that of ONNX itself.
        producer: Program that wrote the file, with its version.
        inputs: Inputs, including those with a default value.
        outputs: Outputs in order.
        nodes: Number of nodes of each operator, the most frequent first; without nodes inside functions.
        functions: Number of nodes inside each model-local function.
        parameters: Number of weights and biases of convolutions and matrix products, float or quantized.
    """

    path: str
    size_bytes: int
    metadata: ModelMetadata | None
    ir_version: int
    opsets: dict[str, int]
    producer: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    nodes: dict[str, int]
    functions: dict[str, int]
    parameters: int


def read_onnx(path: str | Path) -> OnnxFile:
    """Return the contents of an ONNX file.

    Raises:
        LoadError: The file is missing, truncated, not ONNX, or has metadata that cannot be read.
    """
    path = Path(path)
    try:
        data = read_bytes(path, max_bytes=MAX_MODEL_BYTES)
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
    try:
        return _read(memoryview(data), path)
    except (ValueError, IndexError, KeyError) as error:
        raise LoadError(
            f"{path} is not an ONNX file, or is truncated ({error}).", fix="Export it:  y7 export --weights WEIGHTS.pt"
        ) from error


def read_onnx_metadata(path: Path) -> ModelMetadata | None:
    """Return the metadata of an ONNX file without reading its weights; `None` if it has none or is not a valid file."""
    try:
        with open_file(path, max_bytes=MAX_MODEL_BYTES) as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        entries = (
            _entry(pb.as_bytes(value)) for number, value, _ in pb.iterate_fields(data) if number == _MODEL_METADATA
        )
        text = dict(entries).get(METADATA_KEY)
        return None if text is None else ModelMetadata.from_json(text)
    except (OSError, ValueError, IndexError, LoadError):
        return None


def _read(data: memoryview, path: Path) -> OnnxFile:
    model = pb.parse_message(data)
    if _MODEL_GRAPH not in model or _MODEL_IR not in model:
        raise ValueError("there is no graph in it")
    graph = pb.parse_message(pb.as_bytes(model[_MODEL_GRAPH][-1]))
    nodes = [pb.parse_message(pb.as_bytes(node)) for node in graph.get(_GRAPH_NODE, [])]
    ir_version = pb.integer(model, _MODEL_IR)
    tensors = dict(_initializer(pb.as_bytes(tensor)) for tensor in graph.get(_GRAPH_INITIALIZER, []))
    inputs = [_tensor_info(pb.as_bytes(value), tensors) for value in graph.get(_GRAPH_INPUT, [])]
    metadata = dict(_entry(pb.as_bytes(entry)) for entry in model.get(_MODEL_METADATA, []))
    functions = [pb.parse_message(pb.as_bytes(function)) for function in model.get(_MODEL_FUNCTIONS, [])]
    return OnnxFile(
        path=str(path),
        size_bytes=len(data),
        metadata=ModelMetadata.from_json(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None,
        ir_version=ir_version,
        opsets=dict(_opset(pb.as_bytes(entry)) for entry in model.get(_MODEL_OPSETS, [])),
        producer=f"{pb.text(model, _MODEL_PRODUCER)} {pb.text(model, _MODEL_PRODUCER_VERSION)}".strip(),
        inputs=tuple(tensor for tensor in inputs if not tensor.has_default or ir_version >= _IR_WITH_DEFAULTS),
        outputs=tuple(_tensor_info(pb.as_bytes(value), {}) for value in graph.get(_GRAPH_OUTPUT, [])),
        nodes=dict(Counter(pb.text(node, _NODE_OP) for node in nodes).most_common()),
        functions={pb.text(body, _FUNCTION_NAME): len(body.get(_FUNCTION_NODE, [])) for body in functions},
        parameters=_parameters(nodes, tensors),
    )


def _parameters(nodes: Iterable[dict[int, list[pb.Value]]], tensors: dict[str, int]) -> int:
    """Return the number of elements of the tensors that weighted nodes take, directly or through conversions."""
    sizes = dict(tensors)
    total = 0
    for node in nodes:
        op, inputs = pb.text(node, _NODE_OP), [pb.decode(name) for name in node.get(_NODE_INPUT, [])]
        if op in _WEIGHTED:
            total += sum(sizes.get(name, 0) for name in inputs)
            continue
        size = None
        if op == "Constant":
            size = next(_constants(node), None)
        elif op in _PASS_THROUGH and inputs:
            size = sizes.get(inputs[0])
        if size is not None:
            sizes[pb.text(node, _NODE_OUTPUT)] = size
    return total


def _constants(node: dict[int, list[pb.Value]]) -> Iterator[int]:
    for attribute in node.get(_NODE_ATTRIBUTE, []):
        for tensor in pb.parse_message(pb.as_bytes(attribute)).get(_ATTRIBUTE_TENSOR, []):
            yield _initializer(pb.as_bytes(tensor))[1]


def _initializer(data: memoryview) -> tuple[str, int]:
    """Return the name and number of elements."""
    tensor = pb.parse_message(data)
    dims: list[int] = []
    for value in tensor.get(_TENSOR_DIMS, []):
        dims += [value] if isinstance(value, int) else pb.packed(value)
    return pb.text(tensor, _TENSOR_NAME), prod(dims)


def _tensor_info(data: memoryview, tensors: dict[str, int]) -> TensorInfo:
    value = pb.parse_message(data)
    name, dtype = pb.text(value, _VALUE_NAME), "?"
    shape: tuple[int | str, ...] = ()
    for kind in value.get(_VALUE_TYPE, []):
        for tensor in pb.parse_message(pb.as_bytes(kind)).get(_TYPE_TENSOR, []):
            fields = pb.parse_message(pb.as_bytes(tensor))
            number = pb.integer(fields, _TENSOR_TYPE_ELEMENT)
            dtype = _DTYPES.get(number, f"type {number}")
            dims = [pb.parse_message(pb.as_bytes(s)).get(_SHAPE_DIM, []) for s in fields.get(_TENSOR_TYPE_SHAPE, [])]
            shape = tuple(_dim(pb.as_bytes(dim)) for group in dims for dim in group)
    return TensorInfo(name=name, dtype=dtype, shape=shape, has_default=name in tensors)


def _dim(data: memoryview) -> int | str:
    dim = pb.parse_message(data)
    return pb.integer(dim, _DIM_VALUE) if _DIM_VALUE in dim else pb.text(dim, _DIM_NAME) or "?"


def _entry(data: memoryview) -> tuple[str, str]:
    entry = pb.parse_message(data)
    return pb.text(entry, _KEY), pb.text(entry, _VALUE)


def _opset(data: memoryview) -> tuple[str, int]:
    entry = pb.parse_message(data)
    return pb.text(entry, _KEY), pb.integer(entry, _VALUE)


# --- INT8 -------------------------------------------------------------------------------------------------------------


def read_int8_summary(path: Path) -> Int8Summary:
    """Return the INT8 summary of a file, also of a third-party one. Needs onnx.

    Raises:
        LoadError: The file is missing, empty, truncated or not ONNX.
    """
    from yolov7_deploy.precision.int8_summary import summarize_int8
    from yolov7_deploy.tensorrt.onnx_rewrite import open_onnx

    return summarize_int8(open_onnx(path).proto)


def int8_lines(summary: Int8Summary) -> tuple[str, str]:
    """Return two lines: how much is computed in INT8, and the number of Q/DQ pairs with their rules."""
    share = "shapes are dynamic" if summary.share is None else f"{summary.share:.1%} of all multiply-accumulates"
    pairs = [f"{count} {_QDQ_RULES.get(kind, f'before {kind}')}" for kind, count in summary.pairs.items()]
    twice = f"; {len(summary.duplicate_pairs)} tensors have more than one" if summary.duplicate_pairs else ""
    return (
        f"{summary.int8_convolutions} of {len(summary.convolutions)} convolutions, {share}",
        f"{sum(summary.pairs.values())} Q/DQ pairs, one per tensor: {', '.join(pairs) or 'none'}{twice}; "
        f"{summary.scales} scales; {summary.weights} weights stored as int8",
    )


def int8_to_dict(summary: Int8Summary) -> dict[str, Any]:
    """Return plain data for JSON."""
    return {
        "convolutions": [
            {"layer": cost.name, "macs": cost.macs, "int8": cost.is_int8} for cost in summary.convolutions
        ],
        "int8_convolutions": summary.int8_convolutions,
        "int8_share_of_macs": summary.share,
        "pairs": dict(summary.pairs),
        "pairs_twice": list(summary.duplicate_pairs),
        "int8_weights": summary.weights,
        "scales": summary.scales,
    }
