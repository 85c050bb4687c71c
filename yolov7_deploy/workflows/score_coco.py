"""COCO results of `y7 score`: the detections of all images as one JSON list, for programs that compute COCO AP."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from yolov7_deploy._atomic_file import atomic_write
from yolov7_deploy.datasets.coco import read_coco
from yolov7_deploy.datasets.samples import CocoId
from yolov7_deploy.errors import UsageError


@dataclass(kw_only=True, slots=True)
class CocoIds:
    """The ids of images and categories in a COCO annotation file.

    Attributes:
        images: Paths and ids of the images of each file name.
        categories: Ids by class name in lower case.
        unknown_images: Names of images that the file does not list, or lists more than once.
        unknown_classes: Class names that it does not have.
    """

    images: Mapping[str, list[tuple[str, CocoId]]]
    categories: Mapping[str, CocoId]
    unknown_images: list[str] = field(default_factory=list)
    unknown_classes: set[str] = field(default_factory=set)

    def image(self, name: str) -> CocoId | None:
        """Return the id of an image by its file name; folders decide between files with the same name."""
        path = PureWindowsPath(name)
        found = self.images.get(path.name, [])
        if len(found) > 1:
            found = [one for one in found if f"/{path.as_posix()}".endswith(f"/{one[0]}")]
        if len(found) == 1:
            return found[0][1]
        self.unknown_images.append(name)
        return None

    def category(self, name: str) -> CocoId | None:
        """Return the id of a class."""
        found = self.categories.get(_key(name))
        if found is None:
            self.unknown_classes.add(name)
        return found


def read_ids(annotations: Path) -> CocoIds:
    """Return the ids in an annotation file.

    Raises:
        DatasetError: It is not a COCO annotation file.
    """
    document = read_coco(annotations)
    images = defaultdict[str, list[tuple[str, CocoId]]](list)
    for image in document["images"]:
        path = PureWindowsPath(image["file_name"])
        images[path.name].append((path.as_posix(), image["id"]))
    return CocoIds(images=images, categories={_key(one["name"]): one["id"] for one in document["categories"]})


def write_coco(records: Iterable[dict[str, Any]], path: Path, *, ids: CocoIds) -> int:
    """Write the detections of all images as COCO results, and return their number.

    Images and classes without an id are left out, and collected in `ids`.

    Args:
        records: Images in the form of `Detections.to_dict`.
        path: The file.
        ids: The ids in the annotation file.

    Raises:
        UsageError: The file cannot be written.
    """
    count = 0
    try:
        with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            for record in records:
                for row in _rows(record, ids):
                    file.write(f"{',' if count else ''}\n{json.dumps(row)}")
                    count += 1
            file.write("\n]\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", fix="Free some space.") from error
    return count


def _rows(record: Mapping[str, Any], ids: CocoIds) -> list[dict[str, Any]]:
    """Return the detections of an image, rounded as by `Detections.to_coco`."""
    image_id = None if record.get("error") else ids.image(record["path"])
    if image_id is None:
        return []
    rows = []
    for one in record["detections"]:
        category = ids.category(one["class_name"])
        box = np.asarray(one["box"], dtype=np.float32)
        box[2:] -= box[:2]
        if category is not None:
            score = float(np.float32(one["score"]).astype(np.float64).round(5))
            bbox = box.astype(np.float64).round(3).tolist()
            rows.append({"image_id": image_id, "category_id": category, "bbox": bbox, "score": score})
    return rows


def _key(name: str) -> str:
    return name.strip().casefold()
