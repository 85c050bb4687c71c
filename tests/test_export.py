"""The exported graph does what torch and the reference suppression do, in every form, opset and batch."""

import itertools
import os
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from deterministic import fill_model, picture
from onnx import TensorProto, helper
from small_models import HW, decoded_by_torch, exported_tiny, fused_tiny, images, info_of, session, tiny_session

from yolov7_deploy.boxes import detections_of
from yolov7_deploy.errors import ExportError, LoadError, UsageError
from yolov7_deploy.export.nms import attach_nms
from yolov7_deploy.export.onnx_model import NMS_OUTPUTS, OnnxModel
from yolov7_deploy.export.suppression import NmsPlan
from yolov7_deploy.export.to_onnx import export_onnx
from yolov7_deploy.fusion import fuse
from yolov7_deploy.info import ModelInfo
from yolov7_deploy.model.variants import VARIANTS
from yolov7_deploy.model.yolov7 import new_model
from yolov7_deploy.options import ExportOptions, Thresholds

# Pixels and probabilities: two float32 implementations add up the same products in another order, which leaves a
# hundred-thousandth of raw values, and of boxes up to 1500 pixels wide.
DECODED_TOLERANCE = 2e-2
SCORE_TOLERANCE = 2e-5
# Raw maps of random weights run hot, so they are compared relative to their own spread (as in test_golden_models).
RAW_TOLERANCE = 2e-4
ENDS = ("none", "standard", "plugin", "efficient")
SUPPRESSED = ("standard", "plugin", "efficient")
CONF, IOU, MAX_DET, MAX_CANDIDATES = 0.5, 0.45, 1000, 1024
SUPPRESSION = {"conf": CONF, "iou": IOU, "max_det": MAX_DET, "max_candidates": MAX_CANDIDATES}


def run(model_session, array, **thresholds):
    feeds = {f"{name}_threshold": np.array([value], np.float32) for name, value in thresholds.items()}
    return model_session.run(None, {"images": array, **feeds})


def picked(result, index=0):
    """Boxes, scores and class ids of one picture; what lies behind `num_dets` must be zero."""
    count, boxes, scores, classes = (part[index] for part in result)
    n = int(count.item())
    assert not boxes[n:].any() and not scores[n:].any() and not classes[n:].any()
    assert (boxes.dtype, scores.dtype, classes.dtype, count.dtype) == (np.float32, np.float32, np.int32, np.int32)
    return boxes[:n], scores[:n], classes[:n]


def assert_same_detections(ours, expected):
    """Equal but for rounding: neighbours of nearly the same score may have changed places."""
    assert len(ours[1]) == len(expected[1])
    assert (np.diff(ours[1]) <= 0).all()
    np.testing.assert_allclose(ours[1], expected[1], atol=SCORE_TOLERANCE)
    same = (
        (ours[2][:, None] == expected[2][None])
        & (np.abs(ours[1][:, None] - expected[1][None]) <= SCORE_TOLERANCE)
        & (np.abs(ours[0][:, None] - expected[0][None]) <= DECODED_TOLERANCE).all(-1)
    )
    assert same.any(0).all() and same.any(1).all()


def reference(decoded, *, max_candidates=MAX_CANDIDATES, **thresholds):
    chosen = {"conf": CONF, "iou": IOU, "max_det": MAX_DET, "multi_label": True, **thresholds}
    return detections_of(decoded, Thresholds(**chosen), max_candidates=max_candidates)


# --- every end, opset and batch -----------------------------------------------------------------------------------

MATRIX = [
    *itertools.product(ENDS, (13, 17, 20), (1, None)),
    *((end, opset, None) for end in ENDS for opset in (15, 18, 21)),
]


@pytest.mark.parametrize("nms, opset, batch", MATRIX)
def test_the_file_is_valid_and_equals_torch(nms, opset, batch):
    options = {"nms": nms, "opset": opset, "batch": batch, **SUPPRESSION}
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
        assert_same_detections(picked(result, index), expected)


