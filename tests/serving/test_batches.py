"""Requests that run in one batch get the same boxes as alone, and errors of one do not disturb the others."""

from __future__ import annotations

import json

import cv2
import pytest

from tests.support.sample_images import assert_same, noise
from yolov7_deploy.detections import Detections
from yolov7_deploy.errors import DeviceError, UsageError
from yolov7_deploy.serving.batches import BATCH_HEADER, DetectRequest, answer_batch
from yolov7_deploy.serving.requests import RequestThresholds

IMAGES = [noise(96, 128, seed) for seed in range(3)]
CONF = 0.6


def encoded(image):
    return cv2.imencode(".png", image)[1].tobytes()


def request(image, **thresholds):
    data = image if isinstance(image, bytes) else encoded(image)
    return DetectRequest(image=data, thresholds=RequestThresholds(**thresholds))


def found(answer):
    assert answer.status == 200, answer.body
    return json.loads(answer.body)["detections"]


def detections(answer, detector):
    record = found(answer)
    return Detections(
        boxes=[one["box"] for one in record],
        scores=[one["score"] for one in record],
        class_ids=[one["class_id"] for one in record],
        class_names=detector.class_names,
        image_hw=tuple(json.loads(answer.body)["image_hw"]),
    )


def test_different_thresholds_in_one_batch_give_the_boxes_of_single_calls(detector):
    asked = [{}, {"conf": 0.8}, {"conf": 0.3}, {"iou": 0.2}, {"max_det": 2}, {"classes": "thing 1"}]
    images = [IMAGES[i % 3] for i in range(len(asked))]
    answers = answer_batch(detector, [request(image, **one) for image, one in zip(images, asked, strict=True)])
    for answer, image, one in zip(answers, images, asked, strict=True):
        assert_same(detections(answer, detector), detector(image, **one))
    assert len(found(answers[2])) > len(found(answers[1])) > 0


def test_requests_that_differ_in_confidence_only_run_together(detector):
    answers = answer_batch(detector, [request(IMAGES[0]), request(IMAGES[1], conf=0.8), request(IMAGES[2], iou=0.3)])
    assert [answer.headers[BATCH_HEADER] for answer in answers] == ["2", "2", "1"]


@pytest.mark.parametrize(
    "image,thresholds,says",
    [
        (b"no image", {}, "not an image"),
        (b"", {}, "is empty"),
        (IMAGES[0], {"conf": 2.0}, "conf must be between 0 and 1"),
        (IMAGES[0], {"max_det": 0}, "max_det must be at least 1"),
        (IMAGES[0], {"classes": "unicorn"}, "no class 'unicorn'"),
    ],
)
def test_a_wrong_request_is_answered_and_the_others_are_not_disturbed(detector, image, thresholds, says):
    first, wrong, last = answer_batch(detector, [request(IMAGES[0]), request(image, **thresholds), request(IMAGES[1])])
    assert wrong.status == 400
    error = json.loads(wrong.body)
    assert says in error["error"] and error["fix"]
    assert found(first) and found(last)


class Failing:
    """A detector that raises an error for some thresholds, as a file with fixed ones does."""

    def __init__(self, detector, error, fails):
        self.thresholds, self.class_names = detector.thresholds, detector.class_names
        self._detector, self._error, self._fails = detector, error, fails

    def batch(self, images, **thresholds):
        if self._fails(thresholds):
            raise self._error
        return self._detector.batch(images, **thresholds)


def test_a_threshold_that_the_file_refuses_is_the_error_of_its_request_only(detector):
    fixed = Failing(detector, UsageError("fixed"), lambda asked: asked["conf"] != CONF)
    first, wrong = answer_batch(fixed, [request(IMAGES[0]), request(IMAGES[1], conf=0.3)])
    assert found(first)
    assert (wrong.status, json.loads(wrong.body)["error"]) == (400, "fixed")


def test_an_error_of_the_model_is_one_of_the_server(detector):
    broken = Failing(detector, UsageError("A box is NaN"), lambda asked: True)
    assert answer_batch(broken, [request(IMAGES[0])])[0].status == 500
    full = Failing(detector, DeviceError("out of memory"), lambda asked: True)
    assert [answer.status for answer in answer_batch(full, [request(IMAGES[0]), request(IMAGES[1])])] == [503, 503]
