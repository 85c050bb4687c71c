"""The part of a graph whose precision can change: all nodes before decoding and NMS."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from yolov7_deploy.onnx_export.nms import END_PREFIX
from yolov7_deploy.onnx_export.onnx_model import OnnxModel

Weight: TypeAlias = npt.NDArray[np.float32]

# Number of leading inputs that are data. The others (roi and scales of Resize) are float32 by definition.
_DATA_INPUTS = {"Resize": 1}
_MAX_SIZE_ELEMENTS = 16
_LONG_DOMAIN = "ai.onnx"  # the same as ""
_ONNX_DOMAINS = ("", _LONG_DOMAIN)
_SEPARATE_INITIALIZERS = 4  # the first IR version in which an initializer need not be an input
# Attributes of `Constant` and their types; the value of `value` is a tensor.
_CONSTANT_TYPES: dict[str, type[np.generic] | None] = {
    "value": None,
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


class Network:
    """The nodes before decoding, with the producer and the consumers of each tensor.

    In a graph of this package, they end at the raw head maps that the metadata names. In a third-party graph, all
    nodes belong to the network except custom operators after the last convolutions (such as NMS), and the heads are
    the outputs of the last convolutions.

    Args:
        model: A float32 graph; it is not modified.

    Attributes:
        proto: The whole graph. Constants of third-party graphs are initializers in it; see `with_initializers`.
        nodes: In execution order.
        floats: Names of all float32 tensors of the whole graph.
        heads: Names of the raw head maps.
        producers: The node of the network that produces a tensor.
        consumers: The nodes of the whole graph that read a tensor.
    """

    def __init__(self, model: OnnxModel) -> None:
        self.proto = with_initializers(model.proto)
        graph = self.proto.graph
        self.nodes = _network_nodes(graph.node, is_ours=bool(model.metadata.heads))
        self.floats = float_tensors(self.proto)
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node_inputs(node)):
                self.consumers.setdefault(name, []).append(node)
        self._initializers = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self.heads = tuple(model.metadata.heads) or tuple(self._last_convolutions())

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """float32 initializers by name."""
        return {name: numpy_helper.to_array(tensor) for name, tensor in self._initializers.items()}

    @cached_property
    def initializers(self) -> set[str]:
        """Names of all initializers, of any type."""
        return {tensor.name for tensor in self.proto.graph.initializer}

    @property
    def convolutions(self) -> list[onnx.NodeProto]:
        """All `Conv` nodes in execution order."""
        return [node for node in self.nodes if is_convolution(node)]

    def _last_convolutions(self) -> Iterator[str]:
        """Yield the outputs of the convolutions whose result reaches no other convolution."""
        reaches_conv: set[str] = set()
        for node in reversed(self.nodes):
            if any(name in reaches_conv for name in node.output):
                reaches_conv.update(node.input)
            elif is_convolution(node):
                yield node.output[0]
            if is_convolution(node):
                reaches_conv.update(node.input)


def is_custom(node: onnx.NodeProto) -> bool:
    """Return True for an operator outside ONNX's own domain."""
    return node.domain not in _ONNX_DOMAINS


def is_convolution(node: onnx.NodeProto) -> bool:
    """Return True for ONNX's own convolution."""
    return node.op_type == "Conv" and not is_custom(node)


def _network_nodes(nodes: Sequence[onnx.NodeProto], *, is_ours: bool) -> list[onnx.NodeProto]:
    """Return the nodes before decoding and NMS, in execution order."""
    if is_ours:
        return [node for node in nodes if not is_custom(node) and not node.name.startswith(END_PREFIX)]
    reaches_conv: set[str] = set()
    before = set()
    for number, node in reversed(list(enumerate(nodes))):
        if is_convolution(node) or reaches_conv.intersection(node.output):
            before.add(number)
            reaches_conv.update(node_inputs(node))
    left_out: set[str] = set()
    kept = []
    for number, node in enumerate(nodes):
        if number in before or not (is_custom(node) or left_out.intersection(node_inputs(node))):
            kept.append(node)
        else:
            left_out.update(node.output)
    return kept