@pytest.mark.parametrize("nms", ENDS)
@pytest.mark.parametrize("batch", [1, 3, None])
def test_names_types_and_shapes_are_the_promised_ones(nms, batch):
    if batch == 3 and nms == "efficient":
        pytest.skip("the same graph end as plugin")
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


@pytest.mark.parametrize("nms", ENDS)
def test_a_batch_of_four_equals_four_single_runs(nms):
    opened = tiny_session(nms=nms, batch=None, **SUPPRESSION)
    together = run(opened, images(4))
    for index in range(4):
        alone = run(opened, images(4)[index : index + 1])
        if nms == "none":
            np.testing.assert_allclose(alone[0][0], together[0][index], atol=DECODED_TOLERANCE)
        else:
            assert_same_detections(picked(alone), picked(together, index))


@pytest.mark.parametrize("nms", ["none", "plugin"])
def test_uint8_input_equals_float32_input(nms):
    pixels = np.random.default_rng(3).integers(0, 256, (2, *HW, 3), np.uint8)
    scaled = np.ascontiguousarray(pixels[..., ::-1].transpose(0, 3, 1, 2)) / np.float32(255)
    options = {"nms": nms, "batch": None, **SUPPRESSION}
    from_bytes = tiny_session(input_kind="uint8", **options)
    assert [i.type for i in from_bytes.get_inputs()] == ["tensor(uint8)"]
    ours, expected = run(from_bytes, pixels), run(tiny_session(**options), scaled)
    if nms == "none":
        np.testing.assert_allclose(ours[0], expected[0], atol=DECODED_TOLERANCE)
    else:
        for index in range(2):
            assert_same_detections(picked(ours, index), picked(expected, index))
    assert exported_tiny(input_kind="uint8", **options).info.input_kind == "uint8"


# --- what suppression is told -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms", ["standard", "plugin"])
@pytest.mark.parametrize("conf, iou", [(0.6, 0.45), (0.8, 0.45), (0.5, 0.05), (0.5, 0.9), (0.0, 0.5), (1.0, 0.5)])
def test_thresholds_change_at_run_time_as_the_reference_does(nms, conf, iou):
    opened = tiny_session(nms=nms, batch=None, **SUPPRESSION)
    assert {entry.name for entry in opened.get_overridable_initializers()} == {"conf_threshold", "iou_threshold"}
    result = run(opened, images(), conf=conf, iou=iou)
    assert_same_detections(picked(result), reference(decoded_by_torch()[0], conf=conf, iou=iou))


