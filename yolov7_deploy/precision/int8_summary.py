"""Count the INT8 convolutions, their multiply-accumulates and the Q/DQ pairs of a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import onnx
from onnx import TensorProto

from yolov7_deploy.precision.subgraph import infer_tensors

Types: TypeAlias = Mapping[str, onnx.TypeProto.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvolutionSummary:
    """One convolution: its multiply-accumulates per image (`None` for dynamic shapes), and whether it is INT8."""

    name: str
    macs: int | None
    is_int8: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Summary:
    """The INT8 part of a graph: convolutions, Q/DQ pairs, weights and scales.

    Attributes:
        convolutions: All convolutions, in execution order.
        pairs: Number of Q/DQ pairs on activations by the operation that reads them: `Conv`, `Resize`, `Add`, ... A pair
            with several consumers counts as `Conv` if one of them is a convolution.
        weights: Number of DequantizeLinear nodes on int8 weights.
        scales: Number of different activation scales.
        duplicate_pairs: Tensors with more than one pair; there should be none.
    """

    convolutions: tuple[ConvolutionSummary, ...]
    pairs: Mapping[str, int]
    weights: int
    scales: int
    duplicate_pairs: tuple[str, ...]

    @property
    def share(self) -> float | None:
        """Fraction of all multiply-accumulates that INT8 convolutions compute; `None` for dynamic shapes."""
        macs = [convolution.macs for convolution in self.convolutions]
        if not macs or any(count is None for count in macs):
            return None
        int8 = sum(convolution.macs or 0 for convolution in self.convolutions if convolution.is_int8)
        return int8 / sum(count or 0 for count in macs)

    @property
    def int8_convolutions(self) -> int:
        """Number of INT8 convolutions."""
        return sum(convolution.is_int8 for convolution in self.convolutions)


def summarize_int8(proto: onnx.ModelProto) -> Int8Summary:
    """Return the INT8 summary of a graph; nodes inside functions are not counted.

    A convolution is INT8 if its data and its weights are outputs of a DequantizeLinear, and the weights are int8
    values: stored ones, or float ones after a QuantizeLinear, as other quantizers write them.
    """
    graph = proto.graph
    types = {value.name: value.type.tensor_type for value in infer_tensors(proto)}
    producers = {name: node for node in graph.node for name in node.output}
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in graph.initializer}
    dequantizers = [node for node in graph.node if _is_dequantizer(node)]
    pairs = [node for node in dequantizers if node.input[0] not in constants]
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    pairs_of = Counter(node.input[0] for node in quantizers)
    return Int8Summary(
        convolutions=tuple(_summarize_convolutions(graph, producers, types)),
        pairs=dict(Counter(_consumer_op(consumers.get(node.output[0], [])) for node in pairs)),
        weights=sum(node.input[0] in constants and _dequantizes_int8(node, types) for node in dequantizers),
        scales=len({node.input[1] for node in quantizers}),
        duplicate_pairs=tuple(sorted(name for name, count in pairs_of.items() if count > 1)),
    )


def _consumer_op(consumers: Sequence[onnx.NodeProto]) -> str:
    ops = sorted({node.op_type for node in consumers}, key=lambda op: (op != "Conv", op))
    return ops[0] if ops else "nothing"


def _summarize_convolutions(
    graph: onnx.GraphProto, producers: Mapping[str, onnx.NodeProto], types: Types
) -> Iterator[ConvolutionSummary]:
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        data, weight = producers.get(node.input[0]), producers.get(node.input[1])
        yield ConvolutionSummary(
            name=node.name or node.output[0],
            macs=_macs(types.get(node.output[0]), types.get(node.input[1])),
            is_int8=_is_dequantizer(data) and _dequantizes_int8(weight, types),
        )


def _is_dequantizer(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _dequantizes_int8(node: onnx.NodeProto | None, types: Types) -> bool:
    """Return True for a DequantizeLinear of int8 values."""
    if node is None or not _is_dequantizer(node) or node.input[0] not in types:
        return False
    return types[node.input[0]].elem_type == TensorProto.INT8


def _macs(output: onnx.TypeProto.Tensor | None, weight: onnx.TypeProto.Tensor | None) -> int | None:
    """Return the multiply-accumulates per image: every weight is used once per output pixel."""
    if output is None or weight is None:
        return None
    sizes = [int(dim.dim_value) for dim in (*weight.shape.dim, *output.shape.dim[2:])]
    return prod(sizes) if len(output.shape.dim) > 2 and min(sizes) > 0 else None
