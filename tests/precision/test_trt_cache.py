"""TensorRT calibration cache: its format, a line for every tensor before decoding, the same scales as the INT8 file."""

from __future__ import annotations

import re
import struct
from functools import lru_cache

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.sample_images import noise
from tests.support.small_models import HW, exported_tiny
from tests.support.thin_variants import SIDE, thin_model
from yolov7_deploy.metadata import assumed_metadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import INT8_METHODS, Int8Options
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_cache import trt_calibration_cache
from yolov7_deploy.precision.histogram import LEVELS
from yolov7_deploy.precision.int8 import to_int8

# Scales are products of float64 that are rounded to float32 at the end.
FLOAT32_REL = 1e-6
# With SiLU, with a space-to-depth stem, with residual sums.
THIN = ("yolov7-tiny-silu", "yolov7-w6", "yolov7-e6e")


@lru_cache
def model_of(which, **options):
    """Exported yolov7-tiny, or a thin variant."""
    return exported_tiny(**{"nms": "plugin", **options}) if which == "tiny" else thin_model(which)


@lru_cache
def calibration_of(which, **options):
    hw = HW if which == "tiny" else (SIDE, SIDE)
    return calibrate(model_of(which, **options), [noise(*hw, seed) for seed in range(2)], count=2)


@lru_cache
def text_of(which="tiny", *, method="max", **options):
    return trt_calibration_cache(model_of(which, **options), calibration_of(which, **options), method)


def scales_in(text):
    """The scale of each line as a float32; a tensor has one line."""
    lines = text.splitlines()[1:]
    scales = {
        line.rpartition(": ")[0]: struct.unpack(">f", bytes.fromhex(line.rpartition(": ")[2]))[0] for line in lines
    }
    assert len(scales) == len(lines)
    return scales


def nodes_before_decoding(model):
    return [node for node in model.proto.graph.node if not node.domain and not node.name.startswith("end__")]


MODELS = [("tiny", {}), ("tiny", {"nms": "standard"}), ("tiny", {"input_kind": "uint8"}), *((v, {}) for v in THIN)]
QUICK = ("max", "percentile")  # the others are searches, a second for twenty tensors
every_model = pytest.mark.parametrize("which, options", MODELS, ids=str)


# --- format -----------------------------------------------------------------------------------------------------------


@every_model
def test_the_cache_is_a_header_and_lines_of_a_name_and_the_bits_of_a_float(which, options):
    text = text_of(which, **options)
    assert text.isascii() and text.endswith("\n") and "\r" not in text
    header, *lines = text[:-1].split("\n")
    assert header == "TRT-8601-EntropyCalibration2"
    assert lines and all(re.fullmatch(r"\S+: [0-9a-f]{8}", line) for line in lines)


def test_bits_are_written_in_big_endian_order():
    """1 / 127, as TensorRT writes it for a sigmoid."""
    line = next(line for line in text_of("yolov7-tiny-silu").splitlines() if "sigmoid" in line)
    assert line.endswith(": 3c010204")
    assert np.array([0x3C010204], np.uint32).view(np.float32)[0] == np.float32(1 / 127)


def test_the_same_calibration_gives_the_same_text():
    model = model_of("tiny")
    again = calibrate(model, [noise(*HW, seed) for seed in range(2)], count=2)
    assert trt_calibration_cache(model, again, "max") == text_of()
    assert trt_calibration_cache(model, calibration_of("tiny"), "max") == text_of()


# --- tensors ----------------------------------------------------------------------------------------------------------


@every_model
def test_every_float_tensor_before_decoding_has_a_line_and_none_after_it(which, options):
    model = model_of(which, **options)
    computed = [name for node in nodes_before_decoding(model) for name in node.output]
    is_uint8 = options.get("input_kind") == "uint8"
    assert list(scales_in(text_of(which, **options))) == [*([] if is_uint8 else ["images"]), *computed]
    assert set(model.metadata.heads) < set(computed)
    assert len(computed) < len(model.proto.graph.node)


@every_model
@pytest.mark.parametrize("method", QUICK)
def test_every_scale_is_finite_and_positive(which, options, method):
    for name, scale in scales_in(text_of(which, method=method, **options)).items():
        assert np.isfinite(scale) and scale > 1e-9, name


# --- scales -----------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("method", QUICK)
def test_tensors_with_a_pair_have_the_scale_of_the_int8_file(which, options, method):
    model, calibration = model_of(which, **options), calibration_of(which, **options)
    graph = to_int8(model, calibration, Int8Options(method=method, fallback="fp32")).proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    scales = scales_in(text_of(which, method=method, **options))
    pairs = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(pairs) > 40
    for node in pairs:
        assert scales[node.input[0]] == numpy_helper.to_array(stored[node.input[1]]), node.input[0]


