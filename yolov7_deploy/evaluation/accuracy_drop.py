"""The drop in AP between two detectors on the same images, with a confidence interval.

AP is not a mean over images, so its standard error comes from the delete-a-group jackknife (P. S. Kott, "The
delete-a-group jackknife", Journal of Official Statistics 17, 2001, 521-526): the drop is measured again without each
group of images. Both detectors see the same images, so the difficulty of an image cancels in the difference.
The jackknife overestimates the variance (B. Efron, C. Stein, "The jackknife estimate of variance", Annals of
Statistics 9, 1981, 586-596), by a fifth and more if there are only one or two boxes of each class in all the images.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress, cycle
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from faster_coco_eval import COCO, COCOeval_faster

from yolov7_deploy._console import plural
from yolov7_deploy._statistics import student_t_quantile
from yolov7_deploy._text import get_logger
from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import DoubleArray
from yolov7_deploy.errors import DatasetError, UsageError
from yolov7_deploy.evaluation.accuracy import MetricIds

GROUPS = 20
MAX_IMAGES_NEEDED = 100_000  # about the size of COCO's training set (118,287); more is not realistic

logger = get_logger(__name__)
Verdict = Literal["within", "above", "inconclusive"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyDrop:
    """The drop in AP from a reference to another detector, with its 95 % confidence interval.

    Attributes:
        reference_ap, ap: AP of the two detectors, 0..1.
        points: 100 * (reference_ap - ap); negative if the other detector is better.
        standard_error, low, high: Standard error and confidence interval of `points`; all `None` if unknown.
        images: Number of evaluated images.
    """

    reference_ap: float
    ap: float
    points: float
    standard_error: float | None
    low: float | None
    high: float | None
    images: int

    def verdict(self, max_drop: float) -> Verdict:
        """Return whether the whole interval is `within` the allowed drop or `above` it; else `inconclusive`."""
        if self.high is not None and self.high <= max_drop:
            return "within"
        if self.low is not None and self.low > max_drop:
            return "above"
        return "inconclusive"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for one JSON document; every number is finite."""
        return asdict(self)


def accuracy_drop(
    dataset: Dataset,
    indices: Sequence[int],
    reference: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    *,
    groups: int = GROUPS,
) -> AccuracyDrop:
    """Return the drop in AP from `reference` to `other`, with a confidence interval for all images of this kind.

    Image i belongs to group i % `groups`; if there are fewer images than groups, each image is a group. The mean is
    over the classes with ground truth, so without its only group a class drops out, as it would in another sample of
    images.

    The standard error is unknown if there is one group, or if one group has all the boxes. It is 0 if the predictions
    are the same, but also if no group shows a difference, as may happen with a few easy images.
    For 2,000 images with 190 predictions each it takes two to three times as long as one `compute_coco_metrics`.

    Args:
        dataset: Dataset with the ground truth.
        indices: Samples that both detectors were evaluated on.
        reference, other: COCO results as in `AccuracyReport.predictions`; those of other images are ignored.
        groups: Number of groups, at least 1. Fewer groups make the interval wider and noisier, and save little time.

    Raises:
        UsageError: `groups` is below 1.
        DatasetError: The images have no ground truth.
    """
    if groups < 1:
        raise UsageError(f"groups must be at least 1, not {groups}.", fix=f"For example: groups={GROUPS}")
    document = dataset.ground_truth(indices)
    if all(annotation["iscrowd"] for annotation in document["annotations"]):
        raise DatasetError(
            f"{dataset.source} has no ground truth boxes in the {len(indices)} images of this comparison.",
            fix="Measure on more images, or check that the label files are where the image paths imply.",
        )
    metric_ids = MetricIds.of(document)
    truth = COCO(metric_ids.renumber(document))
    ids = [metric_ids.images[dataset.image_id(index)] for index in indices]
    groups = min(groups, len(ids))
    parts = [ids, *([i for index, i in enumerate(ids) if index % groups != group] for group in range(groups))]
    reference_ap, *reference_aps = _aps(truth, metric_ids.to_table(reference), parts)
    ap, *aps = _aps(truth, metric_ids.to_table(other), parts)
    points = 100 * (reference_ap - ap)
    error = _jackknife(100 * (np.array(reference_aps) - np.array(aps)))
    margin = None if error is None else student_t_quantile(0.975, groups - 1) * error
    return AccuracyDrop(
        reference_ap=reference_ap,
        ap=ap,
        points=points,
        standard_error=error,
        low=None if margin is None else points - margin,
        high=None if margin is None else points + margin,
        images=len(ids),
    )


