"""The part of a graph whose precision can change: all nodes before decoding and NMS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from yolov7_deploy.export.nms import END_PREFIX
from yolov7_deploy.export.onnx_model import OnnxModel

Weight: TypeAlias = npt.NDArray[np.float32]

# Number of leading inputs that are data. The others (roi and scales of Resize) are float32 by definition.
_DATA_INPUTS = {"Resize": 1}
_MAX_SIZE_ELEMENTS = 16


class Network:
    """The nodes before decoding, with the producer and the consumers of each tensor.

    In a graph of this package, they end at the raw head maps that the metadata names. In a third-party graph, all
    nodes belong to the network, and the heads are the outputs of the last convolutions.

    Args:
        model: A float32 graph; it is not modified.

    Attributes:
        proto: The whole graph.
        nodes: In execution order.
        floats: Names of all float32 tensors of the whole graph.
        heads: Names of the raw head maps.
        producers: The node of the network that produces a tensor.
        consumers: The nodes of the whole graph that read a tensor.
    """

    def __init__(self, model: OnnxModel) -> None:
        self.proto = model.proto
        graph = model.proto.graph
        self.nodes = [node for node in graph.node if not is_after_head(node)]
        self.floats = float_tensors(model.proto)
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

    @property
    def convolutions(self) -> list[onnx.NodeProto]:
        """All `Conv` nodes in execution order."""
        return [node for node in self.nodes if node.op_type == "Conv" and not node.domain]

    def _last_convolutions(self) -> Iterator[str]:
        """Yield the outputs of the convolutions whose result reaches no other convolution."""
        reaches_conv: set[str] = set()
        for node in reversed(self.nodes):
            if any(name in reaches_conv for name in node.output):
                reaches_conv.update(node.input)
            elif node.op_type == "Conv":
                yield node.output[0]
            if node.op_type == "Conv":
                reaches_conv.update(node.input)


def is_after_head(node: onnx.NodeProto) -> bool:
    """Return True for the nodes of decoding and NMS."""
    return bool(node.domain) or node.name.startswith(END_PREFIX)


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
