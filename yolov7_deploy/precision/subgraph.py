"""The part of a graph that precision is about: what stands in front of decoding."""

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

# Inputs behind this one are no data: roi and scales of Resize are float32 by its definition.
_DATA_INPUTS = {"Resize": 1}
_LONGEST_SIZE = 16


class Network:
    """The nodes in front of decoding, and who makes and reads their tensors.

    In a graph of ours they end at the head maps that the metadata names. In a foreign one, all nodes count, and the
    heads are what the last convolutions make.

    Args:
        model: A float32 graph; it is not changed.

    Attributes:
        proto: Its graph.
        nodes: In the order they run.
        floats: Names of all float32 tensors of the whole graph.
        weights: float32 initializers by name.
        heads: Maps at which it ends.
        makers: The node that makes a tensor.
        readers: The nodes of the whole graph that read a tensor.
    """

    def __init__(self, model: OnnxModel) -> None:
        self.proto = model.proto
        graph = model.proto.graph
        self.nodes = [node for node in graph.node if not is_behind_head(node)]
        self.floats = float_tensors(model.proto)
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(read_by(node)):
                self.readers.setdefault(name, []).append(node)
        self._stored = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT}
        self.heads = tuple(model.metadata.heads) or tuple(self._last_convolutions())

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """float32 initializers by name."""
        return {name: numpy_helper.to_array(tensor) for name, tensor in self._stored.items()}

    @property
    def convolutions(self) -> list[onnx.NodeProto]:
        """All `Conv` nodes in the order they run."""
        return [node for node in self.nodes if node.op_type == "Conv" and not node.domain]

    def _last_convolutions(self) -> Iterator[str]:
        """Convolutions behind which there is no other."""
        has_behind: set[str] = set()
        for node in reversed(self.nodes):
            if any(name in has_behind for name in node.output):
                has_behind.update(node.input)
            elif node.op_type == "Conv":
                yield node.output[0]
            if node.op_type == "Conv":
                has_behind.update(node.input)


def is_behind_head(node: onnx.NodeProto) -> bool:
    """The node decodes or suppresses."""
    return bool(node.domain) or node.name.startswith(END_PREFIX)


def data_of(node: onnx.NodeProto) -> Sequence[str]:
    """The inputs of a node that are data."""
    return list(node.input)[: _DATA_INPUTS.get(node.op_type)]


def half_weight(graph: onnx.GraphProto) -> str | None:
    """Name of a weight that is half already, if there is one."""
    low = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    return next((tensor.name for tensor in graph.initializer if tensor.data_type in low), None)


def read_by(node: onnx.NodeProto) -> Sequence[str]:
    """Everything a node reads, also by the graphs inside it."""
    return (*node.input, *captured(node))


def captured(node: onnx.NodeProto) -> Iterator[str]:
    """What graphs inside a node take from outside."""
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from inner.input
            yield from captured(inner)


def float_tensors(proto: onnx.ModelProto) -> set[str]:
    """Names of all float32 tensors of the graph."""
    return {v.name for v in typed_tensors(proto) if v.type.tensor_type.elem_type == TensorProto.FLOAT}


def typed_tensors(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Type and shape of every tensor that ONNX can infer them of."""
    graph = proto.graph
    weights = [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in graph.initializer]
    given = {value.name: value for value in [*weights, *graph.input]}
    # Without the weights themselves, which are copied three times on the way and say nothing about types; sizes, which
    # are short, say much about shapes.
    sizes = [tensor for tensor in graph.initializer if len(tensor.dims) <= 1 and sum(tensor.dims) <= _LONGEST_SIZE]
    bare = helper.make_graph(graph.node, "types", list(given.values()), graph.output, initializer=sizes)
    model = helper.make_model(
        bare, opset_imports=proto.opset_import, ir_version=proto.ir_version, functions=proto.functions
    )
    inferred = shape_inference.infer_shapes(model).graph
    return [*inferred.input, *inferred.value_info, *inferred.output]
