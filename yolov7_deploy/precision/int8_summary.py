"""What of a graph computes in INT8, counted in the graph itself: convolutions, multiply-accumulates, Q/DQ pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import onnx
from onnx import TensorProto

from yolov7_deploy.precision.subgraph import typed_tensors

Types: TypeAlias = Mapping[str, onnx.TypeProto.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvolutionCost:
    """One convolution: its multiply-accumulates an image, `None` where its shape is open, and whether it is INT8."""

    name: str
    macs: int | None
    is_int8: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Int8Account:
    """What of a graph is INT8.

    Attributes:
        convolutions: All of them, in the order they run.
        pairs: Q/DQ pairs on activations, by the kind of their readers: `Conv`, `Resize`, `Add`, ...; a pair with
            readers of several kinds counts as `Conv` if one of them is.
        weights: DequantizeLinear nodes on stored int8 weights.
        scales: Different scales of activations.
        pairs_twice: Tensors with more than one pair, which no rule asks for.
    """

    convolutions: tuple[ConvolutionCost, ...]
    pairs: Mapping[str, int]
    weights: int
    scales: int
    pairs_twice: tuple[str, ...]

    @property
    def share(self) -> float | None:
        """Part of all multiply-accumulates that INT8 convolutions do; `None` where shapes are open."""
        costs = [cost.macs for cost in self.convolutions]
        if not costs or any(macs is None for macs in costs):
            return None
        done = sum(cost.macs or 0 for cost in self.convolutions if cost.is_int8)
        return done / sum(macs or 0 for macs in costs)

    @property
    def int8_convolutions(self) -> int:
        """How many convolutions are INT8."""
        return sum(cost.is_int8 for cost in self.convolutions)


def count_int8(proto: onnx.ModelProto) -> Int8Account:
    """The INT8 account of a graph. Only nodes of the graph count, not those inside functions.

    A convolution is INT8 if its data and its weights both come out of a DequantizeLinear, the weights of int8 values:
    stored ones, or float ones behind a QuantizeLinear, as quantisers of others write them.
    """
    graph = proto.graph
    types = {value.name: value.type.tensor_type for value in typed_tensors(proto)}
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    constants = {tensor.name for tensor in graph.initializer}
    back = [node for node in graph.node if _is_back(node)]
    pairs = [node for node in back if node.input[0] not in constants]
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    given = Counter(node.input[0] for node in quantizers)
    return Int8Account(
        convolutions=tuple(_costs(graph, makers, types)),
        pairs=dict(Counter(_kind(readers.get(node.output[0], [])) for node in pairs)),
        weights=sum(node.input[0] in constants and _reads_int8(node, types) for node in back),
        scales=len({node.input[1] for node in quantizers}),
        pairs_twice=tuple(sorted(name for name, count in given.items() if count > 1)),
    )


def _kind(readers: list[onnx.NodeProto]) -> str:
    kinds = sorted({node.op_type for node in readers}, key=lambda kind: (kind != "Conv", kind))
    return kinds[0] if kinds else "nothing"


def _costs(graph: onnx.GraphProto, makers: Mapping[str, onnx.NodeProto], types: Types) -> Iterator[ConvolutionCost]:
    for node in graph.node:
        if node.op_type != "Conv":
            continue
        yield ConvolutionCost(
            name=node.name or node.output[0],
            macs=_macs(types.get(node.output[0]), types.get(node.input[1])),
            is_int8=_is_back(makers.get(node.input[0])) and _reads_int8(makers.get(node.input[1]), types),
        )


def _is_back(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _reads_int8(node: onnx.NodeProto | None, types: Types) -> bool:
    """It is a DequantizeLinear of int8 values."""
    if node is None or not _is_back(node) or node.input[0] not in types:
        return False
    return types[node.input[0]].elem_type == TensorProto.INT8


def _macs(made: onnx.TypeProto.Tensor | None, weight: onnx.TypeProto.Tensor | None) -> int | None:
    """Multiply-accumulates an image: one for each weight at each place of the result."""
    if made is None or weight is None:
        return None
    sides = [int(side.dim_value) for side in (*weight.shape.dim, *made.shape.dim[2:])]
    return prod(sides) if len(made.shape.dim) > 2 and min(sides) > 0 else None
