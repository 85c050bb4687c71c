"""An ONNX graph as TensorRT shall see it: who suppresses is decided here and not by the parser.

Between 9.0 and 10.6 the parser prefers a function's body to a registered plugin, before and after it is the other way
round. So the function goes where a plugin takes the node, and is inlined where none does.

TensorRT before 10 takes INT8 weights as float32 with a QuantizeLinear and a DequantizeLinear, and no int8 constants.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, inliner, numpy_helper

from yolov7_deploy.errors import EngineError, LoadError
from yolov7_deploy.export.nms import CONF_INPUT, EFFICIENT_OP, IOU_INPUT, OP, OVERFLOW
from yolov7_deploy.export.onnx_model import NMS_OUTPUTS, OnnxModel
from yolov7_deploy.metadata import METADATA_KEY, InputKind, ModelMetadata, NmsMetadata, foreign_metadata
from yolov7_deploy.tensorrt.build_record import NmsBy

logger = logging.getLogger(__name__)

OVERFLOW_OUTPUT = "overflow"
EXPORT_AGAIN = "Export the weights here:  y7 export --weights WEIGHTS.pt"
_ONNX_DOMAINS = ("", "ai.onnx")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedGraph:
    """What TensorRT parses.

    Attributes:
        proto: The graph.
        nms_by: Who suppresses in it.
        runtime_thresholds: The thresholds are inputs without a default.
    """

    proto: onnx.ModelProto
    nms_by: NmsBy
    runtime_thresholds: bool


def open_onnx(path: Path) -> OnnxModel:
    """The model in an ONNX file; one without metadata opens with a warning, and metadata that says what it assumes.

    Raises:
        LoadError: The file is absent, empty, cut off or no ONNX.
    """
    fix = "Export it:  y7 export --weights yolov7"
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
        if not proto.graph.node:
            raise LoadError(f"{path} is no ONNX file, or an empty one: it has no nodes.", fix=fix)
        if any(weight.data_location == TensorProto.EXTERNAL for weight in proto.graph.initializer):
            onnx.load_external_data_for_model(proto, str(path.parent))
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error.strerror or error}.", fix="Check the path.") from error
    except (DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise LoadError(f"{path} is not an ONNX file, or cut off.", fix=fix) from error
    try:
        metadata = {entry.key: entry.value for entry in proto.metadata_props}.get(METADATA_KEY)
        metadata = _foreign_metadata(proto) if metadata is None else ModelMetadata.from_json(metadata)
    except UnicodeDecodeError as error:
        raise LoadError(f"{path} is damaged: a name in it is no text.", fix=fix) from error
    if metadata is not None:
        return OnnxModel(proto, metadata)
    logger.warning("%s: %s", path, "; ".join(metadata.notes))
    return OnnxModel(proto, metadata)


def has_own_nms(proto: onnx.ModelProto) -> bool:
    """Our NMS node is in it, which our plugin can take."""
    return _node(proto, OP) is not None


def prepare_graph(
    model: OnnxModel, *, own_plugin: bool, plugins: Collection[str] = (), float_weights: bool = False
) -> PreparedGraph:
    """A copy of the graph for a TensorRT.

    Args:
        model: As exported.
        own_plugin: Our plugin takes our node.
        plugins: Names of the plugins that TensorRT comes with.
        float_weights: INT8 weights become float32 with a QuantizeLinear, which gives back the same INT8.

    Raises:
        EngineError: Its operator set is unknown, or it is damaged.
    """
    try:
        prepared = _prepared(model, own_plugin=own_plugin, plugins=plugins)
        if float_weights:
            _with_float_weights(prepared.proto.graph)
        return prepared
    except UnicodeDecodeError as error:  # names are decoded when they are read, not when the file is
        raise EngineError(f"The graph is damaged: a name in it is no text ({error}).", fix=EXPORT_AGAIN) from error


def _prepared(model: OnnxModel, *, own_plugin: bool, plugins: Collection[str]) -> PreparedGraph:
    _check_opset(model.proto)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    efficient = _node(proto, EFFICIENT_OP) is not None
    own = _node(proto, OP)
    if own is not None:
        _offer_overflow(proto.graph, own)
    thresholds = _open_thresholds(proto.graph)
    nms_by: NmsBy = "operators" if {output.name for output in proto.graph.output} >= set(NMS_OUTPUTS) else "none"
    if own is not None and own_plugin:
        _drop_function(proto, OP)
        nms_by = "plugin"
    if efficient and EFFICIENT_OP in plugins:
        _drop_function(proto, EFFICIENT_OP)
        nms_by = "plugin"
    if proto.functions:
        proto = _inlined(proto)
    return PreparedGraph(proto=proto, nms_by=nms_by, runtime_thresholds=thresholds)


def graph_digest(proto: onnx.ModelProto) -> str:
    """SHA-256 of a graph; that of the file, if this package wrote it."""
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def _node(proto: onnx.ModelProto, op: str) -> onnx.NodeProto | None:
    """The node of one of our op types; foreign nodes of the same name live in other domains."""
    return next((node for node in proto.graph.node if node.op_type == op and node.domain not in _ONNX_DOMAINS), None)


def _check_opset(proto: onnx.ModelProto) -> None:
    known = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if entry.domain in _ONNX_DOMAINS and entry.version > known:
            raise EngineError(
                f"The graph is written in ONNX operator set {entry.version}; onnx {onnx.__version__} knows sets up to "
                f"{known}.",
                fix="Export it with a lower --opset, or:  pip install -U onnx",
            )


def _drop_function(proto: onnx.ModelProto, name: str) -> None:
    others = [function for function in proto.functions if function.name != name]
    del proto.functions[:]
    proto.functions.extend(others)


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError, TypeError, DecodeError) as error:
        raise EngineError(
            f"The functions of the graph cannot be put in place of their nodes: {error}.",
            fix=EXPORT_AGAIN,
        ) from error


def _offer_overflow(graph: onnx.GraphProto, node: onnx.NodeProto) -> None:
    """Makes the node's flag for a full candidate list an output; files of older exports have none."""
    if OVERFLOW not in node.output:
        return
    node.output[:] = [OVERFLOW_OUTPUT if name == OVERFLOW else name for name in node.output]
    shapes = {output.name: output.type.tensor_type.shape.dim for output in graph.output}
    batch = next(iter(shapes.get(NMS_OUTPUTS[0], ())), None)
    size = (batch.dim_param or batch.dim_value) if batch else "batch"
    graph.output.append(helper.make_tensor_value_info(OVERFLOW_OUTPUT, TensorProto.INT32, [size, 1]))


