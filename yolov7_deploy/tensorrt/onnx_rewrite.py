"""Rewrite an ONNX graph for TensorRT's parser.

From 9.0 to 10.6 the parser prefers the body of a model-local function to a registered plugin; other versions prefer the
plugin. So the NMS function is removed if a plugin implements its node, and inlined otherwise.

TensorRT before 10 does not support int8 constants: INT8 weights must be float32 with a QuantizeLinear and a
DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, inliner, numpy_helper

from yolov7_deploy._bounded_read import MAX_MODEL_BYTES, check_file, read_bytes
from yolov7_deploy._text import get_logger
from yolov7_deploy.errors import EngineError, LoadError
from yolov7_deploy.metadata import (
    METADATA_KEY,
    NMS_OUTPUTS,
    OVERFLOW_OUTPUT,
    THRESHOLD_INPUTS,
    ModelMetadata,
    assumed_metadata,
)
from yolov7_deploy.onnx_export.nms import EFFICIENT_OP, OP, OVERFLOW
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.output_layout import TensorSpec, find_layout, layout_metadata
from yolov7_deploy.tensorrt.build_record import NmsBy

logger = get_logger(__name__)

EXPORT_AGAIN = "Export the weights again:  y7 export --weights WEIGHTS.pt"
_ONNX_DOMAINS = ("", "ai.onnx")
_DTYPES = {number: name.lower() for name, number in TensorProto.DataType.items()}
_DTYPES |= {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedGraph:
    """A graph for TensorRT's parser.

    Attributes:
        proto: The graph.
        nms_by: Implementation of NMS; see `EngineRecord`.
        runtime_thresholds: The thresholds are inputs without a default.
    """

    proto: onnx.ModelProto
    nms_by: NmsBy
    runtime_thresholds: bool


def open_onnx(path: Path) -> OnnxModel:
    """Return the model of an ONNX file. Without our metadata, log a warning and assume metadata; `notes` lists it.

    Raises:
        LoadError: The file is missing, empty, truncated or not an ONNX file.
    """
    fix = "Export it:  y7 export --weights yolov7"
    try:
        proto = onnx.load_model_from_string(read_bytes(path, max_bytes=MAX_MODEL_BYTES))
        if not proto.graph.node:
            raise LoadError(f"{path} is not an ONNX file or has an empty graph: it has no nodes.", fix=fix)
        if any(weight.data_location == TensorProto.EXTERNAL for weight in proto.graph.initializer):
            _check_external_data(proto, path.parent)
            onnx.load_external_data_for_model(proto, str(path.parent))
    except MemoryError as error:
        raise LoadError(f"{path} has more data than fits into memory.", fix=fix) from error
    except OSError as error:
        raise LoadError(
            f"{error.filename or path} cannot be read: {error.strerror or error}.", fix="Check the path."
        ) from error
    except (DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise LoadError(f"{path} is not an ONNX file, or is truncated.", fix=fix) from error
    try:
        text = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA_KEY)
        metadata = _foreign_metadata(path, proto) if text is None else ModelMetadata.from_json(text)
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} is damaged: a name in it is not valid UTF-8.", fix=fix) from error
    if text is None:
        logger.warning("%s: %s", path, "; ".join(metadata.notes))
    return OnnxModel(proto, metadata)


def _check_external_data(proto: onnx.ModelProto, folder: Path) -> None:
    """Check the files with the weights of a graph.

    Raises:
        OSError: One is missing, not a regular file, or larger than any network.
    """
    locations = {
        entry.value for weight in proto.graph.initializer for entry in weight.external_data if entry.key == "location"
    }
    for location in sorted(locations):
        check_file(folder / location, max_bytes=MAX_MODEL_BYTES)


def has_nms_node(proto: onnx.ModelProto) -> bool:
    """Return whether a graph contains the node that our NMS plugin implements."""
    return _find_node(proto, OP) is not None


def prepare_graph(
    model: OnnxModel,
    *,
    use_plugin: bool,
    builtin_plugins: Collection[str] = (),
    float_weights: bool = False,
    fixed_thresholds: bool = False,
) -> PreparedGraph:
    """Return a rewritten copy of a graph.

    Args:
        model: An exported model.
        use_plugin: Our plugin implements the NMS node.
        builtin_plugins: Names of the plugins of this TensorRT.
        float_weights: Store INT8 weights as float32 with a QuantizeLinear, which results in the same INT8 values.
        fixed_thresholds: Leave the thresholds of NMS constants with the values of the file.

    Raises:
        EngineError: The operator set is unknown, or the graph is damaged.
    """
    try:
        prepared = _rewrite(
            model, use_plugin=use_plugin, builtin_plugins=builtin_plugins, fixed_thresholds=fixed_thresholds
        )
        if float_weights:
            _store_weights_as_float(prepared.proto.graph)
        return prepared
    except UnicodeDecodeError as error:  # names are decoded on access, not when the file is read
        raise EngineError(
            f"The graph is damaged: a name in it is not valid UTF-8 ({error}).", fix=EXPORT_AGAIN
        ) from error


def _rewrite(
    model: OnnxModel, *, use_plugin: bool, builtin_plugins: Collection[str], fixed_thresholds: bool
) -> PreparedGraph:
    _check_opset(model.proto)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    efficient = _find_node(proto, EFFICIENT_OP) is not None
    nms = _find_node(proto, OP)
    if nms is not None:
        _add_overflow_output(proto.graph, nms)
    runtime_thresholds = _set_threshold_inputs(proto.graph, fixed=fixed_thresholds)
    nms_by: NmsBy = "operators" if {output.name for output in proto.graph.output} >= set(NMS_OUTPUTS) else "none"
    if nms is not None and use_plugin:
        _remove_function(proto, OP)
        nms_by = "plugin"
    if efficient and EFFICIENT_OP in builtin_plugins:
        _remove_function(proto, EFFICIENT_OP)
        nms_by = "plugin"
    if proto.functions:
        proto = _inline_functions(proto)
    return PreparedGraph(proto=proto, nms_by=nms_by, runtime_thresholds=runtime_thresholds)


def _find_node(proto: onnx.ModelProto, op: str) -> onnx.NodeProto | None:
    """Return the node of an op type outside ONNX's own domains, or `None`."""
    return next((node for node in proto.graph.node if node.op_type == op and node.domain not in _ONNX_DOMAINS), None)


