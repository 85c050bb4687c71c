"""A list of detections is accepted if NMS gives it for scores within the slack, and refused with any other change."""

import numpy as np
import pytest

from yolov7_deploy.evaluation.nms_consistency import NmsCheck, Slack, check_nms
from yolov7_deploy.options import Thresholds
from yolov7_deploy.postprocess import RawDetections, postprocess

SLACK = Slack(score=1e-4, box_px=0.01, proportional=False)
RULES = [{}, {"multi_label": True}, {"class_agnostic": True}, {"max_det": 20}, {"iou": 0.0}, {"conf": 0.0}]


def dense_output(classes=3, anchors=400, seed=0):
    """Return a decoded output of overlapping boxes, many of which have nearly the same score."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(0, 120, (anchors, 2))
    sizes = rng.uniform(5, 60, (anchors, 2))
    scores = np.round(rng.uniform(0, 1, (anchors, 1 + classes)), 1) + rng.normal(0, 2e-5, (anchors, 1 + classes))
    return np.concatenate([centres, sizes, scores.clip(0, 1)], axis=1).astype(np.float32)


def perturbed(output, seed=1):
    """Return the output with differences that are smaller than the slack."""
    rng = np.random.default_rng(seed)
    noise = np.concatenate(
        [rng.uniform(-2e-3, 2e-3, (len(output), 4)), rng.uniform(-3e-5, 3e-5, output[:, 4:].shape)], 1
    )
    return np.concatenate([output[:, :4] + noise[:, :4], (output[:, 4:] + noise[:, 4:]).clip(0, 1)], 1).astype(
        np.float32
    )


def check(found, output, thresholds, *, slack=SLACK, max_candidates=30_000) -> NmsCheck:
    return check_nms(found, output, thresholds, slack=slack, max_candidates=max_candidates)


def take(found, rows):
    return RawDetections(boxes=found.boxes[rows], scores=found.scores[rows], class_ids=found.class_ids[rows])


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("classes", [1, 3])
def test_the_result_of_nms_is_accepted_without_slack(rule, classes):
    output, thresholds = dense_output(classes), Thresholds(**rule)
    found = postprocess(output, thresholds)
    result = check(found, output, thresholds, slack=Slack(score=0, box_px=1e-6))
    assert result == NmsCheck(matched=len(found.scores), missing=0, extra=0, box_px=0.0, score=0.0)
    assert result.matched > 10


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_small_differences_flip_detections_and_are_accepted(rule, seed):
    output, thresholds = dense_output(seed=seed), Thresholds(**rule)
    found = postprocess(perturbed(output, seed), thresholds)
    result = check(found, output, thresholds)
    assert (result.matched, result.missing, result.extra) == (len(found.scores), 0, 0)
    assert 0 < result.score <= 1e-4 and 0 < result.box_px <= 0.01


def test_without_slack_the_flips_are_found():
    output, thresholds = dense_output(), Thresholds()
    result = check(postprocess(perturbed(output), thresholds), output, thresholds, slack=Slack(score=0, box_px=1e-6))
    assert result.missing > 0 and result.extra > 0


@pytest.mark.parametrize("row", [0, 5, 50])
def test_a_missing_detection_is_found(row):
    output, thresholds = dense_output(), Thresholds()
    found = postprocess(output, thresholds)
    shorter = take(found, np.delete(np.arange(len(found.scores)), row))
    result = check(shorter, output, thresholds)
    assert result.missing >= 1 and result.extra == 0


def test_an_empty_list_misses_everything():
    output, thresholds = dense_output(), Thresholds()
    assert check(take(postprocess(output, thresholds), []), output, thresholds).missing > 50


@pytest.mark.parametrize(
    "other", [{"iou": 0.5}, {"iou": 0.4}, {"class_agnostic": True}, {"conf": 0.3}, {"multi_label": True}]
)
def test_the_result_of_another_rule_is_refused(other):
    output = dense_output()
    found = postprocess(output, Thresholds(**other))
    result = check(found, output, Thresholds())
    assert result.missing + result.extra > 0


@pytest.mark.parametrize("change", ["box", "score", "class", "twice", "order"])
def test_a_detection_that_nms_cannot_give_is_found(change):
    output, thresholds = dense_output(), Thresholds()
    boxes, scores, class_ids = (part.copy() for part in postprocess(output, thresholds))
    if change == "box":
        boxes[3, 2] += 1
    elif change == "score":
        scores[3] += 0.01
    elif change == "class":
        class_ids[3] = 7
    elif change == "twice":
        boxes[4], scores[4], class_ids[4] = boxes[3], scores[3], class_ids[3]
    else:
        boxes, scores, class_ids = boxes[::-1], scores[::-1], class_ids[::-1]
    assert check(RawDetections(boxes, scores, class_ids), output, thresholds).extra > 0


def test_candidates_beyond_the_limit_need_not_be_found():
    output = dense_output()
    thresholds = Thresholds(conf=0.0, max_det=300)
    found = postprocess(output, thresholds, max_candidates=40)
    assert check(found, output, thresholds, max_candidates=40).missing == 0
    assert check(found, output, thresholds).missing > 0


def test_boxes_with_unlimited_coordinates_are_compared_by_iou():
    output, thresholds = dense_output(), Thresholds()
    found = postprocess(output, thresholds)
    moved, loose = found._replace(boxes=found.boxes + np.float32(0.5)), Slack(score=0.3, box_px=np.inf)
    assert check(moved, output, thresholds, slack=loose).extra == 0


def test_boxes_of_high_scores_must_be_there_also_with_unlimited_coordinates():
    output, thresholds = dense_output(), Thresholds()
    found = postprocess(output, thresholds)
    far = found._replace(boxes=found.boxes + np.float32(200))
    extra = check(far, output, thresholds, slack=Slack(score=0.3, box_px=np.inf)).extra
    assert extra == (found.scores > thresholds.conf + 0.3).sum() > 5


def test_low_scores_have_a_slack_in_proportion():
    slack = Slack(score=0.02, box_px=1)
    np.testing.assert_allclose(slack.of_scores(np.float32([0, 0.001, 0.5])), [1e-6, 0.00064 + 1e-6, 0.02], rtol=1e-3)


def test_nan_is_refused_without_an_exception():
    output, thresholds = dense_output(), Thresholds()
    found = postprocess(output, thresholds)
    result = check(found, np.full_like(output, np.nan), thresholds)
    assert result.extra == len(found.scores)
