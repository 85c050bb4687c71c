"""INT8 summary of a graph: multiply-accumulates against counting one by one, and which convolutions are INT8."""

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
from yolov7_deploy.precision.int8_summary import ConvolutionSummary, Int8Summary, summarize_int8

SIDES = (12, 16)
FLOAT = TensorProto.FLOAT


class Sketch:
    """A graph with the input `images`; every call adds a node and returns its output."""

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
        """Constant weights followed by a DequantizeLinear."""
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
    """A graph of one convolution."""
    sketch = Sketch()
    weight = np.zeros((c_out, 4 // group, *kernel), np.float32)
    sketch.node("Conv", "images", sketch.weight("weight", weight), name="c", group=group, **attributes)
    return sketch.proto("c", batch=batch, sides=sides)


def share_of(*entries):
    convolutions = [
        ConvolutionSummary(name=str(i), macs=macs, is_int8=is_int8) for i, (macs, is_int8) in enumerate(entries)
    ]
    summary = Int8Summary(convolutions=tuple(convolutions), pairs={}, weights=0, scales=0, duplicate_pairs=())
    return summary.share, summary.int8_convolutions


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
def test_multiply_accumulates_are_counted_for_every_output_value(options):
    proto = single(**options)
    output = session(proto).run(None, {"images": np.zeros((1, 4, *SIDES), np.float32)})[0]
    per_number = 0
    for _ in range(4 // options.get("group", 1)):  # channels that one number reads
        per_number += math.prod(options.get("kernel", (3, 3)))
    (conv,) = summarize_int8(proto).convolutions
    assert conv == ConvolutionSummary(name="c", macs=output.size * per_number, is_int8=False)


@pytest.mark.parametrize("batch", [2, 7, "batch"])
def test_multiply_accumulates_do_not_depend_on_the_batch(batch):
    assert summarize_int8(single(batch=batch)).convolutions == summarize_int8(single()).convolutions


@pytest.mark.parametrize("sides", [("height", 16), (12, "width"), ("height", "width")])
def test_with_dynamic_sizes_multiply_accumulates_and_the_share_are_unknown(sides):
    summary = summarize_int8(single(sides=sides))
    assert [conv.macs for conv in summary.convolutions] == [None]
    assert summary.share is None


def test_sliced_weights_count_by_their_size_after_slicing():
    sketch = Sketch()
    stored = sketch.weight("stored", np.zeros((10, 4, 3, 3), np.float32))
    weight = sketch.node("Slice", stored, sketch.weight("from", [0]), sketch.weight("to", [6]), name="weight")
    sketch.node("Conv", "images", weight, name="c")
    assert summarize_int8(sketch.proto("c")).convolutions == summarize_int8(single()).convolutions


def test_with_weights_of_dynamic_shape_multiply_accumulates_are_unknown():
    sketch = Sketch()
    sketch.node("Conv", "images", "given", name="c")
    proto = sketch.proto("c")
    proto.graph.input.append(helper.make_tensor_value_info("given", FLOAT, ["filters", 4, 3, 3]))
    assert [conv.macs for conv in summarize_int8(proto).convolutions] == [None]


def test_a_convolution_without_a_name_is_named_by_its_output():
    proto = single()
    proto.graph.node[0].name = ""
    assert summarize_int8(proto).convolutions[0].name == "c"


@pytest.mark.parametrize("size", [320, 640])
def test_twice_the_macs_of_tiny_and_its_bias_additions_are_the_flops_of_complexity(size):
    """Complexity also counts one addition for each output value of a layer with BatchNorm, which excludes the heads."""
    model = exported_tiny(classes=80, input_hw=(size, size), nms="none", simplify=False)
    summary = summarize_int8(model.proto)
    shapes = {
        value.name: [side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in onnx.shape_inference.infer_shapes(model.proto).graph.value_info
    }
    additions = sum(math.prod(shapes[c.name]) for c in summary.convolutions if c.name not in model.metadata.heads)
    macs = sum(conv.macs for conv in summary.convolutions)
    assert 2 * (macs + additions) == round(complexity("yolov7-tiny", size=size).gflops * 1e9)
    assert 0 < additions < 0.004 * macs
    assert len(summary.convolutions) == 58


# --- the share --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "entries, share",
    [
        ([(300, True), (100, False)], 0.75),
        ([(300, True), (100, True)], 1.0),
        ([(300, False)], 0.0),
        ([(300, True), (None, True)], None),
        ([(300, True), (None, False)], None),
        ([], None),
    ],
)
def test_the_share_is_a_fraction_of_multiply_accumulates_not_of_convolutions(entries, share):
    assert share_of(*entries) == (share, sum(is_int8 for _, is_int8 in entries))


# --- INT8 convolutions ------------------------------------------------------------------------------------------------

WEIGHT = np.zeros((4, 4, 3, 3), np.int8)


@pytest.mark.parametrize(
    "data, kind, is_int8",
    [
        ("pair", "int8", True),
        ("float", "int8", False),
        ("pair", "float", False),
        ("float", "float", False),
        ("pair", "uint8", False),
        ("after a pair", "int8", False),
        ("pair", "float after a pair", True),
        ("float", "float after a pair", False),
    ],
)
def test_a_convolution_is_int8_if_data_and_weights_are_dequantized_int8(data, kind, is_int8):
    sketch = Sketch()
    x = "images" if data == "float" else sketch.pair("images")
    if data == "after a pair":
        x = sketch.node("Relu", x, name="relu")
    if kind.startswith("float"):
        weight = sketch.weight("w", WEIGHT.astype(np.float32))
        weight = sketch.pair(weight) if "pair" in kind else weight
    else:
        weight = sketch.back("w", WEIGHT.astype(kind))
    sketch.node("Conv", x, weight, name="c")
    proto = sketch.proto("c")
    session(proto)  # a graph that runs
    (conv,) = summarize_int8(proto).convolutions
    assert conv.is_int8 is is_int8
    assert conv.macs == 4 * 10 * 14 * 4 * 9
    assert summarize_int8(proto).weights == (kind == "int8")


def test_pairs_are_counted_by_the_operation_of_their_consumers_with_convolutions_first():
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
    summary = summarize_int8(sketch.proto(unread))
    assert summary.pairs == {"Conv": 3, "Add": 2, "Resize": 1, "nothing": 1}
    assert summary.weights == 1
    assert summary.scales == len({node.input[1] for node in sketch.nodes if node.op_type == "QuantizeLinear"}) == 7
    assert summary.duplicate_pairs == ()
    assert summary.int8_convolutions == 3


def test_a_stored_int32_bias_is_not_a_weight():
    """The quantizer of ONNX Runtime stores biases as int32."""
    sketch = Sketch()
    bias = sketch.weight("bias", np.zeros(4, np.int32))
    back = sketch.node("DequantizeLinear", bias, sketch.weight("scale", np.float32(0.1)), name="bias.back")
    output = sketch.node("Conv", sketch.pair("images"), sketch.back("w", WEIGHT), back, name="c")
    summary = summarize_int8(sketch.proto(output))
    assert (summary.int8_convolutions, summary.weights, summary.pairs) == (1, 1, {"Conv": 1})


def test_a_shared_scale_is_counted_once():
    sketch = Sketch()
    scale, zero = sketch.weight("one", np.float32(0.1)), sketch.weight("zero", np.int8(0))
    first = sketch.node("QuantizeLinear", "images", scale, zero, name="a")
    middle = sketch.node("Relu", sketch.node("DequantizeLinear", first, scale, zero, name="b"), name="m")
    sketch.node("QuantizeLinear", middle, scale, zero, name="c")
    assert summarize_int8(sketch.proto()).scales == 1


def test_a_tensor_with_two_pairs_is_listed():
    sketch = Sketch()
    weight = sketch.back("w", np.zeros((4, 4, 1, 1), np.int8))
    first = sketch.node("Conv", sketch.pair("images"), weight, name="c")
    second = sketch.node("Conv", sketch.pair("images", "again"), weight, name="d")
    summary = summarize_int8(sketch.proto(first, second))
    assert summary.duplicate_pairs == ("images",)
    assert summary.pairs == {"Conv": 2}


def test_a_file_of_this_package_is_int8_except_for_its_heads_and_has_no_duplicate_pairs():
    model = exported_tiny(nms="none")
    found = to_int8(model, calibrate(model, [noise(*HW)], count=1), Int8Options())
    summary, before = summarize_int8(found.proto), summarize_int8(model.proto)
    assert [(c.name, c.macs) for c in summary.convolutions] == [(c.name, c.macs) for c in before.convolutions]
    assert {conv.name for conv in summary.convolutions if not conv.is_int8} == set(model.metadata.heads)
    heads = sum(conv.macs for conv in summary.convolutions if conv.name in model.metadata.heads)
    assert summary.share == 1 - heads / sum(conv.macs for conv in summary.convolutions)
    kinds = Counter(node.op_type for node in found.proto.graph.node)
    assert sum(summary.pairs.values()) == kinds["QuantizeLinear"]
    assert summary.weights == summary.int8_convolutions == 55
    assert summary.pairs["Resize"] == 2 and set(summary.pairs) == {"Conv", "Resize"}
    assert summary.duplicate_pairs == ()
    assert (before.share, before.pairs, before.weights, before.scales) == (0.0, {}, 0, 0)