def _check_opset(proto: onnx.ModelProto) -> None:
    known = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in _ONNX_DOMAINS and entry.version > known:
            raise EngineError(
                f"The graph uses ONNX operator set {entry.version}; onnx {onnx.__version__} supports sets up to "
                f"{known}.",
                fix="Export it with a lower --opset, or:  pip install -U onnx",
            )


def _remove_function(proto: onnx.ModelProto, name: str) -> None:
    others = [function for function in proto.functions if function.name != name]
    del proto.functions[:]
    proto.functions.extend(others)


def _inline_functions(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError, TypeError, DecodeError) as error:
        raise EngineError(
            f"The functions of the graph cannot be inlined: {error}.",
            fix=EXPORT_AGAIN,
        ) from error


def _add_overflow_output(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Make the node's flag for a full candidate list a graph output; older exports have no such flag."""
    if OVERFLOW not in node.output:
        return
    node.output[:] = [OVERFLOW_OUTPUT if name == OVERFLOW else name for name in node.output]
    shapes = {output.name: output.type.tensor_type.shape.dim for output in graph.output}
    batch = next(iter(shapes.get(NMS_OUTPUTS[0], ())), None)
    size = (batch.dim_param or batch.dim_value) if batch else "batch"
    graph.output.append(helper.make_tensor_value_info(OVERFLOW_OUTPUT, TensorProto.INT32, [size, 1]))


def _set_threshold_inputs(graph: onnx.GraphProto, *, fixed: bool) -> bool:
    """Remove the defaults of the threshold inputs, with which the parser would make them constants, or the inputs.

    Returns:
        Whether the graph has threshold inputs now.
    """
    names = set(THRESHOLD_INPUTS)
    if not names <= {entry.name for entry in graph.input}:
        return False
    if fixed:
        images = [entry for entry in graph.input if entry.name not in names]
        del graph.input[:]
        graph.input.extend(images)
        return False
    weights = [weight for weight in graph.initializer if weight.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    return True


# --- INT8 weights -----------------------------------------------------------------------------------------------------

# Suffixes of new names, after the name of the output of a DequantizeLinear.
_FLOAT, _ROUNDED, _ZERO = "__float", "__rounded", "__zero"


def _store_weights_as_float(graph: onnx.GraphProto) -> None:
    """Replace each int8 constant before a DequantizeLinear by a float32 constant and a QuantizeLinear.

    The float weight is the integer times its scale, rounded once; quantizing divides by the same scale. The error of
    the quotient is below 0.001, so it rounds to the same integer.

    Raises:
        EngineError: Weights, scales or zero points are damaged.
    """
    try:
        nodes, constants = _float_nodes(graph)
    except (ValueError, TypeError, IndexError) as error:
        raise EngineError(f"INT8 weights of the graph are damaged: {error}.", fix=EXPORT_AGAIN) from error
    del graph.node[:]
    graph.node.extend(nodes)
    used = {*_names_read(graph), *(entry.name for entry in (*graph.input, *graph.output))}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *constants])


