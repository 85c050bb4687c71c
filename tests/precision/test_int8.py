"""INT8 as a graph step: what the file says, that it computes what it says, and what is refused."""

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
    ENDS,
    EXPORTS,
    SUPPRESSION,
    assert_same_detections,
    end_of,
    picked,
    reference,
)
from tests.support.sample_images import noise
from tests.support.small_models import HW, exported_tiny, fused_tiny, images, session
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.metadata import ModelMetadata, foreign_metadata
from yolov7_deploy.options import INT8_METHODS, Int8Options
from yolov7_deploy.precision.calibrate import calibrate
from yolov7_deploy.precision.fp16 import to_fp16
from yolov7_deploy.precision.int8 import to_int8
from yolov7_deploy.precision.int8_summary import count_int8
from yolov7_deploy.precision.subgraph import Network

IMAGES = [noise(*HW, seed=seed) for seed in range(3)]
HALF, FLOAT, INT8 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.INT8
# Of a raw map's spread, in the mean of squares: deterministic weights of nearly no structure are harder than trained
# ones (0.1). Measured: 0.05.
HEAD_TOLERANCE = 0.15
# The same tensor by two runtimes that add up in another order: where a value stands between two steps, a step (1/127 of
# its tensor's reach) is the difference. Measured: 0.001; a wrong scale or weight gives tenths.
STEPS_TOLERANCE = 0.005
CONVOLUTIONS, HEADS = 58, 3


@lru_cache
def calibration(**options):
    return calibrate(exported_tiny(**options), IMAGES, count=len(IMAGES))


def quantized(options=None, **export):
    """yolov7-tiny at HW in INT8."""
    return to_int8(exported_tiny(**export), calibration(**export), options or Int8Options())


@lru_cache
def usual() -> OnnxModel:
    return quantized(nms="plugin", **SUPPRESSION)


def heads_of(model, array):
    proto = copy.deepcopy(model.proto)
    known = {output.name for output in proto.graph.output}
    heads = Network(model).heads if not model.metadata.heads else model.metadata.heads
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in heads if name not in known)
    return [raw.astype(np.float32) for raw in session(proto).run(list(heads), {"images": array})]


def rms(ours, expected):
    return max(float(np.sqrt(np.square(a - b).mean()) / b.std()) for a, b in zip(ours, expected, strict=True))


def stored(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.proto.graph.initializer}


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms, opset, batch, input_kind", EXPORTS)
def test_the_file_is_strictly_typed_with_the_same_inputs_and_outputs(nms, opset, batch, input_kind):
    export = {"nms": nms, "opset": opset, "batch": batch, "input_kind": input_kind, **SUPPRESSION}
    whole, small = exported_tiny(**export), quantized(**export)
    onnx.checker.check_model(small.proto, full_check=True)
    for kind in ("input", "output"):
        ports = [[v.SerializeToString() for v in getattr(m.proto.graph, kind)] for m in (whole, small)]
        assert ports[0] == ports[1]
    assert small.metadata.int8.int8_convolutions == CONVOLUTIONS - HEADS
    values = stored(small)
    for node in small.proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = values[node.input[1]], values[node.input[2]]
            assert scale.dtype == np.float32 and (scale > 0).all() and scale.shape == zero.shape
            assert zero.dtype == np.int8 and not zero.any()


