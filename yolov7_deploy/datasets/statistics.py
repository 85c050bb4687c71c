"""Statistics of the labels of a dataset: boxes per class, and box sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from yolov7_deploy._console import plural
from yolov7_deploy.datasets.samples import Dataset, DoubleArray, join_names
from yolov7_deploy.errors import ImageError

SMALL_PX = 8  # the stride of the finest level: a smaller box covers less than one cell of its feature map
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
LISTED_CLASSES = 3  # most frequent and rarest classes in the summary


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassCount:
    """Frequency of a class.

    Attributes:
        name: Name of the class.
        images: Number of images with at least one box of the class.
        boxes: Number of boxes of the class.
    """

    name: str
    images: int
    boxes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelStatistics:
    """Counts and sizes of the labels of a dataset; only `crowd_boxes` includes crowd boxes.

    Attributes:
        images: Number of images.
        background_images: Number of images without a box.
        unreadable_images: Number of images whose size is not known because their header cannot be read.
        boxes: Number of boxes, including those in unreadable images.
        crowd_boxes: Number of crowd boxes.
        classes: One entry per class, in class order.
        image_size: Longer side of the images at which `small_boxes` are counted.
        small_boxes: Number of boxes with a longer side below `SMALL_PX` at `image_size`.
        relative_sizes: For each of `QUANTILES`, the square root of the box area as a fraction of the longer side of
            the image; empty if there is no box.
    """

    images: int
    background_images: int
    unreadable_images: int
    boxes: int
    crowd_boxes: int
    classes: tuple[ClassCount, ...]
    image_size: int
    small_boxes: int
    relative_sizes: tuple[float, ...]

    @property
    def empty_classes(self) -> tuple[str, ...]:
        """Names of the classes without a box."""
        return tuple(count.name for count in self.classes if not count.boxes)

    def summary(self) -> str:
        """Return the statistics as a few lines of text."""
        crowd = f", {plural(self.crowd_boxes, 'crowd box')}" if self.crowd_boxes else ""
        lines = [
            f"{plural(self.images, 'image')} ({self.background_images} without a box), {plural(self.boxes, 'box')} of "
            f"{plural(len(self.classes), 'class')}{crowd}"
        ]
        if self.relative_sizes:
            lines.append(self._size_line())
        by_frequency = sorted((count for count in self.classes if count.boxes), key=lambda count: -count.boxes)
        if len(by_frequency) > 1:
            texts = [f"{count.name} {count.boxes}" for count in by_frequency]
            frequent, rare = texts[:LISTED_CLASSES], texts[max(LISTED_CLASSES, len(texts) - LISTED_CLASSES) :]
            lines.append(f"most frequent: {', '.join(frequent)}" + (f"; rarest: {', '.join(rare)}" if rare else ""))
        if self.empty_classes:
            lines.append(f"classes without a box: {join_names(self.empty_classes)}")
        if self.unreadable_images:
            lines.append(f"{plural(self.unreadable_images, 'image')} cannot be read")
        return "\n".join(lines)

    def _size_line(self) -> str:
        sizes = self.relative_sizes
        return (
            f"box size (square root of the area / longer image side): median {sizes[QUANTILES.index(0.5)]:.3f}, "
            f"range {sizes[0]:.3f} to {sizes[-1]:.3f}; {plural(self.small_boxes, 'box')} "
            f"({self.small_boxes / self.boxes:.1%}) smaller than {SMALL_PX} pixels at image size {self.image_size}"
        )


def describe_labels(dataset: Dataset, *, image_size: int = 640) -> LabelStatistics:
    """Count the labels of a dataset; reads the headers of images whose size is not known yet.

    Args:
        dataset: Images and labels.
        image_size: Longer side, in pixels, to which images are scaled before box sizes are measured.
    """
    classes = len(dataset.class_names)
    boxes, images = np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64)
    background = crowd = 0
    for index in range(len(dataset)):
        labels = dataset.record(index).labels
        counts = np.bincount(labels.without_crowd().class_ids, minlength=classes)
        boxes, images = boxes + counts, images + (counts > 0)
        background += not counts.any()
        crowd += int(labels.crowd.sum())
    sizes, unreadable = box_sizes(dataset, image_size=image_size)
    relative = np.quantile(np.sqrt(sizes.prod(axis=1)) / image_size, QUANTILES).tolist() if len(sizes) else []
    return LabelStatistics(
        images=len(dataset),
        background_images=background,
        unreadable_images=unreadable,
        boxes=int(boxes.sum()),
        crowd_boxes=crowd,
        classes=tuple(
            ClassCount(name=name, images=int(in_images), boxes=int(count))
            for name, in_images, count in zip(dataset.class_names, images, boxes, strict=True)
        ),
        image_size=image_size,
        small_boxes=int(np.sum(sizes.max(axis=1) < SMALL_PX)),
        relative_sizes=tuple(relative),
    )


def box_sizes(dataset: Dataset, *, image_size: int) -> tuple[DoubleArray, int]:
    """Return width and height of all boxes except crowd boxes, in pixels of images with longer side `image_size`.

    Returns:
        float64 [N, 2], and the number of images whose header cannot be read; their boxes are not included.
    """
    sizes, unreadable = [np.zeros((0, 2))], 0
    for index in range(len(dataset)):
        boxes = dataset.record(index).labels.without_crowd().boxes
        try:
            height, width = dataset.image_hw(index)
        except ImageError:
            unreadable += 1
            continue
        sizes.append((boxes[:, 2:] - boxes[:, :2]) * (np.array([width, height]) * (image_size / max(height, width))))
    return np.concatenate(sizes), unreadable