def _float_nodes(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return all nodes, including the new ones, and the new constants."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []
    for node in graph.node:
        weight = _float_weight(node, stored)
        if weight is not None:
            name = node.output[0]
            scale, zero = node.input[1], node.input[2] if len(node.input) > 2 else ""
            if not zero:  # without a zero point the output of QuantizeLinear is uint8
                zero = f"{name}{_ZERO}"
                constants.append(numpy_helper.from_array(np.zeros(tuple(stored[scale].dims), np.int8), zero))
            constants.append(numpy_helper.from_array(weight, f"{name}{_FLOAT}"))
            rounded = f"{name}{_ROUNDED}"
            quantizer = helper.make_node("QuantizeLinear", [f"{name}{_FLOAT}", scale, zero], [rounded], name=rounded)
            quantizer.attribute.extend(entry for entry in node.attribute if entry.name == "axis")
            nodes.append(quantizer)
            node.input[:] = [rounded, scale, zero]
        nodes.append(node)
    return nodes, constants


def _float_weight(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> npt.NDArray[np.float32] | None:
    """Return the output of a DequantizeLinear of an int8 constant; `None` for other nodes and for block-wise scales."""
    if node.op_type != "DequantizeLinear" or node.domain not in _ONNX_DOMAINS:
        return None
    names = [*node.input, "", "", ""][:3]
    weight, scale, zero = map(stored.get, names)
    if weight is None or weight.data_type != TensorProto.INT8 or scale is None or scale.data_type != TensorProto.FLOAT:
        return None
    if names[2] and zero is None:
        return None
    shape = [1] * len(weight.dims)  # of the scale, for broadcasting
    if prod(scale.dims) != 1:
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        if not -len(shape) <= axis < len(shape) or list(scale.dims) != [weight.dims[axis]]:
            return None
        shape[axis] = scale.dims[0]
    integers = numpy_helper.to_array(weight).astype(np.float32)
    if zero is not None:
        integers -= numpy_helper.to_array(zero).astype(np.float32).reshape(shape)
    with np.errstate(over="ignore", invalid="ignore"):
        weights: npt.NDArray[np.float32] = integers * numpy_helper.to_array(scale).reshape(shape)
    return weights if np.isfinite(weights).all() else None


def _names_read(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names that nodes read, including those of subgraphs."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            yield from _names_read(attribute.g)


# --- files of other exporters -----------------------------------------------------------------------------------------


def _foreign_metadata(path: Path, proto: onnx.ModelProto) -> ModelMetadata:
    """Return the metadata that is assumed by the shapes of inputs and outputs.

    A network whose outputs are not read here can still be quantized or become an engine for another program; then a
    note says so.
    """
    weights = {weight.name for weight in proto.graph.initializer}
    inputs = [_spec(entry) for entry in proto.graph.input if entry.name not in weights]
    outputs = [_spec(entry) for entry in proto.graph.output]
    properties = {entry.key: entry.value for entry in proto.metadata_props}
    try:
        metadata = layout_metadata(find_layout(str(path), inputs, outputs, properties=properties))
    except LoadError as error:
        metadata = _unreadable_metadata(inputs, f"Detector does not read these outputs: {error.message}")
    is_fp16 = any(weight.data_type == TensorProto.FLOAT16 for weight in proto.graph.initializer)
    quantized = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    return replace(metadata, precision="int8" if quantized else "fp16" if is_fp16 else "fp32")


def _unreadable_metadata(inputs: Sequence[TensorSpec], note: str) -> ModelMetadata:
    """Return metadata without classes; sizes are those of the first input, if it is an image."""
    shape = inputs[0].shape if inputs and len(inputs[0].shape) == 4 else (None,) * 4
    is_uint8 = bool(inputs) and inputs[0].dtype == "uint8"
    height, width = shape[1:3] if is_uint8 else shape[2:4]
    metadata = assumed_metadata(
        classes=0,
        input_hw=(height, width) if height and width else None,
        batch=shape[0] or None,
        input_kind="uint8" if is_uint8 else "float32",
        nms=None,
    )
    return replace(metadata, notes=(*metadata.notes, note))


def _spec(entry: onnx.ValueInfoProto) -> TensorSpec:
    """Return name, type and shape of an input or output; `None` is a dynamic dimension."""
    tensor = entry.type.tensor_type
    sizes = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in tensor.shape.dim]
    return TensorSpec(
        name=entry.name,
        dtype=_DTYPES.get(tensor.elem_type, f"type {tensor.elem_type}"),
        shape=tuple(size if size >= 0 else None for size in sizes),
    )
