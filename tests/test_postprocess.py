"""Box arithmetic and NMS against a quadratic loop in plain Python, and against the reference NMS."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import reference_nms
from yolov7_deploy.errors import UsageError
from yolov7_deploy.metadata import NmsMetadata
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import (
    HeadNms,
    check_nms_compatible,
    greedy_nms,
    iou_matrix,
    postprocess,
    postprocess_scores,
    xywh_to_xyxy,
)

# float32 against Python's float64: three products and a quotient.
IOU_TOLERANCE = 1e-6

# Corners on a coarse grid, so that empty, touching, nested and identical boxes are common and every product is exact
# in float32: the loop below then compares the same numbers as the code.
corners = st.tuples(*[st.integers(0, 12)] * 4).map(lambda c: (min(c[:2]), min(c[2:]), max(c[:2]), max(c[2:])))
box_lists = st.lists(corners, max_size=24).map(lambda b: np.array(b, np.float32).reshape(-1, 4))
grid_thresholds = st.sampled_from([0.0, 0.25, 0.45, 0.5, 0.75, 1.0])


def areas(a, b):
    """Return intersection and union of two boxes, as exact Python numbers."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    return intersection, (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - intersection


def slow_nms(boxes, class_ids, *, iou, max_det, class_agnostic=False):
    """Apply NMS as a loop: compare every box with every better one that was selected."""
    kept = []
    for i, box in enumerate(boxes.tolist()):
        is_suppressed = False
        for k in kept:
            intersection, union = areas(boxes[k].tolist(), box)
            if (class_agnostic or class_ids[i] == class_ids[k]) and intersection > np.float32(iou) * np.float32(union):
                is_suppressed = True
        if not is_suppressed:
            kept.append(i)
    return kept[:max_det]


def slow_detections(output, thresholds):
    """Return detections by the official semantics, as loops over anchors and classes."""
    candidates = []
    for anchor, row in enumerate(output):
        cx, cy, w, h, objectness, *probabilities = row
        if not objectness > np.float32(thresholds.conf):
            continue
        scores = [objectness * p for p in probabilities] if len(probabilities) > 1 else [objectness]
        chosen = range(len(scores)) if thresholds.multi_label else [int(np.argmax(scores))]
        half_w, half_h = w * np.float32(0.5), h * np.float32(0.5)
        box = [cx - half_w, cy - half_h, cx + half_w, cy + half_h]
        for c in chosen:
            if scores[c] > np.float32(thresholds.conf) and (thresholds.classes is None or c in thresholds.classes):
                candidates.append((scores[c], anchor, c, box))
    candidates.sort(key=lambda item: (-item[0], item[1], item[2]))
    boxes = np.array([item[3] for item in candidates], np.float32).reshape(-1, 4)
    class_ids = [item[2] for item in candidates]
    kept = slow_nms(
        boxes,
        class_ids,
        iou=thresholds.iou,
        max_det=thresholds.max_det,
        class_agnostic=thresholds.class_agnostic,
    )
    return boxes[kept], np.array([candidates[k][0] for k in kept], np.float32), [class_ids[k] for k in kept]


def assert_as_slow(output, thresholds):
    boxes, scores, class_ids = postprocess(output, thresholds)
    slow_boxes, slow_scores, slow_classes = slow_detections(output, thresholds)
    assert class_ids.tolist() == slow_classes
    np.testing.assert_array_equal(scores, slow_scores)
    np.testing.assert_array_equal(boxes, slow_boxes)
    assert (boxes.dtype, scores.dtype, class_ids.dtype) == (np.float32, np.float32, np.int64)


def head(rows):
    """Return rows as a float32 decoded output [A, 5 + C]."""
    return np.array(rows, np.float32)


# --- IoU ------------------------------------------------------------------------------------------------------------


@given(box_lists, box_lists)
def test_iou_matrix_equals_the_double_loop(a, b):
    expected = np.zeros((len(a), len(b)))
    for i, first in enumerate(a.tolist()):
        for j, second in enumerate(b.tolist()):
            intersection, union = areas(first, second)
            expected[i, j] = intersection / union if union else 0
    np.testing.assert_allclose(iou_matrix(a, b), expected, atol=IOU_TOLERANCE, rtol=0)


