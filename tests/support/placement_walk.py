"""The rules of the placement of Q/DQ pairs, walked slowly: what a placement, and a file written by it, must be."""

from __future__ import annotations

from collections import Counter

import numpy as np
from onnx import numpy_helper

from yolov7_deploy.precision.fp16_casts import check_types
from yolov7_deploy.precision.int8 import write_pairs
from yolov7_deploy.precision.qdq_placement import float_nodes, measured_tensors


class Walk:
    """The part of a graph in front of decoding, as a test walks it: by names alone, and slowly."""

    def __init__(self, network, quantized):
        self.nodes = [node for node in network.proto.graph.node if not node.name.startswith("end__")]
        self.quantized = [node for node in self.nodes if node.output[0] in quantized]
        self.makers = {node.output[0]: node for node in self.nodes}
        self._reaches = {}

    def passed(self, node):
        if node.op_type == "Concat":
            return list(node.input)
        is_linear = any(attribute.s == b"linear" for attribute in node.attribute)
        return list(node.input[:1]) if node.op_type in ("MaxPool", "Resize", "Slice") and not is_linear else []

    def terms(self, node):
        """Of a residual sum."""
        return list(node.input) if node.op_type == "Add" and set(node.input) <= set(self.makers) else []

    def reaches(self, name):
        """A quantised convolution reads it, at once or behind nodes that pass on or add."""
        if name not in self._reaches:
            readers = [node for node in self.nodes if name in node.input]
            self._reaches[name] = any(
                (node in self.quantized and node.input[0] == name)
                or (name in self.passed(node) + self.terms(node) and self.reaches(node.output[0]))
                for node in readers
            )
        return self._reaches[name]

    def pairs(self):
        """Each tensor that must have a pair, and who reads through it."""
        found = {}
        for node in self.nodes:
            through = list(node.input[:1]) if node in self.quantized else []
            if self.reaches(node.output[0]):
                through += self.terms(node) + (self.passed(node) if node.op_type == "Resize" else [])
            for name in dict.fromkeys(through):
                found.setdefault(name, set()).add(node.output[0])
        return found

    def tied(self):
        """Sets of tensors that must share a scale."""
        sets = []
        for node in self.nodes:
            if self.reaches(node.output[0]):
                whole = {*self.passed(node), *(node.output if self.passed(node) else ()), *self.terms(node)}
                if self.terms(node):
                    sets.append(set(self.terms(node)))
                elif whole:
                    sets.append(whole)
        merged = []
        for one in sets:
            for other in [other for other in merged if other & one]:
                merged.remove(other)
                one = one | other
            merged.append(one)
        return merged

    def origins(self, name):
        node = self.makers.get(name)
        if node is None or not self.passed(node):
            return {name}
        return set().union(*map(self.origins, self.passed(node)))

    def in_float(self):
        """Outputs of what is not INT8: float convolutions, what hangs on them, and what passes on to nobody."""
        inside = set()
        for node in self.nodes:
            made = [name for name in node.input if name in self.makers]
            if self.passed(node):
                is_inside = self.reaches(node.output[0])
            else:
                is_inside = node in self.quantized or (node.op_type != "Conv" and made and inside.issuperset(made))
            inside |= set(node.output) if is_inside else set()
        return [node.output[0] for node in self.nodes if node.output[0] not in inside]


def scale_by_group(placement):
    """Another power of two for each group, so that a scale tells whose it is."""
    groups = list(dict.fromkeys(placement.groups.values()))
    return {name: np.float32(2.0 ** (groups.index(group) - 60)) for name, group in placement.groups.items()}


def check_placement(network, placement):
    """All rules, against the walk."""
    walk = Walk(network, placement.convolutions)
    assert {name: set(readers) for name, readers in placement.pairs.items()} == walk.pairs()
    assert placement.groups.keys() == placement.pairs.keys()
    ties = walk.tied()
    of_name = {name: next((tie for tie in ties if name in tie), {name}) for name in placement.pairs}
    for name, group in placement.groups.items():
        assert set(group) == set().union(*map(walk.origins, of_name[name])), name
        assert list(group) == sorted(group)
    assert {source for group in placement.groups.values() for source in group} <= set(measured_tensors(network))
    assert [node.output[0] for node in float_nodes(network, placement)] == walk.in_float()


def check_file(network, placement):
    """The written graph has the pairs of the placement, and nothing more."""
    scales = scale_by_group(placement)
    proto = write_pairs(network, placement, scales, {})
    check_types(proto)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    old = network.makers
    quantizers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert sorted(node.input[0] for node in quantizers) == sorted(placement.pairs)
    by_group = {placement.groups[node.input[0]]: node.input[1] for node in quantizers}
    assert len(set(by_group.values())) == len(by_group)  # other groups have other scales,
    for node in quantizers:
        assert node.input[1] == by_group[placement.groups[node.input[0]]]  # and one group has one in the file
        assert stored[node.input[1]] == scales[node.input[0]], node.input[0]

    def behind_pair(name):
        """The tensor in front of the pair, or `None` where it comes from none."""
        back = makers.get(name)
        if back is None or back.op_type != "DequantizeLinear" or back.input[0] in stored:
            return None
        assert list(makers[back.input[0]].input[1:]) == list(back.input[1:])
        return makers[back.input[0]].input[0]

    for node in proto.graph.node:
        if node.output[0] not in old:
            continue
        for index, name in enumerate(old[node.output[0]].input):
            if node.output[0] in placement.pairs.get(name, ()):
                assert behind_pair(node.input[index]) == name
            elif node.output[0] in placement.convolutions and index == 1:
                back = makers[node.input[1]]
                assert back.op_type == "DequantizeLinear" and stored[back.input[0]].dtype == np.int8
            else:
                assert node.input[index] == name
    kinds = Counter(node.op_type for node in proto.graph.node)
    weights = {old[output].input[1] for output in placement.convolutions}
    assert kinds["DequantizeLinear"] == len(placement.pairs) + len(weights)
    return proto