def test_a_lower_threshold_finds_more():
    opened = tiny_session(nms="plugin", batch=None, **SUPPRESSION)
    counts = [len(picked(run(opened, images(), conf=conf))[1]) for conf in (0.5, 0.6, 0.8, 1.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] and counts[-1] == 0


@pytest.mark.parametrize("nms", SUPPRESSED)
@pytest.mark.parametrize("multi_label, class_agnostic", [(False, False), (False, True), (True, True)])
def test_best_class_and_class_agnostic_equal_the_reference(nms, multi_label, class_agnostic):
    options = {"multi_label": multi_label, "class_agnostic": class_agnostic}
    result = run(tiny_session(nms=nms, **SUPPRESSION, **options), images())
    assert_same_detections(picked(result), reference(decoded_by_torch()[0], **options))


def test_best_class_multi_label_and_class_agnostic_differ_on_this_picture():
    decoded = decoded_by_torch()[0]
    found = [
        reference(decoded, multi_label=multi_label, class_agnostic=agnostic)
        for multi_label, agnostic in itertools.product((False, True), repeat=2)
    ]
    assert len({one[0].tobytes() for one in found}) == 4


@pytest.mark.parametrize("nms", SUPPRESSED)
@pytest.mark.parametrize("classes", [1, 2, 80])
def test_one_two_and_eighty_classes_equal_the_reference(nms, classes):
    result = run(tiny_session(classes, nms=nms, **SUPPRESSION), images())
    expected = reference(decoded_by_torch(classes)[0])
    assert len(expected[1]) > 10
    assert_same_detections(picked(result), expected)


@pytest.mark.parametrize("nms", SUPPRESSED)
@pytest.mark.parametrize("max_candidates, max_det", [(100, 100), (257, 7), (3840, 1000), (3840, 255), (1, 1)])
def test_limits_equal_the_reference(nms, max_candidates, max_det):
    limits = {"max_candidates": max_candidates, "max_det": max_det}
    result = run(tiny_session(nms=nms, conf=CONF, iou=IOU, **limits), images())
    expected = reference(decoded_by_torch()[0], **limits)
    assert_same_detections(picked(result), expected)


# --- what is in the file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nms", ENDS)
def test_the_same_export_twice_gives_the_same_bytes(nms):
    model = fused_tiny()
    options = ExportOptions(input_hw=HW, nms=nms)
    first, second = (export_onnx(model, info_of(model), options).proto for _ in range(2))
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_exporting_leaves_the_model_as_it_was():
    model = fuse(fill_model(new_model("yolov7-tiny", classes=2)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(model, info_of(model), ExportOptions(input_hw=HW))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("nms", ENDS)
def test_the_passport_travels_inside(nms, tmp_path):
    model = exported_tiny(nms=nms, batch=None, conf=CONF, iou=IOU, opset=15, max_det=70, class_agnostic=True)
    model.save(tmp_path / "m.onnx")
    loaded = OnnxModel.load(tmp_path / "m.onnx")
    info = loaded.info
    assert info == model.info
    assert loaded.proto == model.proto
    assert (info.variant, info.input_hw, info.batch, info.opset) == ("yolov7-tiny", HW, None, 15)
    assert info.class_names == info_of(fused_tiny()).class_names
    assert info.anchors == fused_tiny().anchors
    if nms == "none":
        assert info.nms is None
        return
    assert (info.nms.kind, info.nms.conf, info.nms.iou, info.nms.max_det) == (nms, CONF, IOU, 70)
    assert (info.nms.multi_label, info.nms.class_agnostic) == (True, True)
    assert info.nms.runtime_thresholds == (nms != "efficient")


@pytest.mark.parametrize("nms", SUPPRESSED)
def test_the_passport_says_whether_only_the_best_class_counts(nms):
    assert exported_tiny(nms=nms, conf=CONF, iou=IOU, multi_label=False).info.nms.multi_label is False


@pytest.mark.parametrize("simplify", [True, False])
def test_the_heads_named_in_the_passport_are_the_raw_maps(simplify):
    model = exported_tiny(nms="plugin", simplify=simplify)
    graph = onnx.ModelProto()
    graph.CopyFrom(model.proto)
    graph.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in model.info.heads)
    maps = session(graph).run(list(model.info.heads), {"images": images()})
    with torch.no_grad():
        net = fused_tiny()
        expected = net.head.maps(net.features(torch.from_numpy(images())))
    assert [m.shape for m in maps] == [(1, 30, HW[0] // s, HW[1] // s) for s in (8, 16, 32)]
    for ours, raw in zip(maps, expected, strict=True):
        np.testing.assert_allclose(ours, raw.numpy(), atol=RAW_TOLERANCE * max(1, raw.std().item()))


@pytest.mark.parametrize("nms, domain, op", [("plugin", "y7", "Y7NMS"), ("efficient", "TRT", "EfficientNMS_TRT")])
@pytest.mark.parametrize("opset", [13, 17, 18, 21])
def test_the_suppression_node_is_a_function_that_tensorrt_may_replace(nms, domain, op, opset):
    proto = exported_tiny(nms=nms, opset=opset, batch=None, conf=CONF, iou=IOU).proto
    node = proto.graph.node[-1]
    (body,) = proto.functions
    assert (node.domain, node.op_type) == (body.domain, body.name) == (domain, op)
    assert domain in {entry.domain for entry in proto.opset_import}
    assert list(node.output) == list(NMS_OUTPUTS)
    assert proto.ir_version >= 8
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert (attributes["plugin_version"], attributes["plugin_namespace"]) == (b"1", b"")
    assert {a.type for a in node.attribute if not a.name.startswith("plugin_")} <= {
        onnx.AttributeProto.INT,
        onnx.AttributeProto.INTS,
        onnx.AttributeProto.FLOAT,
        onnx.AttributeProto.FLOATS,
    }
    assert set(body.attribute) == set(attributes)
    assert [(entry.domain, entry.version) for entry in body.opset_import] == [("", opset)]


@pytest.mark.parametrize("nms", ["plugin", "efficient"])
def test_every_name_inside_the_function_has_the_prefix(nms):
    (body,) = exported_tiny(nms=nms, conf=CONF, iou=IOU).proto.functions
    names = {*body.input, *body.output, *names_in(body.node)}
    assert len(names) > 50
    assert {name for name in names if not name.startswith("y7nms__")} == set()


def names_in(nodes):
    """Every tensor and node name of nodes and of the graphs inside them."""
    for node in nodes:
        yield from (name for name in (node.name, *node.input, *node.output) if name)
        for attribute in node.attribute:
            inner = attribute.g
            yield from (value.name for value in (*inner.input, *inner.output, *inner.initializer))
            yield from names_in(inner.node)


@pytest.mark.parametrize("nms", ["none", "standard"])
def test_without_a_function_only_standard_operators_are_left(nms):
    proto = exported_tiny(nms=nms, conf=CONF, iou=IOU).proto
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} == {""}
    assert "NonMaxSuppression" not in {node.op_type for node in proto.graph.node}


def test_the_plugin_node_holds_everything_a_plugin_must_know():
    node = exported_tiny(nms="plugin", **{**SUPPRESSION, "max_det": 70}, class_agnostic=True).proto.graph.node[-1]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    assert attributes["strides"] == [8, 16, 32]
    assert attributes["anchors"] == [side for level in fused_tiny().anchors for anchor in level for side in anchor]
    assert {name: attributes[name] for name in ("classes", "max_det", "max_candidates")} == {
        "classes": 5,
        "max_det": 70,
        "max_candidates": 1024,
    }
    assert (attributes["multi_label"], attributes["class_agnostic"]) == (1, 1)
    assert list(node.input[3:]) == ["conf_threshold", "iou_threshold"]


# --- all variants -------------------------------------------------------------------------------------------------

LARGE = ("yolov7", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e", "yolov7x")


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=[pytest.mark.slow] * (v in LARGE)) for v in sorted(VARIANTS)]
)
def test_every_variant_gives_the_maps_of_torch(variant):
    net = fuse(fill_model(new_model(variant, classes=3)))
    side = 2 * net.head.strides[-1]
    model = export_onnx(net, info_of(net), ExportOptions(input_hw=(side, side), nms="none"))
    assert len(model.info.heads) == net.head.levels
    image = picture(side, side)
    with torch.no_grad():
        features = net.features(image)
        expected = [raw.numpy() for raw in net.head.maps(features)]
        decoded = net.predict(image).numpy()
    model.proto.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in model.info.heads
    )
    output, *maps = session(model.proto).run(None, {"images": image.numpy()})
    for ours, raw in zip(maps, expected, strict=True):
        assert raw.std() > 0
        np.testing.assert_allclose(ours, raw, atol=RAW_TOLERANCE * max(1, raw.std()))
    assert output.shape == decoded.shape