def test_iou_of_known_pairs():
    box = head([[0, 0, 10, 10]])
    others = head([[0, 0, 10, 10], [10, 0, 20, 10], [5, 0, 15, 10], [2, 2, 4, 4], [3, 3, 3, 3], [30, 30, 31, 31]])
    np.testing.assert_allclose(iou_matrix(box, others), [[1, 0, 1 / 3, 0.04, 0, 0]], atol=IOU_TOLERANCE)


def test_iou_of_two_empty_boxes_is_zero_without_a_warning():
    point = head([[3, 3, 3, 3]])
    assert iou_matrix(point, point).tolist() == [[0.0]]


@given(box_lists)
def test_centre_and_size_convert_back_to_corners(boxes):
    centred = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1)
    np.testing.assert_array_equal(xywh_to_xyxy(centred), boxes)


# --- NMS ------------------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(data=st.data(), boxes=box_lists, iou=grid_thresholds, agnostic=st.booleans(), max_det=st.integers(1, 30))
def test_greedy_nms_equals_the_double_loop(data, boxes, iou, agnostic, max_det):
    class_ids = np.array(data.draw(st.lists(st.integers(0, 2), min_size=len(boxes), max_size=len(boxes))), np.int64)
    kept = greedy_nms(boxes, class_ids, iou=iou, max_det=max_det, class_agnostic=agnostic)
    assert kept.dtype == np.int64
    assert kept.tolist() == slow_nms(boxes, class_ids, iou=iou, max_det=max_det, class_agnostic=agnostic)


def test_an_iou_equal_to_the_threshold_does_not_suppress():
    boxes = head([[0, 0, 4, 4], [0, 0, 4, 2]])  # IoU exactly 0.5
    classes = np.zeros(2, np.int64)
    assert greedy_nms(boxes, classes, iou=0.5, max_det=9).tolist() == [0, 1]
    assert greedy_nms(boxes, classes, iou=0.4999, max_det=9).tolist() == [0]


def test_a_suppressed_box_suppresses_nothing():
    boxes = head([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]])  # neighbours overlap by 6/14, the ends by 2/18
    assert greedy_nms(boxes, np.zeros(3, np.int64), iou=0.4, max_det=9).tolist() == [0, 2]


def test_empty_boxes_never_suppress():
    boxes = np.tile(head([[5, 5, 5, 5]]), (3, 1))
    assert greedy_nms(boxes, np.zeros(3, np.int64), iou=0.0, max_det=9).tolist() == [0, 1, 2]


def test_identical_boxes_are_suppressed_unless_the_class_differs():
    boxes = np.tile(head([[0, 0, 4, 4]]), (3, 1))
    classes = np.array([0, 1, 0])
    assert greedy_nms(boxes, classes, iou=0.9, max_det=9).tolist() == [0, 1]
    assert greedy_nms(boxes, classes, iou=0.9, max_det=9, class_agnostic=True).tolist() == [0]
    assert greedy_nms(boxes, classes, iou=1.0, max_det=9, class_agnostic=True).tolist() == [0, 1, 2]


# --- from a decoded output ------------------------------------------------------------------------------------------


@st.composite
def outputs(draw):
    """Draw a decoded output [A, 5 + C] with many equal boxes and scores."""
    classes = draw(st.sampled_from([1, 2, 3]))
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    anchors = draw(st.integers(0, 20))
    output = np.empty((anchors, 5 + classes), np.float32)
    output[:, :2] = rng.integers(0, 12, (anchors, 2))
    output[:, 2:4] = 2 * rng.integers(0, 7, (anchors, 2))
    output[:, 4:] = rng.integers(0, 5, (anchors, 1 + classes)) / np.float32(4)
    return output


@settings(max_examples=300)
@given(
    output=outputs(),
    conf=st.sampled_from([0.0, 0.0625, 0.25, 0.5, 1.0]),
    iou=grid_thresholds,
    max_det=st.sampled_from([1, 3, 300]),
    multi_label=st.booleans(),
    class_agnostic=st.booleans(),
    classes=st.sampled_from([None, (0,), (1, 2), (2,)]),
)
def test_detections_equal_the_official_semantics_written_as_loops(output, **options):
    assert_as_slow(output, Thresholds(**options))


