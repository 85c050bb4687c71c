"""COCO annotation files: where their images are, which category is which class, and the boxes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from yolov7_deploy.datasets._text import MAX_SHOWN, is_file, printable, reason, short, shown, some
from yolov7_deploy.datasets.samples import Dataset, DoubleArray, Labels, Record
from yolov7_deploy.errors import DatasetError

# The 80 ids COCO uses of 1..90, in class order (the official 80-to-91 map).
COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})
SECTIONS = {"images": ("id", "file_name", "width", "height"), "categories": ("id", "name"), "annotations": ()}
MAX_SIDE = 2**20
MAX_NUMBER = 1e9  # pixels of a box or area: sums and products of such stay far inside float64
# What a value of another kind than its section has makes of int(), float(), numpy and dict.
_WRONG = (ArithmeticError, KeyError, TypeError, ValueError, RecursionError)


def open_coco(path: Path, *, images: Path | None, split: str, limit: int | None) -> Dataset:
    """The samples of an instances file whose images are in `images`, or in one of the usual places beside it.

    Raises:
        DatasetError: The file is malformed, or its images are not found.
    """
    document = read_coco(path)
    names = [image["file_name"] for image in document["images"]]
    if not names:
        raise DatasetError(f"{path} lists no images.", fix="Check that it is an instances file with annotations.")
    folder = images or _guess_folder(path, names, split)
    if not any(is_file(folder / name) for name in names):
        raise DatasetError(
            f"None of the {len(names)} images of {path} is in {folder} (the first is {short(names[0])}).",
            fix="Name their folder:  --images DIR",
        )
    pairs = sorted(zip((folder / name for name in names), document["images"], strict=True), key=lambda pair: pair[0])
    class_names, category_ids = match_classes(document, None, source=path)
    return Dataset(
        coco_records(pairs[:limit], document, category_ids, source=path),
        source=path.name,
        class_names=class_names,
        category_ids=category_ids,
    )


def _guess_folder(path: Path, names: Sequence[str], split: str) -> Path:
    """The folder of the images, in the layouts of COCO itself, of this package and of labelling tools."""
    home = path.resolve().parent
    parts = dict.fromkeys((path.stem.split("_")[-1], split, f"{split}2017"))
    tried = [base / part for base in (home.parent / "images", home.parent, home) for part in parts]
    tried += [home, home / "images", home.parent / "images"]
    for folder in tried:
        if any(is_file(folder / name) for name in names[:MAX_SHOWN]):
            return folder
    looked = "\n  ".join(str(folder) for folder in dict.fromkeys(tried))
    raise DatasetError(
        f"The images of {path} (the first is {short(names[0])}) were not found; looked in:\n  {looked}",
        fix="Name their folder:  --images DIR",
    )


def read_coco(path: Path) -> dict[str, Any]:
    """An instances file as plain data, with the sections and keys that are needed here.

    Raises:
        DatasetError: It is not JSON, or not an instances file.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{path} cannot be read as JSON: {reason(error)}.", fix="Copy or download it again."
        ) from error
    for section, keys in SECTIONS.items():
        rows = document.get(section) if isinstance(document, dict) else None
        if not isinstance(rows, list):
            raise DatasetError(
                f"{path} is not a COCO instances file: it has no list of {section}.",
                fix="It needs images, annotations and categories; a file of predictions has none of them.",
            )
        for row in rows:
            missing = [key for key in keys if not isinstance(row, dict) or row.get(key) in (None, "")]
            if missing:
                raise DatasetError(
                    f"{path}: {shown(row)} of {section} has no {', '.join(missing)}.", fix="Add it to the file."
                )
    for section, check in (("images", _check_image), ("categories", _check_category)):
        for row in document[section]:
            try:
                check(row)
            except _WRONG as error:
                raise DatasetError(
                    f"{path}: {shown(row)} of {section} is malformed: {_cause(error)}.", fix="Correct it."
                ) from error
    return dict(document)


def _cause(error: Exception) -> str:
    """A missing key needs its kind of error beside it; the others speak for themselves."""
    return f"it has no {shown(error.args[0])}" if isinstance(error, KeyError) and error.args else reason(error)


def _check_image(image: Mapping[str, Any]) -> None:
    int(image["id"])
    hash(image["id"])
    if not isinstance(image["file_name"], str) or "\0" in image["file_name"]:
        raise ValueError("file_name is no text")
    if not all(1 <= int(image[side]) <= MAX_SIDE for side in ("width", "height")):
        raise ValueError(f"width and height go from 1 to {MAX_SIDE} pixels")


