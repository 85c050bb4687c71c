"""FP16 conversion: the nodes that become FP16 or stay float32, with reasons, and the error of the outputs."""

import copy
import json
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

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
    network_nodes,
    nodes_after_heads,
    reference,
    run,
)
from tests.support.deterministic import fill_model, make_image
from tests.support.sample_images import noise
from tests.support.slow_cases import some_fast
from tests.support.small_models import HW, exported_tiny, fused_tiny, images, metadata_of, session
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.onnx_export.onnx_model import OnnxModel
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.precision import fp16
from yolov7_deploy.precision.fp16 import FP16_OPS, MAX_ACTIVATION, activation_ranges, to_fp16

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "models.json").read_text())
LARGE = ("yolov7", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e", "yolov7x")
IMAGES = (noise(*HW),)
# Error of a raw head map, in its standard deviations. Measured: tiny 0.006, d6 (which has the largest values) 0.03.
HEAD_TOLERANCE = {"yolov7-d6": 0.06}
COMMON_TOLERANCE = 0.02
FP16, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


@lru_cache
def fp16_tiny(**options) -> OnnxModel:
    """yolov7-tiny at HW in FP16; it is shared, so do not modify it."""
    return to_fp16(exported_tiny(**options), IMAGES)


def with_heads(model):
    """The graph with its raw head maps as additional outputs, after the others."""
    proto = copy.deepcopy(model.proto)
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in model.metadata.heads if name not in known)
    return proto


def heads_of(model, array):
    return session(with_heads(model)).run(list(model.metadata.heads), {"images": array})


def max_error(actual, expected):
    """The largest difference of head maps in standard deviations; NaN if a map is not finite."""
    return max(
        float(np.abs(a.astype(np.float32) - b).max() / b.std()) if np.isfinite(a).all() else float("nan")
        for a, b in zip(actual, expected, strict=True)
    )


def types_of(proto):
    """Element type of every tensor, by ONNX's strict inference."""
    graph = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return {**types, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def types_and_shapes(values):
    return [(value.name, value.type.SerializeToString()) for value in values]


# --- the graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms, opset, batch, input_kind", some_fast(EXPORTS, every=4))
def test_the_file_is_strictly_typed_with_the_same_inputs_and_outputs(nms, opset, batch, input_kind):
    options = {"nms": nms, "opset": opset, "batch": batch, "input_kind": input_kind, **NMS_OPTIONS}
    float_model, fp16_model = exported_tiny(**options), fp16_tiny(**options)
    onnx.checker.check_model(fp16_model.proto, full_check=True)
    assert types_and_shapes(fp16_model.proto.graph.input) == types_and_shapes(float_model.proto.graph.input)
    assert types_and_shapes(fp16_model.proto.graph.output) == types_and_shapes(float_model.proto.graph.output)
    types = types_of(fp16_model.proto)
    assert {types[name] for name in fp16_model.metadata.heads} == {FP16}
    for node in network_nodes(fp16_model):
        if node.op_type in FP16_OPS:
            assert types[node.output[0]] == FP16, node.name
            assert {types[name] for name in node.input if name} <= {FP16, TensorProto.INT64} or node.op_type == "Resize"
    assert {
        types[name] for node in network_nodes(fp16_model) if node.op_type == "Resize" for name in node.input[2:]
    } == {FLOAT}


@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
@pytest.mark.parametrize("nms", NMS_CHOICES)
def test_nothing_is_cast_twice_and_nothing_to_its_own_type(nms, input_kind):
    fp16_model = fp16_tiny(nms=nms, input_kind=input_kind, **NMS_OPTIONS)
    types = types_of(fp16_model.proto)
    casts = [node for node in fp16_model.proto.graph.node if node.op_type == "Cast"]
    producers = {name: node for node in fp16_model.proto.graph.node for name in node.output}
    for cast in casts:
        assert types[cast.input[0]] != types[cast.output[0]], cast.name
        assert producers.get(cast.input[0], cast).op_type != "Cast" or cast.input[0] not in producers, cast.name
    in_network = [(types[cast.input[0]], types[cast.output[0]]) for cast in casts if not cast.name.startswith("end__")]
    bytes_first = [(TensorProto.UINT8, FLOAT)] if input_kind == "uint8" else []
    assert in_network == [*bytes_first, (FLOAT, FP16)]


def test_bytes_are_scaled_in_float32():
    fp16_model = fp16_tiny(nms="none", input_kind="uint8")
    types = types_of(fp16_model.proto)
    scaling = [node for node in network_nodes(fp16_model) if node.op_type not in FP16_OPS and node.op_type != "Cast"]
    assert [node.op_type for node in scaling] == ["Transpose", "Gather", "Div"]
    assert {types[node.output[0]] for node in scaling} == {FLOAT}
    assert any("Div" in note for note in fp16_model.metadata.notes)


@pytest.mark.parametrize("simplify", [True, False])
def test_weights_are_rounded_and_the_file_has_half_the_size(simplify):
    float_model, fp16_model = (f(nms="plugin", simplify=simplify, **NMS_OPTIONS) for f in (exported_tiny, fp16_tiny))
    rounded = {t.name: numpy_helper.to_array(t).astype(np.float16) for t in float_model.proto.graph.initializer}
    weights = [t for t in fp16_model.proto.graph.initializer if t.data_type == FP16]
    assert len(weights) == 2 * Counter(node.op_type for node in fp16_model.proto.graph.node)["Conv"]
    for tensor in weights:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), rounded[tensor.name])
    assert fp16_model.proto.ByteSize() < 0.52 * float_model.proto.ByteSize()


