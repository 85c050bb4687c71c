"""Placement of Q/DQ pairs: the rules as invariants of every variant, and on small graphs."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.support.placement_walk import check_file, check_placement, scale_by_group
from tests.support.sample_images import noise
from tests.support.small_models import session
from tests.support.thin_variants import random_model, thin_model
from yolov7_deploy.errors import ExportError
from yolov7_deploy.metadata import assumed_metadata
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.precision.qdq_placement import HEAD_REASON, float_nodes, place_qdq
from yolov7_deploy.precision.subgraph import Network

# Error of three INT8 layers, in standard deviations of the output. Measured: 0.03.
INT8_TOLERANCE = 0.05
WHY = "excluded by a test"


@lru_cache
def network_of(variant) -> Network:
    """Network of a thin variant; it is shared, so do not modify it."""
    return Network(thin_model(variant))


# --- every variant ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_heads_and_only_heads_stay_float(variant):
    network = network_of(variant)
    placement = place_qdq(network, {})
    every = [node.output[0] for node in network.proto.graph.node if node.op_type == "Conv"]
    assert placement.float_convolutions == dict.fromkeys(network.heads, HEAD_REASON)
    assert placement.convolutions == tuple(name for name in every if name not in network.heads)
    assert {node.output[0] for node in float_nodes(network, placement)} == set(network.heads)


@pytest.mark.parametrize(
    "variant", [v if v.startswith("yolov7-tiny") else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS]
)
def test_a_variant_has_the_placement_of_its_thin_copy(variant):
    """Large variants take seconds."""
    assert place_qdq(Network(random_model(VARIANTS[variant])), {}) == place_qdq(network_of(variant), {})


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_rules_hold_for_every_variant_in_the_placement_and_in_the_file(variant):
    network = network_of(variant)
    placement = place_qdq(network, {})
    check_placement(network, placement)
    check_file(network, placement)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_and_outputs_of_concat_max_pool_and_resize_have_one_scale(variant):
    network = network_of(variant)
    placement = place_qdq(network, {})
    scales = scale_by_group(placement)
    kinds = Counter()
    for node in network.nodes:
        if node.op_type in ("Concat", "MaxPool", "Resize"):
            kinds[node.op_type] += 1
            names = node.input if node.op_type == "Concat" else node.input[:1]
            assert len({scales[name] for name in (*names, *node.output) if name in scales}) <= 1
            if node.op_type == "Resize":
                assert node.output[0] in placement.pairs[node.input[0]]
    assert min(kinds["Concat"], kinds["MaxPool"], kinds["Resize"]) > 0


def test_both_terms_of_a_residual_sum_have_pairs_of_one_scale():
    network = network_of("yolov7-e6e")
    placement = place_qdq(network, {})
    sums = [node for node in network.nodes if node.op_type == "Add"]
    assert len(sums) == 11  # an extended ELAN on each stage of backbone and neck
    for node in sums:
        assert len({placement.scale_groups[name] for name in node.input}) == 1
        assert all(node.output[0] in placement.pairs[name] for name in node.input)


def test_excluding_a_convolution_of_tiny_removes_its_pair_and_no_other():
    network = network_of("yolov7-tiny")
    whole = place_qdq(network, {})
    for output in whole.convolutions:
        placement = place_qdq(network, {output: WHY})
        assert placement.float_convolutions[output] == WHY and len(placement.float_convolutions) == 4
        check_placement(network, placement)
        gone = whole.pairs.keys() - placement.pairs.keys()
        read = network.producers[output].input[0]
        assert (read in gone) == (whole.pairs[read] == (output,))


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_all_rules_hold_for_any_excluded_layers(data):
    network = network_of(data.draw(st.sampled_from(["yolov7-tiny", "yolov7-w6", "yolov7-e6e"])))
    excluded = data.draw(st.sets(st.sampled_from(place_qdq(network, {}).convolutions), max_size=40))
    placement = place_qdq(network, dict.fromkeys(excluded, WHY))
    check_placement(network, placement)
    check_file(network, placement)


def test_an_excluded_layer_reads_the_float_tensor_and_keeps_its_weights():
    network = network_of("yolov7-tiny")
    output = "model.5.conv"
    proto = check_file(network, place_qdq(network, {output: WHY}))
    node = next(node for node in proto.graph.node if node.output[0] == output)
    assert list(node.input) == list(network.producers[output].input)
    floats = [node.output[0] for node in float_nodes(network, place_qdq(network, {output: WHY}))]
    assert floats == [output, "model.5.act", *network.heads]


# --- small graphs -----------------------------------------------------------------------------------------------------


class Sketch:
    """A third-party graph with the input `images` [1, 3, 16, 16]; every call adds a node and returns its output."""

    def __init__(self):
        self.nodes, self.weights = [], {}
        self._rng = np.random.default_rng(0)

    def node(self, op, *inputs, name, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def weight(self, name, values):
        self.weights[name] = np.asarray(values)
        return name

    def conv(self, x, name, *, c_in=4, c_out=4, group=1, bias=True):
        weight = self._rng.normal(size=(c_out, c_in // group, 3, 3)).astype(np.float32) / 3
        inputs = [self.weight(f"{name}.weight", weight)]
        if bias:
            inputs.append(self.weight(f"{name}.bias", self._rng.normal(size=c_out).astype(np.float32)))
        return self.node("Conv", x, *inputs, name=name, group=group, pads=[1, 1, 1, 1])

    def enlarge(self, x, name, *, mode):
        scales = self.weight("scales", np.array([1, 1, 2, 2], np.float32))
        return self.node("Resize", x, "", scales, name=name, mode=mode, coordinate_transformation_mode="asymmetric")

    def model(self, *outputs):
        graph = helper.make_graph(
            self.nodes,
            "sketch",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 16, 16])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            initializer=[numpy_helper.from_array(values, name) for name, values in self.weights.items()],
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
        metadata = assumed_metadata(classes=1, input_hw=(16, 16), batch=1, input_kind="float32", nms=None)
        return OnnxModel(proto, metadata)


def quantized(model, **options):
    images = [noise(16, 16, seed) for seed in range(3)]
    return to_int8(model, calibrate(model, images, count=3), Int8Options(**options))


def placement_of(model, *, excluded=()):
    """The placement, after checking that all rules hold in it and in the file."""
    network = Network(model)
    placement = place_qdq(network, dict.fromkeys(excluded, WHY))
    check_placement(network, placement)
    check_file(network, placement)
    return placement


def assert_near(model, ours):
    """The outputs of the INT8 file are close to those of the float32 file."""
    image = noise(16, 16, 9)[None, ..., ::-1].transpose(0, 3, 1, 2) / np.float32(255)
    runs = [session(m.proto).run(None, {"images": np.ascontiguousarray(image)}) for m in (model, ours)]
    for expected, found in zip(*runs, strict=True):
        assert 0 < np.sqrt(np.mean((found - expected) ** 2)) < INT8_TOLERANCE * expected.std()


def test_there_is_no_pair_between_convolution_and_activation():
    sketch = Sketch()
    first = sketch.node("Relu", sketch.conv("images", "a", c_in=3), name="a.act")
    second = sketch.node("Relu", sketch.conv(first, "b"), name="b.act")
    model = sketch.model(sketch.conv(second, "head"))
    placement = placement_of(model)
    assert placement.pairs == {"images": ("a",), "a.act": ("b",)}
    assert placement.float_convolutions == {"head": HEAD_REASON}
    assert_near(model, quantized(model, fallback="fp32"))


def test_two_consumers_share_one_pair():
    sketch = Sketch()
    first = sketch.conv("images", "a", c_in=3)
    joined = sketch.node("Sub", sketch.conv(first, "b"), sketch.conv(first, "c"), name="joined")
    placement = placement_of(sketch.model(sketch.conv(joined, "head")))
    assert placement.pairs == {"images": ("a",), "a": ("b", "c")}


@pytest.mark.parametrize("float_one", ["excluded", "not a convolution"])
def test_a_concat_with_a_float_branch_has_the_scale_of_both_branches(float_one):
    sketch = Sketch()
    first = sketch.conv("images", "a", c_in=3)
    one = sketch.conv(first, "b") if float_one == "excluded" else sketch.node("Tanh", first, name="b")
    joined = sketch.node("Concat", one, sketch.conv(first, "c"), name="joined", axis=1)
    model = sketch.model(sketch.conv(sketch.conv(joined, "d", c_in=8), "head"))
    placement = placement_of(model, excluded=["b"] if float_one == "excluded" else [])
    assert placement.scale_groups["joined"] == ("b", "c")
    assert placement.pairs["joined"] == ("d",)
    assert "b" not in placement.pairs and "c" not in placement.pairs
    assert_near(model, quantized(model, fallback="fp32", exclude={"b": WHY} if float_one == "excluded" else {}))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_only_a_nearest_resize_is_a_pass_through_operation(mode):
    sketch = Sketch()
    large = sketch.enlarge(sketch.conv("images", "a", c_in=3), "large", mode=mode)
    model = sketch.model(sketch.conv(sketch.conv(large, "b"), "head"))
    placement = placement_of(model)
    if mode == "nearest":
        assert placement.pairs == {"images": ("a",), "a": ("large",), "large": ("b",)}
        assert placement.scale_groups["a"] == placement.scale_groups["large"] == ("a",)
    else:
        assert placement.pairs == {"images": ("a",), "large": ("b",)}
        assert placement.scale_groups["large"] == ("large",)
    assert_near(model, quantized(model, fallback="fp32"))


@pytest.mark.parametrize("options", [{"group": 4}, {"group": 2}, {"bias": False}, {"group": 4, "bias": False}], ids=str)
def test_convolutions_with_groups_or_without_bias_are_quantized(options):
    sketch = Sketch()
    first = sketch.node("Relu", sketch.conv("images", "a", c_in=3), name="a.act")
    model = sketch.model(sketch.conv(sketch.conv(first, "b", **options), "head"))
    assert placement_of(model).convolutions == ("a", "b")
    assert_near(model, quantized(model, fallback="fp32"))


@pytest.mark.parametrize("op", ["Abs", "Relu"])
def test_a_convolution_whose_weights_are_computed_stays_float_with_a_reason(op):
    sketch = Sketch()
    first = sketch.conv("images", "a", c_in=3)
    weight = sketch.node(op, sketch.weight("stored", np.ones((4, 4, 1, 1), np.float32)), name="made")
    second = sketch.node("Conv", first, weight, name="b")
    model = sketch.model(sketch.conv(second, "head"))
    placement = placement_of(model)
    assert placement.float_convolutions == {"b": "its weights are not a float32 constant", "head": HEAD_REASON}
    assert placement.convolutions == ("a",)
    assert ("b", placement.float_convolutions["b"]) in quantized(model).metadata.int8.float_layers


@pytest.mark.parametrize("source", ["Constant", "Identity"])
def test_a_convolution_whose_weights_are_a_constant_node_is_quantized(source):
    sketch = Sketch()
    first = sketch.conv("images", "a", c_in=3)
    values = np.ones((4, 4, 1, 1), np.float32)
    if source == "Constant":
        weight = sketch.node("Constant", name="made", value=numpy_helper.from_array(values))
    else:
        weight = sketch.node("Identity", sketch.weight("stored", values), name="made")
    model = sketch.model(sketch.conv(sketch.node("Conv", first, weight, name="b"), "head"))
    assert placement_of(model).convolutions == ("a", "b")
    assert_near(model, quantized(model, fallback="fp32"))


def test_a_graph_without_convolutions_has_an_empty_placement():
    sketch = Sketch()
    model = sketch.model(sketch.node("Relu", "images", name="output"))
    placement = place_qdq(Network(model), {})
    assert (placement.convolutions, placement.pairs) == ((), {})
    assert (placement.scale_groups, placement.float_convolutions) == ({}, {})
    with pytest.raises(ExportError, match="No convolution can be INT8: the graph has none"):
        quantized(model)


def test_a_sum_with_a_constant_or_the_image_is_not_residual():
    sketch = Sketch()
    first = sketch.conv("images", "a", c_in=3, c_out=3)
    shifted = sketch.node("Add", first, sketch.weight("shift", np.ones((3, 1, 1), np.float32)), name="shifted")
    added = sketch.node("Add", shifted, "images", name="added")
    placement = placement_of(sketch.model(sketch.conv(sketch.conv(added, "b", c_in=3), "head")))
    assert placement.pairs == {"images": ("a",), "added": ("b",)}


def test_sums_of_sums_read_all_terms_through_pairs():
    sketch = Sketch()
    terms = [sketch.conv("images", name, c_in=3) for name in "abc"]
    once = sketch.node("Add", *terms[:2], name="once")
    twice = sketch.node("Add", once, terms[2], name="twice")
    placement = placement_of(sketch.model(sketch.conv(sketch.conv(twice, "d"), "head")))
    assert set(placement.pairs) == {"images", "a", "b", "c", "once", "twice"}
    assert placement.scale_groups["a"] == placement.scale_groups["b"] == ("a", "b")
    assert placement.scale_groups["once"] == placement.scale_groups["c"] == ("c", "once")


def test_a_pooled_term_of_a_sum_has_the_scale_of_the_input_of_the_pool():
    """Its values are also read without the pool; two ranges would be two scales of the same name."""
    sketch = Sketch()
    first = sketch.conv("images", "a", c_in=3)
    pooled = sketch.node("MaxPool", first, name="pooled", kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    added = sketch.node("Add", pooled, sketch.conv(first, "b"), name="added")
    model = sketch.model(sketch.conv(sketch.conv(added, "c"), "head"))
    placement = placement_of(model)
    assert placement.scale_groups["a"] == placement.scale_groups["pooled"] == placement.scale_groups["b"] == ("a", "b")
    assert_near(model, quantized(model, fallback="fp32"))


def test_a_constant_input_of_a_concat_shares_the_scale():
    sketch = Sketch()
    grid = sketch.weight("grid", np.linspace(-9, 9, 256, dtype=np.float32).reshape(1, 1, 16, 16))
    joined = sketch.node("Concat", sketch.conv("images", "a", c_in=3), grid, name="joined", axis=1)
    model = sketch.model(sketch.conv(sketch.conv(joined, "b", c_in=5), "head"))
    assert placement_of(model).scale_groups["joined"] == ("a", "grid")
    assert_near(model, quantized(model, fallback="fp32"))
