"""What one detector loses against another on the same images, and how far the number of images lets us trust it.

AP is no mean over images, so its error comes from the delete-a-group jackknife (P. S. Kott, "The delete-a-group
jackknife", Journal of Official Statistics 17, 2001, 521-526): the drop is measured again with each group of images
left out. Both detectors see the same images, so what makes an image hard for both cancels in the difference.
A jackknife errs on the wide side (B. Efron, C. Stein, "The jackknife estimate of variance", Annals of Statistics 9,
1981, 586-596); with a box or two of each class in all the images it does so by a fifth and more.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import compress, cycle
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from faster_coco_eval import COCO, COCOeval_faster

from yolov7_deploy.datasets import Dataset
from yolov7_deploy.errors import DatasetError, UsageError

GROUPS = 20
MOST_IMAGES = 100_000  # about COCO's training set (118,287); nobody labels more to settle this
# Two-sided 95 % quantiles of Student's t with 1 to 9 degrees of freedom; `_t95` has a formula for more.
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
NORMAL95 = 1.959964

logger = logging.getLogger(__name__)
Verdict = Literal["within", "beyond", "cannot tell"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyDrop:
    """The AP that `accuracy_drop` found to be lost between two detectors, with its 95 % interval.

    Attributes:
        reference_ap, ap: 0..1.
        points: 100 * (reference_ap - ap); negative where the other detector is the better one.
        standard_error, low, high: Of `points`; all `None` where they cannot be known.
        images: Images that were judged.
    """

    reference_ap: float
    ap: float
    points: float
    standard_error: float | None
    low: float | None
    high: float | None
    images: int

    def verdict(self, max_drop: float) -> Verdict:
        """Whether the whole interval is `within` what may be lost, all of it is `beyond`, or neither."""
        if self.high is not None and self.high <= max_drop:
            return "within"
        if self.low is not None and self.low > max_drop:
            return "beyond"
        return "cannot tell"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for one JSON document; every number is finite."""
        return asdict(self)


def accuracy_drop(
    dataset: Dataset,
    indices: Sequence[int],
    reference: Sequence[Mapping[str, Any]],
    other: Sequence[Mapping[str, Any]],
    *,
    groups: int = GROUPS,
) -> AccuracyDrop:
    """The drop in AP from `reference` to `other`, with an interval for the drop on all images of this kind.

    The i-th image belongs to group i % `groups`; fewer images than groups make a group each. A class counts where
    it has a box, so leaving out its only group takes it out of the mean, as drawing other images would.

    The error is unknown where there is one group, or where one group has all the boxes. It is 0 where the predictions
    are the same, but also where no group shows a difference, which a handful of easy images may not.
    For 2,000 images with 190 predictions each it takes two to three times as long as one `compute_coco_metrics`.

    Args:
        dataset: Where the ground truth comes from.
        indices: The samples that both detectors have seen.
        reference, other: COCO results, as `AccuracyReport.predictions`; those of other images do not count.
        groups: At least 1. Fewer make the interval wider and less steady, and save little time.

    Raises:
        UsageError: There is no group.
        DatasetError: The images have no box to find.
    """
    if groups < 1:
        raise UsageError(f"groups must be at least 1, not {groups}.", fix=f"For example: groups={GROUPS}")
    document = dataset.ground_truth(indices)
    if all(annotation["iscrowd"] for annotation in document["annotations"]):
        raise DatasetError(
            f"{dataset.source} has no box to find in the {len(indices)} images that both detectors have seen.",
            fix="Measure on more images, or check that the labels lie where the images' paths say.",
        )
    truth = COCO(document)
    ids = [dataset.image_id(index) for index in indices]
    groups = min(groups, len(ids))
    parts = [ids, *([i for place, i in enumerate(ids) if place % groups != group] for group in range(groups))]
    reference_ap, *reference_aps = _aps(truth, reference, parts)
    ap, *aps = _aps(truth, other, parts)
    points = 100 * (reference_ap - ap)
    error = _jackknife(100 * (np.array(reference_aps) - np.array(aps)))
    margin = None if error is None else _t95(groups - 1) * error
    return AccuracyDrop(
        reference_ap=reference_ap,
        ap=ap,
        points=points,
        standard_error=error,
        low=None if margin is None else points - margin,
        high=None if margin is None else points + margin,
        images=len(ids),
    )


