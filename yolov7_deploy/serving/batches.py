"""Detection for requests that arrive together, each with thresholds of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from yolov7_deploy.detections import Detections, find_classes
from yolov7_deploy.detector import Detector
from yolov7_deploy.errors import ImageError, UsageError, Y7Error
from yolov7_deploy.image import Image, decode_image
from yolov7_deploy.options import Thresholds
from yolov7_deploy.serving.requests import Answer, HttpError, RequestThresholds, error_answer

BATCH_HEADER = "x-batch-size"  # number of images that went through the network together
_DEFAULTS = RequestThresholds()
_IMAGE_FIX = "Send a JPEG, PNG, WebP, TIFF or BMP file unchanged; curl needs --data-binary @image.jpg for that, not -d."


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DetectRequest:
    """The content of an image file, and thresholds."""

    image: bytes
    thresholds: RequestThresholds


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Job:
    """A request whose image and thresholds are valid; `index` is its position in the batch."""

    index: int
    image: Image
    asked: RequestThresholds
    thresholds: Thresholds


def answer_batch(detector: Detector, requests: Sequence[DetectRequest]) -> list[Answer]:
    """Return the answer to each request.

    Requests that differ in `conf` only run together, at the lowest one: NMS never removes a box because of a worse one,
    so the boxes above a higher `conf` are the same. A request with an error does not disturb the others.
    """
    answers: dict[int, Answer] = {}
    jobs: list[_Job] = []
    for index, request in enumerate(requests):
        try:
            jobs.append(_prepare(detector, index, request))
        except Y7Error as error:
            answers[index] = error_answer(_as_sent(error))
    for group in _groups(jobs):
        answers.update(_answer_group(detector, group))
    return [answers[index] for index in range(len(requests))]


def _as_sent(error: Y7Error) -> Y7Error | HttpError:
    """Return the error about an image with a fix for the sender; those about thresholds have one."""
    return HttpError(400, error.message, fix=_IMAGE_FIX) if isinstance(error, ImageError) else error


def _prepare(detector: Detector, index: int, request: DetectRequest) -> _Job:
    """Decode the image and check the thresholds.

    Raises:
        ImageError: It is not an image.
        UsageError: A threshold is out of range, or the model does not have a class.
    """
    asked = request.thresholds
    given = {name: value for name in ("conf", "iou", "max_det") if (value := getattr(asked, name)) is not None}
    thresholds = replace(detector.thresholds, **given)
    if asked.classes:
        thresholds = replace(thresholds, classes=find_classes(asked.classes, detector.class_names))
    return _Job(index=index, image=decode_image(request.image, name="The body"), asked=asked, thresholds=thresholds)


def _groups(jobs: Iterable[_Job]) -> list[list[_Job]]:
    """Return the jobs that can run together."""
    groups: dict[Thresholds, list[_Job]] = defaultdict(list)
    for job in jobs:
        groups[replace(job.thresholds, conf=0)].append(job)
    return list(groups.values())


def _answer_group(detector: Detector, group: Sequence[_Job]) -> dict[int, Answer]:
    try:
        found = _run(detector, group)
    except Y7Error as error:
        if len(group) > 1:  # find out whose error it is
            return {job.index: _answer_group(detector, [job])[job.index] for job in group}
        (job,) = group
        is_ours = isinstance(error, UsageError) and job.asked == _DEFAULTS  # such as boxes that are not finite
        return {job.index: error_answer(HttpError(500, error.message, fix=error.fix) if is_ours else error)}
    headers = {BATCH_HEADER: str(len(group))}
    return {
        job.index: Answer(status=200, body=detections.to_json(), headers=headers)
        for job, detections in zip(group, found, strict=True)
    }


def _run(detector: Detector, group: Sequence[_Job]) -> list[Detections]:
    shared = group[0].thresholds
    found = detector.batch(
        [job.image for job in group],
        conf=min(job.thresholds.conf for job in group),
        iou=shared.iou,
        max_det=shared.max_det,
        classes=shared.classes,
    )
    return [one.filter(conf=job.thresholds.conf) for one, job in zip(found, group, strict=True)]
