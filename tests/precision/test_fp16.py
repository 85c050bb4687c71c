"""Half precision as a graph step: what becomes half, what stays float32 and why, and what the numbers lose."""

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
    ENDS,
    EXPORTS,
    SUPPRESSION,
    assert_same_detections,
    end_of,
    network_of,
    picked,
    reference,
    run,
)
from tests.support.deterministic import fill_model, make_image
from tests.support.sample_images import noise
from tests.support.small_models import HW, exported_tiny, fused_tiny, images, metadata_of, session
from yolov7_deploy.errors import ExportError, UsageError
from yolov7_deploy.export.onnx_exporter import export_onnx
from yolov7_deploy.export.onnx_model import OnnxModel
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.options import ExportOptions
from yolov7_deploy.precision import fp16
from yolov7_deploy.precision.activation_ranges import activation_ranges
from yolov7_deploy.precision.fp16 import HALF_OPS, WIDEST, to_fp16

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "models.json").read_text())
LARGE = ("yolov7", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e", "yolov7x")
IMAGES = (noise(*HW),)
# Of a raw map, in its standard deviations. Measured: tiny 0.006, the hottest variant (d6) 0.03.
HEAD_TOLERANCE = {"yolov7-d6": 0.06}
COMMON_TOLERANCE = 0.02
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


@lru_cache
def half_tiny(**options) -> OnnxModel:
    """yolov7-tiny at HW in half; shared, so not to be changed."""
    return to_fp16(exported_tiny(**options), IMAGES)


def with_heads(model):
    """The graph with its raw maps as outputs, which then stand behind the others."""
    proto = copy.deepcopy(model.proto)
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in model.metadata.heads if name not in known)
    return proto


def heads_of(model, array):
    return session(with_heads(model)).run(list(model.metadata.heads), {"images": array})


def worst(ours, expected):
    """The largest difference of raw maps in standard deviations; not a number where a map is not finite."""
    return max(
        float(np.abs(a.astype(np.float32) - b).max() / b.std()) if np.isfinite(a).all() else float("nan")
        for a, b in zip(ours, expected, strict=True)
    )


def types_of(proto):
    """Element type of every tensor, by ONNX's own strict inference."""
    graph = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.value_info, *graph.output)}
    return {**kinds, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def ports(values):
    return [(value.name, value.type.SerializeToString()) for value in values]


# --- the graph ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms, opset, batch, input_kind", EXPORTS)
def test_the_file_is_strictly_typed_with_the_same_inputs_and_outputs(nms, opset, batch, input_kind):
    options = {"nms": nms, "opset": opset, "batch": batch, "input_kind": input_kind, **SUPPRESSION}
    whole, half = exported_tiny(**options), half_tiny(**options)
    onnx.checker.check_model(half.proto, full_check=True)
    assert ports(half.proto.graph.input) == ports(whole.proto.graph.input)
    assert ports(half.proto.graph.output) == ports(whole.proto.graph.output)
    kinds = types_of(half.proto)
    assert {kinds[name] for name in half.metadata.heads} == {HALF}
    for node in network_of(half):
        if node.op_type in HALF_OPS:
            assert kinds[node.output[0]] == HALF, node.name
            assert {kinds[name] for name in node.input if name} <= {HALF, TensorProto.INT64} or node.op_type == "Resize"
    assert {kinds[name] for node in network_of(half) if node.op_type == "Resize" for name in node.input[2:]} == {FLOAT}


@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
@pytest.mark.parametrize("nms", ENDS)
def test_nothing_is_cast_twice_and_nothing_to_its_own_type(nms, input_kind):
    half = half_tiny(nms=nms, input_kind=input_kind, **SUPPRESSION)
    kinds = types_of(half.proto)
    casts = [node for node in half.proto.graph.node if node.op_type == "Cast"]
    makers = {name: node for node in half.proto.graph.node for name in node.output}
    for cast in casts:
        assert kinds[cast.input[0]] != kinds[cast.output[0]], cast.name
        assert makers.get(cast.input[0], cast).op_type != "Cast" or cast.input[0] not in makers, cast.name
    in_network = [(kinds[cast.input[0]], kinds[cast.output[0]]) for cast in casts if not cast.name.startswith("end__")]
    bytes_first = [(TensorProto.UINT8, FLOAT)] if input_kind == "uint8" else []
    assert in_network == [*bytes_first, (FLOAT, HALF)]


def test_bytes_are_scaled_in_float32():
    half = half_tiny(nms="none", input_kind="uint8")
    kinds = types_of(half.proto)
    scaling = [node for node in network_of(half) if node.op_type not in HALF_OPS and node.op_type != "Cast"]
    assert [node.op_type for node in scaling] == ["Transpose", "Gather", "Div"]
    assert {kinds[node.output[0]] for node in scaling} == {FLOAT}
    assert any("Div" in note for note in half.metadata.notes)


@pytest.mark.parametrize("simplify", [True, False])
def test_weights_are_the_rounded_ones_and_the_file_is_half_the_size(simplify):
    whole, half = (f(nms="plugin", simplify=simplify, **SUPPRESSION) for f in (exported_tiny, half_tiny))
    rounded = {t.name: numpy_helper.to_array(t).astype(np.float16) for t in whole.proto.graph.initializer}
    weights = [t for t in half.proto.graph.initializer if t.data_type == HALF]
    assert len(weights) == 2 * Counter(node.op_type for node in half.proto.graph.node)["Conv"]
    for tensor in weights:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), rounded[tensor.name])
    assert half.proto.ByteSize() < 0.52 * whole.proto.ByteSize()