@pytest.mark.parametrize("multi_label", [False, True])
def test_detections_of_random_scores_equal_the_official_semantics(multi_label):
    rng = np.random.default_rng(7)
    output = rng.random((200, 9), dtype=np.float32)
    output[:, :4] *= 100
    assert_as_slow(output, Thresholds(conf=0.3, iou=0.3, multi_label=multi_label))


def test_a_score_equal_to_the_threshold_is_not_a_detection():
    output = head([[5, 5, 4, 4, 0.5, 0.5, 0.5], [25, 5, 4, 4, 1, 0.5, 0.25]])
    assert postprocess(output, Thresholds(conf=0.25))[1].tolist() == [0.5]
    assert postprocess(output, Thresholds(conf=0.249))[1].tolist() == [0.5, 0.25]
    assert len(postprocess(output, Thresholds(conf=0.5))[1]) == 0


def test_multi_label_keeps_every_class_and_otherwise_only_the_best():
    output = head([[5, 5, 4, 4, 1, 0.5, 0.75, 0.25]])
    _, scores, class_ids = postprocess(output, Thresholds(conf=0.3, multi_label=True))
    assert (scores.tolist(), class_ids.tolist()) == ([0.75, 0.5], [1, 0])
    _, scores, class_ids = postprocess(output, Thresholds(conf=0.3))
    assert (scores.tolist(), class_ids.tolist()) == ([0.75], [1])


def test_a_box_whose_best_class_is_not_selected_is_not_a_detection_of_its_second_class():
    output = head([[5, 5, 4, 4, 1, 0.5, 0.75]])
    assert len(postprocess(output, Thresholds(classes=(0,)))[1]) == 0
    assert postprocess(output, Thresholds(classes=(0,), multi_label=True))[1].tolist() == [0.5]


@pytest.mark.parametrize("multi_label", [False, True])
def test_with_one_class_the_score_is_the_objectness(multi_label):
    output = head([[5, 5, 4, 4, 0.75, 0.001], [25, 5, 4, 4, 0.2, 1]])
    _, scores, class_ids = postprocess(output, Thresholds(multi_label=multi_label))
    assert (scores.tolist(), class_ids.tolist()) == ([0.75], [0])


def test_classes_that_are_not_selected_do_not_count_as_candidates():
    output = head([[10 * i, 5, 4, 4, 1, 0.9, 0.1] for i in range(5)] + [[90, 5, 4, 4, 1, 0.1, 0.8]])
    _, scores, class_ids = postprocess(output, Thresholds(classes=(1,), max_det=1), max_candidates=1)
    assert (scores.tolist(), class_ids.tolist()) == (head([0.8]).tolist(), [1])


def test_max_det_keeps_the_best():
    output = head([[10 * i, 5, 4, 4, 1, 0.3 + i / 16, 0] for i in range(8)])
    scores = postprocess(output, Thresholds(max_det=3))[1]
    np.testing.assert_array_equal(scores, head([0.3 + i / 16 for i in (7, 6, 5)]))


def test_only_the_best_candidates_enter_nms():
    output = head([[5, 5, 4, 4, 1, s, 0] for s in (0.9, 0.8, 0.7)] + [[50, 50, 4, 4, 1, 0.6, 0]])
    assert len(postprocess(output, Thresholds())[1]) == 2
    assert len(postprocess(output, Thresholds(), max_candidates=3)[1]) == 1


def test_class_agnostic_suppresses_across_classes():
    output = head([[5, 5, 4, 4, 1, 0.9, 0], [5, 5, 4, 4, 1, 0, 0.8]])
    assert postprocess(output, Thresholds())[2].tolist() == [0, 1]
    assert postprocess(output, Thresholds(class_agnostic=True))[2].tolist() == [0]


def test_equal_scores_keep_the_order_of_anchors_and_classes():
    output = head([[10 * i, 5, 4, 4, 1, 0.5, 0.5] for i in (3, 1, 2)])
    boxes, _, class_ids = postprocess(output, Thresholds(multi_label=True))
    assert boxes[:, 0].tolist() == [28, 28, 8, 8, 18, 18]
    assert class_ids.tolist() == [0, 1] * 3


