"""INT8 conversion: the types in the file, the values that it computes, and the graphs that are refused."""

import copy
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.support.detecting import (
    DECODED_TOLERANCE,
    EXPORTS,
    NMS_CHOICES,
    NMS_OPTIONS,
    assert_same_detections,
    image_result,
    nodes_after_heads,
    reference,
)
from tests.support.sample_images import noise
from tests.support.slow_cases import some_fast
from tests.support.small_models import HW, exported_tiny, fused_tiny, images, session
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.metadata import ModelMetadata, assumed_metadata
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import INT8_METHODS, Int8Options
from yolov7_deploy.precision.calibrate import calibrate, network_digest
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.precision.int8_summary import summarize_int8
from yolov7_deploy.precision.subgraph import Network

IMAGES = [noise(*HW, seed=seed) for seed in range(3)]
FP16, FLOAT, INT8 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT8
# Root mean square error of head maps in their standard deviations. Deterministic weights with little structure are
# harder than trained ones (0.1). Measured: 0.05.
HEAD_TOLERANCE = 0.15
# The same tensor in two runtimes that add in another order: a value between two steps may differ by a step, 1/127 of
# the largest value. Measured: 0.001; a wrong scale or weight gives tenths.
STEPS_TOLERANCE = 0.005
CONVOLUTIONS, HEADS = 58, 3


@lru_cache
def calibration(**options):
    return calibrate(exported_tiny(**options), IMAGES, count=len(IMAGES))


def quantized(options=None, **export):
    """yolov7-tiny at HW in INT8."""
    return to_int8(exported_tiny(**export), calibration(**export), options or Int8Options())


@lru_cache
def default_int8() -> OnnxModel:
    return quantized(nms="plugin", **NMS_OPTIONS)


def heads_of(model, array):
    proto = copy.deepcopy(model.proto)
    known = {output.name for output in proto.graph.output}
    heads = Network(model).heads if not model.metadata.heads else model.metadata.heads
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in heads if name not in known)
    return [raw.astype(np.float32) for raw in session(proto).run(list(heads), {"images": array})]


def rms(actual, expected):
    return max(float(np.sqrt(np.square(a - b).mean()) / b.std()) for a, b in zip(actual, expected, strict=True))


def stored(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.graph.initializer}


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms, opset, batch, input_kind", some_fast(EXPORTS, every=4))
def test_the_file_is_strictly_typed_with_the_same_inputs_and_outputs(nms, opset, batch, input_kind):
    export = {"nms": nms, "opset": opset, "batch": batch, "input_kind": input_kind, **NMS_OPTIONS}
    float_model, int8_model = exported_tiny(**export), quantized(**export)
    onnx.checker.check_model(int8_model.proto, full_check=True)
    for kind in ("input", "output"):
        ports = [[v.SerializeToString() for v in getattr(m.proto.graph, kind)] for m in (float_model, int8_model)]
        assert ports[0] == ports[1]
    assert int8_model.metadata.int8.int8_convolutions == CONVOLUTIONS - HEADS
    values = stored(int8_model)
    for node in int8_model.proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = values[node.input[1]], values[node.input[2]]
            assert scale.dtype == np.float32 and (scale > 0).all() and scale.shape == zero.shape
            assert zero.dtype == np.int8 and not zero.any()


