"""What the labels of a dataset are like: how many of what, and how large."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from yolov7_deploy.datasets._text import some
from yolov7_deploy.datasets.samples import Dataset, DoubleArray
from yolov7_deploy.errors import ImageError

SMALL_PX = 8  # a cell of the finest level: below it a box has hardly a feature of its own
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
FREQUENT = 3  # classes at each end that are named


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCount:
    """How often a class is there.

    Attributes:
        name: Of the class.
        images: With at least one of it.
        boxes: In all.
    """

    name: str
    images: int
    boxes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelStatistics:
    """What is labelled in a dataset; crowd boxes are counted as such and nowhere else.

    Attributes:
        source: The file of the dataset.
        images: All of them.
        background_images: Those without a box.
        unreadable: Images whose size is not known, as their header cannot be read.
        boxes: In readable and other images.
        crowd_boxes: Regions that are neither hit nor false alarm.
        classes: In class order.
        size: Longer side of the images that `small_boxes` are counted at.
        small_boxes: With a longer side below `SMALL_PX` there.
        sides: For each of `QUANTILES` the side of a square of a box's area, in longer sides of its image; empty
            where there is no box.
        problems: What was repaired while reading.
    """

    source: str
    images: int
    background_images: int
    unreadable: int
    boxes: int
    crowd_boxes: int
    classes: tuple[ClassCount, ...]
    size: int
    small_boxes: int
    sides: tuple[float, ...]
    problems: tuple[str, ...]

    @property
    def empty_classes(self) -> tuple[str, ...]:
        """Names of the classes without a box."""
        return tuple(found.name for found in self.classes if not found.boxes)

    def words(self) -> str:
        """The statistics for people, a few lines."""
        lines = [
            f"{self.images} images ({self.background_images} without a box), {self.boxes} boxes of "
            f"{len(self.classes)} classes" + (f", {self.crowd_boxes} crowd boxes" if self.crowd_boxes else "")
        ]
        if self.sides:
            lines.append(
                f"boxes: half of them below {self.sides[QUANTILES.index(0.5)]:.3f} of the image's longer side, from "
                f"{self.sides[0]:.3f} to {self.sides[-1]:.3f}; {self.small_boxes} "
                f"({self.small_boxes / self.boxes:.1%}) smaller than {SMALL_PX} pixels at {self.size}"
            )
        order = sorted((found for found in self.classes if found.boxes), key=lambda found: -found.boxes)
        if len(order) > 1:
            shown = [f"{found.name} {found.boxes}" for found in order]
            often, rare = shown[:FREQUENT], shown[max(FREQUENT, len(shown) - FREQUENT) :]
            lines.append(f"most frequent: {', '.join(often)}" + (f"; rarest: {', '.join(rare)}" if rare else ""))
        if self.empty_classes:
            lines.append(f"classes without a box: {some(self.empty_classes)}")
        if self.unreadable:
            lines.append(f"{self.unreadable} images cannot be read")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The whole record for JSON."""
        sides = {f"{quantile:g}": side for quantile, side in zip(QUANTILES, self.sides, strict=False)}
        return {**asdict(self), "sides": sides, "empty_classes": self.empty_classes}


def describe_labels(dataset: Dataset, *, size: int = 640) -> LabelStatistics:
    """Counts what is labelled. Reads the headers of images whose size is not known yet.

    Args:
        dataset: What `open_dataset` gives.
        size: Images are counted as scaled so that their longer side is this.
    """
    classes = len(dataset.class_names)
    boxes, images = np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64)
    background = crowd = 0
    for index in range(len(dataset)):
        labels = dataset.record(index).labels
        found = np.bincount(labels.class_ids[~labels.crowd], minlength=classes)
        boxes, images = boxes + found, images + (found > 0)
        background += not found.any()
        crowd += int(labels.crowd.sum())
    sizes, unreadable = label_sizes(dataset, size=size)
    sides = np.quantile(np.sqrt(sizes.prod(axis=1)) / size, QUANTILES).tolist() if len(sizes) else []
    return LabelStatistics(
        source=dataset.source,
        images=len(dataset),
        background_images=background,
        unreadable=unreadable,
        boxes=int(boxes.sum()),
        crowd_boxes=crowd,
        classes=tuple(
            ClassCount(name=name, images=int(in_images), boxes=int(count))
            for name, in_images, count in zip(dataset.class_names, images, boxes, strict=True)
        ),
        size=size,
        small_boxes=int(np.sum(sizes.max(axis=1) < SMALL_PX)),
        sides=tuple(sides),
        problems=dataset.problems,
    )


def label_sizes(dataset: Dataset, *, size: int) -> tuple[DoubleArray, int]:
    """Widths and heights of all boxes but crowd ones, float64 [N, 2], in pixels of images of longer side `size`.

    Boxes in an image whose header cannot be read are left out; the second value is the number of such images.
    """
    found, unreadable = [np.zeros((0, 2))], 0
    for index in range(len(dataset)):
        labels = dataset.record(index).labels
        try:
            height, width = dataset.image_hw(index)
        except ImageError:
            unreadable += 1
            continue
        boxes = labels.boxes[~labels.crowd]
        found.append((boxes[:, 2:] - boxes[:, :2]) * (np.array([width, height]) * (size / max(height, width))))
    return np.concatenate(found), unreadable