def _open_thresholds(graph: onnx.GraphProto) -> bool:
    """Takes the defaults away from the threshold inputs; with a default, the parser makes constants of them."""
    names = {CONF_INPUT, IOU_INPUT}
    if not names <= {entry.name for entry in graph.input}:
        return False
    weights = [weight for weight in graph.initializer if weight.name not in names]
    del graph.initializer[:]
    graph.initializer.extend(weights)
    return True


# --- INT8 weights -----------------------------------------------------------------------------------------------------

_FLOAT, _ROUNDED, _ZERO = "__float", "__rounded", "__zero"  # behind the name of what a DequantizeLinear gives


def _with_float_weights(graph: onnx.GraphProto) -> None:
    """Puts a float32 constant and a QuantizeLinear in front of each DequantizeLinear of an int8 constant.

    A float weight is a step times its scale, rounded once; quantising divides by the same scale. The quotient is off
    by less than a thousandth of a step, so it rounds to the step that it came from.

    Raises:
        EngineError: Weights, scales and zero points are damaged.
    """
    try:
        nodes, made = _float_nodes(graph)
    except (ValueError, TypeError, IndexError) as error:
        raise EngineError(f"INT8 weights of the graph are damaged: {error}.", fix=EXPORT_AGAIN) from error
    del graph.node[:]
    graph.node.extend(nodes)
    read = {*_read(graph), *(entry.name for entry in (*graph.input, *graph.output))}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *made])


