"""INT8 weights as float32 for TensorRT before 10: the same INT8 comes back, and only where that TensorRT builds."""

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
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.options import EngineOptions
from yolov7_deploy.precision.int8_summary import count_int8
from yolov7_deploy.tensorrt.builder import build_engine
from yolov7_deploy.tensorrt.onnx_rewrite import prepare_graph
from yolov7_deploy.tensorrt.selection import find_tensorrt

STEPS = np.arange(-127, 128, dtype=np.int8)
# A TensorRT that the building process imports: it writes down the graph that it is given.
MODULE = """
import sys
from pathlib import Path
from fake_tensorrt import FakeTensorrt
sys.modules[__name__] = FakeTensorrt({version!r}, parsed=Path({graph!r}).write_bytes)
"""


def prepared(model, *, float_weights=True):
    return prepare_graph(model, own_plugin=False, float_weights=float_weights).proto


def weights_only(values, scales, zeros=None, *, axis=None, nodes=(), inputs=(), outputs=()):
    """A file of another program: a DequantizeLinear of a constant, and what more is in the graph."""
    constants = {"steps": values, "scales": scales, **({} if zeros is None else {"zeros": zeros})}
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


def rounded(proto):
    """The INT8 that ONNX Runtime makes of the float weights, by the name of what their DequantizeLinear gives."""
    shown = onnx.ModelProto()
    shown.CopyFrom(proto)
    constants = {tensor.name for tensor in proto.graph.initializer}
    quantizers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in constants]
    del shown.graph.node[:], shown.graph.output[:], shown.graph.input[:]
    shown.graph.node.extend(quantizers)
    names = [node.output[0] for node in quantizers]
    shown.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in names)
    readers = {node.input[0]: node.output[0] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    return {readers[name]: value for name, value in zip(names, session(shown).run(None, {}), strict=True)}


def stored(proto):
    """The INT8 weights of a graph, by the name of what their DequantizeLinear gives."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    back = [node for node in proto.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    return {node.output[0]: numpy_helper.to_array(constants[node.input[0]]) for node in back}


# --- the same numbers -------------------------------------------------------------------------------------------------


def test_every_step_comes_back_at_every_scale():
    """50,000 scales over all of float32 but its smallest, where runtimes may take them for 0, and its largest."""
    rng = np.random.default_rng(0)
    scales = np.concatenate([2.0 ** rng.uniform(-125, 120, 49_000), 2.0 ** np.arange(-125, 121.0), rng.random(754)])
    model = weights_only(np.tile(STEPS, (len(scales), 1)), scales.astype(np.float32), axis=0)
    (back,) = rounded(prepared(model)).values()
    np.testing.assert_array_equal(back, stored(model.proto)["floats"])


def test_every_step_comes_back_where_a_runtime_multiplies_by_the_reciprocal():
    scales = (2.0 ** np.random.default_rng(1).uniform(-125, 120, 50_000)).astype(np.float32)[:, None]
    floats = STEPS.astype(np.float32) * scales
    np.testing.assert_array_equal(np.rint(floats * (np.float32(1) / scales)), np.tile(STEPS, (len(scales), 1)))


def test_the_int8_of_a_network_comes_back_bit_by_bit():
    model = quantized()
    expected, back = stored(model.proto), rounded(prepared(model))
    assert len(back) == count_int8(model.proto).weights > 50
    for name, values in back.items():
        np.testing.assert_array_equal(values, expected[name])


def test_what_onnx_runtime_computes_stays_the_same():
    model = quantized(nms="none")
    image = np.random.default_rng(2).random((1, 3, *model.metadata.input_hw), dtype=np.float32)
    outputs = [session(prepared(model, float_weights=wanted)).run(None, {"images": image}) for wanted in (False, True)]
    np.testing.assert_array_equal(*(output[0] for output in outputs))


def test_scales_and_zero_points_stay_and_no_int8_weight_is_left():
    model = quantized()
    proto = prepared(model)
    made = {node.output[0]: node for node in proto.graph.node}
    for node in (node for node in proto.graph.node if node.op_type == "DequantizeLinear"):
        assert made[node.input[0]].op_type == "QuantizeLinear"
        assert made[node.input[0]].input[1:] == node.input[1:]
        assert made[node.input[0]].attribute[:] == node.attribute[:]
    zeros = {node.input[2] for node in proto.graph.node if node.op_type == "DequantizeLinear"}
    integers = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == TensorProto.INT8}
    assert integers == zeros
    assert count_int8(model.proto).weights > 50  # the model itself is untouched


# --- what others write ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scales,zeros,axis",
    [
        (np.float32(0.5), np.int8(0), None),
        (np.array([0.5], np.float32), np.zeros(1, np.int8), 0),
        (np.array([0.5, 0.25], np.float32), np.zeros(2, np.int8), -2),
        (np.full(255, 0.5, np.float32), None, None),
        (np.full(255, 0.5, np.float32), np.full(255, 3, np.int8), 1),
    ],
    ids=["one scale", "one in a list", "rows from behind", "axis 1 and no zero point", "a zero point"],
)
def test_each_way_to_write_scales_gives_the_same_steps_and_floats(scales, zeros, axis):
    model = weights_only(np.stack([STEPS, STEPS[::-1]]), scales, zeros, axis=axis)
    proto = prepared(model)
    onnx.checker.check_model(proto)
    (back,) = rounded(proto).values()
    np.testing.assert_array_equal(back, stored(model.proto)["floats"])
    np.testing.assert_array_equal(session(proto).run(None, {})[0], session(model.proto).run(None, {})[0])


@pytest.mark.parametrize(
    "steps,scales",
    [
        (STEPS.astype(np.uint8), np.float32(0.5)),
        (STEPS, np.array([0.5, 0.5], np.float32)),
        (STEPS, np.float32(np.finfo(np.float32).max / 2)),
        (STEPS, np.float16(0.5)),
    ],
    ids=["uint8", "scales that do not fit", "floats would be infinite", "half scales"],
)
def test_what_cannot_be_written_so_is_left_for_tensorrt_to_judge(steps, scales):
    model = weights_only(steps, scales, np.zeros(np.shape(scales), steps.dtype), axis=0)
    assert [node.op_type for node in prepared(model).graph.node] == ["DequantizeLinear"]


def test_a_constant_that_is_read_elsewhere_too_stays():
    inner = helper.make_graph(
        [helper.make_node("Identity", ["steps"], ["inner"])],
        "inner",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.INT8, STEPS.shape)],
    )
    nodes = [
        helper.make_node("If", ["yes"], ["chosen"], then_branch=inner, else_branch=inner),
        helper.make_node("Cast", ["chosen"], ["cast"], to=TensorProto.FLOAT),
    ]
    yes = helper.make_tensor_value_info("yes", TensorProto.BOOL, [])
    output = helper.make_tensor_value_info("cast", TensorProto.FLOAT, STEPS.shape)
    model = weights_only(STEPS, np.float32(0.5), np.int8(0), nodes=nodes, inputs=[yes], outputs=[output])
    proto = prepared(model)
    onnx.checker.check_model(proto)
    floats, cast = session(proto).run(None, {"yes": np.array(True)})
    np.testing.assert_array_equal(floats, STEPS * np.float32(0.5))
    np.testing.assert_array_equal(cast, STEPS.astype(np.float32))


def test_damaged_weights_are_our_error():
    model = weights_only(STEPS, np.float32(0.5), np.int8(0))
    model.proto.graph.initializer[0].raw_data = b"too few"
    with pytest.raises(EngineError, match="INT8 weights of the graph are damaged"):
        prepared(model)


# --- where ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a stand-in for a TensorRT of a version; gives the file in which its parser leaves the graph."""

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
def test_tensorrt_before_10_gets_float_weights_and_all_others_the_int8_of_the_file(installed, version, flags, is_float):
    parsed = installed(version)
    model = quantized()
    found = find_tensorrt(EngineOptions())
    assert (found.product, found.version) == ("tensorrt", version)
    record = build_engine(model, EngineOptions(plugin="off", use_timing_cache=False), on=found).record
    account = count_int8(onnx.load(parsed))
    in_file = count_int8(model.proto)
    assert (record.flags, record.strongly_typed) == (flags, not flags)
    assert account.weights == (0 if is_float else in_file.weights)
    assert sum(account.pairs.values()) == sum(in_file.pairs.values()) + (in_file.weights if is_float else 0)
    assert record.metadata == model.metadata


def test_a_float32_file_is_the_same_for_every_tensorrt():
    graphs = [prepared(exported(), float_weights=wanted).SerializeToString() for wanted in (False, True)]
    assert graphs[0] == graphs[1]
