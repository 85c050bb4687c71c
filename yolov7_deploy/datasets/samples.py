"""The samples of a dataset, whatever its labels were written in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from yolov7_deploy.datasets.image_size import read_image_hw
from yolov7_deploy.errors import DatasetError
from yolov7_deploy.image import FloatArray

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Labels:
    """What is in one image, in fractions of its width and height (so that its size need not be known yet).

    Attributes:
        boxes: float64 [N, 4] xyxy.
        class_ids: int64 [N].
        crowd: bool [N].
        polygons: Per box its outline, float64 [K, 2] xy; [0, 2] where there is none.
    """

    boxes: DoubleArray
    class_ids: IntArray
    crowd: BoolArray
    polygons: tuple[DoubleArray, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sample:
    """One image and what is in it.

    Attributes:
        path: The image file; it may turn out to be unreadable.
        image_id: COCO image id.
        image_hw: Height and width in pixels as decoded (EXIF orientation applied).
        boxes: float32 [N, 4] xyxy in pixels.
        class_ids: int64 [N], indices into `Dataset.class_names`.
        crowd: bool [N]; a crowd box marks a region that is neither hit nor false alarm.
        polygons: Per box its outline, float32 [K, 2] xy in pixels; [0, 2] where there is only a box or several parts.
    """

    path: Path
    image_id: int
    image_hw: tuple[int, int]
    boxes: FloatArray
    class_ids: IntArray
    crowd: BoolArray
    polygons: tuple[FloatArray, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Record:
    """A sample before its image was looked at: `labels` are fractions of a size that may not be known yet.

    `areas` are COCO's (of the mask, in pixels); `None` takes the boxes' areas.
    """

    path: Path
    image_id: int
    image_hw: tuple[int, int] | None
    labels: Labels
    areas: DoubleArray | None = None


class Dataset(Sequence[Sample]):
    """Images with boxes, ordered by path.

    Attributes:
        source: The file it was opened from.
        class_names: One name per class, in class-id order.
        category_ids: The COCO category id of each class, for ground truth and prediction files.
        problems: What was repaired while reading (duplicates dropped, labels not found), one line each.
    """

    def __init__(
        self,
        records: Sequence[Record],
        *,
        source: str,
        class_names: tuple[str, ...],
        category_ids: tuple[int, ...],
        problems: tuple[str, ...] = (),
    ) -> None:
        self._records = list(records)
        self.source = source
        self.class_names = class_names
        self.category_ids = category_ids
        self.problems = problems

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        """The sample at `index`; reads the image's header where its size is not known yet.

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

    def record(self, index: int) -> Record:
        """All that is known of a sample, without touching its image; nobody may write into it."""
        return self._records[index]

    def path(self, index: int) -> Path:
        """The image file of a sample, without touching it."""
        return self._records[index].path

    def image_id(self, index: int) -> int:
        """The COCO image id of a sample."""
        return self._records[index].image_id

    def image_hw(self, index: int) -> tuple[int, int]:
        """Height and width of an image: from the annotation file, else from the image's header (read once).

        Raises:
            ImageError: The image cannot be read.
        """
        record = self._records[index]
        if record.image_hw is None:
            record = self._records[index] = replace(record, image_hw=read_image_hw(record.path))
        assert record.image_hw is not None
        return record.image_hw

    def box_counts(self) -> IntArray:
        """Boxes per class that a detector is asked to find (crowd boxes not counted), int64 [C]."""
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for record in self._records:
            counts += np.bincount(record.labels.class_ids[~record.labels.crowd], minlength=len(counts))
        return counts

    def require_boxes(self) -> None:
        """Does nothing where there is a box to find.

        Raises:
            DatasetError: There is none, with what was repaired while reading.
        """
        if not self.box_counts().any():
            raise DatasetError(
                "\n".join([f"{self.source} has not one box in {len(self)} images.", *self.problems[:3]]),
                fix="Check --data, and that labels lie where its images' paths say.",
            )

    def ground_truth(self, indices: Sequence[int]) -> dict[str, Any]:
        """The chosen samples as a COCO document: `images`, `annotations` (ids from 1), `categories`.

        Raises:
            ImageError: The size of an image is needed and it cannot be read.
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
                # COCO's matcher takes annotation id 0 for "not matched", so ids start at 1 whatever the file said.
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
