"""COCO annotation files: image folder, classes and boxes; and the class names of COCO."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PureWindowsPath
from typing import Any

import numpy as np

from yolov7_deploy._bounded_read import read_bytes
from yolov7_deploy._serialization import short_repr
from yolov7_deploy.datasets.samples import (
    MAX_LISTED,
    CocoId,
    Dataset,
    DoubleArray,
    Labels,
    Record,
    id_order,
    is_file,
    join_names,
    printable,
    short_reason,
    short_text,
)
from yolov7_deploy.errors import DatasetError, ImageError
from yolov7_deploy.image import read_image_hw

# The 80 class names in the order of the official YOLOv7 weights.
# fmt: off
COCO_NAMES: tuple[str, ...] = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple",
    "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)
# fmt: on
# The category id of each class, 80 numbers from 1..90 (the official 80-to-91 map).
COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
SECTIONS = {"images": ("id", "file_name"), "categories": ("id", "name"), "annotations": ()}
MAX_BYTES = 2**31  # the annotations of LVIS have 1.1 GB
MAX_SIDE = 2**20
MAX_NUMBER = 1e9  # pixels, of a box or area: sums and products of these are far from the limits of float64
# Raised by int(), float(), numpy and dict for values of a wrong type.
_MALFORMED = (ArithmeticError, KeyError, TypeError, ValueError, RecursionError)
# Forms in which file names are looked for: as written, with / for \, and without the folders of another machine.
_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name.replace("\\", "/"),
    lambda name: PureWindowsPath(name).name,
)


def open_coco(path: Path, *, images: Path | None, split: str, limit: int | None) -> Dataset:
    """Open an instances file whose images are in `images`, or in one of the usual folders next to the file.

    Raises:
        DatasetError: The file is malformed, or its images are not found.
    """
    document = read_coco(path)
    names = [image["file_name"] for image in document["images"]]
    if not names:
        raise DatasetError(f"{path} lists no images.", fix="Check that it is an instances file with annotations.")
    files = _find_files(path, names, [images] if images else _usual_folders(path, split))
    pairs = sorted(zip(files, document["images"], strict=True), key=lambda pair: pair[0])
    roots = _root_categories(document)
    document["categories"] = [category for category in document["categories"] if category not in roots]
    class_names, category_ids = match_classes(document, None, source=path)
    annotated = annotate_images(pairs[:limit], document, category_ids, source=path)
    absent = [image for image, _ in pairs[:limit] if not is_file(image)]
    gone = [f"{len(absent)} images of {path.name} do not exist; the first is {short_text(absent[0])}"] if absent else []
    groups = [f"category {short_repr(root['name'])} has no boxes, only other categories; not a class" for root in roots]
    return Dataset(
        annotated.records,
        source=path.name,
        class_names=class_names,
        category_ids=category_ids,
        problems=(*gone, *groups, *annotated.problems),
        left_out=tuple(gone),
        coverage=annotated.coverage(),
    )


def _find_files(path: Path, names: Sequence[str], folders: Sequence[Path]) -> list[Path]:
    """Return the image files, which are in the first of the folders that has one of the first names."""
    for spelling in _SPELLINGS:
        spelled = [spelling(name) for name in names]
        if len(set(spelled)) < len(names):
            continue
        for folder in folders:
            if any(is_file(folder / name) for name in (spelled if len(folders) == 1 else spelled[:MAX_LISTED])):
                return [folder / name for name in spelled]
    listing = "\n  ".join(map(str, folders))
    raise DatasetError(
        f"None of the {len(names)} images of {path} (the first is {short_text(names[0])}) was found; looked in:"
        f"\n  {listing}",
        fix="Name the folder:  --images DIR",
    )


def _usual_folders(path: Path, split: str) -> list[Path]:
    """Return the image folders in the layouts of COCO, of this package and of labelling tools."""
    root = path.resolve().parent
    parts = dict.fromkeys((path.stem.split("_")[-1], split, f"{split}2017"))
    folders = [base / part for base in (root.parent / "images", root.parent, root) for part in parts]
    return list(dict.fromkeys([*folders, root, root / "images", root.parent / "images"]))


def _root_categories(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the categories that only group others; the exports of Roboflow begin with one."""
    categories = document["categories"]
    groups = {str(category.get("supercategory")) for category in categories}
    roots = [c for c in categories if str(c["name"]) in groups and c.get("supercategory") in (None, "", "none")]
    if not roots:
        return []
    used = {_as_text(row.get("category_id")) for row in document["annotations"] if isinstance(row, dict)}
    return [root for root in roots if _as_text(root["id"]) not in used]