def test_what_is_not_int8_is_half_and_cast_once():
    small = usual()
    graph = onnx.shape_inference.infer_shapes(small.proto, check_type=True, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    heads = [node for node in small.proto.graph.node if node.output[0] in small.metadata.heads]
    assert {kinds[name] for node in heads for name in node.output} == {HALF}
    casts = [node for node in small.proto.graph.node if node.op_type == "Cast"]
    assert sorted(node.input[0] for node in casts) == [f"model.{layer}.act" for layer in (74, 75, 76)]
    node = next(node for node in small.proto.graph.node if node.op_type == "Y7NMS")
    assert {kinds[name] for name in node.input[:3]} == {HALF}


def test_a_rest_of_float32_has_no_half_at_all():
    small = quantized(Int8Options(rest="fp32"), nms="none")
    assert not [tensor.name for tensor in small.proto.graph.initializer if tensor.data_type == HALF]
    assert not [node for node in small.proto.graph.node if node.op_type == "Cast" and not node.name.startswith("end__")]
    assert small.metadata.int8.rest == "fp32"


def test_weights_are_stored_as_int8_and_the_file_is_a_quarter_of_the_size():
    whole, small = exported_tiny(nms="plugin", **SUPPRESSION), usual()
    kernels = [t for t in small.proto.graph.initializer if len(t.dims) == 4]
    assert {t.data_type for t in kernels} == {INT8, HALF}
    assert sum(t.data_type == INT8 for t in kernels) == CONVOLUTIONS - HEADS
    assert small.proto.ByteSize() < 0.3 * whole.proto.ByteSize()


def test_the_float32_model_is_left_as_it_was_and_the_same_input_gives_the_same_bytes():
    model = exported_tiny(nms="plugin", **SUPPRESSION)
    before = model.proto.SerializeToString(deterministic=True)
    again = calibrate(model, IMAGES, count=len(IMAGES))
    first, second = (to_int8(model, c, Int8Options()) for c in (calibration(nms="plugin", **SUPPRESSION), again))
    assert model.proto.SerializeToString(deterministic=True) == before
    assert first.proto.SerializeToString(deterministic=True) == second.proto.SerializeToString(deterministic=True)


def test_the_metadata_says_how_it_came_about(tmp_path):
    small = usual()
    small.save(tmp_path / "m.onnx")
    metadata = OnnxModel.load(tmp_path / "m.onnx").metadata
    assert metadata == small.metadata
    assert metadata.precision == "int8"
    assert (metadata.int8.method, metadata.int8.images, metadata.int8.rest) == ("mse", len(IMAGES), "fp16")
    assert metadata.int8.images_sha256 == calibration(nms="plugin", **SUPPRESSION).images_sha256
    assert metadata.int8.share == pytest.approx(count_int8(small.proto).share)
    assert [layer for layer, _ in metadata.int8.kept] == list(metadata.heads)
    assert metadata.notes[0].startswith(f"int8: {CONVOLUTIONS - HEADS} of {CONVOLUTIONS} convolutions, ")
    assert "head: what decoding reads stays float" in metadata.notes[-1]
    assert (
        replace(metadata, precision="fp32", int8=None, notes=()) == exported_tiny(nms="plugin", **SUPPRESSION).metadata
    )


# --- the numbers --------------------------------------------------------------------------------------------------


def fake(values, scale):
    return torch.clamp(torch.round(values / scale), -128, 127) * scale


def simulated(model, array, layer):
    """What torch makes of a layer with the same scales and weights: an independent reading of the file."""
    values, makers = stored(model), {name: node for node in model.proto.graph.node for name in node.output}
    net, found = copy.deepcopy(fused_tiny()), []
    modules = dict(net.named_modules())
    for node in model.proto.graph.node:
        if node.op_type != "Conv" or node.output[0] in model.metadata.heads:
            continue
        module, (data, weight) = modules[node.name], (makers[name] for name in node.input[:2])
        scale = torch.tensor(values[data.input[1]])
        module.register_forward_pre_hook(lambda _, given, scale=scale: (fake(given[0], scale),))
        with torch.no_grad():
            rounded, steps = (torch.tensor(values[name]) for name in weight.input[:2])
            module.weight.copy_(rounded * steps[:, None, None, None])
            module.bias.copy_(torch.tensor(values[node.input[2]]))
    modules[layer].register_forward_hook(lambda _, given, made: found.append(made.numpy().copy()))
    with torch.no_grad():
        net.features(torch.from_numpy(array))
    return found


@pytest.mark.parametrize("method", INT8_METHODS)
def test_the_file_computes_what_its_scales_and_weights_say(method):
    """After a few layers: later on, a step that falls to the other side by the last bit has changed everything."""
    small = quantized(Int8Options(method=method, rest="fp32"), nms="none")
    for layer in ("model.0.conv", "model.7.conv", "model.9.conv"):
        proto = copy.deepcopy(small.proto)
        proto.graph.output.append(onnx.ValueInfoProto(name=layer))
        ours = session(proto).run([layer], {"images": images()})
        assert rms(ours, simulated(small, images(), layer)) < STEPS_TOLERANCE, layer


@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
def test_the_maps_are_those_of_float32_but_for_rounding(input_kind):
    array = images() if input_kind == "float32" else np.stack([noise(*HW, seed=5)])
    expected = heads_of(exported_tiny(nms="none", input_kind=input_kind), array)
    ours = heads_of(quantized(nms="none", input_kind=input_kind), array)
    assert 0 < rms(ours, expected) < HEAD_TOLERANCE


@pytest.mark.parametrize("nms", ENDS)
def test_decoding_and_suppression_are_those_of_float32(nms):
    """What the file finds is what float32 decoding and the reference NMS make of its own maps."""
    small = quantized(nms=nms, batch=None, **SUPPRESSION)
    maps = [raw.astype(np.float16) for raw in heads_of(small, images(2))]
    ends = session(end_of(small)).run(None, dict(zip(small.metadata.heads, maps, strict=True)))
    with torch.no_grad():
        head = fused_tiny().head
        raws = [torch.from_numpy(raw.astype(np.float32)) for raw in maps]
        shaped = [r.view(2, 3, -1, *r.shape[2:]).permute(0, 1, 3, 4, 2).contiguous() for r in raws]
        decoded = head.decode(shaped).numpy()
    for index in range(2):
        if nms == "none":
            np.testing.assert_allclose(ends[0][index][..., :4], decoded[index][..., :4], atol=DECODED_TOLERANCE)
        else:
            assert_same_detections(picked(ends, index), reference(decoded[index]))


def test_correcting_the_bias_brings_the_mean_of_the_maps_nearer():
    expected = heads_of(exported_tiny(nms="none"), images(2)[:1])
    errors = []
    for corrects in (True, False):
        ours = heads_of(quantized(Int8Options(correct_bias=corrects, rest="fp32"), nms="none"), images(2)[:1])
        errors.append(sum(float(np.abs((a - b).mean((0, 2, 3))).mean()) for a, b in zip(ours, expected, strict=True)))
    assert errors[0] < errors[1]


# --- sparing ------------------------------------------------------------------------------------------------------


def test_a_spared_layer_reads_and_computes_in_half():
    small = quantized(Int8Options(spare={"model.7.conv": "because"}), nms="none")
    node = next(node for node in small.proto.graph.node if node.name == "model.7.conv")
    assert not [name for name in node.input if "int8" in name]
    assert ("model.7.conv", "because") in small.metadata.int8.kept
    assert small.metadata.int8.int8_convolutions == CONVOLUTIONS - HEADS - 1
    assert any("model.7.conv (because)" in note for note in small.metadata.notes)
    assert rms(heads_of(small, images()), heads_of(exported_tiny(nms="none"), images())) < HEAD_TOLERANCE


def test_a_layer_that_is_not_there_cannot_be_spared():
    with pytest.raises(ExportError, match=r"no convolution 'model\.700\.conv' to spare") as caught:
        quantized(Int8Options(spare={"model.700.conv": "because"}), nms="none")
    assert "model.0.conv" in caught.value.fix


def test_with_every_layer_spared_nothing_is_left_to_do():
    names = [node.name for node in Network(exported_tiny(nms="none")).convolutions]
    with pytest.raises(ExportError, match="No convolution can be INT8: because"):
        quantized(Int8Options(spare=dict.fromkeys(names, "because")), nms="none")


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: usual(), lambda: to_fp16(exported_tiny(nms="none"), IMAGES)])
def test_a_smaller_model_is_refused(make):
    with pytest.raises(ExportError, match="already") as caught:
        to_int8(make(), calibration(nms="none"), Int8Options())
    assert "Start from the float32 file" in caught.value.fix