def test_everything_outside_int8_is_fp16_and_cast_once():
    int8_model = default_int8()
    graph = onnx.shape_inference.infer_shapes(int8_model.proto, check_type=True, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    heads = [node for node in int8_model.proto.graph.node if node.output[0] in int8_model.metadata.heads]
    assert {types[name] for node in heads for name in node.output} == {FP16}
    casts = [node for node in int8_model.proto.graph.node if node.op_type == "Cast"]
    assert sorted(node.input[0] for node in casts) == [f"model.{layer}.act" for layer in (74, 75, 76)]
    node = next(node for node in int8_model.proto.graph.node if node.op_type == "Y7NMS")
    assert {types[name] for name in node.input[:3]} == {FP16}


def test_an_fp32_fallback_has_no_fp16_tensor():
    int8_model = quantized(Int8Options(fallback="fp32"), nms="none")
    assert not [tensor.name for tensor in int8_model.proto.graph.initializer if tensor.data_type == FP16]
    casts = [node for node in int8_model.proto.graph.node if node.op_type == "Cast"]
    assert all(node.name.startswith("end__") for node in casts)
    assert int8_model.metadata.int8.fallback == "fp32"


def test_weights_are_stored_as_int8_and_the_file_is_a_quarter_of_the_size():
    float_model, int8_model = exported_tiny(nms="plugin", **NMS_OPTIONS), default_int8()
    kernels = [t for t in int8_model.proto.graph.initializer if len(t.dims) == 4]
    assert {t.data_type for t in kernels} == {INT8, FP16}
    assert sum(t.data_type == INT8 for t in kernels) == CONVOLUTIONS - HEADS
    assert int8_model.proto.ByteSize() < 0.3 * float_model.proto.ByteSize()


def test_the_float32_model_is_not_modified_and_the_same_input_gives_the_same_bytes():
    model = exported_tiny(nms="plugin", **NMS_OPTIONS)
    before = model.proto.SerializeToString(deterministic=True)
    again = calibrate(model, IMAGES, count=len(IMAGES))
    first, second = (to_int8(model, c, Int8Options()) for c in (calibration(nms="plugin", **NMS_OPTIONS), again))
    assert model.proto.SerializeToString(deterministic=True) == before
    assert first.proto.SerializeToString(deterministic=True) == second.proto.SerializeToString(deterministic=True)


def test_the_metadata_records_the_quantization(tmp_path):
    int8_model = default_int8()
    int8_model.save(tmp_path / "m.onnx")
    metadata = OnnxModel.load(tmp_path / "m.onnx").metadata
    assert metadata == int8_model.metadata
    assert metadata.precision == "int8"
    assert (metadata.int8.method, metadata.int8.images, metadata.int8.fallback) == ("mse", len(IMAGES), "fp16")
    assert metadata.int8.images_sha256 == calibration(nms="plugin", **NMS_OPTIONS).images_sha256
    assert metadata.int8.share == pytest.approx(summarize_int8(int8_model.proto).share)
    assert [layer for layer, _ in metadata.int8.float_layers] == list(metadata.heads)
    assert metadata.notes[0].startswith(f"int8: {CONVOLUTIONS - HEADS} of {CONVOLUTIONS} convolutions, ")
    assert "head: decoding needs float" in metadata.notes[-1]
    assert (
        replace(metadata, precision="fp32", int8=None, notes=()) == exported_tiny(nms="plugin", **NMS_OPTIONS).metadata
    )


# --- the values -------------------------------------------------------------------------------------------------------


def fake_quantize(values, scale):
    return torch.clamp(torch.round(values / scale), -128, 127) * scale


def simulated(model, array, layer):
    """The output of a layer in PyTorch with the scales and weights of the file: an independent implementation."""
    values, producers = stored(model), {name: node for node in model.proto.graph.node for name in node.output}
    net, found = copy.deepcopy(fused_tiny()), []
    modules = dict(net.named_modules())
    for node in model.proto.graph.node:
        if node.op_type != "Conv" or node.output[0] in model.metadata.heads:
            continue
        module, (data, weight) = modules[node.name], (producers[name] for name in node.input[:2])
        scale = torch.tensor(values[data.input[1]])
        module.register_forward_pre_hook(lambda _, given, scale=scale: (fake_quantize(given[0], scale),))
        with torch.no_grad():
            rounded, steps = (torch.tensor(values[name]) for name in weight.input[:2])
            module.weight.copy_(rounded * steps[:, None, None, None])
            module.bias.copy_(torch.tensor(values[node.input[2]]))
    modules[layer].register_forward_hook(lambda _, given, made: found.append(made.numpy().copy()))
    with torch.no_grad():
        net.features(torch.from_numpy(array))
    return found


@pytest.mark.parametrize("method", INT8_METHODS)
def test_the_file_computes_the_same_as_fake_quantization_in_pytorch(method):
    """In the first layers; after many layers, values that are rounded differently have changed everything."""
    int8_model = quantized(Int8Options(method=method, fallback="fp32"), nms="none")
    for layer in ("model.0.conv", "model.7.conv", "model.9.conv"):
        proto = copy.deepcopy(int8_model.proto)
        proto.graph.output.append(onnx.ValueInfoProto(name=layer))
        actual = session(proto).run([layer], {"images": images()})
        assert rms(actual, simulated(int8_model, images(), layer)) < STEPS_TOLERANCE, layer


@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
def test_head_maps_are_those_of_float32_except_for_rounding(input_kind):
    array = images() if input_kind == "float32" else np.stack([noise(*HW, seed=5)])
    expected = heads_of(exported_tiny(nms="none", input_kind=input_kind), array)
    actual = heads_of(quantized(nms="none", input_kind=input_kind), array)
    assert 0 < rms(actual, expected) < HEAD_TOLERANCE


@pytest.mark.parametrize("nms", NMS_CHOICES)
def test_decoding_and_nms_are_those_of_float32(nms):
    """The detections of the file are those of float32 decoding and the reference NMS on its own head maps."""
    int8_model = quantized(nms=nms, batch=None, **NMS_OPTIONS)
    maps = [raw.astype(np.float16) for raw in heads_of(int8_model, images(2))]
    ends = session(nodes_after_heads(int8_model)).run(None, dict(zip(int8_model.metadata.heads, maps, strict=True)))
    with torch.no_grad():
        head = fused_tiny().head
        raws = [torch.from_numpy(raw.astype(np.float32)) for raw in maps]
        shaped = [r.view(2, 3, -1, *r.shape[2:]).permute(0, 1, 3, 4, 2).contiguous() for r in raws]
        decoded = head.decode(shaped).numpy()
    for index in range(2):
        if nms == "none":
            np.testing.assert_allclose(ends[0][index][..., :4], decoded[index][..., :4], atol=DECODED_TOLERANCE)
        else:
            assert_same_detections(image_result(ends, index), reference(decoded[index]))


def test_bias_correction_reduces_the_error_of_the_mean_of_the_head_maps():
    expected = heads_of(exported_tiny(nms="none"), images(2)[:1])
    errors = []
    for corrects in (True, False):
        actual = heads_of(quantized(Int8Options(correct_bias=corrects, fallback="fp32"), nms="none"), images(2)[:1])
        errors.append(sum(float(np.abs((a - b).mean((0, 2, 3))).mean()) for a, b in zip(actual, expected, strict=True)))
    assert errors[0] < errors[1]


# --- excluded layers --------------------------------------------------------------------------------------------------


def test_an_excluded_layer_reads_and_computes_in_fp16():
    int8_model = quantized(Int8Options(exclude={"model.7.conv": "reason"}), nms="none")
    node = next(node for node in int8_model.proto.graph.node if node.name == "model.7.conv")
    assert not [name for name in node.input if "int8" in name]
    assert ("model.7.conv", "reason") in int8_model.metadata.int8.float_layers
    assert int8_model.metadata.int8.int8_convolutions == CONVOLUTIONS - HEADS - 1
    assert any("model.7.conv (reason)" in note for note in int8_model.metadata.notes)
    assert rms(heads_of(int8_model, images()), heads_of(exported_tiny(nms="none"), images())) < HEAD_TOLERANCE


def test_a_layer_that_does_not_exist_cannot_be_excluded():
    with pytest.raises(ExportError, match=r"no convolution 'model\.700\.conv' to exclude") as caught:
        quantized(Int8Options(exclude={"model.700.conv": "reason"}), nms="none")
    assert "model.0.conv" in caught.value.fix


def test_excluding_every_layer_is_an_error():
    names = [node.name for node in Network(exported_tiny(nms="none")).convolutions]
    with pytest.raises(ExportError, match="No convolution can be INT8: reason"):
        quantized(Int8Options(exclude=dict.fromkeys(names, "reason")), nms="none")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: default_int8(), lambda: to_fp16(exported_tiny(nms="none"), IMAGES)])
