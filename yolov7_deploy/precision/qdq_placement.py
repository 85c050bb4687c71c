"""Placement of Q/DQ pairs: rules that leave no float operation between two INT8 convolutions.

For TensorRT:

1. A convolution reads its data and its weights through a pair. Its output and its bias stay float, so that the runtime
   can fuse the following activation and quantize once.
2. A tensor has one pair, which all its quantized consumers share.
3. Operations that only pass values through (Concat, MaxPool, nearest Resize, slices) have one scale for all inputs and
   outputs. They commute with quantization and move bytes.
4. An upsampling Resize reads through a pair, too: quantizing first moves a quarter of the bytes.
5. A residual Add reads both terms through pairs of one scale.
6. The last convolutions, decoding and NMS stay float.

For CPUs, every tensor between the first and the last INT8 convolution has a pair that all its consumers read, because
ONNX Runtime replaces an operation by its INT8 kernel only if pairs surround it: the outputs of convolutions, both
operations of SiLU (a Sigmoid and a Mul), and the inputs and outputs of operations that pass values through. OpenVINO
fuses the activation into the convolution if there is no pair between them, so those pairs are kept apart
(`inner_pairs`), and the OpenVINO runtime removes them when it opens the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx

from yolov7_deploy.precision.subgraph import Network, is_custom

HEAD_REASON = "head: decoding needs float"
# Operations that a runtime may fuse into the kernel of the preceding convolution.
ACTIVATIONS = frozenset({"Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "Relu", "Sigmoid"})
# Activations that ONNX Runtime replaces by the limits of uint8 in the pair after them.
_LIMITS = frozenset({"Clip", "Relu"})
# Operations whose outputs hold only values of their inputs, and the number of leading inputs that are data.
PASS_THROUGH_OPS = {
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
class QdqPlacement:
    """The convolutions that become INT8 and the tensors that get a Q/DQ pair.

    Attributes:
        convolutions: Outputs of the convolutions computed in INT8.
        pairs: Tensors with a Q/DQ pair, and the consumers (by their first output) that read it.
        scale_groups: For each tensor with a pair, the tensors whose values share its scale, sorted. The scale is named
            after the first one.
        float_convolutions: Outputs of the convolutions that stay float, and the reasons.
        float_islands: Outputs and operations of the nodes that compute in float between INT8 convolutions. YOLOv7 has
            none.
        inner_pairs: For CPUs: tensors between a convolution and the output of its activation, and that output.
    """

    convolutions: tuple[str, ...]
    pairs: Mapping[str, tuple[str, ...]]
    scale_groups: Mapping[str, tuple[str, ...]]
    float_convolutions: Mapping[str, str]
    float_islands: Mapping[str, str]
    inner_pairs: Mapping[str, str] = field(default_factory=dict)


def place_qdq(network: Network, excluded: Mapping[str, str], *, for_cpu: bool = False) -> QdqPlacement:
    """Apply the rules of this module to a network.

    Args:
        network: The network to quantize.
        excluded: Outputs of convolutions to exclude from INT8, and the reasons.
        for_cpu: Apply the rules for CPUs, not those for TensorRT.
    """
    float_convolutions = {
        node.output[0]: reason for node in network.convolutions if (reason := _float_reason(network, node, excluded))
    }
    int8 = [node for node in network.convolutions if node.output[0] not in float_convolutions]
    consumers: dict[str, list[str]] = {}
    for node in int8:
        consumers.setdefault(node.input[0], []).append(node.output[0])
    quantized = _quantized_tensors(network, set(consumers))
    groups = _DisjointSets()
    for node in network.nodes:
        if not quantized.intersection(node.output):
            continue
        reads_pairs: Sequence[str] = ()
        if is_pass_through(node):
            groups.union([*pass_through_inputs(node), *node.output])
            reads_pairs = pass_through_inputs(node) if node.op_type == "Resize" else ()
        elif _is_residual(network, node):
            groups.union(list(node.input))
            reads_pairs = node.input
        for name in dict.fromkeys(reads_pairs):
            consumers.setdefault(name, []).append(node.output[0])
    inner_pairs: dict[str, str] = {}
    if for_cpu:
        calibrated = set(calibrated_tensors(network))
        activations = {
            output: inner
            for output, inner in _activation_outputs(network, int8).items()
            if calibrated.issuperset(source_tensors(network, output))
        }
        inner_pairs = {name: output for output, inner in activations.items() for name in inner}
        region = {*inner_pairs, *activations, *quantized} & network.floats
        consumers = {name: [node.output[0] for node in network.consumers.get(name, ())] for name in region}
    order = {name: number for number, name in enumerate(network.producers)}
    pairs = sorted(consumers, key=lambda name: order.get(name, -1))
    return QdqPlacement(
        convolutions=tuple(node.output[0] for node in int8),
        pairs={name: tuple(consumers[name]) for name in pairs},
        scale_groups={name: _all_sources(network, groups.members(name)) for name in pairs if name not in inner_pairs},
        float_convolutions=float_convolutions,
        float_islands=dict(_float_islands(network, quantized, [node.output[0] for node in int8])),
        inner_pairs=inner_pairs,
    )


def _activation_outputs(network: Network, convolutions: Sequence[onnx.NodeProto]) -> dict[str, tuple[str, ...]]:
    """Return the output of the activation after each convolution, and the tensors before it that need a pair.

    A convolution without a known activation is its own output.
    """
    outputs: dict[str, tuple[str, ...]] = {}
    for node in convolutions:
        result = node.output[0]
        readers = network.consumers.get(result, [])
        ops = sorted(reader.op_type for reader in readers)
        if ops == ["Mul", "Sigmoid"]:
            multiply, sigmoid = sorted(readers, key=lambda reader: reader.op_type)
            if sorted(multiply.input) == sorted([result, sigmoid.output[0]]):
                outputs[multiply.output[0]] = (result, sigmoid.output[0])
                continue
        if ops == ["LeakyRelu"]:
            outputs[readers[0].output[0]] = (result,)
        elif len(ops) == 1 and ops[0] in _LIMITS:
            outputs[readers[0].output[0]] = ()
        elif not ACTIVATIONS.intersection(ops):
            outputs[result] = ()
    return outputs


def calibrated_tensors(network: Network) -> tuple[str, ...]:
    """Return the tensors that any placement may quantize: the inputs of convolutions and of residual sums.

    Outputs of pass-through operations are replaced by the tensors whose values they hold, including constants.
    """
    read = [name for node in network.convolutions for name in node.input[:1]]
    read += [name for node in network.nodes if _is_residual(network, node) for name in node.input]
    found = {source for name in read for source in source_tensors(network, name)}
    inputs = [entry.name for entry in network.proto.graph.input]
    order = dict.fromkeys((*inputs, *network.producers, *network.weights))
    return tuple(name for name in order if name in found)


def source_tensors(network: Network, name: str) -> Iterator[str]:
    """Yield the tensors whose values a tensor holds: itself, or the sources of a pass-through operation's inputs."""
    node = network.producers.get(name)
    if node is None or not is_pass_through(node):
        yield name
        return
    for source in pass_through_inputs(node):
        yield from source_tensors(network, source)