def test_no_two_values_share_a_name_in_a_network_with_slices_of_its_own():
    """yolov7-w6 begins with strided slices, and so does the decoding."""
    w6 = fuse(fill_model(new_model("yolov7-w6", classes=2)))
    for nms in ENDS:
        options = ExportOptions(input_hw=(64, 128), nms=nms, simplify=False, max_det=20)
        graph = export_onnx(w6, info_of(w6), options).proto.graph
        values = [name for node in graph.node for name in node.output] + [tensor.name for tensor in graph.initializer]
        for names in (values, [node.name for node in graph.node]):
            assert sorted({name for name in names if names.count(name) > 1}) == []


# --- suppression alone, on a bare head ----------------------------------------------------------------------------

STRIDES = (8, 16)
ANCHORS = (((10, 14), (20, 16), (24, 40)), ((40, 30), (60, 90), (120, 100)))
BARE_HW = (64, 96)


class BareHead:
    """A graph of nothing but suppression, fed with the boxes and scores a test wants.

    Each wish (box xywh, objectness logit, class logits) is put into the cell its centre lies in, at the first anchor
    that is free and can reach its size.
    """

    def __init__(self, nms, classes, **options):
        self.classes = classes
        self.options = ExportOptions(input_hw=BARE_HW, nms=nms, **{"max_det": 20, **options})
        self.plan = NmsPlan.of(STRIDES, ANCHORS, classes, self.options)
        heads = [f"head{level}" for level in range(len(STRIDES))]
        self.maps_of = [(3 * (5 + classes), BARE_HW[0] // s, BARE_HW[1] // s) for s in STRIDES]
        inputs = [
            helper.make_tensor_value_info(h, TensorProto.FLOAT, [self.options.batch or "batch", *shape])
            for h, shape in zip(heads, self.maps_of, strict=True)
        ]
        graph = helper.make_graph([], "bare", inputs, [])
        network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.options.opset)], ir_version=8)
        before = network.SerializeToString(deterministic=True)
        self.model = attach_nms(network, heads, self.plan)
        assert network.SerializeToString(deterministic=True) == before
        onnx.checker.check_model(self.model, full_check=True)
        self.session = session(self.model)
        self.heads = heads

    def empty(self, fill=-30.0):
        return [np.full((1, *shape), fill, np.float32) for shape in self.maps_of]

    def place(self, wishes):
        maps = self.empty()
        taken = set()
        for (cx, cy, w, h), objectness, class_logits in wishes:
            level, anchor, row, column = next(place for place in self._places(cx, cy, w, h) if place not in taken)
            taken.add((level, anchor, row, column))
            stride, (anchor_w, anchor_h) = STRIDES[level], ANCHORS[level][anchor]
            y = [(cx / stride - column + 0.5) / 2, (cy / stride - row + 0.5) / 2]
            y += [np.sqrt(w / anchor_w) / 2, np.sqrt(h / anchor_h) / 2]
            logits = [*(np.log(v / (1 - v)) for v in y), objectness, *class_logits]
            start = anchor * (5 + self.classes)
            maps[level][0, start : start + 5 + self.classes, row, column] = logits
        return maps

    @staticmethod
    def _places(cx, cy, w, h):
        for level, stride in enumerate(STRIDES):
            for anchor, (anchor_w, anchor_h) in enumerate(ANCHORS[level]):
                if 0 < w < 4 * anchor_w * 0.99 and 0 < h < 4 * anchor_h * 0.99:
                    yield level, anchor, int(cy // stride), int(cx // stride)

    def run(self, maps, **thresholds):
        feeds = dict(zip(self.heads, maps, strict=True))
        for name, value in thresholds.items():
            feeds[f"{name}_threshold"] = np.array([value], np.float32)
        return picked(self.session.run(None, feeds))

    def expected(self, maps, **thresholds):
        decoded = decode(maps, self.classes)
        options = self.options
        chosen = Thresholds(
            conf=thresholds.get("conf", options.conf),
            iou=thresholds.get("iou", options.iou),
            max_det=options.max_det,
            multi_label=options.multi_label,
            class_agnostic=options.class_agnostic,
        )
        return detections_of(decoded, chosen, max_candidates=self.plan.candidates)


def decode(maps, classes):
    """[A, 5 + C] from head maps [1, 3 * (5 + C), H, W], one anchor at a time."""
    rows = []
    for raw, stride, anchors in zip(maps, STRIDES, ANCHORS, strict=True):
        _, _, height, width = raw.shape
        by_anchor = raw[0].reshape(3, 5 + classes, height, width)
        for anchor, row, column in itertools.product(range(3), range(height), range(width)):
            y = 1 / (1 + np.exp(-by_anchor[anchor, :, row, column].astype(np.float32)))
            centre = (y[:2] * 2 - 0.5 + [column, row]) * stride
            size = (y[2:4] * 2) ** 2 * anchors[anchor]
            rows.append(np.concatenate([centre, size, y[4:]]).astype(np.float32))
    return np.stack(rows)


@pytest.fixture(scope="module")
def bare():
    """Bare heads, each made once."""
    made = {}

    def get(nms, classes=3, **options):
        key = (nms, classes, *sorted(options.items()))
        if key not in made:
            made[key] = BareHead(nms, classes, **options)
        return made[key]

    return get


EVERY_SUPPRESSION = pytest.mark.parametrize("nms", SUPPRESSED)


@EVERY_SUPPRESSION
@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_random_heads_equal_the_reference(bare, nms, classes, multi_label, class_agnostic):
    head = bare(nms, classes, multi_label=multi_label, class_agnostic=class_agnostic, conf=0.2, max_det=60)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        maps = [rng.normal(0, 2, (1, *shape)).astype(np.float32) for shape in head.maps_of]
        expected = head.expected(maps)
        assert len(expected[1]) > 5
        assert_same_detections(head.run(maps), expected)


@EVERY_SUPPRESSION
def test_everything_below_conf_gives_nothing(bare, nms):
    head = bare(nms)
    boxes, scores, classes = head.run(head.empty())
    assert (len(boxes), len(scores), len(classes)) == (0, 0, 0)
    assert len(head.expected(head.empty())[1]) == 0


# Without multi-label, EfficientNMS_TRT is given every class that ties with the best, so it is left out here.
@pytest.mark.parametrize("nms", ["standard", "plugin"])
@pytest.mark.parametrize("logit", [0.5, 30.0])
def test_everything_above_conf_and_all_scores_equal(bare, nms, logit):
    head = bare(nms, multi_label=False)
    maps = head.empty(logit)
    expected = head.expected(maps)
    assert len(expected[1]) == head.options.max_det
    ours = head.run(maps)
    np.testing.assert_allclose(ours[1], expected[1], atol=SCORE_TOLERANCE)
    np.testing.assert_allclose(ours[0], expected[0], atol=DECODED_TOLERANCE)
    assert ours[2].tolist() == expected[2].tolist()


@EVERY_SUPPRESSION
def test_all_classes_of_all_anchors_equal(bare, nms):
    head = bare(nms, multi_label=True)
    maps = head.empty(30.0)
    ours, expected = head.run(maps), head.expected(maps)
    np.testing.assert_allclose(ours[0], expected[0], atol=DECODED_TOLERANCE)
    assert ours[2].tolist() == expected[2].tolist()


@EVERY_SUPPRESSION
def test_max_det_below_the_survivors_keeps_the_best(bare, nms):
    head = bare(nms, max_det=3)
    maps = head.place([((8 * i + 4, 20, 4, 4), 0.3 * i, (5.0, -30, -30)) for i in range(1, 11)])
    boxes, scores, _ = head.run(maps)
    assert len(scores) == 3
    np.testing.assert_allclose((boxes[:, 0] + boxes[:, 2]) / 2, [84, 76, 68], atol=DECODED_TOLERANCE)
    assert_same_detections((boxes, scores, np.zeros(3)), head.expected(maps))


CHAIN = [((20 + 10 * i, 30, 24, 20), 4.0 - i, (6.0, -30, -30)) for i in range(5)]  # IoU of neighbours 14/34, else < 0.1


@EVERY_SUPPRESSION
def test_a_box_that_fell_suppresses_nothing(bare, nms):
    """A kills B, so B cannot kill C, so C kills D, so E stays."""
    head = bare(nms, iou=0.35)
    maps = head.place(CHAIN)
    boxes, _, _ = head.run(maps)
    np.testing.assert_allclose((boxes[:, 0] + boxes[:, 2]) / 2, [20, 40, 60], atol=DECODED_TOLERANCE)
    assert_same_detections(head.run(maps), head.expected(maps))


@EVERY_SUPPRESSION
def test_a_chain_as_long_as_the_picture_takes_as_many_rounds(bare, nms):
    """Alternating survivors: every round settles only one more."""
    head = bare(nms, iou=0.3, conf=0.01)
    maps = head.place([((4 + 8 * (i % 11), 30, 15.9, 20), 4.0 - 0.4 * i, (6.0, -30, -30)) for i in range(11)])
    expected = head.expected(maps)
    assert len(expected[1]) == 6
    assert_same_detections(head.run(maps), expected)


@EVERY_SUPPRESSION
def test_other_classes_survive_unless_suppression_is_class_agnostic(bare, nms):
    wishes = [((30, 30, 20, 20), 4.0, (6, -30, -30)), ((31, 30, 20, 20), 3.0, (-30, 6, -30))]
    head = bare(nms)
    assert head.run(head.place(wishes))[2].tolist() == [0, 1]
    head = bare(nms, class_agnostic=True)
    assert head.run(head.place(wishes))[2].tolist() == [0]


@EVERY_SUPPRESSION
def test_ties_fall_to_the_anchor_that_comes_first(bare, nms):
    head = bare(nms)
    wishes = [((60, 20, 14, 14), 2.0, (3, -30, -30)), ((20, 20, 14, 14), 2.0, (3, -30, -30))]
    wishes += [((20.5, 20, 14, 14), 2.0, (3, -30, -30)), ((60, 20.5, 14, 14), 2.0, (3, -30, -30))]
    maps = head.place(wishes)
    boxes, scores, classes = head.run(maps)
    expected = head.expected(maps)
    assert len(scores) == 2 and scores[0] == scores[1]
    np.testing.assert_allclose(boxes, expected[0], atol=DECODED_TOLERANCE)
    assert classes.tolist() == expected[2].tolist()


@pytest.mark.parametrize("nms", ["standard", "plugin"])
def test_ties_between_a_best_and_a_second_class_fall_to_the_anchor_that_comes_first(bare, nms):
    """The first anchor's only class ties with the second one's second class; they overlap."""
    head = bare(nms)
    maps = head.place([((20, 20, 14, 14), 2.0, (-30, 1, -30)), ((21, 20, 14, 14), 2.0, (3, 1, -30))])
    boxes, _, classes = head.run(maps)
    expected = head.expected(maps)
    assert classes.tolist() == expected[2].tolist() == [0, 1]
    np.testing.assert_allclose(boxes, expected[0], atol=DECODED_TOLERANCE)


@pytest.mark.parametrize("nms", ["standard", "plugin"])
def test_a_score_equal_to_the_threshold_is_left_out(bare, nms):
    head = bare(nms, classes=1)
    maps = head.place([((20, 20, 14, 14), 0.0, (9,)), ((60, 20, 14, 14), 1.0, (-9,))])
    assert len(head.run(maps, conf=0.5)[1]) == 1
    assert len(head.run(maps, conf=0.499)[1]) == 2


def test_with_one_class_the_class_logit_is_ignored(bare):
    head = bare("plugin", classes=1)
    maps = head.place([((20, 20, 14, 14), 1.0, (-9,))])
    np.testing.assert_allclose(head.run(maps)[1], [1 / (1 + np.exp(-1))], atol=SCORE_TOLERANCE)


# --- refusals -----------------------------------------------------------------------------------------------------


def test_an_unfused_model_is_refused():
    model = new_model("yolov7-tiny", classes=2).eval()
    with pytest.raises(ExportError, match="fused") as caught:
        export_onnx(model, info_of(model), ExportOptions(input_hw=HW))
    assert "fuse" in caught.value.fix


@pytest.mark.parametrize(
    "hw, fix", [((100, 128), "--img 128,128"), ((128, 31), "--img 128,32"), ((0, 64), "--img 32,64")]
)
def test_a_size_that_is_no_multiple_of_the_stride_is_refused(hw, fix):
    with pytest.raises(UsageError, match="stride 32") as caught:
        export_onnx(fused_tiny(), info_of(fused_tiny()), ExportOptions(input_hw=hw))
    assert caught.value.fix == fix


def test_a_negative_size_is_refused():
    with pytest.raises(UsageError):
        export_onnx(fused_tiny(), info_of(fused_tiny()), ExportOptions(input_hw=(-64, 64)))


def test_more_boxes_than_anchors_are_refused():
    options = ExportOptions(input_hw=(32, 32), max_det=100)
    with pytest.raises(UsageError, match="only 63 anchors") as caught:
        export_onnx(fused_tiny(), info_of(fused_tiny()), options)
    assert caught.value.fix == "--max-det 63"
    export_onnx(fused_tiny(), info_of(fused_tiny()), replace(options, nms="none"))


@pytest.mark.parametrize(
    "options",
    [
        {"nms": "fast"},
        {"opset": 12},
        {"opset": 22},
        {"batch": 0},
        {"conf": 1.5},
        {"iou": -0.1},
        {"max_det": 0},
        {"max_candidates": 10},
        {"input_kind": "float16"},
    ],
)
def test_options_without_a_meaning_are_refused_with_a_fix(options):
    with pytest.raises(UsageError) as caught:
        ExportOptions(**options)
    assert str(next(iter(options.values()))) in caught.value.message
    assert caught.value.fix


def test_a_layer_without_a_translation_is_named():
    model = fuse(fill_model(new_model("yolov7-tiny", classes=2)))
    model.model[3].act = torch.nn.Hardswish()
    with pytest.raises(ExportError, match="Hardswish"):
        export_onnx(model, info_of(model), ExportOptions(input_hw=HW))


# --- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return exported_tiny(nms="none", conf=CONF, iou=IOU)


def test_saving_into_a_folder_that_does_not_exist_says_so(model, tmp_path):
    with pytest.raises(ExportError, match="cannot be written") as caught:
        model.save(tmp_path / "absent" / "m.onnx")
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_saving_into_a_read_only_folder_leaves_no_file(model, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="cannot be written"):
        model.save(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_saving_over_a_folder_leaves_no_partial_file(model, tmp_path):
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(ExportError, match="cannot be written"):
        model.save(tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_breaks_off_keeps_the_old_file_and_leaves_no_partial_one(model, tmp_path, monkeypatch, fault):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"the old file")
    write = type(target).write_bytes

    def break_off(path, data):
        write(path, data[: len(data) // 2])
        raise fault

    monkeypatch.setattr(type(target), "write_bytes", break_off)
    with pytest.raises((ExportError, KeyboardInterrupt)) as caught:
        model.save(target)
    assert isinstance(caught.value, ExportError) == isinstance(fault, OSError)
    monkeypatch.undo()
    assert target.read_bytes() == b"the old file"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_saved_file_replaces_the_old_one(model, tmp_path):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"the old file")
    model.save(target)
    assert OnnxModel.load(target).info == model.info
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_files_that_hold_no_model_of_ours_are_refused(model, tmp_path):
    path = tmp_path / "m.onnx"
    with pytest.raises(LoadError, match="cannot be read"):
        OnnxModel.load(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(LoadError, match="not an ONNX file"):
        OnnxModel.load(path)
    data = model.proto.SerializeToString()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(LoadError, match="not an ONNX file"):
        OnnxModel.load(path)
    foreign = onnx.ModelProto()
    foreign.CopyFrom(model.proto)
    del foreign.metadata_props[:]
    onnx.save(foreign, path)
    with pytest.raises(LoadError, match="no passport"):
        OnnxModel.load(path)


def test_a_passport_that_is_none_is_refused(model, tmp_path):
    broken = onnx.ModelProto()
    broken.CopyFrom(model.proto)
    helper.set_model_props(broken, {"yolov7_deploy": "{}"})
    onnx.save(broken, tmp_path / "m.onnx")
    with pytest.raises(LoadError, match="passport"):
        OnnxModel.load(tmp_path / "m.onnx")


def test_the_passport_reads_back_from_its_own_text(model):
    assert ModelInfo.from_json(model.info.to_json()) == model.info
