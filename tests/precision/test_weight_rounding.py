"""Weights rounded for the outputs, against the same algorithm written out, and against rounding to the nearest step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tests.support.sample_images import noise
from tests.support.small_models import HW, exported_tiny
from yolov7_deploy.errors import ExportError
from yolov7_deploy.metadata import ModelMetadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision import weight_rounding
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.int8 import quantize_weight, to_int8
from yolov7_deploy.precision.ort_runner import NetworkRunner, network_input
from yolov7_deploy.precision.subgraph import Network
from yolov7_deploy.precision.weight_rounding import round_columns, round_weights

LEVELS = 127
NAMES = tuple("abc")


def moments_of(size, seed=0, samples=400):
    """Return the second moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(size, size // 4 + 1)) @ rng.normal(size=(size // 4 + 1, samples))
    inputs += 0.3 * rng.normal(size=inputs.shape)
    return inputs @ inputs.T / samples


def errors(steps, integers, moments):
    """Return the squared error of each output."""
    difference = steps - integers
    return np.einsum("od,de,oe->o", difference, moments, difference)


# --- columns ----------------------------------------------------------------------------------------------------------


def round_by_definition(steps, moments, levels):
    """Round one column after the other, the one with the largest moment first, each with the errors of those before."""
    order = np.argsort(moments.diagonal(), kind="stable")
    factor = np.linalg.cholesky(moments[np.ix_(order, order)]).T
    integers = np.zeros_like(steps)
    for row in range(len(steps)):
        for j in reversed(range(len(order))):
            wanted = steps[row, order[j]]
            for k in range(j + 1, len(order)):
                wanted += factor[j, k] / factor[j, j] * (steps[row, order[k]] - integers[row, order[k]])
            integers[row, order[j]] = np.clip(np.rint(wanted), -levels, levels)
    return integers


@pytest.mark.parametrize("size", [1, 7, 64, 150])
def test_blocks_of_columns_give_what_one_column_after_the_other_gives(size):
    steps = np.random.default_rng(size).uniform(-9, 9, (3, size))
    moments = moments_of(size)
    expected = round_by_definition(steps, moments, levels=7)
    found = round_columns(steps, moments, levels=7)
    # float32 against float64: a value in the middle of two integers may go either way, and takes others with it.
    assert (found == expected).mean() > 0.95
    np.testing.assert_allclose(errors(steps, found, moments), errors(steps, expected, moments), rtol=0.1)


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_inputs_without_correlation_leave_the_nearest_step(seed):
    rng = np.random.default_rng(seed)
    steps = rng.uniform(-140, 140, (4, 20))
    found = round_columns(steps, np.diag(rng.uniform(0.1, 5, 20)), LEVELS)
    np.testing.assert_array_equal(found, np.clip(np.rint(steps.astype(np.float32)), -LEVELS, LEVELS))


def test_correlated_inputs_make_the_error_of_outputs_several_times_smaller():
    steps = np.random.default_rng(0).uniform(-100, 100, (16, 200))
    moments = moments_of(200)
    nearest, found = np.rint(steps), round_columns(steps, moments, LEVELS)
    assert errors(steps, found, moments).sum() < 0.25 * errors(steps, nearest, moments).sum()


# --- a layer ----------------------------------------------------------------------------------------------------------


def graph_model(nodes, weights):
    """Return a graph from `images` to `output`."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, (1, 3, *HW))],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    metadata = ModelMetadata(variant="custom", class_names=NAMES, strides=(8,), anchors=(((1.0, 1.0),),), input_hw=HW)
    return OnnxModel.of(onnx.shape_inference.infer_shapes(proto), metadata)


def convolution_model(weight, bias=None, **attributes):
    """Return a graph of a convolution, a ReLU, and a last convolution, which stays float."""
    biases = {} if bias is None else {"b": bias}
    nodes = [
        helper.make_node("Conv", ["images", "w", *biases], ["x"], name="first", **attributes),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Conv", ["y", "last"], ["output"], name="last"),
    ]
    return graph_model(nodes, {"w": weight, "last": np.ones((1, len(weight), 1, 1), np.float32), **biases})


def rounded_first_layer(weight, bias=None, images=6, **attributes):
    """Return the result for the only INT8 convolution, and its float32 output and INT8 output for the images."""
    model = convolution_model(weight, bias, **attributes)
    arrays = [noise(*HW, seed=seed) for seed in range(images)]
    calibration = calibrate(model, arrays)
    found = {}
    for rounding in ("nearest", "gptq"):
        options = Int8Options(target="tensorrt", fallback="fp32", rounding=rounding, method="max")
        rounded = round_weights(model, calibration, arrays, options) if rounding == "gptq" else None
        quantized = to_int8(model, calibration, options, rounded)
        errors = []
        for array in arrays:
            images = network_input(array, model.metadata)
            runs = [NetworkRunner(p, p.graph.node, ["x"]).run(images)["x"] for p in (model.proto, quantized.proto)]
            errors.append(np.square(runs[0] - runs[1]).mean())
        found[rounding] = float(np.mean(errors))
    return rounded, found


GEOMETRIES = [
    {"pads": [1, 1, 1, 1]},
    {"pads": [0, 2, 1, 0], "strides": [2, 1]},
    {"pads": [2, 2, 2, 2], "dilations": [2, 3]},
    {},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_positions_of_a_map_are_those_of_the_convolution(geometry, monkeypatch):
    """Wrong strides, pads or dilations would round weights for inputs that the convolution does not read."""
    monkeypatch.setattr(weight_rounding, "POSITIONS", 2000)
    weight = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    bias = np.random.default_rng(1).normal(size=8).astype(np.float32)
    rounded, error = rounded_first_layer(weight, bias, **geometry)
    assert error["gptq"] < 0.8 * error["nearest"]
    steps = np.abs(rounded["x"].weight.dequantized - weight).max() / rounded["x"].weight.scales.max()
    assert steps < 2


def test_a_convolution_without_a_bias_gets_the_one_that_its_rounding_needs():
    weight = np.random.default_rng(0).normal(size=(8, 3, 3, 3)).astype(np.float32)
    rounded, error = rounded_first_layer(weight)
    assert rounded["x"].bias.shape == (8,) and error["gptq"] < error["nearest"]


def test_a_convolution_with_groups_is_rounded_to_the_nearest_step():
    rounded, error = rounded_first_layer(np.random.default_rng(0).normal(size=(6, 1, 3, 3)).astype(np.float32), group=3)
    assert rounded == {}
    assert error["gptq"] == error["nearest"]


# --- a network --------------------------------------------------------------------------------------------------------

SHAPES = {"a": (16, 3, 3, 3), "b": (16, 16, 1, 1), "c": (16, 32, 3, 3), "last": (8, 16, 1, 1)}


@pytest.fixture(scope="module")
def small():
    """Model with a branch, its images and its calibration."""
    rng = np.random.default_rng(0)
    weights = {f"w{key}": rng.normal(size=shape).astype(np.float32) / shape[1] for key, shape in SHAPES.items()}
    weights |= {f"b{key}": rng.normal(size=shape[0]).astype(np.float32) / 4 for key, shape in SHAPES.items()}
    nodes = []
    for key, data, attributes in (
        ("a", "images", {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ("b", "ya", {}),
        ("c", "both", {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ):
        inputs = [data, f"w{key}", f"b{key}"]
        nodes.append(helper.make_node("Conv", inputs, [f"x{key}"], name=f"conv {key}", **attributes))
        nodes.append(helper.make_node("Relu", [f"x{key}"], [f"y{key}"]))
        if key == "b":
            nodes.append(helper.make_node("Concat", ["ya", "yb"], ["both"], axis=1))
    nodes.append(helper.make_node("Conv", ["yc", "wlast", "blast"], ["output"], name="conv last"))
    model = graph_model(nodes, weights)
    images = [noise(*HW, seed=seed) for seed in range(6)]
    return model, images, calibrate(model, images)


def initializers(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.graph.initializer}


@pytest.mark.parametrize("target", ["tensorrt", "cpu"])
def test_only_integers_of_weights_and_biases_change_in_the_file(small, target):
    model, images, calibration = small
    options = Int8Options(target=target)
    nearest = to_int8(model, calibration, options)
    options = replace(options, rounding="gptq")
    rounded = to_int8(model, calibration, options, round_weights(model, calibration, images, options))
    assert rounded.metadata.int8.rounding == "gptq" and nearest.metadata.int8.rounding == "nearest"
    assert [node.SerializeToString() for node in rounded.proto.graph.node] == [
        node.SerializeToString() for node in nearest.proto.graph.node
    ]
    before, after = initializers(nearest), initializers(rounded)
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    weights = {name for name in changed if before[name].dtype == np.int8 and before[name].ndim == 4}
    assert len(weights) == rounded.metadata.int8.int8_convolutions
    assert all("bias" in name for name in changed - weights)
    levels = 64 if target == "cpu" else 127
    assert max(np.abs(after[name].astype(int)).max() for name in weights) <= levels


def head_errors(model, quantized, images):
    """Return the mean squared error of the last maps on images."""
    names = Network(model).heads
    runs = [NetworkRunner(one.proto, Network(one).nodes, names) for one in (model, quantized)]
    total = 0.0
    for image in images:
        exact, found = (run.run(network_input(image, model.metadata)) for run in runs)
        total += sum(float(np.square(exact[name] - found[name]).mean()) for name in names)
    return total / len(images)


@pytest.mark.parametrize(("target", "factor"), [("tensorrt", 0.97), ("cpu", 0.8)])
def test_the_outputs_of_other_images_are_closer_to_those_of_float32(small, target, factor):
    model, images, calibration = small
    options = Int8Options(target=target)
    nearest = to_int8(model, calibration, options)
    options = replace(options, rounding="gptq")
    rounded = to_int8(model, calibration, options, round_weights(model, calibration, images, options))
    others = [noise(*HW, seed=seed) for seed in range(100, 104)]
    assert head_errors(model, rounded, others) < factor * head_errors(model, nearest, others)


def test_tensors_that_do_not_fit_into_memory_are_computed_again(small, monkeypatch):
    model, images, calibration = small
    options = Int8Options(rounding="gptq")
    counts = []

    class CountedRunner(NetworkRunner):
        def __init__(self, proto, nodes, names, **given):
            counts.append(len(nodes))
            super().__init__(proto, nodes, names, **given)

    monkeypatch.setattr(weight_rounding, "NetworkRunner", CountedRunner)
    expected = round_weights(model, calibration, images, options)
    kept = sum(counts)
    monkeypatch.setattr(weight_rounding, "MEMORY_BYTES", 1e5)
    found = round_weights(model, calibration, images, options)
    assert sum(counts) - kept > 1.3 * kept
    assert found.keys() == expected.keys() == {"xa", "xb", "xc"}
    for output, one in expected.items():
        # ONNX Runtime fuses other operations, so a few values are rounded to a neighbour.
        assert (found[output].weight.values == one.weight.values).mean() > 0.9
        np.testing.assert_allclose(found[output].bias, one.bias, atol=0.01)


def test_progress_is_reported_for_each_convolution(small):
    model, images, calibration = small
    options = Int8Options(rounding="gptq", exclude={"conv b": "a reason"})
    reported = []
    rounded = round_weights(
        model, calibration, images[:2], options, progress=lambda done, total: reported.append((done, total))
    )
    assert reported == [(1, 2), (2, 2)] and rounded.keys() == {"xa", "xc"}


def test_a_single_image_leaves_the_nearest_step(small):
    """Weights rounded for one image cannot be tried on another one."""
    model, images, calibration = small
    options = Int8Options(rounding="gptq")
    rounded = round_weights(model, calibration, images[:1], options)
    weight = Network(model).weights["wa"]
    np.testing.assert_array_equal(rounded["xa"].weight.values, quantize_weight(weight).values)


@pytest.mark.slow
def test_the_head_error_of_a_whole_network_is_smaller():
    model = exported_tiny(nms="none")
    images = [noise(*HW, seed=seed) for seed in range(12)]
    calibration = calibrate(model, images)
    options = Int8Options(rounding="gptq", fallback="fp32")
    rounded = to_int8(model, calibration, options, round_weights(model, calibration, images, options))
    nearest = to_int8(model, calibration, replace(options, rounding="nearest"))
    others = [noise(*HW, seed=seed) for seed in range(100, 104)]
    assert head_errors(model, rounded, others) < head_errors(model, nearest, others)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_calibration_of_another_model_is_refused(small):
    model, images, _ = small
    other = calibrate(convolution_model(np.ones((4, 3, 3, 3), np.float32)), images)
    with pytest.raises(ExportError, match="belongs to another network"):
        round_weights(model, other, images, Int8Options(rounding="gptq"))


@pytest.mark.parametrize(("rounding", "rounded"), [("gptq", None), ("nearest", {})])
def test_options_and_weights_of_different_rounding_are_refused(small, rounding, rounded):
    model, _, calibration = small
    with pytest.raises(ExportError, match="round_weights") as caught:
        to_int8(model, calibration, Int8Options(rounding=rounding), rounded)
    assert "round_weights(" in caught.value.fix
