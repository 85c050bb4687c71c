"""Images with boxes, independent of the format that their labels are stored in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from yolov7_deploy._serialization import short_repr
from yolov7_deploy._text import printable_line
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.image import FloatArray, read_image_hw
from yolov7_deploy.options import split_classes

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
DoubleArray = npt.NDArray[np.float64]
CocoId = int | str  # of an image or category; whole numbers are ints

MAX_LISTED = 10  # names or lines that a message lists
MAX_TEXT = 200  # characters of a file's text that a message quotes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Labels:
    """The objects of one image, in fractions of its width and height, so that its size can be read later.

    Attributes:
        boxes: float64 [N, 4] xyxy.
        class_ids: int64 [N].
        crowd: bool [N], see `Sample`.
        polygons: The outline of each box, float64 [K, 2] xy; [0, 2] if there is none.
    """

    boxes: DoubleArray
    class_ids: IntArray
    crowd: BoolArray
    polygons: tuple[DoubleArray, ...]

    def select(self, keep: BoolArray) -> Labels:
        """Return the objects where `keep`, bool [N], is true."""
        if keep.all():
            return self
        return Labels(
            boxes=self.boxes[keep],
            class_ids=self.class_ids[keep],
            crowd=self.crowd[keep],
            polygons=tuple(polygon for polygon, is_kept in zip(self.polygons, keep.tolist(), strict=True) if is_kept),
        )

    def without_crowd(self) -> Labels:
        """Return the objects that a detector has to find."""
        return self.select(~self.crowd)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One image and its objects.

    Attributes:
        path: The image file; reading it can still fail.
        image_id: COCO image id.
        image_hw: Height and width in pixels as decoded (EXIF orientation applied).
        boxes: float32 [N, 4] xyxy in pixels.
        class_ids: int64 [N], indices into `Dataset.class_names`.
        crowd: bool [N]; detections in a crowd region count neither as true nor as false positives.
        polygons: The outline of each box, float32 [K, 2] xy in pixels; [0, 2] if it has none, or several parts.
    """

    path: Path
    image_id: CocoId
    image_hw: tuple[int, int]
    boxes: FloatArray
    class_ids: IntArray
    crowd: BoolArray
    polygons: tuple[FloatArray, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Record:
    """A sample as its label file describes it; the image has not been opened.

    Attributes:
        path: The image file.
        image_id: COCO image id.
        image_hw: Height and width in pixels; `None` until the image header has been read.
        labels: In fractions of height and width.
        areas: float64 [N], COCO mask areas in pixels; `None` uses the areas of the boxes.
    """

    path: Path
    image_id: CocoId
    image_hw: tuple[int, int] | None
    labels: Labels
    areas: DoubleArray | None = None


class Dataset(Sequence[Sample]):
    """Images with boxes, ordered by path.

    Attributes:
        source: Name of the file it was opened from.
        class_names: One name per class, in class-id order.
        category_ids: The COCO category id of each class, for ground truth and prediction files.
        problems: What is missing, left out or repaired (labels not found, hidden files, duplicates), one line each.
        left_out: Those of the problems that are about images: hidden files, names that do not exist or are repeated.
        coverage: How many images have no label file, or no annotation.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        source: str,
        class_names: tuple[str, ...],
        category_ids: tuple[CocoId, ...],
        problems: tuple[str, ...] = (),
        left_out: tuple[str, ...] = (),
        coverage: str = "",
    ) -> None:
        self._records = list(records)
        self.source = source
        self.class_names = class_names
        self.category_ids = category_ids
        self.problems = tuple(map(printable_line, problems))
        self.left_out = tuple(map(printable_line, left_out))
        self.coverage = coverage

    def __repr__(self) -> str:
        boxes = int(self.box_counts().sum())
        return f"Dataset({self.source!r}: {len(self)} images, {boxes} boxes, {len(self.class_names)} classes)"

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        """Return the sample at `index`; reads the image header if the size is not known yet.

        Raises:
            ImageError: The image cannot be read.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        height, width = self.image_hw(index)
        record, size = self._records[index], np.array([width, height], dtype=np.float64)
        return Sample(
            path=record.path,
            image_id=record.image_id,
            image_hw=(height, width),
            boxes=(record.labels.boxes * np.tile(size, 2)).astype(np.float32),
            class_ids=record.labels.class_ids.copy(),
            crowd=record.labels.crowd.copy(),
            polygons=tuple((polygon * size).astype(np.float32) for polygon in record.labels.polygons),
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user of the dataset: `coverage`, then `problems`."""
        is_known = any(problem.startswith(self.coverage) for problem in self.problems)
        return self.problems if is_known or not self.coverage else (self.coverage, *self.problems)

    def record(self, index: int) -> Record:
        """Return a sample without opening its image. Do not modify its arrays."""
        return self._records[index]

    def path(self, index: int) -> Path:
        """Return the image file of a sample without opening it."""
        return self._records[index].path

    def image_id(self, index: int) -> CocoId:
        """Return the COCO image id of a sample."""
        return self._records[index].image_id

    def image_hw(self, index: int) -> tuple[int, int]:
        """Return height and width of an image: from the annotation file, or from the image header (read once).

        Raises:
            ImageError: The image cannot be read.
        """
        record = self._records[index]
        if record.image_hw is None:
            record = self._records[index] = replace(record, image_hw=read_image_hw(record.path))
        assert record.image_hw is not None
        return record.image_hw

    def box_counts(self) -> IntArray:
        """Return the number of boxes of each class without crowd boxes, int64 [C]."""
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for record in self._records:
            counts += np.bincount(record.labels.without_crowd().class_ids, minlength=len(counts))
        return counts

    def require_boxes(self) -> None:
        """Check that the dataset has a box that is not a crowd box.

        Raises:
            DatasetError: It has none; the message includes the first `problems`.
        """
        if not self.box_counts().any():
            raise DatasetError(
                "\n".join([f"{self.source} has no box in {len(self)} images.", *self.problems[:3]]),
                fix="Check --data, and that the label files are in the folders that belong to its image paths.",
            )

    def ground_truth(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return samples as a COCO document: `images`, `annotations` (ids from 1), `categories`.

        Raises:
            ImageError: The size of an image is not known, and its header cannot be read.
        """
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in indices:
            (height, width), record = self.image_hw(index), self._records[index]
            images.append({"id": record.image_id, "file_name": record.path.name, "height": height, "width": width})
            boxes = record.labels.boxes * np.array([width, height, width, height], dtype=np.float64)
            boxes[:, 2:] -= boxes[:, :2]
            areas = boxes[:, 2] * boxes[:, 3] if record.areas is None else record.areas
            for box, area, class_id, crowd in zip(
                boxes.tolist(), areas.tolist(), record.labels.class_ids, record.labels.crowd, strict=True
            ):
                # The COCO matcher uses annotation id 0 for "not matched", so ids start at 1 even if the file's do not.
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": record.image_id,
                        "category_id": self.category_ids[class_id],
                        "bbox": box,
                        "area": area,
                        "iscrowd": int(crowd),
                    }
                )
        categories = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.class_names, strict=True)]
        return {"images": images, "annotations": annotations, "categories": categories}