@every_model
def test_outputs_of_pass_through_operations_have_the_scale_of_their_inputs(which, options):
    scales = scales_in(text_of(which, **options))
    kinds = set()
    for node in nodes_before_decoding(model_of(which, **options)):
        if node.op_type in ("Concat", "MaxPool", "Resize", "Slice"):
            kinds.add(node.op_type)
            names = node.input if node.op_type == "Concat" else node.input[:1]
            assert len({scales[name] for name in (*names, *node.output)}) == 1, node.name
    assert {"Concat", "MaxPool", "Resize"} <= kinds
    assert ("Slice" in kinds) == (which in ("yolov7-w6", "yolov7-e6e"))


def test_both_terms_of_a_residual_sum_share_a_scale():
    scales = scales_in(text_of("yolov7-e6e"))
    sums = [node for node in nodes_before_decoding(model_of("yolov7-e6e")) if node.op_type == "Add"]
    assert sums
    for node in sums:
        assert len({scales[name] for name in node.input}) == 1


@every_model
def test_the_output_of_a_convolution_has_the_scale_of_its_activation(which, options):
    model = model_of(which, **options)
    scales = scales_in(text_of(which, **options))
    activations = [node for node in nodes_before_decoding(model) if node.op_type in ("LeakyRelu", "Mul")]
    assert len(activations) > 50
    for node in activations:
        assert scales[node.input[0]] == scales[node.output[0]]


@pytest.mark.parametrize("which", THIN)
def test_a_sigmoid_ends_at_one(which):
    scales = scales_in(text_of(which))
    sigmoids = [node.output[0] for node in nodes_before_decoding(model_of(which)) if node.op_type == "Sigmoid"]
    assert len(sigmoids) > 50
    assert {scales[name] for name in sigmoids} == {np.float32(1 / LEVELS)}


@every_model
def test_heads_are_not_clipped(which, options):
    scales, amax = scales_in(text_of(which, **options)), calibration_of(which, **options).output_amax
    for head in model_of(which, **options).metadata.heads:
        assert scales[head] == pytest.approx(amax[head] / LEVELS, rel=FLOAT32_REL)


def test_uint8_inputs_have_255_times_the_scale_of_the_scaled_image():
    scales = scales_in(text_of(input_kind="uint8"))
    for name in ("pixels", "planes", "rgb"):
        assert scales[name] == pytest.approx(255 * scales["scaled"], rel=FLOAT32_REL)


# --- third-party graphs -----------------------------------------------------------------------------------------------


def foreign(*nodes, shape):
    """Two convolutions with outputs `a` and `b`, and the given nodes."""
    weights = {
        "first": np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32),
        "second": np.ones((4, 4, 1, 1), np.float32),
        "shape": np.array([1, -1], np.int64),
    }
    begin = [
        helper.make_node("Conv", ["images", "first"], ["a"]),
        helper.make_node("Conv", ["a", "second"], ["b"]),
    ]
    graph = helper.make_graph(
        [*begin, *nodes],
        "foreign",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        initializer=[numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return OnnxModel(proto, assumed_metadata(classes=1, input_hw=(64, 64), batch=1, input_kind="float32", nms=None))


def test_a_tensor_of_unknown_range_has_no_line():
    """TensorRT computes tensors without a line in float."""
    model = foreign(
        helper.make_node("Softmax", ["b"], ["soft"], axis=1),
        helper.make_node("Reshape", ["soft", "shape"], ["flat"]),
        helper.make_node("Reshape", ["b", "shape"], ["known"]),
        helper.make_node("Concat", ["flat", "known"], ["output"], axis=1),
        shape=[1, 2 * 4 * 64 * 64],
    )
    scales = scales_in(trt_calibration_cache(model, calibrate(model, [noise(64, 64)], count=1), "max"))
    assert list(scales) == ["images", "a", "b", "known"]
    assert scales["known"] == scales["b"]


def test_each_method_gives_the_scales_of_its_int8_file():
    model = foreign(helper.make_node("Conv", ["b", "second"], ["output"]), shape=[1, 4, 64, 64])
    calibration = calibrate(model, [noise(64, 64)], count=1)
    found = {}
    for method in INT8_METHODS:
        scales = scales_in(trt_calibration_cache(model, calibration, method))
        graph = to_int8(model, calibration, Int8Options(method=method)).proto.graph
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        pairs = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
        assert pairs.keys() == {"images", "a"}
        found[method] = tuple(scales[name] for name in pairs)
        assert found[method] == tuple(stored[scale] for scale in pairs.values())
    assert len(set(found.values())) == len(INT8_METHODS)