def test_the_float32_model_is_not_modified():
    model = exported_tiny(nms="plugin", **NMS_OPTIONS)
    before = model.proto.SerializeToString(deterministic=True)
    first, second = (to_fp16(model, IMAGES).proto.SerializeToString(deterministic=True) for _ in range(2))
    assert model.proto.SerializeToString(deterministic=True) == before
    assert first == second


def test_the_metadata_records_fp16_and_the_nodes_that_stay_float32(tmp_path):
    float_model, fp16_model = exported_tiny(nms="plugin", **NMS_OPTIONS), fp16_tiny(nms="plugin", **NMS_OPTIONS)
    fp16_model.save(tmp_path / "m.onnx")
    metadata = OnnxModel.load(tmp_path / "m.onnx").metadata
    assert metadata == fp16_model.metadata
    assert replace(metadata, precision="fp32", notes=()) == float_model.metadata
    assert metadata.precision == "fp16"
    nodes = len(network_nodes(float_model))
    assert metadata.notes[0] == f"fp16: {nodes} of {nodes} nodes before decoding are FP16"
    assert any("became 0" in note for note in metadata.notes)


# --- the outputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms", NMS_CHOICES)
def test_decoding_and_nms_are_those_of_float32(nms):
    """The detections of the file are those of float32 decoding and the reference NMS on its own FP16 head maps."""
    fp16_model = fp16_tiny(nms=nms, batch=None, **NMS_OPTIONS)
    maps = heads_of(fp16_model, images(2))
    assert {raw.dtype for raw in maps} == {np.dtype(np.float16)}
    ends = session(nodes_after_heads(fp16_model)).run(None, dict(zip(fp16_model.metadata.heads, maps, strict=True)))
    with torch.no_grad():
        head = fused_tiny().head
        raws = [torch.from_numpy(raw.astype(np.float32)) for raw in maps]
        shaped = [r.view(2, 3, -1, *r.shape[2:]).permute(0, 1, 3, 4, 2).contiguous() for r in raws]
        decoded = head.decode(shaped).numpy()
    for index in range(2):
        if nms == "none":
            np.testing.assert_allclose(ends[0][index][..., :4], decoded[index][..., :4], atol=DECODED_TOLERANCE)
            np.testing.assert_allclose(ends[0][index][..., 4:], decoded[index][..., 4:], atol=1e-6)
        else:
            assert_same_detections(image_result(ends, index), reference(decoded[index]))