def id_order(coco_id: CocoId) -> tuple[bool, CocoId]:
    """Return the key by which ids are sorted: numbers come before texts."""
    return isinstance(coco_id, str), coco_id


def join_names(names: Iterable[str]) -> str:
    """Return the first names of a list, quoted, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(map(short_repr, names[:MAX_LISTED])) + more


def short_text(text: object) -> str:
    """Return a printable text for a message, truncated if it is long: parser errors can quote a whole file."""
    full = str(text)
    return printable(full if len(full) <= MAX_TEXT else f"{full[:MAX_TEXT]}...")


def printable(text: str) -> str:
    """Return a text without lone surrogates, which cannot be printed or written."""
    return text.encode("utf-8", "replace").decode()


def short_reason(error: Exception) -> str:
    """Return the reason of an error as `short_text`; that of an `OSError` without its number and file name."""
    return short_text(getattr(error, "strerror", None) or error)


def is_file(path: Path) -> bool:
    """Return whether a file exists; unlike `Path.is_file`, names that are too long do not raise."""
    return os.path.isfile(path)  # noqa: PTH113


SINGLE_CLASS_NAME = "object"
REMOVED = -1


def select_classes(dataset: Dataset, names_or_ids: Sequence[str | int]) -> Dataset:
    """Return the same images with the boxes of some classes only, renumbered from 0 in the given order.

    Images without a box of these classes remain, as background.

    Args:
        dataset: The dataset, which is not changed.
        names_or_ids: Class names, or class ids (also as text, unless a class has that name); a text may have several,
            as in `person,dog` or `0 16`.

    Raises:
        DatasetError: No class is given, one is given twice, or one is not in the dataset.
    """
    parts = [split_classes(p, dataset.class_names) if isinstance(p, str) else [p] for p in names_or_ids]
    ids = [_class_id(dataset, name_or_id) for part in parts for name_or_id in part]
    if not ids or len(set(ids)) < len(ids):
        repeated = join_names(dataset.class_names[i] for i in dict.fromkeys(ids) if ids.count(i) > 1)
        raise DatasetError(
            f"Class {repeated} is selected more than once." if ids else "No class is selected.",
            fix=f"Name each class once, of {join_names(dataset.class_names)}",
        )
    new_ids = np.full(len(dataset.class_names), REMOVED, dtype=np.int64)
    new_ids[ids] = np.arange(len(ids))
    return _renumber(
        dataset,
        new_ids,
        class_names=tuple(dataset.class_names[i] for i in ids),
        category_ids=tuple(dataset.category_ids[i] for i in ids),
    )


def as_single_class(dataset: Dataset) -> Dataset:
    """Return the same images and boxes with a single class, `object`; a dataset with one class keeps its name."""
    return _renumber(
        dataset,
        np.zeros(len(dataset.class_names), dtype=np.int64),
        class_names=dataset.class_names if len(dataset.class_names) == 1 else (SINGLE_CLASS_NAME,),
        category_ids=dataset.category_ids[:1],
    )


def _class_id(dataset: Dataset, name_or_id: str | int) -> int:
    if isinstance(name_or_id, int) and 0 <= name_or_id < len(dataset.class_names):
        return name_or_id
    folded = [name.casefold() for name in dataset.class_names]
    if str(name_or_id).casefold() in folded:
        return folded.index(str(name_or_id).casefold())
    raise DatasetError(
        f"{dataset.source} does not have class {name_or_id!r:.100}; it has {join_names(dataset.class_names)}.",
        fix=f"Use a name, or a number from 0 to {len(dataset.class_names) - 1}.",
    )


def _renumber(
    dataset: Dataset, new_ids: IntArray, *, class_names: tuple[str, ...], category_ids: tuple[CocoId, ...]
) -> Dataset:
    """Return the dataset with class ids mapped by `new_ids`, int64 [C]; boxes that become `REMOVED` are dropped."""
    return Dataset(
        [_renumber_record(dataset.record(i), new_ids) for i in range(len(dataset))],
        source=dataset.source,
        class_names=class_names,
        category_ids=category_ids,
        problems=dataset.problems,
        left_out=dataset.left_out,
        coverage=dataset.coverage,
    )


def _renumber_record(record: Record, new_ids: IntArray) -> Record:
    class_ids = new_ids[record.labels.class_ids]
    keep = class_ids != REMOVED
    return replace(
        record,
        areas=None if record.areas is None else record.areas[keep],
        labels=replace(record.labels.select(keep), class_ids=class_ids[keep]),
    )
