"""What of a graph is INT8: multiply-accumulates against counting them one by one, and what is INT8 and what is not."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.sample_images import noise
from tests.support.small_models import HW, exported_tiny, session
from yolov7_deploy.inspection.complexity import complexity
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.precision.int8_summary import ConvolutionCost, Int8Account, count_int8

SIDES = (12, 16)
FLOAT = TensorProto.FLOAT


class Sketch:
    """A graph that takes `images`; every call adds a node and gives its output."""

    def __init__(self):
        self.nodes, self.weights, self.outputs = [], {}, []

    def node(self, op, *inputs, name, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name, values):
        self.weights[name] = np.asarray(values)
        return name

    def quantize(self, x, name):
        scale = self.weight(f"{name}.scale", np.float32(0.1))
        return self.node("QuantizeLinear", x, scale, self.weight("zero", np.int8(0)), name=name)

    def dequantize(self, x, name):
        scale = self.weight(f"{name}.scale", np.float32(0.1))
        return self.node("DequantizeLinear", x, scale, self.weight("zero", np.int8(0)), name=name)

    def pair(self, x, name=None):
        name = name or x
        return self.dequantize(self.quantize(x, f"{name}.int8"), f"{name}.back")

    def back(self, name, values):
        """Constant weights behind a DequantizeLinear."""
        zero = self.weight(f"{name}.zero", np.zeros((), values.dtype))
        stored, scale = self.weight(name, values), self.weight(f"{name}.scale", np.float32(0.1))
        return self.node("DequantizeLinear", stored, scale, zero, name=f"{name}.back")

    def proto(self, *outputs, batch=1, sides=SIDES):
        graph = helper.make_graph(
            self.nodes,
            "sketch",
            [helper.make_tensor_value_info("images", FLOAT, [batch, 4, *sides])],
            [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
            initializer=[numpy_helper.from_array(values, name) for name, values in self.weights.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def single(*, c_out=6, group=1, kernel=(3, 3), batch=1, sides=SIDES, **attributes):
    """One convolution, and the shape of its weights."""
    sketch = Sketch()
    weight = np.zeros((c_out, 4 // group, *kernel), np.float32)
    sketch.node("Conv", "images", sketch.weight("weight", weight), name="c", group=group, **attributes)
    return sketch.proto("c", batch=batch, sides=sides)


def share_of(*costs):
    made = [ConvolutionCost(name=str(i), macs=macs, is_int8=is_int8) for i, (macs, is_int8) in enumerate(costs)]
    account = Int8Account(convolutions=tuple(made), pairs={}, weights=0, scales=0, pairs_twice=())
    return account.share, account.int8_convolutions


# --- multiply-accumulates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"strides": [3, 1]},
        {"group": 2},
        {"group": 4, "c_out": 8, "pads": [1, 1, 1, 1]},
        {"kernel": (1, 1)},
        {"kernel": (5, 2), "dilations": [2, 3]},
        {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    ],
    ids=str,
)
def test_multiply_accumulates_are_those_of_every_number_that_the_convolution_makes(options):
    proto = single(**options)
    made = session(proto).run(None, {"images": np.zeros((1, 4, *SIDES), np.float32)})[0]
    per_number = 0
    for _ in range(4 // options.get("group", 1)):  # channels that one number reads
        per_number += math.prod(options.get("kernel", (3, 3)))
    (cost,) = count_int8(proto).convolutions
    assert cost == ConvolutionCost(name="c", macs=made.size * per_number, is_int8=False)


@pytest.mark.parametrize("batch", [2, 7, "batch"])
def test_they_are_of_one_image_whatever_the_batch(batch):
    assert count_int8(single(batch=batch)).convolutions == count_int8(single()).convolutions


@pytest.mark.parametrize("sides", [("height", 16), (12, "width"), ("height", "width")])
def test_open_sides_leave_them_and_the_share_open(sides):
    account = count_int8(single(sides=sides))
    assert [cost.macs for cost in account.convolutions] == [None]
    assert account.share is None


def test_weights_that_are_part_of_what_is_stored_count_as_they_are_read():
    sketch = Sketch()
    stored = sketch.weight("stored", np.zeros((10, 4, 3, 3), np.float32))
    weight = sketch.node("Slice", stored, sketch.weight("from", [0]), sketch.weight("to", [6]), name="weight")
    sketch.node("Conv", "images", weight, name="c")
    assert count_int8(sketch.proto("c")).convolutions == count_int8(single()).convolutions


def test_weights_of_open_shape_leave_them_open():
    sketch = Sketch()
    sketch.node("Conv", "images", "given", name="c")
    proto = sketch.proto("c")
    proto.graph.input.append(helper.make_tensor_value_info("given", FLOAT, ["filters", 4, 3, 3]))
    assert [cost.macs for cost in count_int8(proto).convolutions] == [None]


def test_a_convolution_without_a_name_is_called_by_its_result():
    proto = single()
    proto.graph.node[0].name = ""
    assert count_int8(proto).convolutions[0].name == "c"


@pytest.mark.parametrize("size", [320, 640])
def test_twice_those_of_tiny_and_an_addition_for_each_biased_number_are_the_operations_that_complexity_counts(size):
    """The additions are all that it counts besides: one for each number of a layer that had a BatchNorm, so no head."""
    model = exported_tiny(classes=80, input_hw=(size, size), nms="none", simplify=False)
    account = count_int8(model.proto)
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model.proto).graph.value_info
    }
    additions = sum(math.prod(shapes[c.name]) for c in account.convolutions if c.name not in model.metadata.heads)
    macs = sum(cost.macs for cost in account.convolutions)
    assert 2 * (macs + additions) == round(complexity("yolov7-tiny", size=size).gflops * 1e9)
    assert 0 < additions < 0.004 * macs
    assert len(account.convolutions) == 58


# --- the share --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "costs, share",
    [
        ([(300, True), (100, False)], 0.75),
        ([(300, True), (100, True)], 1.0),
        ([(300, False)], 0.0),
        ([(300, True), (None, True)], None),
        ([(300, True), (None, False)], None),
        ([], None),
    ],
)
def test_the_share_is_of_multiply_accumulates_and_not_of_convolutions(costs, share):
    assert share_of(*costs) == (share, sum(is_int8 for _, is_int8 in costs))


# --- what is INT8 -----------------------------------------------------------------------------------------------------

WEIGHT = np.zeros((4, 4, 3, 3), np.int8)


@pytest.mark.parametrize(
    "data, kind, is_int8",
    [
        ("pair", "int8", True),
        ("float", "int8", False),
        ("pair", "float", False),
        ("float", "float", False),
        ("pair", "uint8", False),
        ("behind a pair", "int8", False),
        ("pair", "float behind a pair", True),
        ("float", "float behind a pair", False),
    ],
)
def test_a_convolution_is_int8_if_data_and_weights_come_straight_out_of_int8(data, kind, is_int8):
    sketch = Sketch()
    x = "images" if data == "float" else sketch.pair("images")
    if data == "behind a pair":
        x = sketch.node("Relu", x, name="relu")
    if kind.startswith("float"):
        weight = sketch.weight("w", WEIGHT.astype(np.float32))
        weight = sketch.pair(weight) if "pair" in kind else weight
    else:
        weight = sketch.back("w", WEIGHT.astype(kind))
    sketch.node("Conv", x, weight, name="c")
    proto = sketch.proto("c")
    session(proto)  # a graph that runs
    (cost,) = count_int8(proto).convolutions
    assert cost.is_int8 is is_int8
    assert cost.macs == 4 * 10 * 14 * 4 * 9
    assert count_int8(proto).weights == (kind == "int8")


def test_pairs_are_counted_by_the_kind_of_their_readers_with_convolutions_first():
    sketch = Sketch()
    weight = sketch.back("w", np.zeros((4, 4, 1, 1), np.int8))
    both = sketch.pair("images")
    first = sketch.node("Conv", both, weight, name="c")
    pooled = sketch.node("MaxPool", both, name="pooled", kernel_shape=[1, 1])
    second = sketch.node("Conv", sketch.pair(first), weight, name="d")
    third = sketch.node("Conv", sketch.pair(second), weight, name="e")
    added = sketch.node("Add", sketch.pair(third), sketch.pair(pooled), name="added")
    scales = sketch.weight("by", np.array([1, 1, 2, 2], np.float32))
    large = sketch.node("Resize", sketch.pair(added), "", scales, name="large")
    unread = sketch.pair(large)
    account = count_int8(sketch.proto(unread))
    assert account.pairs == {"Conv": 3, "Add": 2, "Resize": 1, "nothing": 1}
    assert account.weights == 1
    assert account.scales == len({node.input[1] for node in sketch.nodes if node.op_type == "QuantizeLinear"}) == 7
    assert account.pairs_twice == ()
    assert account.int8_convolutions == 3


def test_a_stored_bias_in_int32_is_no_weight():
    """As the quantiser of ONNX Runtime writes it."""
    sketch = Sketch()
    bias = sketch.weight("bias", np.zeros(4, np.int32))
    back = sketch.node("DequantizeLinear", bias, sketch.weight("scale", np.float32(0.1)), name="bias.back")
    made = sketch.node("Conv", sketch.pair("images"), sketch.back("w", WEIGHT), back, name="c")
    account = count_int8(sketch.proto(made))
    assert (account.int8_convolutions, account.weights, account.pairs) == (1, 1, {"Conv": 1})


def test_a_shared_scale_is_one():
    sketch = Sketch()
    scale, zero = sketch.weight("one", np.float32(0.1)), sketch.weight("zero", np.int8(0))
    first = sketch.node("QuantizeLinear", "images", scale, zero, name="a")
    middle = sketch.node("Relu", sketch.node("DequantizeLinear", first, scale, zero, name="b"), name="m")
    sketch.node("QuantizeLinear", middle, scale, zero, name="c")
    assert count_int8(sketch.proto()).scales == 1


def test_a_tensor_with_two_pairs_is_named():
    sketch = Sketch()
    weight = sketch.back("w", np.zeros((4, 4, 1, 1), np.int8))
    first = sketch.node("Conv", sketch.pair("images"), weight, name="c")
    second = sketch.node("Conv", sketch.pair("images", "again"), weight, name="d")
    account = count_int8(sketch.proto(first, second))
    assert account.pairs_twice == ("images",)
    assert account.pairs == {"Conv": 2}


def test_a_file_of_ours_is_int8_but_for_its_heads_and_has_no_pair_twice():
    model = exported_tiny(nms="none")
    found = to_int8(model, calibrate(model, [noise(*HW)], count=1), Int8Options())
    account, before = count_int8(found.proto), count_int8(model.proto)
    assert [(c.name, c.macs) for c in account.convolutions] == [(c.name, c.macs) for c in before.convolutions]
    assert {cost.name for cost in account.convolutions if not cost.is_int8} == set(model.metadata.heads)
    heads = sum(cost.macs for cost in account.convolutions if cost.name in model.metadata.heads)
    assert account.share == 1 - heads / sum(cost.macs for cost in account.convolutions)
    kinds = Counter(node.op_type for node in found.proto.graph.node)
    assert sum(account.pairs.values()) == kinds["QuantizeLinear"]
    assert account.weights == account.int8_convolutions == 55
    assert account.pairs["Resize"] == 2 and set(account.pairs) == {"Conv", "Resize"}
    assert account.pairs_twice == ()
    assert (before.share, before.pairs, before.weights, before.scales) == (0.0, {}, 0, 0)