def _check_category(category: Mapping[str, Any]) -> None:
    int(category["id"])
    if not isinstance(category["name"], (str, int, float)):
        raise ValueError("name is no text")


def match_classes(
    document: Mapping[str, Any], names: Sequence[str] | None, *, source: Path
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Class names in class order, and the category id of each.

    Without `names` classes follow the category ids. With them a class is the category of the same name, or, for
    COCO's own ids, of the same place (other spellings of its 80 names are common).

    Raises:
        DatasetError: A name is not a category, or a category is there twice.
    """
    by_id = {int(category["id"]): printable(str(category["name"])) for category in document["categories"]}
    ids, by_name = tuple(sorted(by_id)), {name: i for i, name in by_id.items()}
    if len(by_name) != len(document["categories"]):
        raise DatasetError(f"{source} has two categories of one id or name.", fix="Make ids and names unique.")
    if names is None:
        return tuple(by_id[i] for i in ids), ids
    unknown = [name for name in names if name not in by_name]
    if not unknown:
        return tuple(names), tuple(by_name[name] for name in names)
    if ids == COCO_CATEGORY_IDS and len(names) == len(ids):
        return tuple(names), ids
    raise DatasetError(
        f"{source} has no category called {some(unknown)}; it has {some(by_name)}.",
        fix="Make `names` of the YAML and `categories` of the JSON say the same.",
    )


def coco_records(
    pairs: Sequence[tuple[Path, Mapping[str, Any]]],
    document: Mapping[str, Any],
    category_ids: Sequence[int],
    *,
    source: Path,
) -> list[Record]:
    """One record per (image, image entry) pair, with the boxes of the document.

    Raises:
        DatasetError: An annotation is malformed or of a category that is no class.
    """
    class_of = {category: index for index, category in enumerate(category_ids)}
    of_image: dict[object, list[Mapping[str, Any]]] = defaultdict(list)
    for annotation in document["annotations"]:
        try:
            _check_annotation(annotation, class_of)
        except _WRONG as error:
            raise DatasetError(
                f"{source}: annotation {shown(annotation)} is malformed: {_cause(error)}.",
                fix="Correct it, or leave it out.",
            ) from error
        of_image[annotation["image_id"]].append(annotation)
    return [_coco_record(path, image, of_image[image["id"]], class_of) for path, image in pairs]


def _check_annotation(annotation: Mapping[str, Any], class_of: Mapping[int, int]) -> None:
    if annotation["category_id"] not in class_of:
        raise ValueError(f"category_id {shown(annotation['category_id'])} is not one of the classes")
    numbers = [*annotation["bbox"], annotation.get("area", 0)]
    if not all(isinstance(number, (int, float)) and abs(number) <= MAX_NUMBER for number in numbers):
        raise ValueError("bbox and area are numbers of pixels")
    _, _, width, height, _ = numbers
    if width < 0 or height < 0:
        raise ValueError("bbox is not x, y, width, height")
    if not isinstance(annotation.get("iscrowd") or 0, (int, float)):
        raise ValueError("iscrowd is 0 or 1")
    hash(annotation["image_id"])
    _outline(annotation.get("segmentation"))


def _coco_record(
    path: Path, image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], class_of: Mapping[int, int]
) -> Record:
    image_hw = (int(image["height"]), int(image["width"]))
    size = np.array([image_hw[1], image_hw[0]], dtype=np.float64)
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    areas = [float(a.get("area", w * h)) for a, (w, h) in zip(annotations, boxes[:, 2:], strict=True)]
    boxes[:, 2:] += boxes[:, :2]
    return Record(
        path=path,
        image_id=int(image["id"]),
        image_hw=image_hw,
        areas=np.array(areas, dtype=np.float64),
        labels=Labels(
            boxes=boxes / np.tile(size, 2),
            class_ids=np.array([class_of[a["category_id"]] for a in annotations], dtype=np.int64),
            crowd=np.array([bool(a.get("iscrowd")) for a in annotations], dtype=np.bool_),
            polygons=tuple(_outline(a.get("segmentation")) / size for a in annotations),
        ),
    )


def _outline(segmentation: object) -> DoubleArray:
    """The polygon of an annotation that has exactly one, else [0, 2]."""
    parts = segmentation if isinstance(segmentation, list) else []
    points = parts[0] if len(parts) == 1 and isinstance(parts[0], list) and len(parts[0]) % 2 == 0 else []
    if not all(isinstance(number, (int, float)) and abs(number) <= MAX_NUMBER for number in points):
        raise ValueError("segmentation is no list of x, y, x, y, ...")
    return np.array(points, dtype=np.float64).reshape(-1, 2)
