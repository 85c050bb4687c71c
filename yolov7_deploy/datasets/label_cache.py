"""What was read from label files and image headers, kept on disk and never trusted: each entry is checked.

Reading the labels of a large dataset again takes a minute; asking whether its files have changed takes a second.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolov7_deploy._atomic_file import whole_file
from yolov7_deploy.datasets.image_size import read_image_hw
from yolov7_deploy.datasets.samples import BoolArray, IntArray, Labels
from yolov7_deploy.datasets.yolo_labels import LabelFile, checked_labels, label_path, read_label_file
from yolov7_deploy.errors import ImageError
from yolov7_deploy.hub import cache_dir

VERSION = 1  # of the arrays, and of how lines are understood
# A file that changed this shortly before it was read may change once more within the same tick of its clock (two
# seconds on FAT, the coarsest there is), and would then look as before. Such entries are not kept.
SETTLED_NS = 2_000_000_000
STAMPS = 6  # size, time of the contents and of the inode; of the label file, then of the image
ABSENT = -1
SCALARS: Mapping[str, type[np.generic]] = {
    "stamps": np.int64,
    "hw": np.int64,
    "box_counts": np.int64,
    "boxes": np.float64,
    "class_ids": np.int64,
    "point_counts": np.int64,
    "points": np.float64,
    "repairs": np.uint8,
}

# What a file that is cut off, of another kind or of another program makes of numpy, zipfile and json.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, MemoryError, RuntimeError)
_DAMAGED_ZIP = (zipfile.BadZipFile, zlib.error, struct.error)

logger = logging.getLogger(__name__)

Arrays = dict[str, npt.NDArray[Any]]
Hw = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Entry:
    """An image: its label file, and its height and width (`None` where its header cannot be read)."""

    file: LabelFile
    image_hw: Hw | None


def read_labels_cached(
    images: Sequence[Path], *, classes: int, folder: Path | None = None
) -> tuple[list[Labels], list[Hw | None], list[str]]:
    """As `read_label_files`, and the size of each image; what has not changed since the last time is not read again.

    An entry is taken only while size and times of both files are as they were. A damaged cache is read anew, and one
    that cannot be written is a logged warning.

    Args:
        images: The image files.
        classes: Number of classes.
        folder: Where caches are kept; `$XDG_CACHE_HOME/yolov7_deploy/labels` by default.

    Raises:
        DatasetError: See `read_label_files`.
    """
    start, now_ns = time.perf_counter(), time.time_ns()
    paths = _label_paths(images)
    place = (cache_dir() / "labels" if folder is None else folder) / f"{_digest(images, paths, classes)}.npz"
    stamps = np.array(
        [(*_stamp(path), *_stamp(image)) for path, image in zip(paths, images, strict=True)], dtype=np.int64
    ).reshape(-1, STAMPS)
    kept = _load(place, count=len(paths), classes=classes)
    fresh = np.all(kept["stamps"] == stamps, axis=1) if kept else np.zeros(len(paths), dtype=np.bool_)
    entries: list[Entry | None] = _unpacked(kept, fresh) if kept else [None] * len(paths)
    whole = [
        entry or Entry(file=read_label_file(path, classes=classes), image_hw=_image_hw(image))
        for entry, path, image in zip(entries, paths, images, strict=True)
    ]
    if not fresh.all():
        _write(place, _packed(whole, _trusted(stamps, whole, now_ns)))
    labels, repairs = checked_labels([entry.file for entry in whole], paths)
    logger.info(
        "%d label files, %d of them from %s, in %.1f s", len(paths), fresh.sum(), place, time.perf_counter() - start
    )
    return labels, [entry.image_hw for entry in whole], repairs


def _label_paths(images: Sequence[Path]) -> list[Path]:
    """`label_path` of each; looks only once where the labels of a folder of images are."""
    folders: dict[Path, Path] = {}
    for image in images:
        if image.parent not in folders:
            folders[image.parent] = label_path(image).parent
    return [folders[image.parent] / f"{image.stem}.txt" for image in images]


def _digest(images: Sequence[Path], paths: Sequence[Path], classes: int) -> str:
    digest = hashlib.sha256(f"{VERSION} {classes} {Path.cwd()}".encode("utf-8", "surrogateescape"))
    for files in (images, paths):
        digest.update("\0".join(map(str, files)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes whenever a file does; the time of the inode also when a program sets back that of the contents."""
    try:
        found = os.stat(path)  # noqa: PTH116 - Path.stat takes twice as long, and there are hundreds of thousands
    except (OSError, ValueError):
        return ABSENT, ABSENT, ABSENT
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _image_hw(image: Path) -> Hw | None:
    try:
        return read_image_hw(image)
    except ImageError:
        return None