@pytest.mark.parametrize("anchors", [0, 3])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("classes", [1, 80])
def test_no_candidates_give_empty_arrays(anchors, multi_label, classes):
    output = np.zeros((anchors, 5 + classes), np.float32)
    boxes, scores, class_ids = postprocess(output, Thresholds(conf=0, multi_label=multi_label))
    assert (boxes.shape, scores.shape, class_ids.shape) == ((0, 4), (0,), (0,))
    assert (boxes.dtype, scores.dtype, class_ids.dtype) == (np.float32, np.float32, np.int64)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("column", [4, 5, 6])
def test_nan_scores_are_not_detections(multi_label, column):
    output = head([[5, 5, 4, 4, 1, 0.9, 0.8], [25, 5, 4, 4, 1, 0.7, 0.1]])
    output[0, column] = np.nan
    boxes, scores, _ = postprocess(output, Thresholds(multi_label=multi_label))
    assert np.isfinite(scores).all()
    assert 23 in boxes[:, 0]


def test_a_nan_class_score_does_not_hide_the_best_class_of_its_box():
    output = head([[5, 5, 4, 4, 1, np.nan, 0.8]])
    assert postprocess(output, Thresholds(multi_label=True))[2].tolist() == [1]


def test_the_output_is_not_modified():
    output = head([[5, 5, 4, 4, 1, 0.9, 0.8]])
    before = output.copy()
    postprocess(output, Thresholds(multi_label=True))
    np.testing.assert_array_equal(output, before)


# --- against the reference NMS, with more boxes than the loops above can take ---------------------------------------


def random_output(rng):
    """Return a decoded output of 0 to 4000 anchors around a few objects; often with equal boxes or scores."""
    classes = int(rng.choice([1, 2, 5, 80, 300]))
    anchors = int(rng.choice([0, 1, 30, 63, 64, 65, 700, 4000]) * rng.uniform(0.8, 1.2))
    objects = rng.uniform(0, 640, (int(rng.choice([1, 4, 40])), 4)) * (1, 1, 0.5, 0.5)
    output = np.empty((anchors, 5 + classes), np.float32)
    output[:, :4] = objects[rng.integers(0, len(objects), anchors)]
    output[:, :4] += rng.normal(0, rng.choice([0, 2, 30]), (anchors, 4))
    output[:, 2:4] = np.abs(output[:, 2:4])
    output[:, 4:] = rng.random((anchors, 1 + classes)) ** rng.choice([1, 4, 20])
    if rng.random() < 0.4:
        output[:, :4] = np.round(output[:, :4] / 8) * 8
    if rng.random() < 0.4:
        output[:, 4:] = np.round(output[:, 4:] * 16) / 16
    if rng.random() < 0.1 and anchors:
        output[rng.integers(0, anchors, 5), rng.integers(0, 5 + classes, 5)] = rng.choice([np.nan, np.inf, 0], 5)
    return output


def random_thresholds(rng, classes):
    chosen = tuple(rng.choice(classes, min(3, classes), replace=False).tolist())
    return Thresholds(
        conf=float(rng.choice([0, 0.001, 0.001, 0.25, 0.5, 1])),
        iou=float(rng.choice([0, 0.2, 0.45, 0.65, 0.65, 0.999, 1])),
        max_det=int(rng.choice([1, 10, 300, 300, 5000])),
        multi_label=bool(rng.integers(2)),
        class_agnostic=bool(rng.random() < 0.3),
        classes=chosen if rng.random() < 0.2 else None,
    )


def assert_bit_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of infinite boxes
def test_nms_is_bit_equal_to_the_reference(seed):
    rng = np.random.default_rng([16, seed])
    for _ in range(25):
        output = random_output(rng)
        thresholds = random_thresholds(rng, output.shape[1] - 5)
        limit = int(rng.choice([1, 40, 1500, 30_000]))
        found = postprocess(output, thresholds, max_candidates=limit)
        assert_bit_equal(found, reference_nms.postprocess(output, thresholds, max_candidates=limit))


