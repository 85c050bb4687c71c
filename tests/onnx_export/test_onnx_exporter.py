"""The exported graph equals PyTorch and the reference NMS, for every kind of NMS, opset and batch size."""

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.support.detecting import (
    CONF,
    DECODED_TOLERANCE,
    IOU,
    MAX_DET,
    NMS_CHOICES,
    NMS_INSIDE,
    NMS_OPTIONS,
    RAW_TOLERANCE,
    SCORE_TOLERANCE,
    assert_same_detections,
    image_result,
    reference,
    run,
)
from tests.support.deterministic import fill_model, make_image
from tests.support.slow_cases import some_fast
from tests.support.small_models import HW, decoded_by_torch, exported_tiny, images, metadata_of, session, tiny_session
from yolov7_deploy.metadata import THRESHOLD_INPUTS
from yolov7_deploy.model.configs import VARIANTS
from yolov7_deploy.model.fusion import fuse
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.onnx_export.onnx_exporter import export_onnx
from yolov7_deploy.options import ExportOptions

# --- every NMS, opset and batch ---------------------------------------------------------------------------------------

MATRIX = [
    *itertools.product(NMS_CHOICES, (13, 17, 20), (1, None)),
    *((nms, opset, None) for nms in NMS_CHOICES for opset in (15, 18, 21)),
]


@pytest.mark.parametrize("nms, opset, batch", some_fast(MATRIX, every=5))
def test_the_file_is_valid_and_equals_pytorch(nms, opset, batch):
    options = {"nms": nms, "opset": opset, "batch": batch, **NMS_OPTIONS}
    model = exported_tiny(**options)
    onnx.checker.check_model(model.proto, full_check=True)
    assert {entry.domain: entry.version for entry in model.proto.opset_import}[""] == opset
    count = batch or 2
    result = run(tiny_session(**options), images(count))
    decoded = decoded_by_torch(count=count)
    if nms == "none":
        np.testing.assert_allclose(result[0][..., :4], decoded[..., :4], atol=DECODED_TOLERANCE)
        np.testing.assert_allclose(result[0][..., 4:], decoded[..., 4:], atol=SCORE_TOLERANCE)
        return
    for index in range(count):
        expected = reference(decoded[index])
        assert 300 < len(expected[1]) < MAX_DET
        assert_same_detections(image_result(result, index), expected)


@pytest.mark.parametrize("nms", NMS_CHOICES)
@pytest.mark.parametrize("batch", [1, 3, None])
def test_outputs_have_the_documented_names_types_and_shapes(nms, batch):
    if batch == 3 and nms == "efficient":
        pytest.skip("the same outputs as plugin")
    graph = exported_tiny(nms=nms, batch=batch, max_det=50).proto.graph
    b = batch or "batch"
    assert shapes(graph.input)["images"] == (TensorProto.FLOAT, [b, 3, *HW])
    if nms == "none":
        assert shapes(graph.output) == {"output": (TensorProto.FLOAT, [b, 1512, 10])}
        return
    assert shapes(graph.output) == {
        "num_dets": (TensorProto.INT32, [b, 1]),
        "det_boxes": (TensorProto.FLOAT, [b, 50, 4]),
        "det_scores": (TensorProto.FLOAT, [b, 50]),
        "det_classes": (TensorProto.INT32, [b, 50]),
    }


def shapes(values):
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim],
        )
        for value in values
    }


@pytest.mark.parametrize("nms", NMS_CHOICES)
def test_a_batch_of_four_equals_four_single_runs(nms):
    opened = tiny_session(nms=nms, batch=None, **NMS_OPTIONS)
    together = run(opened, images(4))
    for index in range(4):
        alone = run(opened, images(4)[index : index + 1])
        if nms == "none":
            np.testing.assert_allclose(alone[0][0], together[0][index], atol=DECODED_TOLERANCE)
        else:
            assert_same_detections(image_result(alone), image_result(together, index))


@pytest.mark.parametrize("nms", ["none", "plugin"])
def test_uint8_input_equals_float32_input(nms):
    pixels = np.random.default_rng(3).integers(0, 256, (2, *HW, 3), np.uint8)
    scaled = np.ascontiguousarray(pixels[..., ::-1].transpose(0, 3, 1, 2)) / np.float32(255)
    options = {"nms": nms, "batch": None, **NMS_OPTIONS}
    from_bytes = tiny_session(input_kind="uint8", **options)
    assert [i.type for i in from_bytes.get_inputs()] == ["tensor(uint8)"]
    ours, expected = run(from_bytes, pixels), run(tiny_session(**options), scaled)
    if nms == "none":
        np.testing.assert_allclose(ours[0], expected[0], atol=DECODED_TOLERANCE)
    else:
        for index in range(2):
            assert_same_detections(image_result(ours, index), image_result(expected, index))
    assert exported_tiny(input_kind="uint8", **options).metadata.input_kind == "uint8"