def test_a_metadata_that_hides_a_smaller_model_does_not_help():
    liar = OnnxModel(usual().proto, exported_tiny(nms="plugin", **SUPPRESSION).metadata)
    with pytest.raises(ExportError, match="quantised already: it has a"):
        to_int8(liar, calibration(nms="plugin", **SUPPRESSION), Int8Options())


def test_the_calibration_of_another_network_is_refused():
    other = exported_tiny(classes=3, nms="none")
    with pytest.raises(ExportError, match="calibration is of another network"):
        to_int8(other, calibration(nms="none"), Int8Options())


@pytest.mark.parametrize("wrong", [{"method": "mean"}, {"rest": "int4"}])
def test_an_unknown_option_is_refused(wrong):
    with pytest.raises(UsageError, match="is unknown"):
        Int8Options(**wrong)


# --- graphs of others ---------------------------------------------------------------------------------------------


def foreign_net(*, constant=True):
    """Two convolutions with ReLU, a third in front of a sigmoid, without metadata."""
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
    metadata: ModelMetadata = foreign_metadata(classes=0, input_hw=(32, 32), batch=1, input_kind="float32", nms=None)
    return OnnxModel(proto, metadata)


def test_a_plain_network_of_others_becomes_int8_but_for_its_last_convolution():
    model = foreign_net()
    small = to_int8(model, calibrate(model, IMAGES, count=3), Int8Options())
    assert small.metadata.int8.rest == "fp32"  # where decoding begins is unknown
    assert [layer for layer, _ in small.metadata.int8.kept] == ["conv2"]
    given = np.random.default_rng(1).random((1, 3, 32, 32), dtype=np.float32)
    ours, expected = (session(m.proto).run(None, {"images": given})[0] for m in (small, model))
    assert 0 < np.abs(ours - expected).max() < 0.05


def test_weights_that_are_no_constants_are_named():
    model = foreign_net(constant=False)
    with pytest.raises(ExportError, match=r"No convolution can be INT8: .*its weights are no float32 initializer"):
        to_int8(model, replace(calibration(nms="none"), network_sha256=digest_of(model)), Int8Options())


def digest_of(model):
    from yolov7_deploy.precision.calibrate import network_digest

    return network_digest(Network(model))


def test_what_computes_in_float_between_two_convolutions_is_named():
    model = foreign_net()
    proto = copy.deepcopy(model.proto)
    nodes = list(proto.graph.node)
    nodes[2].input[0] = "odd"  # the second convolution
    nodes.insert(2, helper.make_node("Softplus", ["a0"], ["odd"], name="odd one"))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    changed = OnnxModel(proto, model.metadata)
    small = to_int8(changed, calibrate(changed, IMAGES), Int8Options())
    assert "float between INT8 convolutions: Softplus (odd)" in small.metadata.notes
    assert not [note for note in usual().metadata.notes if "between INT8" in note]