def test_the_float32_model_is_left_as_it_was():
    model = exported_tiny(nms="plugin", **SUPPRESSION)
    before = model.proto.SerializeToString(deterministic=True)
    first, second = (to_fp16(model, IMAGES).proto.SerializeToString(deterministic=True) for _ in range(2))
    assert model.proto.SerializeToString(deterministic=True) == before
    assert first == second


def test_the_metadata_says_fp16_and_what_stayed_float32(tmp_path):
    whole, half = exported_tiny(nms="plugin", **SUPPRESSION), half_tiny(nms="plugin", **SUPPRESSION)
    half.save(tmp_path / "m.onnx")
    metadata = OnnxModel.load(tmp_path / "m.onnx").metadata
    assert metadata == half.metadata
    assert replace(metadata, precision="fp32", notes=()) == whole.metadata
    assert metadata.precision == "fp16"
    nodes = len(network_of(whole))
    assert metadata.notes[0] == f"fp16: {nodes} of {nodes} nodes in front of decoding are half"
    assert any("became 0" in note for note in metadata.notes)


# --- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms", ENDS)
def test_decoding_and_suppression_are_those_of_float32(nms):
    """What the file finds is what float32 decoding and the reference NMS make of its own half maps."""
    half = half_tiny(nms=nms, batch=None, **SUPPRESSION)
    maps = heads_of(half, images(2))
    assert {raw.dtype for raw in maps} == {np.dtype(np.float16)}
    ends = session(end_of(half)).run(None, dict(zip(half.metadata.heads, maps, strict=True)))
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
            assert_same_detections(picked(ends, index), reference(decoded[index]))


@pytest.mark.parametrize("input_kind", ["float32", "uint8"])
def test_the_maps_are_those_of_float32_but_for_rounding(input_kind):
    array = images() if input_kind == "float32" else np.stack([noise(*HW, seed=5)])
    expected = heads_of(exported_tiny(nms="none", input_kind=input_kind), array)
    ours = heads_of(half_tiny(nms="none", input_kind=input_kind), array)
    assert 0 < worst(ours, expected) < COMMON_TOLERANCE


def test_thresholds_still_change_at_run_time():
    opened = session(half_tiny(nms="plugin", **SUPPRESSION).proto)
    counts = [len(picked(run(opened, images(), conf=conf))[1]) for conf in (0.5, 0.8, 1.0)]
    assert counts[0] > counts[1] > counts[2] == 0


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v in LARGE)) for v in sorted(VARIANTS)]
)
def test_every_variant_is_finite_on_its_golden_input(variant):
    golden = GOLDEN[f"{variant}/deploy"]
    net = fuse(fill_model(new_model(variant, classes=golden["nc"], training_form=False), golden["salt"]))
    hw = (golden["height"], golden["width"])
    whole = export_onnx(net, metadata_of(net), ExportOptions(input_hw=hw, nms="none", simplify=False))
    array = make_image(*hw, golden["salt"]).numpy()
    half = to_fp16(whole, [np.rint(array[0, ::-1].transpose(1, 2, 0) * 255).astype(np.uint8)])
    expected = heads_of(whole, array)
    output, *maps = session(with_heads(half)).run(None, {"images": array})
    assert np.isfinite(output).all()
    assert worst(maps, expected) < HEAD_TOLERANCE.get(variant, COMMON_TOLERANCE)
    # The deterministic weights of e6e run hot enough for the last level to need float32.
    assert ("float32 for their values" in " ".join(half.metadata.notes)) == (variant == "yolov7-e6e")