def summarize_drop(drop: AccuracyDrop, max_drop: float) -> str:
    """Return two sentences: the drop with its interval, and whether more than `max_drop` points are lost.

    If that is inconclusive, the second one says how many images would be enough if the drop stayed the same (the
    standard error is proportional to 1 / sqrt(images)).
    """
    moved = f"falls by {drop.points:.2f}" if drop.points >= 0 else f"rises by {-drop.points:.2f}"
    images = plural(drop.images, "image")
    measured = f"AP {moved} points ({drop.reference_ap:.4f} to {drop.ap:.4f}) on {images}"
    question = f"whether more than {max_drop:g} {'point is' if max_drop == 1 else 'points are'} lost"
    if drop.low is None or drop.high is None:
        return f"{measured}. With boxes in so few images there is no interval, so it is unknown {question}."
    measured += f"; the 95 % interval of the drop is {_rounded(drop.low)} to {_rounded(drop.high)}."
    verdict = drop.verdict(max_drop)
    if verdict != "inconclusive":
        return f"{measured} The whole interval is {verdict} the allowed {max_drop:g} points."
    needed = _images_needed(drop, max_drop)
    if needed is None:
        many = f"not even {MAX_IMAGES_NEEDED:,} images would show {question}"
        return f"{measured} The drop is so close to {max_drop:g} that {many}."
    return f"{measured} {images} cannot show {question}; about {needed:,} could if the drop stayed the same."


def _aps(truth: COCO, predictions: DoubleArray, parts: Sequence[Sequence[int]]) -> list[float]:
    """Return the AP (0..1) of a detector on each part, a list of image ids; NaN for a part without ground truth.

    Boxes are matched once, which is most of the work, and accumulated for each part. The distributed evaluation of
    faster-coco-eval (its utils/pytorch/coco_eval.py) sets the same two members before `accumulate`: the matches by
    class, area range and image, in this order, and the parameters with the ids of these images.
    """
    found = truth.loadRes(predictions)
    evaluation = COCOeval_faster(truth, found, "bbox", print_function=logger.debug, separate_eval=True)
    parameters = evaluation.params
    # AP needs only the area range of all sizes and the largest number of detections: a quarter of the work.
    parameters.areaRng, parameters.areaRngLbl = parameters.areaRng[:1], parameters.areaRngLbl[:1]
    parameters.maxDets = parameters.maxDets[-1:]
    evaluation.evaluate()
    image_ids, matches = evaluation.params.imgIds, evaluation._evalImgs_cpp
    aps = []
    for part in parts:
        members = set(part)
        chosen = [image_id in members for image_id in image_ids]
        evaluation._evalImgs_cpp = list(compress(matches, cycle(chosen)))
        evaluation._paramsEval.imgIds = list(compress(image_ids, chosen))
        evaluation.accumulate()
        precision = evaluation.eval["precision"]
        measured = precision[precision > -1]  # COCO writes -1 for a class without boxes
        aps.append(float(measured.mean()) if measured.size else math.nan)
    return aps


def _jackknife(drops: npt.NDArray[np.float64]) -> float | None:
    """Return the standard error from the drops without each group; `None` if a drop is NaN."""
    error = math.sqrt((len(drops) - 1) * float(np.var(drops)))
    return None if math.isnan(error) else error


def _images_needed(drop: AccuracyDrop, max_drop: float) -> int | None:
    """Return the number of images whose interval would just reach `max_drop`, rounded up; `None` if too many."""
    assert drop.high is not None
    distance, margin = abs(max_drop - drop.points), drop.high - drop.points
    needed = drop.images * (margin / distance) ** 2 if distance > 0 else math.inf
    if needed > MAX_IMAGES_NEEDED:
        return None
    step = max(5 * 10 ** (len(str(math.ceil(needed))) - 2), 1)
    return int(math.ceil(needed / step) * step)


def _rounded(points: float) -> str:
    """Return the number with two decimals, without a minus sign for zero."""
    return f"{round(points, 2) + 0.0:.2f}"