def is_pass_through(node: onnx.NodeProto) -> bool:
    """Return True if the outputs hold only values of the inputs, so the node commutes with quantization."""
    if node.op_type not in PASS_THROUGH_OPS or is_custom(node):
        return False
    return node.op_type != "Resize" or _attribute(node, "mode") in (None, b"nearest")


def pass_through_inputs(node: onnx.NodeProto) -> Sequence[str]:
    """Return the data inputs of a pass-through node."""
    return list(node.input)[: PASS_THROUGH_OPS[node.op_type]]


def _attribute(node: onnx.NodeProto, name: str) -> bytes | None:
    return next((attribute.s for attribute in node.attribute if attribute.name == name), None)


def _float_reason(network: Network, node: onnx.NodeProto, excluded: Mapping[str, str]) -> str:
    """Return the reason why a convolution stays float; empty for an INT8 convolution."""
    output = node.output[0]
    if output in excluded:
        return excluded[output]
    if output in network.heads:
        return HEAD_REASON
    if node.input[1] not in network.weights:
        return "its weights are not a float32 constant"
    return ""


def _is_residual(network: Network, node: onnx.NodeProto) -> bool:
    """Return True for a sum of two tensors that the network computes; a constant term is not residual."""
    return node.op_type == "Add" and not is_custom(node) and all(name in network.producers for name in node.input)


def _quantized_tensors(network: Network, read: set[str]) -> set[str]:
    """Return the tensors that INT8 convolutions read, directly or through pass-through operations and sums."""
    quantized = set(read)
    for node in reversed(network.nodes):
        if quantized.intersection(node.output):
            if is_pass_through(node):
                quantized.update(pass_through_inputs(node))
            elif _is_residual(network, node):
                quantized.update(node.input)
    return quantized


def _float_islands(network: Network, quantized: set[str], convolutions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the unexpected nodes between an INT8 convolution and a quantized tensor.

    Expected are activations, pass-through operations and sums.
    """
    leads_to_quantized = set(quantized)
    for node in reversed(network.nodes):
        if node.op_type in ACTIVATIONS and leads_to_quantized.intersection(node.output):
            leads_to_quantized.update(node.input)
    after_int8 = set(convolutions)
    for node in network.nodes:
        if not after_int8.intersection(node.input):
            continue
        after_int8.update(node.output)
        is_sum = _is_residual(network, node) and quantized.intersection(node.output)
        expected = node.op_type == "Conv" or node.op_type in ACTIVATIONS or is_pass_through(node) or is_sum
        if not expected and leads_to_quantized.intersection(node.output):
            yield node.output[0], node.op_type


def _all_sources(network: Network, members: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({source for name in members for source in source_tensors(network, name)}))


class _DisjointSets:
    """Groups of tensors that share a scale (union-find with path compression)."""

    def __init__(self) -> None:
        self._parents: dict[str, str] = {}

    def union(self, names: Sequence[str]) -> None:
        """Merge the groups of all these tensors."""
        first = self._root(names[0])
        for name in names[1:]:
            self._parents[self._root(name)] = first

    def members(self, name: str) -> list[str]:
        """Return all tensors of the group of `name`, starting with itself."""
        root = self._root(name)
        return [name, *(other for other in list(self._parents) if other != name and self._root(other) == root)]

    def _root(self, name: str) -> str:
        parent = self._parents.setdefault(name, name)
        if parent == name:
            return name
        root = self._root(parent)
        self._parents[name] = root
        return root


def float_nodes(network: Network, placement: QdqPlacement) -> list[onnx.NodeProto]:
    """Return the nodes that are not part of INT8 computation; they may compute in FP16.

    INT8 computation includes the quantized convolutions, the nodes that read nothing but their results (the activation,
    which is fused into the kernel), and the pass-through nodes before a pair.
    """
    quantized = _quantized_tensors(network, set(placement.pairs))
    inside = set(placement.convolutions)
    for node in network.nodes:
        if is_pass_through(node):
            belongs = bool(quantized.intersection(node.output))
        else:
            computed = [name for name in node.input if name in network.producers]
            belongs = node.op_type != "Conv" and bool(computed) and inside.issuperset(computed)
        if belongs or inside.intersection(node.output):
            inside.update(node.output)
    return [node for node in network.nodes if not inside.intersection(node.output)]
