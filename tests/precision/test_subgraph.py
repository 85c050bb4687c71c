"""Graphs of other exporters: constants as nodes, and custom operators before and after the last convolution."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support.sample_images import noise
from tests.support.small_models import exported_tiny
from yolov7_deploy.errors import ExportError
from yolov7_deploy.metadata import assumed_metadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.calibration_cache import trt_calibration_cache
from yolov7_deploy.precision.int8 import check_quantizable, to_int8
from yolov7_deploy.precision.sensitivity import layer_sensitivities
from yolov7_deploy.precision.subgraph import Network, with_initializers

IMAGES = [noise(32, 32, seed) for seed in range(2)]
FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)
SHAPES = ((8, 3, 3, 3), (8, 8, 3, 3), (4, 8, 1, 1))
WEIGHTS = {f"w{number}": RNG.normal(0, 0.2, shape).astype(np.float32) for number, shape in enumerate(SHAPES)}
BIASES = {f"b{number}": RNG.normal(0, 0.5, shape[0]).astype(np.float32) for number, shape in enumerate(SHAPES)}


def constant(name, value):
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))


def foreign_net(*, nodes=(), between=(), after=(), opsets=(), functions=(), ir_version=8):
    """Return three convolutions with ReLU and a bias.

    Args:
        nodes: Names of the weights and biases that are `Constant` nodes.
        between: Nodes from `a1` to `x`, before the last convolution.
        after: Nodes from `y` to `output`.
        opsets: More operator sets.
        functions: Functions of the graph.
        ir_version: IR version of the file.
    """
    values = {**WEIGHTS, **BIASES}
    graph_nodes = [constant(name, values[name]) for name in nodes]
    graph_nodes += [
        helper.make_node("Conv", ["images", "w0", "b0"], ["c0"], name="conv0", pads=[1] * 4),
        helper.make_node("Relu", ["c0"], ["a0"]),
        helper.make_node("Conv", ["a0", "w1", "b1"], ["c1"], name="conv1", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["a1"]),
        *(between or [helper.make_node("Identity", ["a1"], ["x"])]),
        helper.make_node("Conv", ["x", "w2", "b2"], ["y"], name="conv2"),
        *(after or [helper.make_node("Sigmoid", ["y"], ["output"])]),
    ]
    graph = helper.make_graph(
        graph_nodes,
        "foreign",
        [helper.make_tensor_value_info("images", FLOAT, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("output", FLOAT, ["a", "b", "c", "d"])],
        [numpy_helper.from_array(value, name) for name, value in values.items() if name not in nodes],
    )
    sets = [helper.make_opsetid("", 17), *opsets]
    proto = helper.make_model(graph, opset_imports=sets, functions=list(functions), ir_version=ir_version)
    metadata = assumed_metadata(classes=0, input_hw=(32, 32), batch=1, input_kind="float32", nms=None)
    return OnnxModel(proto, metadata)


def quantized(model):
    """Return the sensitivities, the INT8 model and the calibration cache."""
    calibration = calibrate(model, IMAGES, count=len(IMAGES))
    sensitivities = layer_sensitivities(model, calibration, IMAGES, Int8Options())
    cache = trt_calibration_cache(model, calibration, "mse")
    return sensitivities, to_int8(model, calibration, Int8Options()), cache


def output_of(proto):
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    array = np.random.default_rng(1).random((1, 3, 32, 32), dtype=np.float32)
    return session.run(None, {"images": array})[0]


@pytest.fixture(scope="module")
def expected():
    sensitivities, int8, _ = quantized(foreign_net())
    return sensitivities, output_of(int8.proto)


RESHAPED = [constant("shape", np.array([1, 8, 32, 32])), helper.make_node("Reshape", ["a1", "shape"], ["x"])]


@pytest.mark.parametrize(
    "options",
    [
        {"nodes": tuple(BIASES)},
        {"nodes": tuple(WEIGHTS)},
        {"nodes": (*WEIGHTS, *BIASES)},
        {"nodes": ("w1", "b0"), "ir_version": 3},
        {"nodes": ("b1",), "between": RESHAPED},
    ],
    ids=["biases", "weights", "both", "IR 3", "a shape"],
)
def test_constants_as_nodes_give_the_result_of_initializers(options, expected):
    sensitivities, int8, _ = quantized(foreign_net(**options))
    assert [entry.layer for entry in sensitivities] == [entry.layer for entry in expected[0]]
    np.testing.assert_allclose([e.error for e in sensitivities], [e.error for e in expected[0]], rtol=1e-5)
    assert int8.metadata.int8.int8_convolutions == 2
    np.testing.assert_allclose(output_of(int8.proto), expected[1], atol=1e-6)


def test_a_bias_that_identity_nodes_share_is_a_constant(expected):
    model = foreign_net()
    shared = helper.make_node("Identity", ["b0"], ["same"])
    model.proto.graph.node.insert(0, shared)
    model.proto.graph.node[1].input[2] = "same"
    _, int8, _ = quantized(model)
    np.testing.assert_allclose(output_of(int8.proto), expected[1], atol=1e-6)


def test_a_bias_that_the_network_computes_is_kept():
    model = foreign_net(between=[
        helper.make_node("ReduceMean", ["a1"], ["bias"], axes=[0, 2, 3], keepdims=0),
        helper.make_node("Conv", ["a1", "w1", "bias"], ["x"], name="own bias", pads=[1] * 4),
    ])  # fmt: skip
    sensitivities, int8, _ = quantized(model)
    assert {entry.layer for entry in sensitivities} == {"conv0", "conv1", "own bias"}
    assert 0 < np.abs(output_of(int8.proto) - output_of(model.proto)).max() < 0.05


def test_sizes_that_the_network_computes_are_read_by_the_layers_after_them():
    """Exports of dynamic size resize to the shape of an earlier map."""
    model = foreign_net(between=[
        helper.make_node("Shape", ["a0"], ["size"]),
        helper.make_node("Resize", ["a1", "", "", "size"], ["x"], mode="nearest"),
    ])  # fmt: skip
    sensitivities, int8, _ = quantized(model)
    assert {entry.layer for entry in sensitivities} == {"conv0", "conv1"}
    assert int8.metadata.int8.int8_convolutions == 2


CONTRIB = helper.make_opsetid("com.microsoft", 1)
OWN = helper.make_opsetid("my.ops", 1)


def test_a_custom_operator_that_onnx_runtime_knows_is_run():
    between = [helper.make_node("QuickGelu", ["a1"], ["x"], domain="com.microsoft", alpha=1.702)]
    model = foreign_net(between=between, opsets=[CONTRIB])
    sensitivities, int8, _ = quantized(model)
    assert {entry.layer for entry in sensitivities} == {"conv0", "conv1"}
    assert 0 < np.abs(output_of(int8.proto) - output_of(model.proto)).max() < 0.05


def test_a_function_of_the_graph_is_run():
    body = [helper.make_node("Tanh", ["a"], ["b"])]
    function = helper.make_function("my.ops", "Squash", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    between = [helper.make_node("Squash", ["a1"], ["x"], domain="my.ops")]
    model = foreign_net(between=between, opsets=[OWN], functions=[function])
    _, int8, _ = quantized(model)
    assert 0 < np.abs(output_of(int8.proto) - output_of(model.proto)).max() < 0.05


def test_an_unknown_operator_before_the_last_convolution_is_an_error_with_its_name():
    between = [helper.make_node("DeformConv", ["a1"], ["x"], domain="my.ops")]
    with pytest.raises(ExportError, match=r"custom operators \(DeformConv of 'my.ops'\)") as caught:
        calibrate(foreign_net(between=between, opsets=[OWN]), IMAGES)
    assert "standard ONNX operators" in caught.value.fix


def test_an_unknown_operator_after_the_last_convolution_is_kept_and_not_run():
    after = [
        helper.make_node("Nms", ["y"], ["kept"], domain="my.ops"),
        helper.make_node("Sigmoid", ["kept"], ["output"]),
    ]
    model = foreign_net(after=after, opsets=[OWN])
    sensitivities, int8, _ = quantized(model)
    assert {entry.layer for entry in sensitivities} == {"conv0", "conv1"}
    assert [node.op_type for node in int8.proto.graph.node][-2:] == ["Nms", "Sigmoid"]


def test_the_long_name_of_the_standard_domain_is_no_custom_domain():
    between = [helper.make_node("Tanh", ["a1"], ["x"], domain="ai.onnx")]
    model = foreign_net(between=between, opsets=[helper.make_opsetid("ai.onnx", 17)])
    assert quantized(model)[1].metadata.int8.int8_convolutions == 2


def test_fp16_constants_as_nodes_are_found():
    model = foreign_net(nodes=("b0",))
    model.proto.graph.node.insert(0, constant("half", np.zeros(3, np.float16)))
    with pytest.raises(ExportError, match="weight half"):
        check_quantizable(model)


def test_a_graph_of_this_package_is_not_rewritten():
    for nms in ("none", "plugin", "standard"):
        model = exported_tiny(nms=nms)
        assert with_initializers(model.proto) is model.proto
        assert Network(model).proto is model.proto


def test_the_graph_that_was_passed_is_not_modified():
    model = foreign_net(nodes=tuple(BIASES))
    before = model.proto.SerializeToString(deterministic=True)
    quantized(model)
    assert model.proto.SerializeToString(deterministic=True) == before
    assert not any(node.op_type == "Constant" for node in Network(model).proto.graph.node)
    assert isinstance(model.proto, onnx.ModelProto)