# --- values that half cannot hold ---------------------------------------------------------------------------------


def scaled(first, second):
    """yolov7-tiny with its first two layers multiplied and the next divided by powers of two: the same function."""
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
def test_what_does_not_fit_half_stays_float32(first, second, why, monkeypatch):
    whole = scaled(first, second)
    half = to_fp16(whole, IMAGES)
    assert why in " ".join(half.metadata.notes)
    kinds = types_of(half.proto)
    assert kinds[why.split()[0]] == FLOAT
    assert kinds["model.4.conv"] == HALF
    expected = heads_of(exported_tiny(nms="none"), images())
    np.testing.assert_array_equal(heads_of(whole, images())[0], expected[0])
    kept = worst(heads_of(half, images()), expected)
    assert kept < COMMON_TOLERANCE
    # Without the rule the maps would be infinite, or worse than they are.
    monkeypatch.setattr(fp16, "_range_reason", lambda largest: "")
    monkeypatch.setattr(fp16, "_weight_reason", lambda weight: "")
    with np.errstate(over="ignore"):
        careless = worst(heads_of(to_fp16(whole, IMAGES), images()), expected)
    assert not careless < 2 * kept


def test_only_the_neighbours_of_a_wide_value_stay_float32():
    half = to_fp16(scaled(2.0**16, 2.0**-16), IMAGES)
    kinds = types_of(half.proto)
    kept = [node.name for node in network_of(half) if node.op_type != "Cast" and kinds[node.output[0]] == FLOAT]
    assert kept == ["model.0.conv", "model.0.act", "model.1.conv"]
    assert half.metadata.notes[0].startswith(f"fp16: {len(network_of(exported_tiny(nms='none'))) - 3} of ")


def test_a_head_that_does_not_fit_makes_all_maps_float32_for_the_plugin():
    net = copy.deepcopy(fused_tiny())
    with torch.no_grad():
        net.head.m[1].bias += 2 * WIDEST
    whole = export_onnx(net, metadata_of(net), ExportOptions(input_hw=HW, nms="plugin", max_det=20))
    half = to_fp16(whole, IMAGES)
    kinds = types_of(half.proto)
    node = next(node for node in half.proto.graph.node if node.op_type == "Y7NMS")
    assert {kinds[name] for name in node.input} == {FLOAT}
    assert [kinds[name] for name in half.metadata.heads] == [HALF, FLOAT, HALF]
    session(half.proto).run(None, {"images": images()})


def test_ranges_are_the_largest_magnitudes_over_all_images():
    model = exported_tiny(nms="none", batch=3)
    frames = [noise(*HW, seed=seed) for seed in range(2)]
    names = [model.metadata.heads[0], "model.5.conv"]
    found = activation_ranges(model, network_of(model), names, frames)
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
    place = next(i for i, node in enumerate(nodes) if "model.7.act" in node.output)
    nodes[place].output[0] = "inner"
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
    nodes.insert(place + 1, helper.make_node("If", ["always"], ["model.7.act"], name="choice", **branches))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    half = to_fp16(OnnxModel.of(proto, model.metadata), IMAGES)
    kinds = types_of(half.proto)
    assert kinds["inner"] == kinds["model.7.act"] == FLOAT
    assert worst(heads_of(half, images()), heads_of(model, images())) < COMMON_TOLERANCE


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_model_in_half_is_refused():
    with pytest.raises(ExportError, match="fp16 already") as caught:
        to_fp16(half_tiny(nms="none"), IMAGES)
    assert "--fp16" in caught.value.fix


def test_half_weights_under_a_metadata_of_fp32_are_refused():
    half = half_tiny(nms="none")
    wrong = OnnxModel(half.proto, replace(half.metadata, precision="fp32"))
    with pytest.raises(ExportError, match="half already"):
        to_fp16(wrong, IMAGES)


@pytest.mark.parametrize("heads", [(), ("nowhere",)])
def test_a_graph_whose_head_is_unknown_is_refused(heads):
    model = exported_tiny(nms="none")
    with pytest.raises(ExportError, match="not exported by this package"):
        to_fp16(OnnxModel(model.proto, replace(model.metadata, heads=heads)), IMAGES)


def test_without_a_image_nothing_is_measured():
    with pytest.raises(UsageError, match="no image"):
        to_fp16(exported_tiny(nms="none"), [])
