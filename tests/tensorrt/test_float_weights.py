"""INT8 weights stored as float32 for TensorRT before 10: they quantize to the same INT8 values."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.engines import exported, quantized
from tests.support.small_models import session
from yolov7_deploy.errors import EngineError
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import EngineOptions
from yolov7_deploy.precision.int8_summary import summarize_int8
from yolov7_deploy.tensorrt.builder import build_engine, find_tensorrt
from yolov7_deploy.tensorrt.onnx_rewrite import prepare_graph

INT8_VALUES = np.arange(-127, 128, dtype=np.int8)
# A fake TensorRT for the build process, which writes the graph that it parses to a file.
MODULE = """
import sys
from pathlib import Path
from tests.fakes.fake_tensorrt import FakeTensorrt
sys.modules[__name__] = FakeTensorrt({version!r}, on_parse=Path({graph!r}).write_bytes)
"""


def prepared(model, *, float_weights=True):
    return prepare_graph(model, use_plugin=False, float_weights=float_weights).proto


def weights_only(values, scales, zeros=None, *, axis=None, nodes=(), inputs=(), outputs=()):
    """Return a model of another exporter: a DequantizeLinear of a constant, and optional further nodes."""
    constants = {"integers": values, "scales": scales, **({} if zeros is None else {"zeros": zeros})}
    attributes = {} if axis is None else {"axis": axis}
    floats = helper.make_tensor_value_info("floats", TensorProto.FLOAT, np.shape(values))
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", list(constants), ["floats"], name="back", **attributes), *nodes],
        "foreign",
        inputs,
        [floats, *outputs],
        initializer=[numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return OnnxModel(proto, ModelMetadata(variant="custom", class_names=(), strides=(), anchors=(), precision="int8"))


def quantize_weights(proto):
    """Return the float weights quantized by ONNX Runtime, by the output of their DequantizeLinear."""
    quantizers_only = onnx.ModelProto()
    quantizers_only.CopyFrom(proto)
    constants = {tensor.name for tensor in proto.graph.initializer}
    quantizers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in constants]
    del quantizers_only.graph.node[:], quantizers_only.graph.output[:], quantizers_only.graph.input[:]
    quantizers_only.graph.node.extend(quantizers)
    names = [node.output[0] for node in quantizers]
    quantizers_only.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in names)
    readers = {node.input[0]: node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    return {readers[name]: value for name, value in zip(names, session(quantizers_only).run(None, {}), strict=True)}


def int8_weights(proto):
    """Return the INT8 weights of a graph, by the output of their DequantizeLinear."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    return {node.output[0]: numpy_helper.to_array(constants[node.input[0]]) for node in nodes}


# --- the same numbers -------------------------------------------------------------------------------------------------


def test_every_int8_value_is_preserved_at_every_scale():
    """50,000 scales over the range of float32, except the smallest, which runtimes may flush to 0, and the largest."""
    rng = np.random.default_rng(0)
    scales = np.concatenate([2.0 ** rng.uniform(-125, 120, 49_000), 2.0 ** np.arange(-125, 121.0), rng.random(754)])
    model = weights_only(np.tile(INT8_VALUES, (len(scales), 1)), scales.astype(np.float32), axis=0)
    (back,) = quantize_weights(prepared(model)).values()
    np.testing.assert_array_equal(back, int8_weights(model.proto)["floats"])


def test_every_int8_value_is_preserved_if_a_runtime_multiplies_by_the_reciprocal():
    scales = (2.0 ** np.random.default_rng(1).uniform(-125, 120, 50_000)).astype(np.float32)[:, None]
    floats = INT8_VALUES.astype(np.float32) * scales
    np.testing.assert_array_equal(np.rint(floats * (np.float32(1) / scales)), np.tile(INT8_VALUES, (len(scales), 1)))


def test_the_int8_weights_of_a_network_are_bit_equal():
    model = quantized()
    expected, back = int8_weights(model.proto), quantize_weights(prepared(model))
    assert len(back) == summarize_int8(model.proto).weights > 50
    for name, values in back.items():
        np.testing.assert_array_equal(values, expected[name])


def test_onnx_runtime_computes_the_same_outputs():
    model = quantized(nms="none")
    image = np.random.default_rng(2).random((1, 3, *model.metadata.input_hw), dtype=np.float32)
    outputs = [
        session(prepared(model, float_weights=enabled)).run(None, {"images": image}) for enabled in (False, True)
    ]
    np.testing.assert_array_equal(*(output[0] for output in outputs))


def test_scales_and_zero_points_are_kept_and_all_int8_weights_are_replaced():
    model = quantized()
    proto = prepared(model)
    producers = {node.output[0]: node for node in proto.graph.node}
    for node in (node for node in proto.graph.node if node.op_type == "DequantizeLinear"):
        assert producers[node.input[0]].op_type == "QuantizeLinear"
        assert producers[node.input[0]].input[1:] == node.input[1:]
        assert producers[node.input[0]].attribute[:] == node.attribute[:]
    zeros = {node.input[2] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    integers = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == TensorProto.INT8}
    assert integers == zeros
    assert summarize_int8(model.proto).weights > 50  # the input is not modified