def _trusted(stamps: IntArray, entries: Sequence[Entry], now_ns: int) -> IntArray:
    """The stamps, or such as no file has where an entry must be read again: changed just now, no image, or errors."""
    times = stamps[:, [1, 2, 4, 5]].max(axis=1)
    whole = np.array([entry.image_hw is not None and not entry.file.errors for entry in entries], dtype=np.bool_)
    return np.where((whole & (times < now_ns - SETTLED_NS))[:, None], stamps, ABSENT - 1)


def _packed(entries: Sequence[Entry], stamps: IntArray) -> Arrays:
    """All entries as a few long arrays."""
    labels = [entry.file.labels for entry in entries]
    polygons = [polygon for one in labels for polygon in one.polygons]
    repairs = {str(i): entry.file.repairs for i, entry in enumerate(entries) if entry.file.repairs}
    return {
        "stamps": stamps,
        "hw": np.array([entry.image_hw or (0, 0) for entry in entries], dtype=np.int64).reshape(-1, 2),
        "box_counts": np.array([len(one.boxes) for one in labels], dtype=np.int64),
        "boxes": np.concatenate([np.zeros((0, 4)), *(one.boxes for one in labels)]),
        "class_ids": np.concatenate([np.zeros(0, np.int64), *(one.class_ids for one in labels)]),
        "point_counts": np.array([len(polygon) for polygon in polygons], dtype=np.int64),
        "points": np.concatenate([np.zeros((0, 2)), *polygons]),
        "repairs": np.frombuffer(json.dumps(repairs, sort_keys=True).encode(), dtype=np.uint8),
    }


def _unpacked(arrays: Arrays, fresh: BoolArray) -> list[Entry | None]:
    """The entries that are still true; their arrays are views of the long ones."""
    last = np.cumsum(arrays["box_counts"]).tolist()
    bounds = np.concatenate([[0], np.cumsum(arrays["point_counts"])]).tolist()
    repairs = json.loads(arrays["repairs"].tobytes())
    boxes, class_ids, points = (arrays[name] for name in ("boxes", "class_ids", "points"))
    crowd = np.zeros(len(boxes), dtype=np.bool_)
    entries: list[Entry | None] = []
    for i, (stop, count, hw) in enumerate(zip(last, arrays["box_counts"].tolist(), arrays["hw"].tolist(), strict=True)):
        if not fresh[i]:
            entries.append(None)
            continue
        first = stop - count
        labels = Labels(
            boxes=boxes[first:stop],
            class_ids=class_ids[first:stop],
            crowd=crowd[first:stop],
            polygons=tuple(points[a:b] for a, b in pairwise(bounds[first : stop + 1])),
        )
        file = LabelFile(
            labels=labels, repairs=tuple(repairs.get(str(i), ())), is_missing=bool(arrays["stamps"][i, 0] == ABSENT)
        )
        entries.append(Entry(file=file, image_hw=(hw[0], hw[1])))
    return entries


def _load(place: Path, *, count: int, classes: int) -> Arrays | None:
    """The arrays of a cache file that is whole; `None` for any other."""
    try:
        with place.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in SCALARS}
        return arrays if _is_whole(arrays, count, classes) else None
    except FileNotFoundError:
        return None
    except (*_DAMAGED, *_DAMAGED_ZIP) as error:
        logger.info("%s is read anew: %s", place, error)
        return None


def _is_whole(arrays: Arrays, count: int, classes: int) -> bool:
    """Whether the arrays belong together, whoever wrote them."""
    boxes, points = len(arrays["boxes"]), len(arrays["points"])
    shapes = {
        "stamps": (count, STAMPS),
        "hw": (count, 2),
        "box_counts": (count,),
        "boxes": (boxes, 4),
        "class_ids": (boxes,),
        "point_counts": (boxes,),
        "points": (points, 2),
        "repairs": (len(arrays["repairs"]),),
    }
    if any(arrays[name].dtype != SCALARS[name] or arrays[name].shape != shape for name, shape in shapes.items()):
        return False
    repairs = json.loads(arrays["repairs"].tobytes())
    return bool(
        isinstance(repairs, dict)
        and all(isinstance(lines, list) and all(isinstance(line, str) for line in lines) for lines in repairs.values())
        and all(np.all(arrays[name] >= 0) for name in ("hw", "box_counts", "point_counts"))
        and (arrays["box_counts"].sum(), arrays["point_counts"].sum()) == (boxes, points)
        and np.all((arrays["class_ids"] >= 0) & (arrays["class_ids"] < classes))
        and all(np.all((arrays[name] >= -1) & (arrays[name] <= 2)) for name in ("boxes", "points"))
    )


def _write(place: Path, arrays: Arrays) -> None:
    """Under a temporary name first; a place that cannot be written costs the time that the cache would save."""
    try:
        with whole_file(place) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        logger.warning("Labels are read again next time: %s cannot be written (%s).", place, error.strerror or error)