def read_coco(path: Path) -> dict[str, Any]:
    """Read an instances file and check the sections and keys that are used here.

    Raises:
        DatasetError: The file is not JSON, or not an instances file; or two images have the same id or file.
    """
    try:
        document = json.loads(read_bytes(path, max_bytes=MAX_BYTES))
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise DatasetError(
            f"{path} cannot be read as JSON: {short_reason(error)}.", fix="Copy or download it again."
        ) from error
    for section, keys in SECTIONS.items():
        rows = document.get(section) if isinstance(document, dict) else None
        if not isinstance(rows, list):
            raise DatasetError(
                f"{path} is not a COCO instances file: it has no list of {section}.",
                fix="Use a file with images, annotations and categories; a predictions file does not have them.",
            )
        for row in rows:
            missing = [key for key in keys if not isinstance(row, dict) or row.get(key) in (None, "")]
            if missing:
                raise DatasetError(
                    f"{path}: {short_repr(row)} of {section} has no {', '.join(missing)}.", fix="Add the missing keys."
                )
    for section, check in (("images", _check_image), ("categories", _check_category)):
        for row in document[section]:
            try:
                check(row)
            except _MALFORMED as error:
                raise DatasetError(
                    f"{path}: {short_repr(row)} of {section} is malformed: {_cause(error)}.", fix="Correct the file."
                ) from error
    _check_unique(document["images"], path)
    return dict(document)