# --- other exporters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scales,zeros,axis",
    [
        (np.float32(0.5), np.int8(0), None),
        (np.array([0.5], np.float32), np.zeros(1, np.int8), 0),
        (np.array([0.5, 0.25], np.float32), np.zeros(2, np.int8), -2),
        (np.full(255, 0.5, np.float32), None, None),
        (np.full(255, 0.5, np.float32), np.full(255, 3, np.int8), 1),
    ],
    ids=["one scale", "one scale in a list", "negative axis", "axis 1 and no zero point", "a zero point"],
)
def test_every_form_of_scales_gives_the_same_integers_and_floats(scales, zeros, axis):
    model = weights_only(np.stack([INT8_VALUES, INT8_VALUES[::-1]]), scales, zeros, axis=axis)
    proto = prepared(model)
    onnx.checker.check_model(proto)
    (back,) = quantize_weights(proto).values()
    np.testing.assert_array_equal(back, int8_weights(model.proto)["floats"])
    # Not optimized: for CPUs without VNNI, ONNX Runtime adds a scalar zero point to scales of an axis, and fails.
    ours, expected = (session(graph, optimize=False).run(None, {})[0] for graph in (proto, model.proto))
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize(
    "integers,scales",
    [
        (INT8_VALUES.astype(np.uint8), np.float32(0.5)),
        (INT8_VALUES, np.array([0.5, 0.5], np.float32)),
        (INT8_VALUES, np.float32(np.finfo(np.float32).max / 2)),
        (INT8_VALUES, np.float16(0.5)),
    ],
    ids=["uint8", "scales of another length", "infinite floats", "FP16 scales"],
)
def test_unsupported_weights_are_not_changed(integers, scales):
    model = weights_only(integers, scales, np.zeros(np.shape(scales), integers.dtype), axis=0)
    assert [node.op_type for node in prepared(model).graph.node] == ["DequantizeLinear"]


def test_a_constant_with_other_readers_is_kept():
    inner = helper.make_graph(
        [helper.make_node("Identity", ["integers"], ["inner"])],
        "inner",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.INT8, INT8_VALUES.shape)],
    )
    nodes = [
        helper.make_node("If", ["condition"], ["selected"], then_branch=inner, else_branch=inner),
        helper.make_node("Cast", ["selected"], ["cast"], to=TensorProto.FLOAT),
    ]
    condition = helper.make_tensor_value_info("condition", TensorProto.BOOL, [])
    output = helper.make_tensor_value_info("cast", TensorProto.FLOAT, INT8_VALUES.shape)
    model = weights_only(INT8_VALUES, np.float32(0.5), np.int8(0), nodes=nodes, inputs=[condition], outputs=[output])
    proto = prepared(model)
    onnx.checker.check_model(proto)
    floats, cast = session(proto).run(None, {"condition": np.array(True)})
    np.testing.assert_array_equal(floats, INT8_VALUES * np.float32(0.5))
    np.testing.assert_array_equal(cast, INT8_VALUES.astype(np.float32))


def test_damaged_weights_are_an_engine_error():
    model = weights_only(INT8_VALUES, np.float32(0.5), np.int8(0))
    model.proto.graph.initializer[0].raw_data = b"too few"
    with pytest.raises(EngineError, match="INT8 weights of the graph are damaged"):
        prepared(model)


# --- TensorRT versions ------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that installs a fake TensorRT and returns the file to which it writes the parsed graph."""

    def install(version: str) -> Path:
        graph = tmp_path / "parsed.onnx"
        (tmp_path / "tensorrt.py").write_text(MODULE.format(version=version, graph=str(graph)), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        assert "tensorrt" not in sys.modules
        return graph

    return install


@pytest.mark.parametrize(
    "version,flags,is_float",
    [
        ("8.5", ("INT8", "FP16"), True),
        ("8.6", ("INT8", "FP16"), True),
        ("10.3", ("INT8", "FP16"), False),
        ("10.13", (), False),
        ("11.1", (), False),
    ],
)
def test_tensorrt_before_10_parses_float_weights_and_later_versions_int8(installed, version, flags, is_float):
    parsed = installed(version)
    model = quantized()
    found = find_tensorrt(EngineOptions())
    assert (found.product, found.version) == ("tensorrt", version)
    record = build_engine(model, EngineOptions(plugin="off", use_timing_cache=False), installation=found).record
    counts = summarize_int8(onnx.load(parsed))
    in_file = summarize_int8(model.proto)
    assert (record.flags, record.strongly_typed) == (flags, not flags)
    assert counts.weights == (0 if is_float else in_file.weights)
    assert sum(counts.pairs.values()) == sum(in_file.pairs.values()) + (in_file.weights if is_float else 0)
    assert record.metadata == model.metadata


def test_a_float32_file_is_not_changed():
    graphs = [prepared(exported(), float_weights=enabled).SerializeToString() for enabled in (False, True)]
    assert graphs[0] == graphs[1]