@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
def test_head_maps_are_those_of_float32_except_for_rounding(input_kind):
    array = images() if input_kind == "float32" else np.stack([noise(*HW, seed=5)])
    expected = heads_of(exported_tiny(nms="none", input_kind=input_kind), array)
    actual = heads_of(fp16_tiny(nms="none", input_kind=input_kind), array)
    assert 0 < max_error(actual, expected) < COMMON_TOLERANCE


def test_thresholds_still_change_at_run_time():
    opened = session(fp16_tiny(nms="plugin", **NMS_OPTIONS).proto)
    counts = [len(image_result(run(opened, images(), conf=conf))[1]) for conf in (0.5, 0.8, 1.0)]
    assert counts[0] > counts[1] > counts[2] == 0


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v in LARGE)) for v in sorted(VARIANTS)]
)
def test_every_variant_is_finite_on_its_golden_input(variant):
    golden = GOLDEN[f"{variant}/deploy"]
    net = fuse(fill_model(new_model(variant, classes=golden["nc"], training_form=False), golden["salt"]))
    hw = (golden["height"], golden["width"])
    float_model = export_onnx(net, metadata_of(net), ExportOptions(input_hw=hw, nms="none", simplify=False))
    array = make_image(*hw, golden["salt"]).numpy()
    fp16_model = to_fp16(float_model, [np.rint(array[0, ::-1].transpose(1, 2, 0) * 255).astype(np.uint8)])
    expected = heads_of(float_model, array)
    output, *maps = session(with_heads(fp16_model)).run(None, {"images": array})
    assert np.isfinite(output).all()
    assert max_error(maps, expected) < HEAD_TOLERANCE.get(variant, COMMON_TOLERANCE)
    # With deterministic weights, the values of e6e are so large that its last level needs float32.
    assert ("overflow or underflow" in " ".join(fp16_model.metadata.notes)) == (variant == "yolov7-e6e")


# --- overflow and underflow -------------------------------------------------------------------------------------------


def scaled(first, second):
    """yolov7-tiny, its first two layers multiplied and the next ones divided by powers of two: the same function."""
    net = copy.deepcopy(fused_tiny())
    one, two, *rest = (net.model[index].conv for index in range(4))
    with torch.no_grad():
        one.weight *= first
        one.bias *= first
        two.weight *= second
        two.bias *= first * second
        for convolution in rest:  # both read the second layer
            convolution.weight /= first * second
    return export_onnx(net, metadata_of(net), ExportOptions(input_hw=HW, nms="none"))


@pytest.mark.parametrize(
    "first, second, why",
    [
        (2.0**16, 2.0**-16, "model.0.conv has values up to"),
        (2.0**24, 2.0**-24, "model.0.conv has weights up to"),
        (2.0**-9, 2.0**-9, "model.1.conv has no value above"),
        (2.0**-20, 2.0**20, "model.0.conv has weights of at most"),
    ],
)
def test_nodes_that_would_overflow_or_underflow_stay_float32(first, second, why, monkeypatch):
    float_model = scaled(first, second)
    fp16_model = to_fp16(float_model, IMAGES)
    assert why in " ".join(fp16_model.metadata.notes)
    types = types_of(fp16_model.proto)
    assert types[why.split()[0]] == FLOAT
    assert types["model.4.conv"] == FP16
    expected = heads_of(exported_tiny(nms="none"), images())
    np.testing.assert_array_equal(heads_of(float_model, images())[0], expected[0])
    kept = max_error(heads_of(fp16_model, images()), expected)
    assert kept < COMMON_TOLERANCE
    # Without the rules the head maps would be infinite or less accurate.
    monkeypatch.setattr(fp16, "_range_reason", lambda largest: "")
    monkeypatch.setattr(fp16, "_weight_reason", lambda weight: "")
    with np.errstate(over="ignore"):
        without_rules = max_error(heads_of(to_fp16(float_model, IMAGES), images()), expected)
    assert not without_rules < 2 * kept