def _check_unique(images: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Check that every id is one file and every file one id: else images share or divide their annotations."""
    files: dict[CocoId, str] = {}
    ids: dict[str, CocoId] = {}
    for image in images:
        image_id, file = _as_id(image["id"]), PurePath(image["file_name"]).as_posix()
        if image_id in files:
            raise DatasetError(
                f"{path} has two images with the id {short_repr(image['id'])}: {short_repr(files[image_id])} and "
                f"{short_repr(file)}.",
                fix="Give every image a different id, also in `image_id` of its annotations, or delete one of the two.",
            )
        if file in ids:
            raise DatasetError(
                f"{path} has {short_repr(file)} twice, with the ids {ids[file]} and {image_id}.",
                fix="Keep one of the two, and use its id in `image_id` of the annotations of both.",
            )
        files[image_id], ids[file] = file, image_id


def _as_id(value: object) -> CocoId:
    """Return an id: 5, 5.0 and "5" are the same id, and other texts are ids, too.

    Raises:
        ValueError, OverflowError: It is neither a whole number nor text.
    """
    if type(value) is int:
        return value
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"\s*-?[0-9]{1,400}\s*", value) else value
    if not isinstance(value, float) or value != int(value):
        raise ValueError(f"the id {short_repr(value)} is neither a whole number nor text")
    return int(value)


def _as_text(value: object) -> str:
    """Return an id as text; an empty text for a value that is not an id."""
    try:
        return str(_as_id(value))
    except (ValueError, OverflowError):
        return ""


def _cause(error: Exception) -> str:
    """Return the reason for a message; a `KeyError` alone would only be the name of the key."""
    return f"it has no {short_repr(error.args[0])}" if isinstance(error, KeyError) and error.args else short_text(error)


def _check_image(image: Mapping[str, Any]) -> None:
    _as_id(image["id"])
    if not isinstance(image["file_name"], str) or "\0" in image["file_name"]:
        raise ValueError("file_name is not a string")
    if not all(1 <= side <= MAX_SIDE for side in _image_hw(image) or ()):
        raise ValueError(f"width and height must be 1 to {MAX_SIDE} pixels")


def _image_hw(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width in the file; `None` if one is missing, null or 0."""
    height, width = (int(image.get(side) or 0) for side in ("height", "width"))
    return (height, width) if height and width else None


def _check_category(category: Mapping[str, Any]) -> None:
    _as_id(category["id"])
    if not isinstance(category["name"], (str, int, float)):
        raise ValueError("name is not a string")


def match_classes(
    document: Mapping[str, Any], names: Sequence[str] | None, *, source: Path
) -> tuple[tuple[str, ...], tuple[CocoId, ...]]:
    """Return the class names in class order, and the category id of each class.

    Without `names`, classes are ordered by category id. With `names`, a class is the category with the same name. With
    the 80 ids of COCO, classes match by position if names differ (other spellings of the COCO names are common).

    Raises:
        DatasetError: A name is not a category, or two categories have the same id or name.
    """
    by_id = {_as_id(category["id"]): printable(str(category["name"])) for category in document["categories"]}
    ids, by_name = tuple(sorted(by_id, key=id_order)), {name: i for i, name in by_id.items()}
    if len(by_name) != len(document["categories"]):
        raise DatasetError(f"{source} has two categories with the same id or name.", fix="Make ids and names unique.")
    if names is None:
        return tuple(by_id[i] for i in ids), ids
    unknown = [name for name in names if name not in by_name]
    if not unknown:
        return tuple(names), tuple(by_name[name] for name in names)
    if ids == COCO_CATEGORY_IDS and len(names) == len(ids):
        return tuple(names), ids
    raise DatasetError(
        f"{source} has no category called {join_names(unknown)}; it has {join_names(by_name)}.",
        fix="Make `names` in the YAML and `categories` in the JSON match.",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AnnotatedImages:
    """The images of an annotation file with their boxes.

    Attributes:
        records: One per image.
        problems: Annotations that were dropped, or that refer to an image that is not in the file, one message each.
    """

    records: tuple[Record, ...]
    problems: tuple[str, ...]

    def coverage(self) -> str:
        """Return how many images have no annotation."""
        empty = sum(not len(record.labels.boxes) for record in self.records)
        return f"{empty} of {len(self.records)} images have no annotation"


def annotate_images(
    pairs: Sequence[tuple[Path, Mapping[str, Any]]],
    document: Mapping[str, Any],
    category_ids: Sequence[CocoId],
    *,
    source: Path,
) -> AnnotatedImages:
    """Return one record per pair (image file, entry of `images`), with the boxes of the document.

    An annotation that repeats another one with its id is dropped, and so is one without a box or category. The size of
    an image that the document does not have is read from the header of the file.

    Raises:
        DatasetError: An annotation is malformed, or its category is not a class.
    """
    class_of = {category: index for index, category in enumerate(category_ids)}
    by_image: dict[CocoId, list[Mapping[str, Any]]] = defaultdict(list)
    by_own_id: dict[int | str, Mapping[str, Any]] = {}
    repeated = incomplete = 0
    for annotation in document["annotations"]:
        if isinstance(annotation, dict) and _is_incomplete(annotation):
            incomplete += 1
            continue
        try:
            _check_annotation(annotation, class_of)
            image_id, own_id = _as_id(annotation["image_id"]), annotation.get("id")
        except _MALFORMED as error:
            raise DatasetError(
                f"{source}: annotation {short_repr(annotation)} is malformed: {_cause(error)}.",
                fix="Correct or delete it.",
            ) from error
        first = by_own_id.setdefault(own_id, annotation) if isinstance(own_id, (int, str)) else annotation
        if first is not annotation and first == annotation:
            repeated += 1
        else:
            by_image[image_id].append(annotation)
    known = {_as_id(image["id"]) for image in document["images"]}
    return AnnotatedImages(
        records=tuple(_coco_record(path, image, by_image[_as_id(image["id"])], class_of) for path, image in pairs),
        problems=tuple(_annotation_problems(by_image, known, repeated, incomplete, source)),
    )


def _annotation_problems(
    by_image: Mapping[CocoId, Sequence[object]], known: set[CocoId], repeated: int, incomplete: int, source: Path
) -> Iterator[str]:
    if incomplete:
        yield f"{incomplete} annotations of {source.name} have no bbox or no category; dropped"
    if repeated:
        yield f"{repeated} annotations of {source.name} repeat another one with the same id; dropped"
    unknown = {image_id: len(found) for image_id, found in by_image.items() if image_id not in known}
    if unknown:
        yield (
            f"{sum(unknown.values())} annotations of {source.name} refer to an image that is not in the file; the "
            f"first has image_id {short_repr(next(iter(unknown)))}"
        )


def _is_incomplete(annotation: Mapping[str, Any]) -> bool:
    return annotation.get("bbox") in (None, []) or annotation.get("category_id") in (None, "")


def _check_annotation(annotation: object, class_of: Mapping[CocoId, int]) -> None:
    if not isinstance(annotation, dict):
        raise TypeError("it is not an object")
    if _as_id(annotation["category_id"]) not in class_of:
        raise ValueError(f"category_id {short_repr(annotation['category_id'])} is not one of the classes")
    box = annotation["bbox"] if isinstance(annotation["bbox"], list) else ()
    numbers = [float(number) for number in (*box, _area(annotation) or 0)]
    if len(numbers) != 5 or not all(abs(number) <= MAX_NUMBER for number in numbers):
        raise ValueError("bbox and area must be numbers, in pixels")
    if numbers[2] < 0 or numbers[3] < 0:
        raise ValueError("bbox is not x, y, width, height")
    _is_crowd(annotation)
    _polygon(annotation.get("segmentation"))


def _area(annotation: Mapping[str, Any]) -> float | None:
    area = annotation.get("area")
    return None if area in (None, "") else float(area)


def _is_crowd(annotation: Mapping[str, Any]) -> bool:
    value = annotation.get("iscrowd")
    if value not in (None, "", 0, 1, "0", "1"):
        raise ValueError("iscrowd is not 0 or 1")
    return value in (1, "1")


def _coco_record(
    path: Path, image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], class_of: Mapping[CocoId, int]
) -> Record:
    image_hw = _image_hw(image)
    if image_hw is None:
        try:
            image_hw = read_image_hw(path)
        except ImageError:
            annotations = ()  # of an image that cannot be used: reading its size fails again then
    height, width = image_hw or (1, 1)
    size = np.array([width, height], dtype=np.float64)
    boxes = np.array([list(map(float, annotation["bbox"])) for annotation in annotations]).reshape(-1, 4)
    given = map(_area, annotations)
    areas = [w * h if area is None else area for area, (w, h) in zip(given, boxes[:, 2:], strict=True)]
    boxes[:, 2:] += boxes[:, :2]
    return Record(
        path=path,
        image_id=_as_id(image["id"]),
        image_hw=image_hw,
        areas=np.array(areas, dtype=np.float64),
        labels=Labels(
            boxes=boxes / np.tile(size, 2),
            class_ids=np.array([class_of[_as_id(a["category_id"])] for a in annotations], dtype=np.int64),
            crowd=np.array([_is_crowd(a) for a in annotations], dtype=np.bool_),
            polygons=tuple(_polygon(a.get("segmentation")) / size for a in annotations),
        ),
    )


def _polygon(segmentation: object) -> DoubleArray:
    """Return the polygon of an annotation that has exactly one, float64 [K, 2] xy, or [0, 2]."""
    parts = segmentation if isinstance(segmentation, list) else []
    points = parts[0] if len(parts) == 1 and isinstance(parts[0], list) and len(parts[0]) % 2 == 0 else []
    if not all(isinstance(number, (int, float)) and abs(number) <= MAX_NUMBER for number in points):
        raise ValueError("segmentation is not a list of x, y, x, y, ...")
    return np.array(points, dtype=np.float64).reshape(-1, 2)
