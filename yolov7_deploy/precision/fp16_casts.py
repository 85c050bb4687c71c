"""Casts between float32 and half, put wherever a value is not of the type that its reader wants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from yolov7_deploy.errors import ExportError
from yolov7_deploy.export.nms import OP
from yolov7_deploy.precision.subgraph import captured, data_of

_HALF, _FLOAT = "__half", "__float32"  # of the names of casts


def pinned(graph: onnx.GraphProto) -> set[str]:
    """Tensors that must keep their type: outputs of the graph, and what graphs inside nodes take from outside."""
    return {output.name for output in graph.output} | {name for node in graph.node for name in captured(node)}


class Caster:
    """Writes a graph again with half tensors, and a cast wherever a value is not of the type its reader wants.

    Args:
        proto: The float32 graph; copied.
        floats: Its float32 tensors.
        half: Those of them that nodes shall make as half.
        heads: The raw maps.

    Attributes:
        weights: New names of the weights that become half.
    """

    def __init__(self, proto: onnx.ModelProto, *, floats: set[str], half: set[str], heads: Sequence[str]) -> None:
        self._proto = onnx.ModelProto()
        self._proto.CopyFrom(proto)
        self._floats, self._half = floats, half
        self._all_heads_half = half.issuperset(heads)
        self.weights = self._half_weights()
        self._casts: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []

    def written(self) -> onnx.ModelProto:
        """The graph in half."""
        graph = self._proto.graph
        for node in graph.node:
            if node.op_type != "Cast":  # takes any type
                self._retype_inputs(node)
            self._nodes.append(node)
        del graph.node[:]
        graph.node.extend(self._nodes)
        self._halve_weights(graph)
        for value in graph.value_info:
            if value.name in self._half:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        return self._proto

    def _half_weights(self) -> dict[str, str]:
        """New names of the weights that become half: the old ones, unless somebody reads them as float32 too."""
        graph = self._proto.graph
        as_half = {name for node in graph.node if self._is_half(node) for name in data_of(node)}
        # What callers may feed, and what graphs inside nodes see, is float32 from outside.
        as_float = pinned(graph) | {entry.name for entry in graph.input}
        for node in graph.node:
            as_float.update(node.input[len(data_of(node)) :] if self._is_half(node) else node.input)
        weights = [tensor.name for tensor in graph.initializer if tensor.name in self._floats & as_half]
        return {name: f"{name}{_HALF}" if name in as_float else name for name in weights}

    def _is_half(self, node: onnx.NodeProto) -> bool:
        return node.output[0] in self._half

    def _retype_inputs(self, node: onnx.NodeProto) -> None:
        data = len(data_of(node)) if self._is_half(node) else 0
        for index, name in enumerate(node.input):
            if name not in self._floats:
                continue
            if index < data and name in self.weights:
                node.input[index] = self.weights[name]
            elif node.op_type == OP and self._all_heads_half and name in self._half:
                continue  # the plugin takes half, but all maps of one type
            elif (index < data) != (name in self._half):
                node.input[index] = self._cast(name)

    def _cast(self, name: str) -> str:
        """The value in the other type, in front of its first reader; one cast serves all."""
        if name not in self._casts:
            suffix, kind = (_FLOAT, TensorProto.FLOAT) if name in self._half else (_HALF, TensorProto.FLOAT16)
            self._casts[name] = name + suffix
            self._nodes.append(helper.make_node("Cast", [name], [name + suffix], name=name + suffix, to=kind))
        return self._casts[name]

    def _halve_weights(self, graph: onnx.GraphProto) -> None:
        for tensor in list(graph.initializer):
            if tensor.name in self.weights:
                halved = numpy_helper.from_array(as_half(numpy_helper.to_array(tensor)), self.weights[tensor.name])
                if halved.name == tensor.name:
                    tensor.CopyFrom(halved)
                else:
                    graph.initializer.append(halved)


def as_half(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """The nearest half values."""
    return values.astype(np.float16)


def check_types(proto: onnx.ModelProto) -> None:
    """ONNX's own rules, strictly: TensorRT takes the types of the file at their word.

    Raises:
        ExportError: They are broken.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(
            f"The graph is not valid with its new types: {str(error).strip().splitlines()[0]}",
            fix="Export it again with this version:  y7 export --weights WEIGHTS.pt",
        ) from error