def _float_nodes(graph: onnx.GraphProto) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """All nodes, and the constants that are new."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    made: list[onnx.TensorProto] = []
    for node in graph.node:
        weight = _float_weight(node, stored)
        if weight is not None:
            name = node.output[0]
            scale, zero = node.input[1], node.input[2] if len(node.input) > 2 else ""
            if not zero:  # without one, QuantizeLinear would make uint8
                zero = f"{name}{_ZERO}"
                made.append(numpy_helper.from_array(np.zeros(tuple(stored[scale].dims), np.int8), zero))
            made.append(numpy_helper.from_array(weight, f"{name}{_FLOAT}"))
            rounded = f"{name}{_ROUNDED}"
            quantizer = helper.make_node("QuantizeLinear", [f"{name}{_FLOAT}", scale, zero], [rounded], name=rounded)
            quantizer.attribute.extend(entry for entry in node.attribute if entry.name == "axis")
            nodes.append(quantizer)
            node.input[:] = [rounded, scale, zero]
        nodes.append(node)
    return nodes, made


def _float_weight(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> npt.NDArray[np.float32] | None:
    """What a DequantizeLinear of an int8 constant gives; `None` for another node, and for scales block by block."""
    if node.op_type != "DequantizeLinear" or node.domain not in _ONNX_DOMAINS:
        return None
    names = [*node.input, "", "", ""][:3]
    weight, scale, zero = map(stored.get, names)
    if weight is None or weight.data_type != TensorProto.INT8 or scale is None or scale.data_type != TensorProto.FLOAT:
        return None
    if names[2] and zero is None:
        return None
    sides = [1] * len(weight.dims)
    if prod(scale.dims) != 1:
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        if not -len(sides) <= axis < len(sides) or list(scale.dims) != [weight.dims[axis]]:
            return None
        sides[axis] = scale.dims[0]
    steps = numpy_helper.to_array(weight).astype(np.float32)
    if zero is not None:
        steps -= numpy_helper.to_array(zero).astype(np.float32).reshape(sides)
    with np.errstate(over="ignore", invalid="ignore"):
        weights: npt.NDArray[np.float32] = steps * numpy_helper.to_array(scale).reshape(sides)
    return weights if np.isfinite(weights).all() else None


def _read(graph: onnx.GraphProto) -> Iterator[str]:
    """What nodes read, those of graphs inside nodes too."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            yield from _read(attribute.g)


# --- files of others --------------------------------------------------------------------------------------------------


def _foreign_metadata(proto: onnx.ModelProto) -> ModelMetadata:
    """What the shapes of inputs and outputs tell."""
    weights = {weight.name for weight in proto.graph.initializer}
    inputs = [entry for entry in proto.graph.input if entry.name not in weights]
    outputs = {entry.name: _sides(entry) for entry in proto.graph.output}
    image = _sides(inputs[0]) if inputs else []
    is_uint8 = bool(inputs) and inputs[0].type.tensor_type.elem_type == TensorProto.UINT8
    kind: InputKind = "uint8" if is_uint8 else "float32"
    hw = (image[1:3] if is_uint8 else image[2:4]) if len(image) == 4 else []
    nms = None
    if set(NMS_OUTPUTS) <= set(outputs):
        boxes = outputs[NMS_OUTPUTS[1]]
        nms = NmsMetadata(
            kind="efficient",
            conf=0.0,
            iou=0.45,
            max_det=boxes[1] if len(boxes) == 3 and boxes[1] > 0 else 100,
            max_candidates=0,
            multi_label=True,
            class_agnostic=False,
            runtime_thresholds=False,
        )
    last = next(iter(outputs.values()), [])
    classes = last[-1] - 5 if nms is None and len(last) == 3 else 0
    halves = any(weight.data_type == TensorProto.FLOAT16 for weight in proto.graph.initializer)
    quantized = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
    metadata = foreign_metadata(
        classes=max(0, classes),
        input_hw=(hw[0], hw[1]) if hw and min(hw) > 0 else None,
        batch=image[0] if image and image[0] > 0 else None,
        input_kind=kind,
        nms=nms,
    )
    return replace(metadata, precision="int8" if quantized else "fp16" if halves else "fp32")


def _sides(entry: onnx.ValueInfoProto) -> list[int]:
    """The shape, -1 where a dimension is open."""
    return [side.dim_value if side.HasField("dim_value") else -1 for side in entry.type.tensor_type.shape.dim]