@pytest.mark.parametrize("count", [63, 64, 65, 128, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("layout", ["equal", "apart", "one class per box"])
def test_nms_is_bit_equal_where_blocks_and_chunks_end(count, layout):
    """Boxes that are all equal, all apart, or each of a class of its own, at numbers around 64 and 1024."""
    boxes = np.tile(head([[0, 0, 10, 10]]), (count, 1))
    classes = np.zeros(count, np.int64)
    if layout == "apart":
        boxes += 20 * np.arange(count, dtype=np.float32)[:, None]
    elif layout == "one class per box":
        classes = np.arange(count)[::-1]
    for max_det in (1, 64, 300, 1024, 5000):
        options = {"iou": 0.5, "max_det": max_det}
        kept = greedy_nms(boxes, classes, **options)
        np.testing.assert_array_equal(kept, reference_nms.greedy_nms(boxes, classes, **options))


def test_scores_of_transposed_outputs_are_bit_equal_to_the_reference():
    """YOLOv8 and later have one column for each box."""
    rng = np.random.default_rng(3)
    cells = rng.random((84, 2000), dtype=np.float32)
    for multi_label in (False, True):
        thresholds = Thresholds(conf=0.9, multi_label=multi_label)
        found = postprocess_scores(cells[:4].T, cells[4:].T, thresholds)
        assert_bit_equal(found, reference_nms.postprocess_scores(cells[:4].T, cells[4:].T, thresholds))


def decode_all(heads, nms):
    """Return the decoded output [A, 5 + C] of the head maps of one image, without a choice of anchors."""
    rows = []
    for head, stride, anchors in zip(heads, nms.strides, nms.anchors, strict=True):
        _, height, width = head.shape
        y = 1 / (1 + np.exp(-head.reshape(3, 5 + nms.classes, height, width).transpose(0, 2, 3, 1)))
        grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)
        y[..., :2] = (y[..., :2] * np.float32(2) - np.float32(0.5) + grid) * np.float32(stride)
        y[..., 2:4] = (y[..., 2:4] * np.float32(2)) ** 2 * anchors[:, None, None]
        rows.append(y.reshape(-1, 5 + nms.classes))
    output = np.concatenate(rows)
    return np.delete(output, 5, axis=1) if nms.classes == 1 else output


@pytest.mark.parametrize("classes", [1, 2, 80])
@pytest.mark.parametrize("conf", [0.0, 0.001, 0.25, 0.999999, 1.0])
def test_nms_of_head_maps_is_bit_equal_to_the_reference_with_all_anchors(classes, conf):
    rng = np.random.default_rng(classes)
    anchors = rng.uniform(4, 200, (3, 3, 2)).astype(np.float32)
    nms = HeadNms(strides=(8, 16, 32), anchors=anchors, classes=classes, max_det=50, max_candidates=200)
    # Rounded, so that there are ties, and with logits whose probability is 0 or 1 in float32.
    heads = [
        np.round(rng.normal(0, 20, (2, 3 * (5 + classes), side, side + 2)) * 2).astype(np.float32) / 2
        for side in (12, 6, 3)
    ]
    for options in ({}, {"multi_label": True}, {"class_agnostic": True}):
        thresholds = Thresholds(conf=conf, max_det=50, **options)
        for image, found in enumerate(nms(heads, thresholds)):
            decoded = decode_all([head[image] for head in heads], nms)
            assert_bit_equal(found, reference_nms.postprocess(decoded, thresholds, max_candidates=200))
            assert conf == 1 or classes == 1 or len(found.scores)


@pytest.mark.parametrize(
    ("max_candidates", "message"),
    [(1000, "was exported with iou=0.45; iou=0.6 was requested"), (0, "did not record its iou, so iou=0.6 cannot")],
    ids=["own file", "another exporter"],
)
def test_an_iou_that_nms_inside_a_file_cannot_apply_is_refused(max_candidates, message):
    nms = NmsMetadata(
        kind="efficient",
        conf=0.0,
        iou=0.45,
        max_det=100,
        max_candidates=max_candidates,
        multi_label=False,
        class_agnostic=False,
        runtime_thresholds=False,
    )
    check_nms_compatible(nms, Thresholds(iou=0.45))
    with pytest.raises(UsageError, match=message) as caught:
        check_nms_compatible(nms, Thresholds(iou=0.6))
    assert "iou" in caught.value.fix
