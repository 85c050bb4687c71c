"""Slow reference implementation of the rules of Q/DQ placement, and the checks of a placement and of its file."""

from __future__ import annotations

from collections import Counter

import numpy as np
from onnx import numpy_helper

from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.fp16 import check_valid
from yolov7_deploy.precision.int8 import QuantizedRange, insert_qdq
from yolov7_deploy.precision.qdq_placement import calibrated_tensors, float_nodes


class Walk:
    """The nodes before decoding; follows tensors by name only, and slowly."""

    def __init__(self, network, quantized):
        self.nodes = [node for node in network.proto.graph.node if not node.name.startswith("end__")]
        self.quantized = [node for node in self.nodes if node.output[0] in quantized]
        self.producers = {node.output[0]: node for node in self.nodes}
        self._reaches = {}

    def pass_through_inputs(self, node):
        if node.op_type == "Concat":
            return list(node.input)
        is_linear = any(attribute.s == b"linear" for attribute in node.attribute)
        return list(node.input[:1]) if node.op_type in ("MaxPool", "Resize", "Slice") and not is_linear else []

    def terms(self, node):
        """Return the terms of a residual sum; empty for other nodes."""
        return list(node.input) if node.op_type == "Add" and set(node.input) <= set(self.producers) else []

    def reaches(self, name):
        """Return whether an INT8 convolution reads the tensor, directly or through pass-through operations and sums."""
        if name not in self._reaches:
            consumers = [node for node in self.nodes if name in node.input]
            self._reaches[name] = any(
                (node in self.quantized and node.input[0] == name)
                or (name in self.pass_through_inputs(node) + self.terms(node) and self.reaches(node.output[0]))
                for node in consumers
            )
        return self._reaches[name]

    def pairs(self):
        """Return each tensor that must have a pair, and the consumers that read it through the pair."""
        found = {}
        for node in self.nodes:
            through = list(node.input[:1]) if node in self.quantized else []
            if self.reaches(node.output[0]):
                through += self.terms(node) + (self.pass_through_inputs(node) if node.op_type == "Resize" else [])
            for name in dict.fromkeys(through):
                found.setdefault(name, set()).add(node.output[0])
        return found

    def scale_groups(self):
        """Return the sets of tensors that must share a scale."""
        sets = []
        for node in self.nodes:
            if self.reaches(node.output[0]):
                if self.terms(node):
                    sets.append(set(self.terms(node)))
                elif self.pass_through_inputs(node):
                    sets.append({*self.pass_through_inputs(node), *node.output})
        merged = []
        for one in sets:
            for other in [other for other in merged if other & one]:
                merged.remove(other)
                one = one | other
            merged.append(one)
        return merged

    def source_tensors(self, name):
        node = self.producers.get(name)
        if node is None or not self.pass_through_inputs(node):
            return {name}
        return set().union(*map(self.source_tensors, self.pass_through_inputs(node)))

    def in_float(self):
        """Return the outputs of nodes outside INT8 computation: float convolutions and nodes that depend on them."""
        inside = set()
        for node in self.nodes:
            computed = [name for name in node.input if name in self.producers]
            if self.pass_through_inputs(node):
                is_inside = self.reaches(node.output[0])
            else:
                is_inside = node in self.quantized or (
                    node.op_type != "Conv" and computed and inside.issuperset(computed)
                )
            inside |= set(node.output) if is_inside else set()
        return [node.output[0] for node in self.nodes if node.output[0] not in inside]


def scale_by_group(placement):
    """Return a different power of two for each group, so that a scale identifies its group."""
    groups = list(dict.fromkeys(placement.scale_groups.values()))
    scales = {group: np.float32(2.0 ** (index - 60)) for index, group in enumerate(groups)}
    return {name: QuantizedRange(scales[group], np.int8(0)) for name, group in placement.scale_groups.items()}


def check_placement(network, placement):
    """Compare a placement with the reference implementation."""
    walk = Walk(network, placement.convolutions)
    assert {name: set(consumers) for name, consumers in placement.pairs.items()} == walk.pairs()
    assert placement.scale_groups.keys() == placement.pairs.keys()
    groups = walk.scale_groups()
    of_name = {name: next((group for group in groups if name in group), {name}) for name in placement.pairs}
    for name, group in placement.scale_groups.items():
        assert set(group) == set().union(*map(walk.source_tensors, of_name[name])), name
        assert list(group) == sorted(group)
    assert {source for group in placement.scale_groups.values() for source in group} <= set(calibrated_tensors(network))
    assert [node.output[0] for node in float_nodes(network, placement)] == walk.in_float()


def check_file(network, placement):
    """Check that the written graph has the pairs of the placement and no other changes."""
    scales = scale_by_group(placement)
    proto = insert_qdq(network, placement, scales, {}, Int8Options())
    check_valid(proto)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    producers = {name: node for node in proto.graph.node for name in node.output}
    old = network.producers
    quantizers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(node.input[0] for node in quantizers) == sorted(placement.pairs)
    by_group = {placement.scale_groups[node.input[0]]: node.input[1] for node in quantizers}
    assert len(set(by_group.values())) == len(by_group)  # different groups have different scales,
    for node in quantizers:
        assert node.input[1] == by_group[placement.scale_groups[node.input[0]]]  # and a group has one scale
        assert stored[node.input[1]] == scales[node.input[0]].scale, node.input[0]

    def before_pair(name):
        """Return the input of the pair whose output is `name`; `None` if it is not the output of a pair."""
        back = producers.get(name)
        if back is None or back.op_type != "DequantizeLinear" or back.input[0] in stored:
            return None
        assert list(producers[back.input[0]].input[1:]) == list(back.input[1:])
        return producers[back.input[0]].input[0]

    for node in proto.graph.node:
        if node.output[0] not in old:
            continue
        for index, name in enumerate(old[node.output[0]].input):
            if node.output[0] in placement.pairs.get(name, ()):
                assert before_pair(node.input[index]) == name
            elif node.output[0] in placement.convolutions and index == 1:
                back = producers[node.input[1]]
                assert back.op_type == "DequantizeLinear" and stored[back.input[0]].dtype == np.int8
            else:
                assert node.input[index] == name
    kinds = Counter(node.op_type for node in proto.graph.node)
    weights = {old[output].input[1] for output in placement.convolutions}
    assert kinds["DequantizeLinear"] == len(placement.pairs) + len(weights)
    return proto
