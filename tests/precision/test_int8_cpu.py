"""INT8 for CPUs: ONNX Runtime's INT8 kernels run every quantized convolution, and no kernel saturates."""

from collections import Counter
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from tests.support.sample_images import noise
from tests.support.small_models import HW, exported_tiny, images
from tests.support.thin_variants import SIDE, thin_model
from yolov7_deploy._ort_options import base_session_options
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.image import to_network_input
from yolov7_deploy.metadata import INNER_PAIR_PREFIX
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import Int8Options
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.int8 import (
    REDUCED_LEVELS,
    _inverse_silu,
    quantize_weight,
    tensor_ranges,
    to_int8,
)
from yolov7_deploy.precision.ort_runner import NetworkRunner
from yolov7_deploy.precision.qdq_placement import place_qdq
from yolov7_deploy.precision.sensitivity import SILU_FLOORS, choose_silu_floor, layer_sensitivities
from yolov7_deploy.precision.subgraph import Network

IMAGES = [noise(*HW, seed=seed) for seed in range(3)]
# The others take minutes.
FAST = ("yolov7", "yolov7-w6")
ALL = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
# Relative root mean square error of the head maps of random networks, whose biases dominate. Measured: at most 1e-4.
RANDOM_TOLERANCE = 1e-3
INT16 = np.iinfo(np.int16)


@lru_cache
def calibration(model_name):
    model = network_of(model_name)
    side = HW if model_name == "tiny" else (SIDE, SIDE)
    return calibrate(model, [noise(*side, seed=seed) for seed in range(3)])


def network_of(name):
    return exported_tiny(nms="none") if name == "tiny" else thin_model(name)


@lru_cache
def quantized(name, target="cpu", *, reduce_range=False):
    options = Int8Options(target=target, fallback="fp32", reduce_range=reduce_range)
    return to_int8(network_of(name), calibration(name), options)


def initializers(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.graph.initializer}