def with_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph in which constants are initializers; other exporters write some of them as nodes.

    These are `Constant` nodes, and `Identity` nodes of initializers, with which PyTorch shares a weight. ONNX's own
    domain gets its usual, empty name. A graph with nothing to change is returned as it is.
    """
    outputs = {output.name for output in proto.graph.output}
    known = {tensor.name: tensor for tensor in proto.graph.initializer}
    constants: dict[int, onnx.TensorProto] = {}
    for number, node in enumerate(proto.graph.node):
        if is_custom(node) or node.name.startswith(END_PREFIX) or outputs.intersection(node.output):
            continue
        value = _constant(node, known)
        if value is not None:
            constants[number] = known[value.name] = value
    has_long_domain = any(node.domain == _LONG_DOMAIN for node in proto.graph.node)
    if not constants and not has_long_domain:
        return proto
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.ir_version = max(copy.ir_version, _SEPARATE_INITIALIZERS)
    kept = [node for number, node in enumerate(copy.graph.node) if number not in constants]
    versions: dict[str, int] = {}
    for entry in copy.opset_import:
        domain = "" if entry.domain == _LONG_DOMAIN else entry.domain
        versions[domain] = max(entry.version, versions.get(domain, 0))
    del copy.opset_import[:]
    copy.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())
    for node in kept:
        node.domain = "" if node.domain == _LONG_DOMAIN else node.domain
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(constants.values())
    return copy


def _constant(node: onnx.NodeProto, known: Mapping[str, onnx.TensorProto]) -> onnx.TensorProto | None:
    """Return the numeric constant that a node produces, with the name of its output; `None` for other nodes."""
    if node.op_type == "Identity" and node.input[0] in known:
        tensor = known[node.input[0]]
    elif node.op_type == "Constant" and node.attribute and node.attribute[0].name in _CONSTANT_TYPES:
        dtype, value = _CONSTANT_TYPES[node.attribute[0].name], helper.get_attribute_value(node.attribute[0])
        tensor = value if dtype is None else numpy_helper.from_array(np.array(value, dtype))
    else:
        return None
    named = onnx.TensorProto()
    named.CopyFrom(tensor)
    named.name = node.output[0]
    return named


def data_inputs(node: onnx.NodeProto) -> Sequence[str]:
    """Return the inputs of a node that are data, not parameters such as scales."""
    return list(node.input)[: _DATA_INPUTS.get(node.op_type)]


def find_fp16_weight(graph: onnx.GraphProto) -> str | None:
    """Return the name of a weight that is FP16 or bfloat16; `None` if there is none."""
    low = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    return next((tensor.name for tensor in graph.initializer if tensor.data_type in low), None)


def node_inputs(node: onnx.NodeProto) -> Sequence[str]:
    """Return every tensor that a node reads, including those read by its subgraphs."""
    return (*node.input, *captured_inputs(node))


def captured_inputs(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that the subgraphs of a node (If, Loop) read; some of them are from the outer scope."""
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from inner.input
            yield from captured_inputs(inner)


def float_tensors(proto: onnx.ModelProto) -> set[str]:
    """Return the names of all float32 tensors of the graph."""
    return {v.name for v in infer_tensors(proto) if v.type.tensor_type.elem_type == TensorProto.FLOAT}


def infer_tensors(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return type and shape of every tensor for which ONNX can infer them."""
    graph = proto.graph
    weights = [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in graph.initializer]
    given = {value.name: value for value in [*weights, *graph.input]}
    # Weights are left out: shape inference would copy them three times, and their values do not affect any type.
    # Short tensors stay, because they may hold sizes, on which shapes depend.
    sizes = [t for t in graph.initializer if len(t.dims) <= 1 and sum(t.dims) <= _MAX_SIZE_ELEMENTS]
    bare = helper.make_graph(graph.node, "types", list(given.values()), graph.output, initializer=sizes)
    model = helper.make_model(
        bare, opset_imports=proto.opset_import, ir_version=proto.ir_version, functions=proto.functions
    )
    inferred = shape_inference.infer_shapes(model).graph
    return [*inferred.input, *inferred.value_info, *inferred.output]
