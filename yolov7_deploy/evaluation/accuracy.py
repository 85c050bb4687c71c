"""COCO average precision of a Detector: the shipped path, judged by the ground truth of a dataset.

The metric is faster-coco-eval's. On detections of the official program it gives pycocotools' twelve numbers to 1e-15
in a sixth of the time, and logs where pycocotools prints.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
from faster_coco_eval import COCO, COCOeval_faster

from yolov7_deploy.datasets import Dataset
from yolov7_deploy.datasets.samples import DoubleArray
from yolov7_deploy.detections import Detections
from yolov7_deploy.errors import DatasetError, ImageError
from yolov7_deploy.evaluation.precision_recall import PrecisionRecall, precision_recall
from yolov7_deploy.evaluation.protocol import Fit, Group, is_rect, plan, thresholds_in_force
from yolov7_deploy.image import Image, read_image
from yolov7_deploy.options import Thresholds, ValOptions

if TYPE_CHECKING:
    from yolov7_deploy.detector import Detector

MAX_READERS = 4
PRECISIONS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
RECALLS = ("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large")
SUMMARY = PRECISIONS + RECALLS  # in the order of the metric library

logger = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassAccuracy:
    """One row of the class-wise table; `ap` and `ap50` are `None` for a class that is in no image."""

    class_id: int
    name: str
    images: int
    instances: int
    ap: float | None
    ap50: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """An image that could not be used, and why."""

    path: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AccuracyReport:
    """COCO's twelve numbers (0..1; `None` where no ground truth is of that kind) and how they came about.

    Attributes:
        images: Images that were judged; `skipped` ones are not among them.
        thresholds: Those in force: a file with its own NMS may hold stricter ones than were asked for.
        protocol: Placement of the images, in words.
        speed_ms: Per image: preprocess, inference, postprocess. Reading files overlaps and is not counted.
        classes: One row per class of the dataset.
        weights_sha256: Of the file, where it was given.
        notes: What a reader of the number should know.
        predictions: COCO results, coordinates rounded as the official program does; not part of `to_dict`.
        curves: Precision against recall at IoU 0.50; `evaluate` always gives them. Not part of `to_dict`.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    ar1: float | None
    ar10: float | None
    ar100: float | None
    ar_small: float | None
    ar_medium: float | None
    ar_large: float | None
    images: int
    weights: str
    backend: str
    precision: str
    thresholds: Thresholds
    protocol: str
    speed_ms: Mapping[str, float]
    classes: tuple[ClassAccuracy, ...]
    skipped: tuple[Skipped, ...]
    weights_sha256: str = ""
    notes: tuple[str, ...] = ()
    predictions: list[dict[str, Any]] = field(default_factory=list, repr=False, compare=False)
    curves: PrecisionRecall | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for one JSON document."""
        document = asdict(replace(self, predictions=[], curves=None))
        del document["predictions"], document["curves"]
        return document


def evaluate(
    detector: Detector, dataset: Dataset, *, options: ValOptions, progress: Progress | None = None
) -> AccuracyReport:
    """The accuracy of a detector on a dataset.

    Reading the next batch overlaps with inference of the current one. Images that cannot be read are left out,
    with their ground truth, and named in the report.

    Args:
        detector: Anything that opens as a Detector.
        dataset: What `open_dataset` gives.
        options: Protocol and thresholds.
        progress: Called with images done and in all, after each batch.

    Raises:
        UsageError: rect is asked of a model with a fixed input size.
        DatasetError: There is no box to find, no readable image, or the classes are not the detector's.
    """
    start = time.perf_counter()
    rect = is_rect(detector.metadata, options)
    category_of = _category_of(detector.metadata.class_names, dataset)
    dataset.require_boxes()
    sized, skipped = _sizes(dataset)
    groups, fit, protocol = plan(detector, sized, rect=rect, batch=options.batch)
    thresholds, notes = thresholds_in_force(options.thresholds, detector.metadata)
    used: list[int] = []
    speeds: list[tuple[float, float, float]] = []
    predictions: list[dict[str, Any]] = []
    for index, found in _detect(detector, dataset, groups, fit, thresholds, skipped, progress):
        used.append(index)
        speeds.append((found.speed.preprocess_ms, found.speed.inference_ms, found.speed.postprocess_ms))
        known = found.filter(classes=list(category_of))
        predictions += known.to_coco(dataset.image_id(index), category_ids=_table(category_of))
    if not used:
        raise DatasetError(
            f"None of the {len(dataset)} images could be used: {skipped[0].path}: {skipped[0].reason}",
            fix="Check the images' folder.",
        )
    summary, classes, curves = compute_coco_metrics(dataset, used, predictions)
    logger.info(
        "accuracy: %s on %d images: AP %s, %.1f s", protocol, len(used), summary["ap"], time.perf_counter() - start
    )
    return AccuracyReport(
        **cast("dict[str, Any]", summary),
        images=len(used),
        weights=detector.metadata.source,
        backend="",
        precision=detector.metadata.precision,
        thresholds=thresholds,
        protocol=protocol,
        speed_ms=dict(zip(("preprocess", "inference", "postprocess"), np.mean(speeds, axis=0).tolist(), strict=True)),
        classes=classes,
        skipped=tuple(skipped),
        notes=notes + dataset.problems,
        predictions=predictions,
        curves=curves,
    )


def _category_of(names: Sequence[str], dataset: Dataset) -> dict[int, int]:
    """The dataset's category id of each class of the detector; classes that the dataset does not have are left out.

    Classes are matched by name, and by place where the detector has no names or both spell mostly alike.
    """
    theirs = [name.strip().casefold() for name in dataset.class_names]
    ours = [name.strip().casefold() for name in names]
    alike = sum(a == b for a, b in zip(ours, theirs, strict=False))
    unnamed = ours == [f"class_{i}" for i in range(len(ours))]
    other_spelling = 2 * alike >= len(ours) and set(ours) != set(theirs)
    if ours == theirs or (len(ours) == len(theirs) and (unnamed or other_spelling)):
        return dict(enumerate(dataset.category_ids))
    place = {name: i for i, name in reversed(list(enumerate(ours)))}
    lost = [theirs[i] for i in np.flatnonzero(dataset.box_counts()) if theirs[i] not in place]
    if lost:
        raise DatasetError(
            f"{dataset.source} has boxes of {', '.join(map(repr, lost[:5]))}, which the model does not know; "
            f"its {len(names)} classes are {', '.join(map(repr, names[:5]))}, ...",
            fix="Measure on a dataset with the model's classes, or rename the dataset's classes to the model's.",
        )
    return {place[name]: category for name, category in zip(theirs, dataset.category_ids, strict=True) if name in place}


def _table(category_of: Mapping[int, int]) -> list[int]:
    return [category_of.get(i, -1) for i in range(max(category_of, default=-1) + 1)]


def _sizes(dataset: Dataset) -> tuple[dict[int, tuple[int, int]], list[Skipped]]:
    """Height and width of every image whose header can be read, by index in order of path, and those that cannot."""
    sized, skipped = {}, []
    for index in sorted(range(len(dataset)), key=lambda i: str(dataset.path(i))):
        try:
            sized[index] = dataset.image_hw(index)
        except ImageError as error:
            skipped.append(Skipped(path=str(dataset.path(index)), reason=error.message))
    return sized, skipped


def _detect(
    detector: Detector,
    dataset: Dataset,
    groups: Sequence[Group],
    fit: Fit,
    thresholds: Thresholds,
    skipped: list[Skipped],
    progress: Progress | None,
) -> Iterator[tuple[int, Detections]]:
    """Index and detections of each readable image; the others are appended to `skipped`."""
    pool = ThreadPoolExecutor(min(MAX_READERS, os.cpu_count() or 1), thread_name_prefix="y7-read")
    done = len(skipped)

    def start(group: Group | None) -> list[Future[Image | Skipped]]:
        indices = group.indices if group else ()
        return [pool.submit(_read, dataset.path(i), dataset.image_hw(i)) for i in indices]

    try:
        coming = start(groups[0] if groups else None)
        for group, following in zip_longest(groups, groups[1:]):
            loaded = [future.result() for future in coming]
            coming = start(following)
            skipped += [item for item in loaded if isinstance(item, Skipped)]
            good = [(i, p) for i, p in zip(group.indices, loaded, strict=True) if not isinstance(p, Skipped)]
            images = [item for _, item in good]
            boxes = [fit((p.shape[0], p.shape[1]), group.canvas_hw) for p in images]
            found = detector.infer(images, boxes, thresholds) if images else []
            yield from zip((i for i, _ in good), found, strict=True)
            done += len(group.indices)
            if progress:
                progress(done, len(dataset))
    finally:
        pool.shutdown(cancel_futures=True)


def _read(path: Path, expected_hw: tuple[int, int]) -> Image | Skipped:
    try:
        image = read_image(path)
    except ImageError as error:
        return Skipped(path=str(path), reason=error.message)
    if image.shape[:2] == expected_hw:
        return image
    (height, width), (real_h, real_w) = expected_hw, image.shape[:2]
    return Skipped(path=str(path), reason=f"is {real_w}x{real_h}, but the annotations are of {width}x{height}")


def compute_coco_metrics(
    dataset: Dataset, indices: Sequence[int], predictions: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float | None], tuple[ClassAccuracy, ...], PrecisionRecall]:
    """COCO's twelve numbers by name, the class-wise table and the curves, of predictions for the chosen samples.

    Args:
        dataset: Where the ground truth comes from.
        indices: The samples that count; predictions must be of these.
        predictions: COCO results of boxes.
    """
    document = dataset.ground_truth(indices)
    truth = COCO(document)
    rows = [(p["image_id"], *p["bbox"], p["score"], p["category_id"]) for p in predictions]
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    evaluation = COCOeval_faster(truth, truth.loadRes(table), "bbox", print_function=logger.debug)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    summary = {name: _measured(value) for name, value in zip(SUMMARY, evaluation.stats[: len(SUMMARY)], strict=True)}
    classes = _class_rows(dataset, document["annotations"], evaluation)
    return summary, classes, _curves(classes, dataset.category_ids, table, evaluation)


def _class_rows(
    dataset: Dataset, annotations: Sequence[Mapping[str, Any]], evaluation: COCOeval_faster
) -> tuple[ClassAccuracy, ...]:
    counted = [a for a in annotations if not a["iscrowd"]]
    # [IoU threshold, recall, category, area range, max detections]; 0 is all areas, -1 is 100 detections
    precision: npt.NDArray[np.float64] = evaluation.eval["precision"][:, :, :, 0, -1]
    column = {category: k for k, category in enumerate(evaluation.params.catIds)}
    rows = []
    for class_id, (name, category) in enumerate(zip(dataset.class_names, dataset.category_ids, strict=True)):
        images = [a["image_id"] for a in counted if a["category_id"] == category]
        curve = precision[:, :, column[category]]
        rows.append(
            ClassAccuracy(
                class_id=class_id,
                name=name,
                images=len(set(images)),
                instances=len(images),
                ap=_measured(curve.mean()),
                ap50=_measured(curve[0].mean()),
            )
        )
    return tuple(rows)


def _curves(
    classes: Sequence[ClassAccuracy], categories: Sequence[int], rows: DoubleArray, evaluation: COCOeval_faster
) -> PrecisionRecall:
    """Curves at the first IoU, 0.50, for objects of all sizes and 100 detections."""
    column = {category: k for k, category in enumerate(evaluation.params.catIds)}
    order = [column[category] for category in categories]
    precision, scores = (evaluation.eval[name][0, :, :, 0, -1][:, order].T for name in ("precision", "scores"))
    found = [rows[rows[:, 6] == category, 5] for category in categories]
    return precision_recall(precision, scores, found=found, instances=[row.instances for row in classes])


def _measured(value: float) -> float | None:
    """COCO writes -1 where there was nothing to measure."""
    return float(value) if value >= 0 else None