def test_a_model_of_lower_precision_is_refused(make):
    with pytest.raises(ExportError, match="already") as caught:
        to_int8(make(), calibration(nms="none"), Int8Options())
    assert "Start from the float32 file" in caught.value.fix


def test_a_quantized_graph_with_fp32_metadata_is_refused():
    wrong = OnnxModel(default_int8().proto, exported_tiny(nms="plugin", **NMS_OPTIONS).metadata)
    with pytest.raises(ExportError, match="quantized already: it has a"):
        to_int8(wrong, calibration(nms="plugin", **NMS_OPTIONS), Int8Options())


def test_the_calibration_of_another_network_is_refused():
    other = exported_tiny(classes=3, nms="none")
    with pytest.raises(ExportError, match="calibration belongs to another network"):
        to_int8(other, calibration(nms="none"), Int8Options())


@pytest.mark.parametrize("wrong", [{"method": "mean"}, {"fallback": "int4"}])
def test_an_unknown_option_is_refused(wrong):
    with pytest.raises(UsageError, match="is unknown"):
        Int8Options(**wrong)


# --- third-party graphs -----------------------------------------------------------------------------------------------


def foreign_net(*, constant=True):
    """Two convolutions with ReLU and a third with a sigmoid, without metadata."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(0, 0.2, shape).astype(np.float32) for shape in ((8, 3, 3, 3), (8, 8, 3, 3), (4, 8, 1, 1))]
    nodes, last = [], "images"
    for number, weight in enumerate(weights):
        pads = [weight.shape[2] // 2] * 4
        nodes.append(helper.make_node("Conv", [last, f"w{number}"], [f"c{number}"], name=f"conv{number}", pads=pads))
        kind = "Relu" if number < 2 else "Sigmoid"
        nodes.append(helper.make_node(kind, [f"c{number}"], [f"a{number}" if number < 2 else "output"]))
        last = f"a{number}"
    tensors = [numpy_helper.from_array(weight, f"w{number}") for number, weight in enumerate(weights)]
    inputs = [helper.make_tensor_value_info("images", FLOAT, [1, 3, 32, 32])]
    if not constant:
        inputs += [helper.make_tensor_value_info(t.name, FLOAT, list(t.dims)) for t in tensors]
        tensors = []
    output = helper.make_tensor_value_info("output", FLOAT, [1, 4, 32, 32])
    graph = helper.make_graph(nodes, "foreign", inputs, [output], initializer=tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    metadata: ModelMetadata = assumed_metadata(classes=0, input_hw=(32, 32), batch=1, input_kind="float32", nms=None)
    return OnnxModel(proto, metadata)


def test_all_convolutions_of_a_third_party_graph_but_the_last_become_int8():
    model = foreign_net()
    int8_model = to_int8(model, calibrate(model, IMAGES, count=3), Int8Options())
    assert int8_model.metadata.int8.fallback == "fp32"  # it is unknown where decoding begins
    assert [layer for layer, _ in int8_model.metadata.int8.float_layers] == ["conv2"]
    array = np.random.default_rng(1).random((1, 3, 32, 32), dtype=np.float32)
    actual, expected = (session(m.proto).run(None, {"images": array})[0] for m in (int8_model, model))
    assert 0 < np.abs(actual - expected).max() < 0.05


def test_weights_that_are_not_constant_are_the_reason_in_the_error():
    model = foreign_net(constant=False)
    with pytest.raises(ExportError, match=r"No convolution can be INT8: .*its weights are not a float32 constant"):
        to_int8(model, replace(calibration(nms="none"), network_sha256=digest_of(model)), Int8Options())


def digest_of(model):
    return network_digest(Network(model))


def test_float_operations_between_int8_convolutions_are_listed():
    model = foreign_net()
    proto = copy.deepcopy(model.proto)
    nodes = list(proto.graph.node)
    nodes[2].input[0] = "odd"  # the second convolution
    nodes.insert(2, helper.make_node("Softplus", ["a0"], ["odd"], name="odd one"))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    changed = OnnxModel(proto, model.metadata)
    int8_model = to_int8(changed, calibrate(changed, IMAGES), Int8Options())
    assert "float between INT8 convolutions: Softplus (odd)" in int8_model.metadata.notes
    assert not [note for note in default_int8().metadata.notes if "between INT8" in note]