def optimized_ops(model, folder):
    options = base_session_options()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(model.proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def head_errors(model, reference, arrays):
    heads = reference.metadata.heads
    runs = [NetworkRunner(m.proto, list(m.proto.graph.node), heads) for m in (model, reference)]
    found = [[run.run(array) for array in arrays] for run in runs]
    squares = [
        np.square(ours[name] - theirs[name]).mean() / theirs[name].var()
        for ours, theirs in zip(*found, strict=True)
        for name in heads
    ]
    return float(np.sqrt(np.mean(squares)))


@pytest.mark.parametrize("name", ["tiny", *ALL])
def test_onnx_runtime_computes_every_quantized_convolution_with_an_int8_kernel(name, tmp_path):
    model = quantized(name)
    ops = optimized_ops(model, tmp_path)
    assert ops["QLinearConv"] == model.metadata.int8.int8_convolutions
    assert ops["Conv"] + ops["FusedConv"] == len(model.metadata.heads)
    # Nothing between the first and the last INT8 convolution is computed in float.
    assert ops["QuantizeLinear"] <= 1
    assert not ops["QuickGelu"] and not ops["LeakyRelu"]


def network_input(height, width):
    return noise(height, width, seed=9).astype(np.float32).transpose(2, 0, 1)[None] / 255


@pytest.mark.parametrize("name", ALL)
def test_every_variant_has_finite_matching_heads_for_every_target(name):
    errors = {
        target: head_errors(quantized(name, target), network_of(name), [network_input(SIDE, SIDE)])
        for target in ("cpu", "arm", "tensorrt")
    }
    assert all(0 < error < RANDOM_TOLERANCE for error in errors.values()), errors
    assert errors["arm"] == pytest.approx(errors["cpu"], rel=0.2)


def test_the_heads_are_at_least_as_exact_as_those_of_the_symmetric_file():
    ours, theirs = (
        head_errors(quantized("tiny", target), network_of("tiny"), [network_input(*HW)])
        for target in ("cpu", "tensorrt")
    )
    assert 0 < ours < theirs


def test_activations_are_uint8_weights_int8_and_biases_int32():
    model = quantized("tiny")
    values = initializers(model)
    for node in model.proto.graph.node:
        if node.op_type == "QuantizeLinear":
            assert values[node.input[2]].dtype == np.uint8
        if node.op_type == "Conv" and node.output[0] not in model.metadata.heads:
            weight, bias = (values[f"{name}"] for name in stored_inputs(model, node))
            assert weight.dtype == np.int8 and bias.dtype == np.int32
    int8 = model.metadata.int8
    assert (int8.target, int8.fallback, int8.reduce_range) == ("cpu", "fp32", False)


def stored_inputs(model, node):
    producers = {name: producer for producer in model.proto.graph.node for name in producer.output}
    return [producers[name].input[0] for name in node.input[1:]]


def test_arm_activations_are_int8_with_the_same_steps():
    x86, arm = initializers(quantized("tiny")), initializers(quantized("tiny", "arm"))
    zeros = [name for name, value in x86.items() if value.dtype == np.uint8]
    assert zeros
    for name in zeros:
        assert arm[name].dtype == np.int8 and int(arm[name]) == int(x86[name]) - 128
    scales = [name for name in x86 if name.endswith("__scale")]
    assert all(np.array_equal(x86[name], arm[name]) for name in scales)


def test_the_image_is_represented_without_error():
    values = initializers(quantized("tiny"))
    zero, scale = values["images__zero"], values["images__scale"]
    pixels = np.arange(256, dtype=np.float32) / np.float32(255)
    steps = np.rint(pixels / scale) + zero
    assert zero == 0 and (steps == np.arange(256)).all()


def test_the_pairs_before_activations_have_names_of_their_own():
    """The OpenVINO runtime finds and removes them."""
    model = quantized("yolov7")
    placement = place_qdq(Network(network_of("yolov7")), {}, for_cpu=True)
    marked = [node for node in model.proto.graph.node if node.name.startswith(INNER_PAIR_PREFIX)]
    assert len(marked) == 2 * len(placement.inner_pairs)
    assert Counter(node.op_type for node in marked) == dict.fromkeys(
        ("QuantizeLinear", "DequantizeLinear"), len(placement.inner_pairs)
    )
    assert {Network(network_of("yolov7")).producers[name].op_type for name in placement.inner_pairs} == {
        "Conv",
        "Sigmoid",
    }


def test_ranges_before_an_activation_give_its_whole_output():
    network = Network(network_of("yolov7"))
    placement = place_qdq(network, {}, for_cpu=True)
    ranges = tensor_ranges(network, placement, calibration("yolov7"), Int8Options(target="cpu"))
    for name, output in placement.inner_pairs.items():
        if network.producers[name].op_type == "Conv":
            x = ranges[name].high
            assert x / (1 + np.exp(-x)) >= ranges[output].high - 1.01 * ranges[name].scale
            floor = -min(Int8Options().silu_floor, calibration("yolov7").output_amax[name])
            assert ranges[name].low == pytest.approx(floor, abs=2 * float(ranges[name].scale))


@pytest.mark.slow
def test_the_floor_of_silu_with_the_smallest_measured_error_is_chosen():
    model = with_large_activations(network_of("yolov7"))
    images = [noise(SIDE, SIDE, seed=seed) for seed in range(2)]
    found, options = calibrate(model, images), Int8Options(target="cpu")
    chosen = choose_silu_floor(model, found, images[:1], options).silu_floor
    arrays = [to_network_input(images[:1])]
    errors = {
        floor: head_errors(to_int8(model, found, replace(options, silu_floor=floor)), model, arrays)
        for floor in SILU_FLOORS
    }
    assert len(set(errors.values())) > 1
    assert errors[chosen] <= 1.1 * min(errors.values())


def with_large_activations(model):
    """Return a copy whose first convolution has weights so large that inputs of SiLU are below every floor."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    weight = weights[next(node for node in proto.graph.node if node.op_type == "Conv").input[1]]
    weight.CopyFrom(numpy_helper.from_array(3e3 * numpy_helper.to_array(weight), weight.name))
    return OnnxModel.of(proto, model.metadata)


def test_networks_without_silu_have_no_floor_to_choose():
    options = Int8Options(target="cpu")
    assert choose_silu_floor(network_of("tiny"), calibration("tiny"), IMAGES[:1], options) is options
    tensorrt = Int8Options()
    assert choose_silu_floor(network_of("yolov7"), calibration("yolov7"), IMAGES[:1], tensorrt) is tensorrt


def test_files_for_cpus_have_weights_of_7_bits_by_default():
    assert Int8Options(target="cpu").reduce_range and not Int8Options(target="cpu", reduce_range=False).reduce_range
    assert not Int8Options().reduce_range and not Int8Options(target="arm").reduce_range


def test_ranges_are_chosen_by_the_better_method_for_each_target():
    assert [Int8Options(target=target).method for target in ("tensorrt", "cpu", "arm")] == ["mse", "lp", "lp"]
    assert Int8Options(target="cpu", method="max").method == "max"


@pytest.mark.parametrize("value", [0.0, 1e-6, 0.2, 1.0, 12.5, 4000.0])
def test_the_inverse_of_silu(value):
    x = _inverse_silu(value)
    assert x >= 0 and x / (1 + np.exp(-x)) == pytest.approx(value, rel=1e-9, abs=1e-12)


# --- weights of 7 bits ------------------------------------------------------------------------------------------------


def saturating_products(data, weight):
    """Return the sums of products as `vpmaddubsw` and `vpmaddwd` of AVX2 compute them: pairs saturate in 16 bits."""
    products = data[:, None, :].astype(np.int32) * weight[None].astype(np.int32)
    pairs = products[..., 0::2] + products[..., 1::2]
    return np.clip(pairs, INT16.min, INT16.max).sum(axis=-1)


def test_only_weights_of_8_bits_saturate():
    generator = np.random.default_rng(0)
    data = generator.integers(128, 256, (64, 128)).astype(np.uint8)
    float_weight = generator.uniform(0.5, 1, (16, 128)).astype(np.float32)
    exact = {}
    for levels in (127, REDUCED_LEVELS):
        weight = quantize_weight(float_weight, levels).values
        expected = data.astype(np.int32) @ weight.T.astype(np.int32)
        exact[levels] = np.array_equal(saturating_products(data, weight), expected)
    assert exact == {127: False, REDUCED_LEVELS: True}


def test_the_largest_sum_of_7_bits_fits_into_16():
    assert 2 * 255 * REDUCED_LEVELS <= INT16.max < 2 * 255 * (REDUCED_LEVELS + 1)
    weights = [value for value in initializers(quantized("tiny", reduce_range=True)).values() if value.dtype == np.int8]
    assert max(int(np.abs(weight.astype(int)).max()) for weight in weights if weight.ndim == 4) == REDUCED_LEVELS


def test_default_kernels_of_onnx_runtime_are_exact_with_7_bits():
    """On CPUs without VNNI the default kernels saturate with 8 bits; with 7 they equal the exact ones everywhere."""
    model = quantized("tiny", reduce_range=True)
    array = images(1)
    exact, default = (
        onnxruntime.InferenceSession(
            model.proto.SerializeToString(), base_session_options(exact_int8=exact), providers=["CPUExecutionProvider"]
        ).run(None, {"images": array})[0]
        for exact in (True, False)
    )
    np.testing.assert_allclose(default, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_sensitivity_uses_the_ranges_of_the_target():
    model = exported_tiny(nms="none")
    found = {
        target: layer_sensitivities(model, calibration("tiny"), IMAGES[:1], Int8Options(target=target))
        for target in ("cpu", "tensorrt")
    }
    total = {target: sum(entry.error for entry in entries) for target, entries in found.items()}
    assert 0 < total["cpu"] < total["tensorrt"]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"target": "gpu"}, "--int8-target gpu is unknown"),
        ({"target": "cpu", "fallback": "fp16"}, "--fallback fp16 is slower than float32 on a CPU"),
        ({"target": "tensorrt", "reduce_range": True}, "--reduce-range is for x86 CPUs"),
        ({"target": "arm", "reduce_range": True}, "--reduce-range is for x86 CPUs"),
    ],
)
def test_options_that_do_not_fit_the_target_are_refused(wrong, message):
    with pytest.raises(UsageError) as caught:
        Int8Options(**wrong)
    assert message in caught.value.message
    assert caught.value.fix


def test_a_quantized_file_is_not_quantized_again():
    with pytest.raises(ExportError, match="quantized already"):
        to_int8(quantized("tiny"), calibration("tiny"), Int8Options(target="cpu"))