# --- options of NMS ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms", ["standard", "plugin"])
@pytest.mark.parametrize("conf, iou", [(0.6, 0.45), (0.8, 0.45), (0.5, 0.05), (0.5, 0.9), (0.0, 0.5), (1.0, 0.5)])
def test_thresholds_can_be_changed_at_run_time(nms, conf, iou):
    opened = tiny_session(nms=nms, batch=None, **NMS_OPTIONS)
    assert {entry.name for entry in opened.get_overridable_initializers()} == set(THRESHOLD_INPUTS)
    result = run(opened, images(), conf=conf, iou=iou)
    assert_same_detections(image_result(result), reference(decoded_by_torch()[0], conf=conf, iou=iou))


def test_a_lower_threshold_gives_more_detections():
    opened = tiny_session(nms="plugin", batch=None, **NMS_OPTIONS)
    counts = [len(image_result(run(opened, images(), conf=conf))[1]) for conf in (0.5, 0.6, 0.8, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] and counts[-1] == 0


@pytest.mark.parametrize("nms", NMS_INSIDE)
@pytest.mark.parametrize("multi_label, class_agnostic", [(False, False), (False, True), (True, True)])
def test_best_class_and_class_agnostic_equal_the_reference(nms, multi_label, class_agnostic):
    options = {"multi_label": multi_label, "class_agnostic": class_agnostic}
    result = run(tiny_session(nms=nms, **NMS_OPTIONS, **options), images())
    assert_same_detections(image_result(result), reference(decoded_by_torch()[0], **options))


def test_best_class_multi_label_and_class_agnostic_differ_on_this_image():
    decoded = decoded_by_torch()[0]
    found = [
        reference(decoded, multi_label=multi_label, class_agnostic=agnostic)
        for multi_label, agnostic in itertools.product((False, True), repeat=2)
    ]
    assert len({one[0].tobytes() for one in found}) == 4


@pytest.mark.parametrize("nms", NMS_INSIDE)
@pytest.mark.parametrize("classes", [1, 2, 80])
def test_one_two_and_eighty_classes_equal_the_reference(nms, classes):
    result = run(tiny_session(classes, nms=nms, **NMS_OPTIONS), images())
    expected = reference(decoded_by_torch(classes)[0])
    assert len(expected[1]) > 10
    assert_same_detections(image_result(result), expected)


@pytest.mark.parametrize("nms", NMS_INSIDE)
@pytest.mark.parametrize("max_candidates, max_det", [(100, 100), (257, 7), (3840, 1000), (3840, 255), (1, 1)])
def test_limits_equal_the_reference(nms, max_candidates, max_det):
    limits = {"max_candidates": max_candidates, "max_det": max_det}
    result = run(tiny_session(nms=nms, conf=CONF, iou=IOU, **limits), images())
    expected = reference(decoded_by_torch()[0], **limits)
    assert_same_detections(image_result(result), expected)


# --- all variants -----------------------------------------------------------------------------------------------------

LARGE = ("yolov7", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e", "yolov7x")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v in LARGE)) for v in sorted(VARIANTS)]
)
def test_the_head_maps_of_every_variant_equal_pytorch(variant):
    net = fuse(fill_model(new_model(variant, classes=3)))
    side = 2 * net.head.strides[-1]
    model = export_onnx(net, metadata_of(net), ExportOptions(input_hw=(side, side), nms="none"))
    assert len(model.metadata.heads) == net.head.levels
    image = make_image(side, side)
    with torch.no_grad():
        features = net.features(image)
        expected = [raw.numpy() for raw in net.head.maps(features)]
        decoded = net.predict(image).numpy()
    model.proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in model.metadata.heads
    )
    output, *maps = session(model.proto).run(None, {"images": image.numpy()})
    for ours, raw in zip(maps, expected, strict=True):
        assert raw.std() > 0
        np.testing.assert_allclose(ours, raw, atol=RAW_TOLERANCE * max(1, raw.std()))
    assert output.shape == decoded.shape


def test_names_are_unique_in_a_network_with_slices():
    """yolov7-w6 begins with strided slices, and decoding has slices, too."""
    w6 = fuse(fill_model(new_model("yolov7-w6", classes=2)))
    for nms in NMS_CHOICES:
        options = ExportOptions(input_hw=(64, 128), nms=nms, simplify=False, max_det=20)
        graph = export_onnx(w6, metadata_of(w6), options).proto.graph
        values = [name for node in graph.node for name in node.output] + [tensor.name for tensor in graph.initializer]
        for names in (values, [node.name for node in graph.node]):
            assert sorted({name for name in names if names.count(name) > 1}) == []
