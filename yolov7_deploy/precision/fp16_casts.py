"""Rewrite a float32 graph so that some tensors are FP16, with a Cast wherever a consumer needs the other type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from yolov7_deploy.errors import ExportError
from yolov7_deploy.export.nms import OP
from yolov7_deploy.precision.subgraph import captured_inputs, data_inputs

_FP16, _FLOAT = "__half", "__float32"  # suffixes of the names of casts


def fixed_type_tensors(graph: onnx.GraphProto) -> set[str]:
    """Return the tensors that must stay float32: outputs of the graph, and what subgraphs read from outside."""
    return {output.name for output in graph.output} | {name for node in graph.node for name in captured_inputs(node)}


class Fp16Rewriter:
    """Convert weights and tensors of a graph to FP16 and insert the casts.

    Args:
        proto: The float32 graph; it is copied.
        floats: Its float32 tensors.
        fp16: Those of them that nodes will produce in FP16.
        heads: The raw head maps.

    Attributes:
        weights: New names of the weights that become FP16.
    """

    def __init__(self, proto: onnx.ModelProto, *, floats: set[str], fp16: set[str], heads: Sequence[str]) -> None:
        self._proto = onnx.ModelProto()
        self._proto.CopyFrom(proto)
        self._floats, self._fp16 = floats, fp16
        self._all_heads_fp16 = fp16.issuperset(heads)
        self.weights = self._fp16_weights()
        self._casts: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []

    def rewrite(self) -> onnx.ModelProto:
        """Return the rewritten graph; call it once."""
        graph = self._proto.graph
        for node in graph.node:
            if node.op_type != "Cast":  # accepts any type
                self._retype_inputs(node)
            self._nodes.append(node)
        del graph.node[:]
        graph.node.extend(self._nodes)
        self._convert_weights(graph)
        for value in graph.value_info:
            if value.name in self._fp16:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
        return self._proto

    def _fp16_weights(self) -> dict[str, str]:
        """Return the new names of the weights that become FP16; unchanged if no consumer needs float32 as well."""
        graph = self._proto.graph
        read_as_fp16 = {name for node in graph.node if self._is_fp16(node) for name in data_inputs(node)}
        # Graph inputs, which callers may feed, and tensors that subgraphs read are float32.
        read_as_float = fixed_type_tensors(graph) | {entry.name for entry in graph.input}
        for node in graph.node:
            read_as_float.update(node.input[len(data_inputs(node)) :] if self._is_fp16(node) else node.input)
        weights = [tensor.name for tensor in graph.initializer if tensor.name in self._floats & read_as_fp16]
        return {name: f"{name}{_FP16}" if name in read_as_float else name for name in weights}

    def _is_fp16(self, node: onnx.NodeProto) -> bool:
        return node.output[0] in self._fp16

    def _retype_inputs(self, node: onnx.NodeProto) -> None:
        data = len(data_inputs(node)) if self._is_fp16(node) else 0
        for index, name in enumerate(node.input):
            if name not in self._floats:
                continue
            if index < data and name in self.weights:
                node.input[index] = self.weights[name]
            elif node.op_type == OP and self._all_heads_fp16 and name in self._fp16:
                continue  # the plugin accepts FP16 if all heads have it
            elif (index < data) != (name in self._fp16):
                node.input[index] = self._cast(name)

    def _cast(self, name: str) -> str:
        """Return the tensor in the other type; one cast, before the first consumer, serves all consumers."""
        if name not in self._casts:
            suffix, kind = (_FLOAT, TensorProto.FLOAT) if name in self._fp16 else (_FP16, TensorProto.FLOAT16)
            self._casts[name] = name + suffix
            self._nodes.append(helper.make_node("Cast", [name], [name + suffix], name=name + suffix, to=kind))
        return self._casts[name]

    def _convert_weights(self, graph: onnx.GraphProto) -> None:
        for tensor in list(graph.initializer):
            if tensor.name in self.weights:
                values = to_float16(numpy_helper.to_array(tensor))
                converted = numpy_helper.from_array(values, self.weights[tensor.name])
                if converted.name == tensor.name:
                    tensor.CopyFrom(converted)
                else:
                    graph.initializer.append(converted)


def to_float16(values: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Return the nearest FP16 values."""
    return values.astype(np.float16)


def check_valid(proto: onnx.ModelProto) -> None:
    """Check a graph with ONNX's full checker: TensorRT requires that all types in the file are exact.

    Raises:
        ExportError: The graph is invalid.
    """
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise ExportError(
            f"The graph is not valid with its new types: {str(error).strip().splitlines()[0]}",
            fix="Export it again with this version:  y7 export --weights WEIGHTS.pt",
        ) from error