def drop_words(drop: AccuracyDrop, max_drop: float) -> str:
    """The drop with its interval, and whether more than `max_drop` points are lost: two sentences for people.

    Where that cannot be told, the second says how many images would do if the drop stayed what it is (the error goes
    with one over the root of their number).
    """
    moved = f"falls by {drop.points:.2f}" if drop.points >= 0 else f"rises by {-drop.points:.2f}"
    images = f"{drop.images:,} image{'' if drop.images == 1 else 's'}"
    measured = f"AP {moved} points ({drop.reference_ap:.4f} to {drop.ap:.4f}) on {images}"
    question = f"whether more than {max_drop:g} points are lost"
    if drop.low is None or drop.high is None:
        return f"{measured}. With boxes in so few images there is no interval, and no telling {question}."
    measured += f"; the 95 % interval of the drop is {_rounded(drop.low)} to {_rounded(drop.high)}."
    verdict = drop.verdict(max_drop)
    if verdict != "cannot tell":
        return f"{measured} All of it is {verdict} the {max_drop:g} points that may be lost."
    needed = _images_needed(drop, max_drop)
    if needed is None:
        many = f"not even {MOST_IMAGES:,} images would tell {question}"
        return f"{measured} The drop is so near to {max_drop:g} that {many}."
    return f"{measured} {images} cannot tell {question}; about {needed:,} would if the drop stayed the same."


def _aps(truth: COCO, predictions: Sequence[Mapping[str, Any]], parts: Sequence[Sequence[int]]) -> list[float]:
    """AP (0..1) of a detector on each part of the images, named by their ids; NaN where a part has no box to find.

    The boxes are matched once, which is most of the work, and summed up for each part. faster-coco-eval's own
    evaluation on several machines (its utils/pytorch/coco_eval.py) sets the same two members before `accumulate`:
    the matches by class, area range and image, in this order, and the parameters that name these images.
    """
    seen = set(truth.getImgIds())
    rows = [(p["image_id"], *p["bbox"], p["score"], p["category_id"]) for p in predictions if p["image_id"] in seen]
    found = truth.loadRes(np.array(rows, dtype=np.float64).reshape(-1, 7))
    evaluation = COCOeval_faster(truth, found, "bbox", print_function=logger.debug, separate_eval=True)
    parameters = evaluation.params
    # AP needs objects of all sizes together and the longest list of detections only: a quarter of the sums.
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
    """Standard error from the drop without each group; `None` where one is NaN, as it is without the only group."""
    error = math.sqrt((len(drops) - 1) * float(np.var(drops)))
    return None if math.isnan(error) else error


def _t95(degrees: int) -> float:
    """Half width of a 95 % interval in standard errors: Student's t.

    Above the table it is the expansion of Abramowitz and Stegun 26.7.5, which is right to 0.0002 there.
    """
    if degrees <= len(T95):
        return T95[degrees - 1]
    z = NORMAL95
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def _images_needed(drop: AccuracyDrop, max_drop: float) -> int | None:
    """Images whose interval would just reach `max_drop`, rounded up: never less than now; `None` for too many."""
    assert drop.high is not None
    distance, margin = abs(max_drop - drop.points), drop.high - drop.points
    needed = drop.images * (margin / distance) ** 2 if distance > 0 else math.inf
    if needed > MOST_IMAGES:
        return None
    step = max(5 * 10 ** (len(str(math.ceil(needed))) - 2), 1)
    return int(math.ceil(needed / step) * step)


def _rounded(points: float) -> str:
    """Two decimals, and no minus before a zero."""
    return f"{round(points, 2) + 0.0:.2f}"
