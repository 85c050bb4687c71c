"""Where Q/DQ pairs go: the rules by which a graph becomes INT8 without a float island between two convolutions.

1. A convolution reads its data, and its weights, through a pair; its result and its bias stay float, so that the
   runtime may fuse the activation behind it and quantise once.
2. A tensor has one pair, which all its quantised readers share.
3. What passes values on (Concat, MaxPool, nearest Resize, slices) has one scale for all its inputs and outputs, so that
   it commutes with quantisation and moves bytes.
4. An upsampling Resize reads through a pair as well: quantising first moves a quarter of the bytes.
5. A residual Add reads both its terms through pairs of one scale.
6. The last convolutions, decoding and NMS stay float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from yolov7_deploy.precision.subgraph import Network

HEAD_REASON = "head: what decoding reads stays float"
# What a runtime may compute inside the kernel of the convolution in front of it.
ACTIVATIONS = frozenset({"Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu", "Sigmoid"})
# They give values that they read, and no others. Inputs behind the number are sizes.
PASSING = {
    "Concat": None,
    "MaxPool": 1,
    "Resize": 1,
    "Slice": 1,
    "Split": 1,
    "Identity": 1,
    "Transpose": 1,
    "Reshape": 1,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What becomes INT8.

    Attributes:
        convolutions: Outputs of the convolutions that compute in INT8.
        pairs: Tensors with a Q/DQ pair, and the readers (by their first output) that take it.
        groups: For each tensor with a pair, the tensors whose values share its scale, sorted; their first names it.
        kept: Convolutions that stay float, by output, and why.
        islands: Nodes that compute in float between INT8 convolutions, by output, and their operation. YOLOv7 has none.
    """

    convolutions: tuple[str, ...]
    pairs: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, tuple[str, ...]]
    kept: Mapping[str, str]
    islands: Mapping[str, str]


def place(network: Network, spared: Mapping[str, str]) -> Placement:
    """Where pairs go in a network.

    Args:
        network: Whose convolutions shall be INT8.
        spared: Outputs of convolutions that shall stay float, and why.
    """
    kept = {node.output[0]: reason for node in network.convolutions if (reason := _reason(network, node, spared))}
    quantized = [node for node in network.convolutions if node.output[0] not in kept]
    readers: dict[str, list[str]] = {}
    for node in quantized:
        readers.setdefault(node.input[0], []).append(node.output[0])
    wanted = _wanted(network, set(readers))
    for node in network.nodes:
        adds = _is_residual(network, node) and bool(wanted.intersection(node.output))
        upsamples = node.op_type == "Resize" and is_passing(node) and bool(wanted.intersection(node.output))
        for name in dict.fromkeys(passed(node) if upsamples else node.input if adds else ()):
            readers.setdefault(name, []).append(node.output[0])
    ties = _Ties()
    for node in network.nodes:
        if is_passing(node) and wanted.intersection(node.output):
            ties.tie([*passed(node), *node.output])
        if _is_residual(network, node) and wanted.intersection(node.output):
            ties.tie(list(node.input))
    order = {name: number for number, name in enumerate(network.makers)}
    pairs = sorted(readers, key=lambda name: order.get(name, -1))
    return Placement(
        convolutions=tuple(node.output[0] for node in quantized),
        pairs={name: tuple(readers[name]) for name in pairs},
        groups={name: _sources(network, ties.members(name)) for name in pairs},
        kept=kept,
        islands=dict(_islands(network, wanted, [node.output[0] for node in quantized])),
    )


def measured_tensors(network: Network) -> tuple[str, ...]:
    """The tensors whose values any placement may have to quantise: those that convolutions and residual sums read.

    Of what only passes values on, the tensors it reads are measured instead, constants among them.
    """
    read = [name for node in network.convolutions for name in node.input[:1]]
    read += [name for node in network.nodes if _is_residual(network, node) for name in node.input]
    found = {source for name in read for source in origins(network, name)}
    order = dict.fromkeys((*_inputs(network), *network.makers, *network.weights))
    return tuple(name for name in order if name in found)


