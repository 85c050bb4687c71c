"""Decoding and NMS in the graph, without a network before them, against the reference."""

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.support.detecting import (
    DECODED_TOLERANCE,
    NMS_INSIDE,
    SCORE_TOLERANCE,
    assert_same_detections,
    image_result,
)
from tests.support.reference_nms import postprocess
from tests.support.small_models import session
from yolov7_deploy.onnx_export.nms import OVERFLOW, attach_nms
from yolov7_deploy.onnx_export.nms_subgraph import NmsPlan
from yolov7_deploy.options import ExportOptions, Thresholds

STRIDES = (8, 16)
ANCHORS = (((10, 14), (20, 16), (24, 40)), ((40, 30), (60, 90), (120, 100)))
BARE_HW = (64, 96)


class BareHead:
    """A graph of decoding and NMS, whose inputs are head maps with the given boxes and scores.

    `maps_with` writes each box (xywh, objectness logit, class logits) into the cell of its center, at the first unused
    anchor that can represent its size.
    """

    def __init__(self, nms, classes, **options):
        self.classes = classes
        self.options = ExportOptions(input_hw=BARE_HW, nms=nms, **{"max_det": 20, **options})
        self.plan = NmsPlan.of(STRIDES, ANCHORS, classes, self.options)
        heads = [f"head{level}" for level in range(len(STRIDES))]
        self.map_shapes = [(3 * (5 + classes), BARE_HW[0] // s, BARE_HW[1] // s) for s in STRIDES]
        inputs = [
            helper.make_tensor_value_info(h, TensorProto.FLOAT, [self.options.batch or "batch", *shape])
            for h, shape in zip(heads, self.map_shapes, strict=True)
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
        return [np.full((1, *shape), fill, np.float32) for shape in self.map_shapes]

    def maps_with(self, boxes):
        maps = self.empty()
        used = set()
        for (cx, cy, w, h), objectness, class_logits in boxes:
            level, anchor, row, column = next(cell for cell in self._cells(cx, cy, w, h) if cell not in used)
            used.add((level, anchor, row, column))
            stride, (anchor_w, anchor_h) = STRIDES[level], ANCHORS[level][anchor]
            y = [(cx / stride - column + 0.5) / 2, (cy / stride - row + 0.5) / 2]
            y += [np.sqrt(w / anchor_w) / 2, np.sqrt(h / anchor_h) / 2]
            logits = [*(np.log(v / (1 - v)) for v in y), objectness, *class_logits]
            start = anchor * (5 + self.classes)
            maps[level][0, start : start + 5 + self.classes, row, column] = logits
        return maps

    @staticmethod
    def _cells(cx, cy, w, h):
        for level, stride in enumerate(STRIDES):
            for anchor, (anchor_w, anchor_h) in enumerate(ANCHORS[level]):
                if 0 < w < 4 * anchor_w * 0.99 and 0 < h < 4 * anchor_h * 0.99:
                    yield level, anchor, int(cy // stride), int(cx // stride)

    def run(self, maps, **thresholds):
        feeds = dict(zip(self.heads, maps, strict=True))
        for name, value in thresholds.items():
            feeds[f"{name}_threshold"] = np.array([value], np.float32)
        return image_result(self.session.run(None, feeds))

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
        return postprocess(decoded, chosen, max_candidates=self.plan.candidates)


def decode(maps, classes):
    """Return the decoded output [A, 5 + C] of head maps [1, 3 * (5 + C), H, W], one anchor at a time."""
    rows = []
    for raw, stride, anchors in zip(maps, STRIDES, ANCHORS, strict=True):
        _, _, height, width = raw.shape
        by_anchor = raw[0].reshape(3, 5 + classes, height, width)
        for anchor, row, column in itertools.product(range(3), range(height), range(width)):
            y = 1 / (1 + np.exp(-by_anchor[anchor, :, row, column].astype(np.float32)))
            center = (y[:2] * 2 - 0.5 + [column, row]) * stride
            size = (y[2:4] * 2) ** 2 * anchors[anchor]
            rows.append(np.concatenate([center, size, y[4:]]).astype(np.float32))
    return np.stack(rows)


@pytest.fixture(scope="module")
def bare():
    """Return a function that creates bare heads, each once."""
    heads = {}

    def get(nms, classes=3, **options):
        key = (nms, classes, *sorted(options.items()))
        if key not in heads:
            heads[key] = BareHead(nms, classes, **options)
        return heads[key]

    return get


EVERY_NMS = pytest.mark.parametrize("nms", NMS_INSIDE)


@EVERY_NMS
@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("class_agnostic", [False, True])
def test_random_heads_equal_the_reference(bare, nms, classes, multi_label, class_agnostic):
    head = bare(nms, classes, multi_label=multi_label, class_agnostic=class_agnostic, conf=0.2, max_det=60)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        maps = [rng.normal(0, 2, (1, *shape)).astype(np.float32) for shape in head.map_shapes]
        expected = head.expected(maps)
        assert len(expected[1]) > 5
        assert_same_detections(head.run(maps), expected)


@EVERY_NMS
def test_without_scores_above_conf_there_are_no_detections(bare, nms):
    head = bare(nms)
    boxes, scores, classes = head.run(head.empty())
    assert (len(boxes), len(scores), len(classes)) == (0, 0, 0)
    assert len(head.expected(head.empty())[1]) == 0


# Without multi-label, EfficientNMS_TRT gets every class that ties with the best one, so it is not tested here.
@pytest.mark.parametrize("nms", ["standard", "plugin"])
@pytest.mark.parametrize("logit", [0.5, 30.0])
def test_equal_scores_above_conf_keep_the_order_of_anchors(bare, nms, logit):
    head = bare(nms, multi_label=False)
    maps = head.empty(logit)
    expected = head.expected(maps)
    assert len(expected[1]) == head.options.max_det
    ours = head.run(maps)
    np.testing.assert_allclose(ours[1], expected[1], atol=SCORE_TOLERANCE)
    np.testing.assert_allclose(ours[0], expected[0], atol=DECODED_TOLERANCE)
    assert ours[2].tolist() == expected[2].tolist()


@EVERY_NMS
def test_equal_scores_of_all_classes_keep_the_order_of_anchors_and_classes(bare, nms):
    head = bare(nms, multi_label=True)
    maps = head.empty(30.0)
    ours, expected = head.run(maps), head.expected(maps)
    np.testing.assert_allclose(ours[0], expected[0], atol=DECODED_TOLERANCE)
    assert ours[2].tolist() == expected[2].tolist()


@EVERY_NMS
def test_max_det_keeps_the_detections_with_the_best_scores(bare, nms):
    head = bare(nms, max_det=3)
    maps = head.maps_with([((8 * i + 4, 20, 4, 4), 0.3 * i, (5.0, -30, -30)) for i in range(1, 11)])
    boxes, scores, _ = head.run(maps)
    assert len(scores) == 3
    np.testing.assert_allclose((boxes[:, 0] + boxes[:, 2]) / 2, [84, 76, 68], atol=DECODED_TOLERANCE)
    assert_same_detections((boxes, scores, np.zeros(3)), head.expected(maps))


CHAIN = [((20 + 10 * i, 30, 24, 20), 4.0 - i, (6.0, -30, -30)) for i in range(5)]  # IoU of neighbors 14/34, else < 0.1


@EVERY_NMS
def test_a_removed_box_does_not_remove_others(bare, nms):
    """A removes B, so B does not remove C, so C removes D, and E survives."""
    head = bare(nms, iou=0.35)
    maps = head.maps_with(CHAIN)
    boxes, _, _ = head.run(maps)
    np.testing.assert_allclose((boxes[:, 0] + boxes[:, 2]) / 2, [20, 40, 60], atol=DECODED_TOLERANCE)
    assert_same_detections(head.run(maps), head.expected(maps))


@EVERY_NMS
def test_every_other_box_of_a_chain_survives(bare, nms):
    """The slowest case of the fixed point: every iteration decides only one more box."""
    head = bare(nms, iou=0.3, conf=0.01)
    maps = head.maps_with([((4 + 8 * (i % 11), 30, 15.9, 20), 4.0 - 0.4 * i, (6.0, -30, -30)) for i in range(11)])
    expected = head.expected(maps)
    assert len(expected[1]) == 6
    assert_same_detections(head.run(maps), expected)


@EVERY_NMS
def test_boxes_of_other_classes_survive_unless_nms_is_class_agnostic(bare, nms):
    boxes = [((30, 30, 20, 20), 4.0, (6, -30, -30)), ((31, 30, 20, 20), 3.0, (-30, 6, -30))]
    head = bare(nms)
    assert head.run(head.maps_with(boxes))[2].tolist() == [0, 1]
    head = bare(nms, class_agnostic=True)
    assert head.run(head.maps_with(boxes))[2].tolist() == [0]


@EVERY_NMS
def test_ties_go_to_the_first_anchor(bare, nms):
    head = bare(nms)
    boxes = [((60, 20, 14, 14), 2.0, (3, -30, -30)), ((20, 20, 14, 14), 2.0, (3, -30, -30))]
    boxes += [((20.5, 20, 14, 14), 2.0, (3, -30, -30)), ((60, 20.5, 14, 14), 2.0, (3, -30, -30))]
    maps = head.maps_with(boxes)
    boxes, scores, classes = head.run(maps)
    expected = head.expected(maps)
    assert len(scores) == 2 and scores[0] == scores[1]
    np.testing.assert_allclose(boxes, expected[0], atol=DECODED_TOLERANCE)
    assert classes.tolist() == expected[2].tolist()


@pytest.mark.parametrize("nms", ["standard", "plugin"])
def test_ties_between_a_best_and_a_second_class_go_to_the_first_anchor(bare, nms):
    """The only class of the first anchor ties with the second class of the second anchor; the boxes overlap."""
    head = bare(nms)
    maps = head.maps_with([((20, 20, 14, 14), 2.0, (-30, 1, -30)), ((21, 20, 14, 14), 2.0, (3, 1, -30))])
    boxes, _, classes = head.run(maps)
    expected = head.expected(maps)
    assert classes.tolist() == expected[2].tolist() == [0, 1]
    np.testing.assert_allclose(boxes, expected[0], atol=DECODED_TOLERANCE)


@pytest.mark.parametrize("nms", ["standard", "plugin"])
def test_a_score_equal_to_the_threshold_is_not_detected(bare, nms):
    head = bare(nms, classes=1)
    maps = head.maps_with([((20, 20, 14, 14), 0.0, (9,)), ((60, 20, 14, 14), 1.0, (-9,))])
    assert len(head.run(maps, conf=0.5)[1]) == 1
    assert len(head.run(maps, conf=0.499)[1]) == 2


def test_with_one_class_the_class_logit_is_ignored(bare):
    head = bare("plugin", classes=1)
    maps = head.maps_with([((20, 20, 14, 14), 1.0, (-9,))])
    np.testing.assert_allclose(head.run(maps)[1], [1 / (1 + np.exp(-1))], atol=SCORE_TOLERANCE)


@pytest.mark.parametrize("multi_label, per_anchor", [(False, 1), (True, 2)])
def test_the_overflow_output_reports_a_full_list_of_candidates(multi_label, per_anchor):
    """Both classes of every box are above conf, so it is one candidate, or two with multi-label."""
    head = BareHead("plugin", 2, max_det=3, max_candidates=6, multi_label=multi_label)
    head.model.graph.output.append(helper.make_tensor_value_info(OVERFLOW, TensorProto.INT32, [1, 1]))
    flagged = session(head.model)
    for passing in range(1, 9):
        maps = head.maps_with([((8 * i + 4, 20, 4, 4), 2.0, (3.0, 2.0)) for i in range(passing)])
        overflow = flagged.run([OVERFLOW], dict(zip(head.heads, maps, strict=True)))[0]
        assert (overflow.dtype, overflow.shape) == (np.int32, (1, 1))
        assert overflow.item() == (passing * per_anchor >= 6), passing