def test_only_the_neighbors_of_a_large_value_stay_float32():
    fp16_model = to_fp16(scaled(2.0**16, 2.0**-16), IMAGES)
    types = types_of(fp16_model.proto)
    kept = [
        node.name for node in network_nodes(fp16_model) if node.op_type != "Cast" and types[node.output[0]] == FLOAT
    ]
    assert kept == ["model.0.conv", "model.0.act", "model.1.conv"]
    assert fp16_model.metadata.notes[0].startswith(f"fp16: {len(network_nodes(exported_tiny(nms='none'))) - 3} of ")


def test_one_overflowing_head_makes_all_heads_float32_for_the_plugin():
    net = copy.deepcopy(fused_tiny())
    with torch.no_grad():
        net.head.m[1].bias += 2 * MAX_ACTIVATION
    float_model = export_onnx(net, metadata_of(net), ExportOptions(input_hw=HW, nms="plugin", max_det=20))
    fp16_model = to_fp16(float_model, IMAGES)
    types = types_of(fp16_model.proto)
    node = next(node for node in fp16_model.proto.graph.node if node.op_type == "Y7NMS")
    assert {types[name] for name in node.input} == {FLOAT}
    assert [types[name] for name in fp16_model.metadata.heads] == [FP16, FLOAT, FP16]
    session(fp16_model.proto).run(None, {"images": images()})


def test_ranges_are_the_largest_magnitudes_over_all_images():
    model = exported_tiny(nms="none", batch=3)
    frames = [noise(*HW, seed=seed) for seed in range(2)]
    names = [model.metadata.heads[0], "model.5.conv"]
    found = activation_ranges(model, network_nodes(model), names, frames)
    proto = copy.deepcopy(model.proto)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    arrays = [p[None, ..., ::-1].transpose(0, 3, 1, 2).repeat(3, 0) / np.float32(255) for p in frames]
    runs = [session(proto).run(names, {"images": np.ascontiguousarray(array)}) for array in arrays]
    for index, name in enumerate(names):
        assert found[name] == pytest.approx(max(float(np.abs(values[index]).max()) for values in runs), rel=1e-5)


def test_control_flow_inside_the_network_stays_float32():
    model = exported_tiny(nms="none")
    proto = copy.deepcopy(model.proto)
    nodes = list(proto.graph.node)
    index = next(i for i, node in enumerate(nodes) if "model.7.act" in node.output)
    nodes[index].output[0] = "inner"
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("Identity", ["inner"], [f"{name}_out"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", FLOAT, None)],
        )
        for name in ("then", "else")
    }
    proto.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    nodes.insert(index + 1, helper.make_node("If", ["always"], ["model.7.act"], name="choice", **branches))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    fp16_model = to_fp16(OnnxModel.of(proto, model.metadata), IMAGES)
    types = types_of(fp16_model.proto)
    assert types["inner"] == types["model.7.act"] == FLOAT
    assert max_error(heads_of(fp16_model, images()), heads_of(model, images())) < COMMON_TOLERANCE


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_model_in_fp16_is_refused():
    with pytest.raises(ExportError, match="fp16 already") as caught:
        to_fp16(fp16_tiny(nms="none"), IMAGES)
    assert "--fp16" in caught.value.fix


def test_fp16_weights_with_fp32_metadata_are_refused():
    fp16_model = fp16_tiny(nms="none")
    wrong = OnnxModel(fp16_model.proto, replace(fp16_model.metadata, precision="fp32"))
    with pytest.raises(ExportError, match="FP16 already"):
        to_fp16(wrong, IMAGES)


@pytest.mark.parametrize("heads", [(), ("nowhere",)])
def test_a_graph_whose_head_is_unknown_is_refused(heads):
    model = exported_tiny(nms="none")
    with pytest.raises(ExportError, match="not exported by this package"):
        to_fp16(OnnxModel(model.proto, replace(model.metadata, heads=heads)), IMAGES)


def test_conversion_without_images_is_an_error():
    with pytest.raises(UsageError, match="no image"):
        to_fp16(exported_tiny(nms="none"), [])