def origins(network: Network, name: str) -> Iterator[str]:
    """The tensors whose values a tensor holds: itself, or what the passing nodes in front of it read."""
    node = network.makers.get(name)
    if node is None or not is_passing(node):
        yield name
        return
    for given in passed(node):
        yield from origins(network, given)


def is_passing(node: onnx.NodeProto) -> bool:
    """The node gives values that it reads and no others, so it commutes with quantisation."""
    if node.op_type not in PASSING or node.domain:
        return False
    return node.op_type != "Resize" or _attribute(node, "mode") in (None, b"nearest")


def passed(node: onnx.NodeProto) -> Sequence[str]:
    """What a passing node reads that is data."""
    return list(node.input)[: PASSING[node.op_type]]


def _inputs(network: Network) -> list[str]:
    return [entry.name for entry in network.proto.graph.input]


def _attribute(node: onnx.NodeProto, name: str) -> bytes | None:
    return next((attribute.s for attribute in node.attribute if attribute.name == name), None)


def _reason(network: Network, node: onnx.NodeProto, spared: Mapping[str, str]) -> str:
    """Why a convolution stays float; empty where it need not."""
    output = node.output[0]
    if output in spared:
        return spared[output]
    if output in network.heads:
        return HEAD_REASON
    if node.input[1] not in network.weights:
        return "its weights are no float32 initializer"
    return ""


def _is_residual(network: Network, node: onnx.NodeProto) -> bool:
    """A sum of two tensors that the network makes, and not of one and a constant."""
    return node.op_type == "Add" and not node.domain and all(name in network.makers for name in node.input)


def _wanted(network: Network, read: set[str]) -> set[str]:
    """The tensors that quantised readers read, at once or through nodes that pass values on or add them."""
    wanted = set(read)
    for node in reversed(network.nodes):
        if wanted.intersection(node.output):
            wanted.update(passed(node) if is_passing(node) else node.input if _is_residual(network, node) else ())
    return wanted


def _islands(network: Network, wanted: set[str], convolutions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Nodes behind an INT8 convolution whose results are quantised, but for activations and what passes values on."""
    leading = set(wanted)
    for node in reversed(network.nodes):
        if node.op_type in ACTIVATIONS and leading.intersection(node.output):
            leading.update(node.input)
    behind = set(convolutions)
    for node in network.nodes:
        if not behind.intersection(node.input):
            continue
        behind.update(node.output)
        sums = _is_residual(network, node) and wanted.intersection(node.output)
        expected = node.op_type == "Conv" or node.op_type in ACTIVATIONS or is_passing(node) or sums
        if not expected and leading.intersection(node.output):
            yield node.output[0], node.op_type


def _sources(network: Network, members: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({source for name in members for source in origins(network, name)}))


class _Ties:
    """Which tensors share a scale (union-find)."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def tie(self, names: Sequence[str]) -> None:
        """All of these share one."""
        first = self._top(names[0])
        for name in names[1:]:
            self._above[self._top(name)] = first

    def members(self, name: str) -> list[str]:
        """All that share the scale of this one, itself among them."""
        top = self._top(name)
        return [name, *(other for other in list(self._above) if other != name and self._top(other) == top)]

    def _top(self, name: str) -> str:
        above = self._above.setdefault(name, name)
        if above == name:
            return name
        top = self._top(above)
        self._above[name] = top
        return top


def float_nodes(network: Network, placement: Placement) -> list[onnx.NodeProto]:
    """The nodes that are not part of INT8 work, and may compute in half.

    Part of it are the quantised convolutions, what follows them alone (their activation, which runs in their kernel),
    and what passes values on to a pair.
    """
    wanted = _wanted(network, set(placement.pairs))
    inside = set(placement.convolutions)
    for node in network.nodes:
        if is_passing(node):
            belongs = bool(wanted.intersection(node.output))
        else:
            made = [name for name in node.input if name in network.makers]
            belongs = node.op_type != "Conv" and bool(made) and inside.issuperset(made)
        if belongs or inside.intersection(node.output):
            inside.update(node.output)
    return [node for node in network.nodes if not inside.intersection(node.output)]
