"""Fake quantizers: their gradients, and their places, which are those of the Q/DQ pairs in the exported file."""

import operator
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import fx

from tests.support.deterministic import fill_model
from tests.support.small_models import HW, fused_tiny, images, metadata_of
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx, tensor_origins, trace
from yolov7_deploy.options import ExportOptions, Int8Options
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.fake_quantize import FakeQuantize, FakeQuantizedYolov7, Int8Convolution
from yolov7_deploy.precision.int8 import QuantizedRange, insert_qdq, quantize_weight, to_int8
from yolov7_deploy.precision.ort_runner import NetworkRunner
from yolov7_deploy.precision.qat import calibrated_network
from yolov7_deploy.precision.qdq_placement import place_qdq
from yolov7_deploy.precision.subgraph import Network

LIMITS = [(0, 255, 12), (-128, 127, 0), (0, 63, 3)]  # smallest and largest integer, zero


def values(count=4000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 3


def gradients(function, x, scale):
    """Return the output, and the gradients of x and scale, of a weighted sum."""
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = function(x, scale)
    (y * values(len(x), seed=1)).sum().backward()
    return y.detach(), x.grad, scale.grad


# --- the fake quantizer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high", "zero"), LIMITS)
def test_values_and_gradients_equal_those_of_torch(low, high, zero):
    """torch has the same function with learned scale and zero; it multiplies by 1 / scale instead of dividing."""
    scale = torch.tensor(0.03125)  # a power of two, with which both are equal

    def ours(x, scale):
        return FakeQuantize.apply(x, scale, torch.tensor(zero, dtype=torch.int32), low, high, 0.5)

    def torchs(x, scale):
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, torch.tensor([float(zero)]), low, high, 0.5)

    y, of_x, of_scale = gradients(ours, values(), scale)
    expected, expected_of_x, expected_of_scale = gradients(torchs, values(), scale.reshape(1))
    assert 0.02 < (of_x == 0).float().mean() < 0.9  # some values are clipped
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(of_x, expected_of_x, rtol=0, atol=0)
    torch.testing.assert_close(of_scale, expected_of_scale.reshape(()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("low", "high", "zero"), LIMITS)
def test_the_gradient_of_the_scale_is_the_derivative_where_rounding_is_constant(low, high, zero):
    """The derivative of (q - z) s is the integer q - z; LSQ subtracts x / s, because x would move with the scale."""
    x, scale = values(300).double(), torch.tensor(0.0371, dtype=torch.float64)
    for one in x:
        _, of_x, of_scale = gradients(
            lambda x, s: FakeQuantize.apply(x, s, torch.tensor(zero), low, high, 1.0), one.reshape(1), scale
        )
        integer = torch.round(one / scale).clamp(low - zero, high - zero)
        step = 1e-9  # so small that no value is rounded to another integer
        outputs = [
            FakeQuantize.apply(one.reshape(1), scale + sign * step, torch.tensor(zero), low, high, 1.0)
            for sign in (1, -1)
        ]
        numeric = (outputs[0] - outputs[1]) / (2 * step)
        assert numeric.item() == pytest.approx(integer.item(), abs=1e-4)
        weight = values(1, seed=1).double().item()
        inside = low - zero <= torch.round(one / scale) <= high - zero
        expected = weight * (integer - one / scale if inside else integer)
        assert of_scale.item() == pytest.approx(expected.item(), abs=1e-9)
        assert of_x.item() == pytest.approx(weight * inside.item())


@pytest.mark.parametrize("levels", [64, 127])
def test_weights_are_rounded_as_in_the_file(levels):
    convolution = torch.nn.Conv2d(8, 6, 3)
    with torch.no_grad():
        convolution.weight[2] = 0
    quantized = quantize_weight(convolution.weight.detach().numpy(), levels)
    layer = Int8Convolution(convolution, levels, None)
    np.testing.assert_array_equal(layer.weight_scales().flatten().numpy(), quantized.scales)
    x = torch.randn(1, 8, 9, 9)
    expected = torch.nn.functional.conv2d(x, torch.from_numpy(quantized.dequantized), convolution.bias)
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    y.sum().backward()
    assert (convolution.weight.grad[0] != 0).all()  # nothing is clipped


# --- places of the quantizers -----------------------------------------------------------------------------------------


def pairs_in_network(network):
    """Return scale, tensor and number of consumers of every fake quantizer, from the traced graph."""
    named = {node.name: name for name, node in tensor_origins(trace(network))[0].items()}

    def name_of(node):
        if node.target in (torch.sigmoid, operator.mul):  # a SiLU is named after its layer
            convolution = node.args[0].args[0] if "quantizers" in str(node.args[0].target) else node.args[0]
            layer = str(convolution.target).removeprefix("net.").rpartition(".")[0]
            return f"{layer}.act.sigmoid" if node.target is torch.sigmoid else f"{layer}.act"
        return named[node.name]

    return {
        (str(node.target).removeprefix("quantizers.").replace("/", "."), name_of(node.args[0]), len(node.users))
        for node in network._traced[0].graph.nodes
        if str(node.target).startswith("quantizers.")
    }


def pairs_in_file(proto):
    """Return scale, tensor and number of consumers of every Q/DQ pair of activations in a file."""
    consumers = {}
    for node in proto.graph.node:
        for name in dict.fromkeys(node.input):
            consumers.setdefault(name, []).append(node.name)
    return {
        (node.input[1].removesuffix("__scale"), node.input[0], len(consumers[f"{node.input[0]}__from_int8"]))
        for node in proto.graph.node
        if node.op_type == "QuantizeLinear"
    }


@lru_cache
def calibrated(variant, target, *, simplify=True):
    """Return the network and the INT8 file of the same calibration, of one image of noise."""
    model = fused_tiny() if variant == "yolov7-tiny" else fuse(fill_model(new_model(variant, classes=3)).eval())
    exported = export_onnx(model, metadata_of(model), ExportOptions(input_hw=HW, nms="none", simplify=simplify))
    noise = np.random.default_rng(0).integers(0, 256, (*HW, 3), dtype=np.uint8)
    calibration, options = calibrate(exported, [noise]), Int8Options(target=target, fallback="fp32")
    return calibrated_network(model, exported, calibration, options), to_int8(exported, calibration, options)


@pytest.mark.parametrize("target", ["cpu", "tensorrt", pytest.param("arm", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["yolov7-tiny", pytest.param("yolov7-tiny-silu", marks=pytest.mark.slow)])
def test_fake_quantizers_are_where_the_file_has_pairs(variant, target):
    start, file = calibrated(variant, target)
    found = pairs_in_network(start.model)
    assert found == pairs_in_file(file.proto)
    assert len(found) > 40


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("variant", ["yolov7", "yolov7-w6", "yolov7-e6e"])
def test_fake_quantizers_of_large_variants_are_where_the_file_has_pairs(variant, target):
    """The two slices of ReOrg are one operation of PyTorch, so the pairs between them have no place there."""
    model = fuse(new_model(variant, classes=3).eval())
    network = FakeQuantizedYolov7(model, target=target, reduce_range=False)
    exported = export_onnx(model, metadata_of(model), ExportOptions(nms="none", simplify=False))
    onnx_network = Network(exported)
    placement = place_qdq(onnx_network, {}, for_cpu=target == "cpu")
    assert placement == network.placement
    ranges = {name: QuantizedRange(np.float32(1), np.uint8(0)) for name in placement.pairs}
    proto = insert_qdq(onnx_network, placement, ranges, {}, Int8Options(target=target))
    inside = {name for name in placement.pairs if name.startswith("slice")}
    assert len(inside) == (8 if variant != "yolov7" and target == "cpu" else 0)
    expected = {pair for pair in pairs_in_file(proto) if pair[1] not in inside}
    found = {(scale, name) for scale, name, _ in pairs_in_network(network)}
    assert found == {(scale, name) for scale, name, _ in expected}


def test_the_network_computes_what_the_file_for_tensorrt_computes():
    """Sums in another order round to the next integer here and there, which later layers amplify."""
    start, file = calibrated("yolov7-tiny", "tensorrt")
    network = Network(file)
    expected = NetworkRunner(network.proto, network.nodes, network.heads).run(images())
    with torch.no_grad():
        maps = start.model.head_maps(torch.from_numpy(images()))
    for name, ours in zip(network.heads, maps, strict=True):
        assert rms(ours.numpy() - expected[name]) < 0.15 * expected[name].std()


def rms(values):
    return np.sqrt(np.mean(values**2))


def rounded_tensors(network, x):
    """Return the output of the fake quantizer of each tensor that an operation of PyTorch computes."""
    named = {node.name: name for name, node in tensor_origins(trace(network))[0].items()}
    found = {}

    class Interpreter(fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if str(node.target).startswith("quantizers."):
                found[named[node.args[0].name]] = value.numpy().copy()
            return value

    with torch.no_grad():
        Interpreter(network._traced[0]).run(x)
    return found


@pytest.mark.parametrize("target", ["cpu", pytest.param("arm", marks=pytest.mark.slow)])
def test_the_network_rounds_to_the_integers_of_the_file_for_cpus(target):
    """Sums in another order round few values to the next integer, more with every layer after it."""
    start, file = calibrated("yolov7-tiny", target)
    network, first = Network(file), list(start.model.placement.pairs)[:20]
    expected = NetworkRunner(network.proto, network.nodes, [f"{name}__from_int8" for name in first]).run(images())
    ours = rounded_tensors(start.model, torch.from_numpy(images()))
    scales = {one.tensor: one.scale for one in start.quantization.ranges}
    for name in first:
        steps = np.abs(ours[name] - expected[f"{name}__from_int8"]) / scales[name]
        assert (steps > 0.5).mean() < 0.02, name


def test_without_inner_pairs_activations_are_rounded_once():
    start, _ = calibrated("yolov7-tiny", "cpu")
    network = start.model
    x = torch.from_numpy(images())
    with torch.no_grad():
        both = network.head_maps(x)
        network.set_inner_pairs(enabled=False)
        once = network.head_maps(x)
        network.set_inner_pairs(enabled=True)
        again = network.head_maps(x)
    assert not torch.equal(both[0], once[0])
    assert torch.equal(both[0], again[0])


def test_the_given_model_is_not_modified():
    model = fused_tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network = FakeQuantizedYolov7(model, target="tensorrt", reduce_range=False)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    names = set(network.state_dict()) - set(before)
    assert names and all(name.startswith("quantizers.") for name in names)
